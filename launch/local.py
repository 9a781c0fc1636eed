"""Supervisor: runs cmd_jax as one or several processes on this machine, and starts them again when one dies.

    python launch/local.py --processes=2 --devices=4 -- \\
        train --config=configs/quickstart.py:autoencoder --workdir=runs/two

starts `python -m cmd_jax.main train ... --distributed=explicit --coordinator=127.0.0.1:PORT --num-processes=2
--process-id=I` twice, each with 4 CPU devices. On each host of a TPU pod (launch/tpu_pod.sh, launch/gke_jobset.yaml)
`--processes=1 --distributed=auto` starts one process, which finds the others for itself.

A process that is killed, aborts, crashes or fails ends the others, and all are started again (training resumes from its
checkpoint), up to `--restarts` times. Not so after exit code 2, an error that a restart does not mend. `--step-timeout`
does the same to a job whose heartbeats (WORKDIR/STAGE/processes/*.json) show no new step. SIGTERM, SIGINT or SIGHUP is
passed on, so that training saves and ends; a second one kills. All output is kept in WORKDIR/launch-I.log
(--distributed=auto: launch-HOST.log); the screen is spared the C++ messages, and what the other processes say after one
has died.

Exit codes: 0 finished, or stopped on request; 2 an error to be mended first; 3 still failing after all restarts;
128 + signal after a second signal.

Tried on one Linux machine with two CPU processes, real and made-up ones (tests/test_launch.py); never on a pod. It
needs Linux, to end the processes when it is itself killed, and nothing but the standard library.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = (
    "python launch/local.py --processes=2 --devices=4 -- train"
    " --config=configs/quickstart.py:autoencoder --workdir=runs/two"
)
WRONG, PEER_FAULT = 2, 3  # exit codes of cmd_jax: the user must act; a fault of another process was noticed
GRACE = 5.0  # seconds between SIGTERM and SIGKILL for the processes that a dead one leaves behind
PATIENCE = 6.0  # seconds after the first PEER_FAULT in which the process at fault may end too (it lingers 5)
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)

USER_ERROR = re.compile(r"[^\s=]+=.*: .+; .+")
STOPPED = re.compile(r"stopped by (a )?(signal|request)")
FORCED_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\S*")
# What absl, gRPC, gloo and JAX's coordination service write; a line of digits only counts after another such line.
NOISE = re.compile(
    r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ |WARNING: All log messages before absl|\*\*\* |\s+@ +0x|\[Gloo\]"
    r"|Additional GRPC error information|:?UNKNOWN:Error received from peer|RPC: /|Barrier result: "
    r"|[A-Z_]+: Barrier failed because|This suggests that the workers are out of sync|The tasks have crashed\."
)


class WrongFlag(Exception):
    """A flag the user must change: printed as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str):
        raise WrongFlag(f"command={self.prog}: {message}; see python launch/local.py --help")


def number(kind: type, least: float):
    """A parser of numbers of a kind, from `least`."""

    def read(text: str):
        with contextlib.suppress(ValueError):
            if least <= kind(text) < float("inf"):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a{' whole' * (kind is int)} number from {least:g}")

    return read


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and the command after `--`."""
    parser = Parser(
        prog="local.py",
        description="Run cmd_jax as one or several processes on this machine; start them again when one dies.",
        epilog=f"example: {EXAMPLE}",
        usage="%(prog)s [flags] -- VERB --config=... --workdir=...",
        allow_abbrev=False,
    )
    positive = number(int, 1)
    parser.add_argument("--processes", metavar="N", type=positive, default=1, help="default 1")
    parser.add_argument("--devices", metavar="N", type=positive, help="CPU devices of each process (JAX_PLATFORMS=cpu)")
    parser.add_argument("--restarts", metavar="N", type=number(int, 0), default=3, help="at most; default 3")
    parser.add_argument(
        "--step-timeout", metavar="SECONDS", type=number(float, 0.1),
        help="start again when no step ends for so long; default: wait forever",
    )  # fmt: skip
    parser.add_argument(
        "--start-timeout", metavar="SECONDS", type=number(float, 0.1), default=1800.0,
        help="the same before the first step; only used with --step-timeout; default 1800",
    )  # fmt: skip
    parser.add_argument(
        "--pause", metavar="SECONDS", type=number(float, 0),
        help="before each restart; default 0, or 90 with --distributed=auto, when the processes of other hosts must"
        " have noticed too (processes.peer_timeout)",
    )  # fmt: skip
    parser.add_argument("--coordinator-port", metavar="PORT", type=number(int, 1), help="default: a free one")
    parser.add_argument(
        "--distributed", choices=("explicit", "auto"), default="explicit",
        help="auto: one process on each host of a cluster that JAX knows",
    )  # fmt: skip
    parser.add_argument("--module", default="cmd_jax.main", help="what to run; the tests run another")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    if not command:
        raise WrongFlag(f"command=: missing after --; write it like {EXAMPLE}")
    if options.distributed == "auto":
        for flag, given, allowed in (
            ("processes", options.processes, 1), ("coordinator-port", options.coordinator_port, None),
        ):  # fmt: skip
            if given != allowed:
                raise WrongFlag(f"--{flag}={given}: not used with --distributed=auto, one process a host; leave it out")
    if options.pause is None:
        options.pause = 90.0 if options.distributed == "auto" else 0.0
    if options.coordinator_port and not is_free(options.coordinator_port):
        port = options.coordinator_port
        raise WrongFlag(f"--coordinator-port={port}: cannot be had; leave it out, or end what listens there")
    return options, command


def is_free(port: int) -> bool:
    """Whether the coordinator could listen there; on a busy port JAX crashes without a word."""
    with socket.socket() as probe:
        # As the coordinator does: connections of a run that just ended don't count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError):
            return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def workdir_of(command: list[str]) -> Path | None:
    """The --workdir of the command; None if it has none, or one of a bucket, which the command itself will say."""
    for flag, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = flag.partition("=")
        place = value if equals else following
        if name == "--workdir" and place and not re.match(r"[A-Za-z][\w+.-]+:/", place):
            return Path(place).expanduser().absolute()
    return None


def describe(code: int) -> str:
    """How a process ended, of its return code as subprocess has it (negative: the signal)."""
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGABRT:
        return f"aborted ({name})"
    if -code in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
        return f"crashed ({name})"
    return f"was killed by {name}"


def likelihood(code: int) -> int:
    """Which of several that ended at about the same time is the cause: the lowest."""
    if code == WRONG:
        return 0
    if code < 0 and -code != signal.SIGABRT:
        return 1
    return {-signal.SIGABRT: 3, PEER_FAULT: 4}.get(code, 2)


def place(beat: dict) -> str:
    return "before its first step" if beat["step"] is None else f"at step {beat['step']}"


def show(stream, text: str):
    """Print a line, if there still is someone who reads."""
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)


def say(text: str):
    show(sys.stderr, f"launch: {text}")


class Process:
    """One process of the job; `log` gets its output, byte for byte."""

    def __init__(self, index: int, command: list[str], environment: dict[str, str], log: Path):
        self.index, self.log_file, self.noisy = index, open(log, "ab", buffering=0), False  # noqa: SIM115
        supervisor = os.getpid()

        def die_with_parent():
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor:
                os._exit(1)

        # A session of its own: Ctrl-C would otherwise reach it twice, and it takes a second signal for "at once".
        self.popen = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, preexec_fn=die_with_parent,  # safe: this program has one thread
        )  # fmt: skip
        self.pending = {self.popen.stdout: b"", self.popen.stderr: b""}  # unfinished lines

    @property
    def code(self) -> int | None:
        """None while it runs."""
        return self.popen.returncode

    def kill(self):
        """It and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def is_noise(self, line: str) -> bool:
        self.noisy = bool(NOISE.match(line)) or (self.noisy and re.fullmatch(r"\d*", line) is not None)
        return self.noisy


class Supervisor:
    """Starts the job and watches it, in one thread: `wait` sleeps until there is something to do, and reads."""

    def __init__(self, options: argparse.Namespace, command: list[str]):
        self.options, self.command, self.workdir = options, command, workdir_of(command)
        self.logs = self.open_logs()
        self.processes: list[Process] = []
        self.signals: list[int] = []  # received
        self.selector = selectors.DefaultSelector()
        self.woken, self.wakes = socket.socketpair()
        self.woken.setblocking(False)
        self.wakes.setblocking(False)
        self.selector.register(self.woken, selectors.EVENT_READ)

    def open_logs(self) -> list[Path]:
        auto = self.options.distributed == "auto"
        names = [socket.gethostname()] if auto else range(self.options.processes)
        folder = self.workdir
        try:
            if folder is None:
                raise OSError("no --workdir")
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                open(folder / f"launch-{name}.log", "ab").close()
        except OSError:  # the command itself will complain about the workdir
            folder = Path(tempfile.mkdtemp(prefix="cmd-jax-launch-"))
        return [folder / f"launch-{name}.log" for name in names]

    def run(self) -> int:
        """Run the job to its end -> exit code."""
        signal.set_wakeup_fd(self.wakes.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only so that `wait` wakes up
        for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if stop != signal.SIGHUP or signal.getsignal(stop) != signal.SIG_IGN:  # as nohup has it
                signal.signal(stop, self.receive)
        restart, restarts = 0, self.options.restarts
        while True:
            code = self.attempt(restart)
            asked = signal.Signals(self.signals[0]).name if self.signals else "request" if self.stopped else ""
            if code == 0 and asked:
                say(f"stopped by {asked}")
            if code != PEER_FAULT:
                return code
            output = f"output: {self.logs[self.cause.index] if self.cause else self.logs[0].parent}"
            if self.signals:
                say(f"{self.fault}, while stopping; {output}")
                return PEER_FAULT
            if restart == restarts:
                say(f"{self.fault}; gave up after {restarts} restarts; {output}")
                return PEER_FAULT
            restart += 1
            say(f"{self.fault}; starting again ({restart} of {restarts}); {output}")
            end = time.monotonic() + self.options.pause
            while time.monotonic() < end and not self.signals:
                self.wait(end - time.monotonic())

    def receive(self, number: int, _):
        if number != signal.SIGHUP or not self.signals:  # a terminal that closes may send it several times
            self.signals.append(number)

    def attempt(self, restart: int) -> int:
        """One start of all processes, to the end of all -> exit code; PEER_FAULT for all that a restart may mend."""
        if (port := self.options.coordinator_port) and not is_free(port):
            say(f"--coordinator-port={port}: cannot be had any more; leave it out for a free one")
            return WRONG
        self.begun = time.time()
        self.fault, self.cause = "", None  # what went wrong, and the process that died first
        self.ended: list[Process] = []  # by themselves and badly
        self.patience = 0.0  # the end of it
        self.stopped = False  # a process said that it was asked to stop
        self.steps, self.moved, self.looked = {}, time.monotonic(), 0.0  # of the watchdog
        self.shown_errors: set[str] = set()
        asked, killing, running = False, None, True
        self.start(port or free_port(), restart)
        while running:
            self.wait(0.2)
            running = [p for p in self.processes if p.code is None]
            if len(self.signals) > 1:
                say("a second signal: killing all processes")
                self.finish()
                return 128 + self.signals[1]
            if self.signals and not asked:
                asked = True
                for process in running:
                    process.popen.terminate()  # for SIGINT too, which a process that only starts up answers at length
            self.fault = self.fault or self.stall()
            if self.fault and killing is None:
                killing = time.monotonic() + GRACE
                for process in running:
                    process.popen.terminate()
            if killing and time.monotonic() > killing:
                for process in running:
                    process.kill()
        self.finish()
        if not self.fault:
            return 0
        return WRONG if self.cause and self.cause.code == WRONG else PEER_FAULT

    def judge(self):
        """Find the cause among the processes that ended badly: the first, but for PEER_FAULT, a consequence."""
        if self.fault:
            return  # the others end because we end them
        self.ended += [p for p in self.processes if self.is_bad(p.code) and p not in self.ended]
        if not self.ended:
            return
        first = min(self.ended, key=lambda p: likelihood(p.code))
        self.patience = self.patience or time.monotonic() + PATIENCE
        over = time.monotonic() > self.patience or all(p.code is not None for p in self.processes)
        if first.code != PEER_FAULT or over:
            beat = next((b for b in self.heartbeats() if b["pid"] == first.popen.pid), {"step": None})
            name = "the process on this host" if self.options.distributed == "auto" else f"process {first.index}"
            self.cause, self.fault = first, f"{name} {describe(first.code)} {place(beat)}"

    def is_bad(self, code: int | None) -> bool:
        """Whether a process ended in a way that it should not have."""
        # Asked to stop before training began to listen, a process just ends.
        fine = (0, -signal.SIGTERM, 128 + signal.SIGTERM) if self.signals else (0,)
        return code is not None and code not in fine

    def start(self, port: int, restart: int):
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        if self.options.devices:
            others = FORCED_DEVICES.sub("", os.environ.get("XLA_FLAGS", ""))
            flag = f"--xla_force_host_platform_device_count={self.options.devices}"
            environment["XLA_FLAGS"] = " ".join([*others.split(), flag])
            environment.setdefault("JAX_PLATFORMS", "cpu")
        self.processes = []
        for index, log in enumerate(self.logs):
            command = [sys.executable, "-m", self.options.module, *self.command]
            command.append(f"--distributed={self.options.distributed}")
            if self.options.distributed == "explicit":
                command.append(f"--coordinator=127.0.0.1:{port}")
                command += [f"--num-processes={self.options.processes}", f"--process-id={index}"]
            process = Process(index, command, environment, log)
            self.processes.append(process)
            heading = f"-- {time.strftime('%Y-%m-%d %H:%M:%S')}, start {restart + 1}, pid {process.popen.pid} --\n"
            self.keep(process, heading.encode())
            for pipe, screen in ((process.popen.stdout, sys.stdout), (process.popen.stderr, sys.stderr)):
                self.selector.register(pipe, selectors.EVENT_READ, (process, screen))

    def wait(self, seconds: float) -> bool:
        """Wait for a signal, output, or the end of a process, and pass on the output -> whether there was any."""
        events = self.selector.select(max(seconds, 0))
        for process in self.processes:
            process.popen.poll()
        self.judge()  # before anything is shown: what the others say of a dead process is no news
        piped = False
        for key, _ in events:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self.woken.recv(4096)
                continue
            piped = True
            process, screen = key.data
            chunk = os.read(key.fd, 65536)
            self.keep(process, chunk)
            *lines, rest = (process.pending[key.fileobj] + chunk).split(b"\n")
            process.pending[key.fileobj] = rest
            if not chunk:
                self.selector.unregister(key.fileobj)
                lines += [rest] if rest else []
                process.pending[key.fileobj] = b""
            for line in lines:
                self.pass_on(process, screen, line.decode(errors="replace").rstrip("\r"))
        return piped

    def keep(self, process: Process, output: bytes):
        with contextlib.suppress(OSError):  # a full disk must not end the training
            process.log_file.write(output)

    def pass_on(self, process: Process, screen, line: str):
        """Show a line of a process, unless it is not worth it."""
        prefix = f"[{process.index}] " if len(self.processes) > 1 else ""
        if process.is_noise(line):
            return
        if screen is sys.stderr:
            if USER_ERROR.fullmatch(line):  # about the job: every process says it
                if line in self.shown_errors:
                    return
                self.shown_errors.add(line)
                prefix = ""
            elif self.fault and process is not self.cause:
                return
        self.stopped = self.stopped or STOPPED.match(line) is not None
        show(screen, prefix + line)

    def finish(self):
        """Leave nothing of the job behind, and show what it still had to say."""
        for process in self.processes:
            process.kill()
            process.popen.wait()
        while self.wait(0):
            pass
        for process in self.processes:
            for pipe in process.pending:
                if pipe in self.selector.get_map():
                    self.selector.unregister(pipe)
                pipe.close()
            process.log_file.close()
        self.processes = []

    def heartbeats(self) -> list[dict]:
        """The heartbeats of this start of the job, those of processes on other hosts included."""
        beats = []
        for path in self.workdir.glob("*/processes/*.json") if self.workdir else ():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                beat = json.loads(path.read_text())
                kinds = {"run": str, "process": int, "pid": int, "step": int | None, "time": float}
                if all(isinstance(beat[key], kind) for key, kind in kinds.items()):
                    beats.append({key: beat[key] for key in kinds})
        # Files of earlier runs stay; ours are of the run of the processes that we started.
        pids = {p.popen.pid for p in self.processes}
        runs = {b["run"] for b in beats if b["pid"] in pids and b["time"] >= self.begun - 1}
        return [b for b in beats if b["run"] in runs]

    def stall(self) -> str:
        """What to say if no process finished a step for too long, else nothing."""
        now = time.monotonic()
        if not self.options.step_timeout or now - self.looked < min(1.0, self.options.step_timeout / 4):
            return ""
        self.looked = now
        beats = self.heartbeats()
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
    try:
        options, command = parse(arguments)
    except WrongFlag as error:
        show(sys.stderr, " ".join(str(error).split()))
        return WRONG
    return Supervisor(options, command).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
