"""Supervisor: runs cmd_jax as one or several processes on this machine, and starts them again when one dies.

    python launch/local.py --processes=2 --devices=4 -- \\
        train --config=configs/quickstart.py:autoencoder --workdir=runs/two

starts `python -m cmd_jax.main train ... --distributed=explicit --coordinator=127.0.0.1:PORT --num-processes=2
--process-id=I` twice, each with 4 CPU devices. On each host of a TPU pod (launch/tpu_pod.sh, launch/gke_jobset.yaml)
`--processes=1 --distributed=auto` starts one process, which finds the others for itself.

How a process ended is told by its exit code alone. One that is killed, aborts, crashes or fails ends the others, and
all are started again (training resumes from its checkpoint), up to `--restarts` times. Not so after exit code 2, an
error that a restart does not mend. `--step-timeout` does the same to a job whose heartbeats
(WORKDIR/STAGE/processes/*.json) show no new step. SIGTERM, SIGINT or SIGHUP is passed on, so that training saves and
ends; a second one, a second later or more, kills. The output of each process is in WORKDIR/launch-I.log
(--distributed=auto: launch-HOST.log), or of a workdir in a bucket in a temporary folder, which is named where something
fails; that of process 0 is on the screen too, and the last line of a process that ended with 2.

Exit codes: 0 finished, or stopped on request; 2 an error to be mended first; 3 still failing after all restarts;
128 + signal after a second signal. Tried on one Linux machine with two CPU processes, real and made-up ones
(tests/test_launch.py); never on a pod. Needs Linux, to end the processes when it is itself killed.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cmd_jax.buckets import check_url  # noqa: E402
from cmd_jax.errors import UserError, tell  # noqa: E402
from cmd_jax.files import as_path, is_remote, read_json  # noqa: E402
from cmd_jax.running.peers import HEARTBEAT  # noqa: E402
from cmd_jax.running.runtime import is_heard, is_same_request  # noqa: E402
from cmd_jax.verbs.flags import Parser  # noqa: E402

WRONG, PEER_FAULT = 2, 3  # exit codes of cmd_jax: the user must act; a fault of another process was noticed
LOOK = 0.05  # seconds between two looks at the processes and at what process 0 says
GRACE = 5.0  # seconds between SIGTERM and SIGKILL for the processes that a dead one leaves behind
PATIENCE = 6.0  # seconds after the first PEER_FAULT in which the process at fault may end too (it lingers 5)
TEMPORARY = "cmd-jax-launch-"
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
ASK = "--print-heartbeats"  # not for users: this program started by itself
FORCED_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\S*")


FLAGS = {  # kind, least, default, meaning
    "processes": (int, 1, 1, "default 1"),
    "devices": (int, 1, None, "CPU devices of each process (JAX_PLATFORMS=cpu)"),
    "restarts": (int, 0, 3, "at most; default 3"),
    "step-timeout": (float, 0.1, None, "seconds; start again when no step ends for so long; default: never"),
    "start-timeout": (float, 0.1, 1800.0, "seconds; with --step-timeout the same before the first step; default 1800"),
    "pause": (float, 0.0, None, "seconds before a restart; default 0, or with --distributed=auto 90, in which the"
              " processes of other hosts notice too (processes.peer_timeout)"),
}  # fmt: skip


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and the command after `--`. UserError for what cannot be run."""
    what = "Run cmd_jax as one or several processes on this machine; start them again when one dies."
    usage = "%(prog)s [flags] -- VERB --config=... --workdir=..."
    parser = Parser(prog="local.py", description=what, usage=usage, allow_abbrev=False)
    for flag, (kind, _, default, what) in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="N", type=kind, default=default, help=what)
    what = "auto: one process on each host of a cluster that JAX knows"
    parser.add_argument("--distributed", choices=("explicit", "auto"), default="explicit", help=what)
    parser.add_argument("--module", default="cmd_jax.main", help="what to run; the tests run another")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    for flag, (_, least, _, _) in FLAGS.items():
        given = getattr(options, flag.replace("-", "_"))
        if given is not None and not least <= given < float("inf"):
            raise UserError(f"--{flag}", given, f"not a number from {least:g}", f"give {least:g} or more")
    if not command:
        raise UserError("command", "", "missing after --", "write it like local.py -- train --config=... --workdir=...")
    if options.distributed == "auto" and options.processes != 1:
        problem = "not used with --distributed=auto, one process a host"
        raise UserError("--processes", options.processes, problem, "leave it out")
    if options.pause is None:
        options.pause = 90.0 if options.distributed == "auto" else 0.0
    return options, command


def free_port() -> int:
    """For the coordinator, which JAX starts in process 0; on a busy one it crashes without a word."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def open_logs(command: list[str], names: list[str]) -> tuple[Path, list[Path]]:
    """The workdir of the command, and a log for each name: there, or if it is in a bucket or refused, where the command
    itself will complain, in a temporary folder."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", nargs="?")
    workdir = folder = None
    try:
        given = parser.parse_known_args(command)[0].workdir or ""
        check_url("--workdir", given)
        workdir = as_path(given) if given else None
        if workdir and not is_remote(workdir):
            workdir = workdir.absolute()
            workdir.mkdir(parents=True, exist_ok=True)
            for name in names:
                open(workdir / f"launch-{name}.log", "ab").close()
            folder = workdir
    except (OSError, UserError):
        workdir = None
    folder = folder or Path(tempfile.mkdtemp(prefix=TEMPORARY))
    return workdir or folder, [folder / f"launch-{name}.log" for name in names]


def read_heartbeats(workdir) -> list[dict]:
    """All in a workdir, those of processes on other hosts included."""
    beats = []
    for path in workdir.glob("*/processes/*.json"):
        with contextlib.suppress(UserError):  # it is being written
            beats.append(read_json(path, "heartbeat", like=HEARTBEAT))
    return beats


def ask_for_heartbeats(workdir) -> list[dict]:
    """The same of a bucket, by a process of its own: the client starts threads, with which this one should not fork.

    OSError where it gets no answer.
    """
    environment = {"CMD_JAX_RETRY_SECONDS": "10", **os.environ}
    try:
        done = subprocess.run(
            [sys.executable, __file__, ASK, str(workdir)], env=environment, capture_output=True, timeout=60, check=True
        )
        return json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as e:
        raise OSError(f"the heartbeats in {workdir} cannot be read") from e


def describe(code: int) -> str:
    """How a process ended, of its return code as subprocess has it (negative: the signal)."""
    if code >= 0:
        return f"ended with code {code}"
    what = {signal.SIGABRT: "aborted", signal.SIGKILL: "was killed", signal.SIGTERM: "was killed"}
    return f"{what.get(-code, 'crashed')} ({signal.Signals(-code).name})"


def likelihood(code: int) -> int:
    """Which of several that ended at about the same time is the cause: the lowest."""
    return {WRONG: 0, -signal.SIGABRT: 3, PEER_FAULT: 4}.get(code, 1 if code < 0 else 2)


def place(beat: dict) -> str:
    return "before its first step" if beat["step"] is None else f"at step {beat['step']}"


class Process:
    """One process of the job. Its output goes to `log`; that of the first one to the screen too, by `pass_on`."""

    def __init__(self, index: int, command: list[str], environment: dict[str, str], log: Path):
        self.index, self.log = index, open(log, "a+b", buffering=0)  # noqa: SIM115
        self.begin, supervisor = self.log.seek(0, os.SEEK_END), os.getpid()

        def die_with_parent():
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor:
                os._exit(1)

        out, err = (self.log, self.log) if index else (subprocess.PIPE, subprocess.PIPE)
        # A session of its own: Ctrl-C would otherwise reach it twice, and it takes a second signal for "at once".
        self.popen = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True, preexec_fn=die_with_parent,  # safe: this program has one thread
        )  # fmt: skip
        self.pipes = {} if index else {self.popen.stdout: sys.stdout, self.popen.stderr: sys.stderr}
        for pipe in self.pipes:
            os.set_blocking(pipe.fileno(), False)

    @property
    def code(self) -> int | None:
        """None while it runs."""
        return self.popen.poll()

    def pass_on(self, quiet: bool):
        """Keep and show what it said since; quiet: without stderr."""
        for pipe, screen in self.pipes.items():
            with contextlib.suppress(BlockingIOError):
                while chunk := os.read(pipe.fileno(), 65536):
                    with contextlib.suppress(OSError):  # a full disk must not end the training
                        self.log.write(chunk)
                    with contextlib.suppress(OSError):  # nobody reads any more
                        if not (quiet and screen is sys.stderr):
                            os.write(screen.fileno(), chunk)

    def said(self) -> list[str]:
        """The last lines of its output."""
        self.log.seek(max(self.begin, self.log.seek(0, os.SEEK_END) - 65536))
        return self.log.read().decode(errors="replace").splitlines()

    def kill(self):
        """It and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)


class Supervisor:
    """Starts the job and watches it, in one thread."""

    def __init__(self, options: argparse.Namespace, command: list[str]):
        self.options, self.command = options, command
        auto = options.distributed == "auto"
        self.workdir, self.logs = open_logs(command, [socket.gethostname()] if auto else range(options.processes))
        self.signals: list[int] = []  # received
        self.asked = 0.0  # when the newest was, of time.monotonic()

    def run(self) -> int:
        """Run the job to its end -> exit code."""
        for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if is_heard(stop):
                signal.signal(stop, self.receive)
        restarts = self.options.restarts
        for start in range(1, restarts + 2):
            code = self.attempt()
            if code == 0 and self.signals:
                tell(f"launch: stopped by {signal.Signals(self.signals[0]).name}")
            if code != PEER_FAULT:
                return code
            last = f"gave up after {restarts} restarts" if start > restarts else ""
            then = "while stopping" if self.signals else last or f"starting again ({start} of {restarts})"
            output = self.logs[self.cause.index] if self.cause else self.logs[0].parent
            tell(f"launch: {self.fault}; {then}; output: {output}")
            if self.signals:
                break
            end = time.monotonic() + (0.0 if last else self.options.pause)
            while time.monotonic() < end and not self.signals:
                time.sleep(LOOK)
        return PEER_FAULT

    def receive(self, number: int, _):
        if not self.signals or not is_same_request(number, self.asked):
            self.signals.append(number)
            self.asked = time.monotonic()

    def attempt(self) -> int:
        """One start of all processes, to the end of all -> exit code; PEER_FAULT for all that a restart may mend."""
        self.begun = time.time()
        self.fault, self.cause = "", None  # what went wrong, and the process that died first
        self.patience = 0.0  # the end of it
        self.steps, self.moved, self.looked = {}, time.monotonic(), 0.0  # of the watchdog
        asked, killing = False, None
        self.processes = self.start(free_port())
        try:
            while running := [p for p in self.processes if p.code is None]:
                time.sleep(LOOK)
                self.look()
                if len(self.signals) > 1:
                    tell("launch: a second signal: killing all processes")
                    return 128 + self.signals[1]
                if self.signals and not asked or self.fault and killing is None:
                    asked, killing = bool(self.signals), time.monotonic() + GRACE if self.fault else None
                    for process in running:
                        process.popen.terminate()  # for SIGINT too, which one that only starts up answers at length
                if killing and time.monotonic() > killing:
                    for process in running:
                        process.kill()
        finally:  # nothing of the job is left behind
            for process in self.processes:
                process.kill()
                process.popen.wait()
            self.look()
        if not self.fault:
            return 0
        if self.cause is None or self.cause.code != WRONG:
            return PEER_FAULT
        for line in self.cause.said()[-1:]:
            if line not in self.processes[0].said():
                tell(line)
        return WRONG

    def start(self, port: int) -> list[Process]:
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        if self.options.devices:
            others = FORCED_DEVICES.sub("", os.environ.get("XLA_FLAGS", ""))
            flag = f"--xla_force_host_platform_device_count={self.options.devices}"
            environment["XLA_FLAGS"] = " ".join([*others.split(), flag])
            environment.setdefault("JAX_PLATFORMS", "cpu")
        command = [sys.executable, "-m", self.options.module, *self.command]
        command.append(f"--distributed={self.options.distributed}")
        if self.options.distributed == "auto":
            return [Process(0, command, environment, self.logs[0])]
        command += [f"--coordinator=127.0.0.1:{port}", f"--num-processes={self.options.processes}"]
        return [Process(i, [*command, f"--process-id={i}"], environment, log) for i, log in enumerate(self.logs)]

    def look(self):
        """See what has become of the processes, and pass on what process 0 said."""
        self.fault = self.fault or self.death() or self.stall()
        # After the look at all: what process 0 says of another one that died is no news.
        self.processes[0].pass_on(quiet=bool(self.cause and self.cause.index and self.cause.code != WRONG))

    def death(self) -> str:
        """What to say once a process ended badly: of the first, but for PEER_FAULT, which is a consequence."""
        # Asked to stop before training began to listen, a process just ends.
        fine = (None, 0, -signal.SIGTERM, 128 + signal.SIGTERM) if self.signals else (None, 0)
        codes = {p.code: p for p in reversed(self.processes)}
        if not codes.keys() - set(fine):
            return ""
        first = codes[min(codes.keys() - set(fine), key=likelihood)]
        self.patience = self.patience or time.monotonic() + PATIENCE
        if first.code == PEER_FAULT and None in codes and time.monotonic() < self.patience:
            return ""
        self.cause = first
        beat = {"step": None}
        with contextlib.suppress(OSError):
            beat = next((b for b in self.heartbeats() if b["pid"] == first.popen.pid), beat)
        name = "the process on this host" if self.options.distributed == "auto" else f"process {first.index}"
        return f"{name} {describe(first.code)} {place(beat)}"

    def heartbeats(self) -> list[dict]:
        """The heartbeats of this start of the job, those of processes on other hosts included."""
        beats = (ask_for_heartbeats if is_remote(self.workdir) else read_heartbeats)(self.workdir)
        # Files of earlier runs stay; ours are of the run of the processes that we started.
        pids = {p.popen.pid for p in self.processes}
        runs = {b["run"] for b in beats if b["pid"] in pids and b["time"] >= self.begun - 1}
        return [b for b in beats if b["run"] in runs]

    def stall(self) -> str:
        """What to say if no process finished a step for too long, else nothing."""
        now, often = time.monotonic(), 30.0 if is_remote(self.workdir) else 1.0
        if not self.options.step_timeout or now - self.looked < min(often, self.options.step_timeout / 4):
            return ""
        self.looked = now
        try:
            beats = self.heartbeats()
        except OSError:  # no news; where the bucket cannot be reached, training itself ends
            return ""
        steps = {b["process"]: b["step"] for b in beats if b["step"] is not None}
        if steps != self.steps:
            self.steps, self.moved = steps, now
        limit = self.options.step_timeout if steps else self.options.start_timeout
        if now - self.moved < limit:
            return ""
        if not beats:
            return f"no process began within {limit:g} s"
        slow = min(beats, key=lambda b: (-1 if b["step"] is None else b["step"], b["time"]))
        return f"no new step for {limit:g} s: process {slow['process']} is {place(slow)}"


def main(arguments: list[str]) -> int:
    if arguments[:1] == [ASK]:
        print(json.dumps(read_heartbeats(as_path(arguments[1]))))
        return 0
    try:
        return Supervisor(*parse(arguments)).run()
    except UserError as error:
        tell(error)
        return WRONG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
