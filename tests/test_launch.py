"""The launch scripts; the supervisor runs a made-up module that beats and dies as it is told."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cmd_jax.config import load

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

# `python -m trainee train --workdir=DIR --do=PLAN`: PLAN is JSON, {"START": {"PROCESS": ACTION}} for the first starts.
TRAINEE = r'''
import json, os, signal, subprocess, sys, time
from pathlib import Path

flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[2:])
index, folder = int(flags.get("process-id", 0)), Path(flags["workdir"]) / "stage"
starts = Path(flags["workdir"]) / f"starts-{index}"
start = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(start + 1))
action = json.loads(flags["do"]).get(str(start), {}).get(str(index), "train")
(folder / "processes").mkdir(parents=True, exist_ok=True)
asked = []
signal.signal(signal.SIGTERM, lambda *_: os._exit(143) if asked else asked.append(1))

def beat(step, state="running"):
    facts = dict(run=str(start), process=index, count=2, host="h", pid=os.getpid(), step=step, state=state)
    path = folder / "processes" / f"{index}.json"
    path.with_suffix(".tmp").write_text(json.dumps(facts | dict(message="", time=time.time())))
    path.with_suffix(".tmp").rename(path)

print("started", json.dumps(sys.argv[1:]), flush=True)
if action == "wrong":
    print("config.sede=1: no such key; did you mean config.seed", file=sys.stderr)
    sys.exit(2)
if action == "stubborn":
    beat(4)
    while True:
        time.sleep(0.05)
if action == "peer-lost":
    print("process 1 was silent", file=sys.stderr)
    sys.exit(3)
beat(None)
while action == "asleep" and not asked:
    time.sleep(0.02)
if action == "wrong later":
    time.sleep(0.7)
    print("disk=full: no space; free some", file=sys.stderr)
    sys.exit(2)
for step in range(5):
    time.sleep(0.02)
    beat(step)
    while action == "stall" and step == 2 and not asked:
        time.sleep(0.02)
    if action == "kill" and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "abort" and step == 3:
        print("[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1", flush=True)
        lines = """E1122 12:21:58.089527   16194 coordination_service_agent.cc:289] Polled an error.
F1122 12:21:58.089562   16194 client.h:80] Terminating process because the JAX distributed service detected
Additional GRPC error information from remote target coordination_service while calling /xla.X:
:UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"Socket closed"}
E1122 12:22:09.955855   16262 coordination_service.cc:1549] tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed. Check the task logs for an earlier error
*** Check failure stack trace: ***
    @     0x7f2e15c40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
a warning in Python"""
        print(lines, file=sys.stderr, flush=True)
        os.abort()
if action in ("wait", "wait with child"):
    if action == "wait with child":
        child = subprocess.Popen(["sleep", "60"])
        Path(flags["workdir"], "child").write_text(str(child.pid))
    Path(flags["workdir"], f"waits-{index}").write_text(str(os.getpid()))
    while not asked and not (folder / "stop").exists():
        time.sleep(0.02)
    (folder / "stop").touch()
    print("stopped by signal 15 after step 5; saved", flush=True)
print("done", flush=True)
'''


class Job:
    """launch/local.py running the made-up module in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.workdir = folder, folder / "run"
        (folder / "trainee.py").write_text(TRAINEE)

    def start(self, *flags, environment=None, plan=None, **starts) -> subprocess.Popen:
        """first={process: action}, second=...: what the processes do at each start."""
        plan = {str(n): starts[name] for n, name in enumerate(("first", "second", "third")) if name in starts}
        command = [sys.executable, LAUNCH / "local.py", "--module=trainee", "--processes=2", *flags, "--"]
        command += ["train", f"--workdir={self.workdir}", f"--do={json.dumps(plan)}"]
        return subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(self.folder)} | (environment or {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *flags, **how):
        """(exit code, stdout, stderr) of the supervisor."""
        running = self.start(*flags, **how)
        return self.end(running)

    def end(self, running):
        out, err = running.communicate(timeout=60)
        return running.returncode, out, err

    def await_file(self, *names):
        end = time.monotonic() + 30
        while not all((self.workdir / name).exists() and (self.workdir / name).read_text() for name in names):
            assert time.monotonic() < end, names
            time.sleep(0.02)
        return [int((self.workdir / name).read_text()) for name in names]

    def starts(self) -> list[int]:
        paths = [self.workdir / f"starts-{i}" for i in range(2)]
        return [int(path.read_text()) if path.exists() else 0 for path in paths]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int) -> bool:
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def test_each_process_gets_its_number_the_port_and_the_devices(job):
    code, out, err = job.run("--devices=3", environment={"XLA_FLAGS": "--xla_cpu_use_thunk_runtime=true"})
    assert (code, err) == (0, "")
    commands = [json.loads(re.search(rf"^\[{i}\] started (.*)$", out, re.M)[1]) for i in range(2)]
    for index, command in enumerate(commands):
        assert command[:2] == ["train", f"--workdir={job.workdir}"]
        assert command[3:] == [
            "--distributed=explicit", commands[0][4], "--num-processes=2", f"--process-id={index}",
        ]  # fmt: skip
        assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d+", command[4])
        log = (job.workdir / f"launch-{index}.log").read_text()
        assert log.startswith("-- ") and "started [" in log and log.endswith("done\n")
    show = "import os; print(os.environ['XLA_FLAGS'], os.environ['JAX_PLATFORMS'])"
    (job.folder / "shower.py").write_text(show)
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_use_thunk_runtime=true"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code, out, _ = job.run("--module=shower", "--processes=1", "--devices=3", environment=environment)
    assert (code, out) == (0, "--xla_cpu_use_thunk_runtime=true --xla_force_host_platform_device_count=3 cpu\n")


def test_one_process_of_a_pod_looks_for_the_others_itself(job):
    code, out, _ = job.run("--processes=1", "--distributed=auto")
    assert code == 0 and out.startswith("started ")
    assert json.loads(out.splitlines()[0].removeprefix("started "))[3:] == ["--distributed=auto"]
    assert (job.workdir / f"launch-{socket.gethostname()}.log").exists()


def test_a_killed_process_ends_the_others_and_all_start_again(job):
    code, out, err = job.run(first={"1": "kill", "0": "wait"})
    log = job.workdir / "launch-1.log"
    assert err == f"launch: process 1 was killed by SIGKILL at step 3; starting again (1 of 3); output: {log}\n"
    assert code == 0 and job.starts() == [2, 2] and out.count("[0] done") == 2 and out.count("[1] done") == 1


def test_an_abort_is_one_line_and_the_restarts_are_counted(job):
    code, out, err = job.run("--restarts=1", first={"0": "abort"}, second={"0": "abort", "1": "stubborn"})
    log = job.workdir / "launch-0.log"
    assert code == 3 and job.starts() == [2, 2] and "Gloo" not in out
    assert err == (
        "[0] a warning in Python\n"
        f"launch: process 0 aborted (SIGABRT) at step 3; starting again (1 of 1); output: {log}\n"
        "[0] a warning in Python\n"
        f"launch: process 0 aborted (SIGABRT) at step 3; gave up after 1 restarts; output: {log}\n"
    )
    assert log.read_text().count("*** Check failure stack trace: ***") == 2


def test_an_error_of_the_user_is_shown_once_and_not_tried_again(job):
    code, _, err = job.run(first={"0": "wrong", "1": "wrong"})
    assert (code, err) == (2, "config.sede=1: no such key; did you mean config.seed\n")
    assert max(job.starts()) == 1  # the second may be ended before it begins


def test_the_process_at_fault_may_end_after_the_one_that_noticed(job):
    code, _, err = job.run(first={"0": "wrong later", "1": "peer-lost"})
    assert (code, err) == (2, "[1] process 1 was silent\ndisk=full: no space; free some\n")
    assert job.starts() == [1, 1]


@pytest.mark.parametrize(
    "actions, flags, message",
    [
        ({"0": "wait", "1": "stall"}, ["--step-timeout=1"], "process 1 is at step 2"),
        ({"0": "wait", "1": "asleep"}, ["--step-timeout=1"], "process 1 is before its first step"),
        ({"0": "asleep", "1": "asleep"}, ["--step-timeout=9", "--start-timeout=1"], "process . is before its first .*"),
    ],
)
def test_a_job_without_progress_starts_again(job, actions, flags, message):
    code, _, err = job.run(*flags, first=actions)
    assert code == 0 and job.starts() == [2, 2]
    line = f"launch: no new step for 1 s: {message}; starting again \\(1 of 3\\); output: {job.workdir}\n"
    assert re.fullmatch(line, err), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_is_passed_on_once(job, number):
    running = job.start(first={"0": "wait", "1": "wait"})
    job.await_file("waits-0", "waits-1")
    begun = time.monotonic()
    for _ in range(1 + (number == signal.SIGHUP)):  # which a terminal that closes may send several times
        running.send_signal(number)
        time.sleep(0.05)
    code, out, err = job.end(running)
    assert code == 0 and err == f"launch: stopped by {number.name}\n" and time.monotonic() - begun < 5
    assert all(f"[{i}] stopped by signal 15 after step 5; saved\n[{i}] done\n" in out for i in range(2))


def test_a_stop_of_one_process_is_a_stop_and_no_fault(job):
    running = job.start(first={"0": "wait", "1": "wait"})
    pid, _ = job.await_file("waits-1", "waits-0")
    os.kill(pid, signal.SIGTERM)
    code, _, err = job.end(running)
    assert (code, err) == (0, "launch: stopped by request\n") and job.starts() == [1, 1]


def test_a_second_signal_kills(job):
    running = job.start(first={"0": "stubborn", "1": "wait with child"})
    (child,) = job.await_file("child")
    job.await_file("waits-1", "starts-0")
    running.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    running.send_signal(signal.SIGTERM)
    code, _, err = job.end(running)
    assert (code, err) == (128 + signal.SIGTERM, "launch: a second signal: killing all processes\n")
    assert gone(child)


def test_processes_do_not_outlive_the_supervisor(job):
    running = job.start(first={"0": "wait", "1": "stubborn"})
    (pid,) = job.await_file("waits-0")
    other = json.loads((job.workdir / "stage" / "processes" / "1.json").read_text())["pid"]
    assert alive(pid) and alive(other)
    running.kill()
    assert gone(pid, other)
    job.end(running)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--processes=0"], r"command=local.py: argument --processes: '0' is not a whole number from 1; see .* --help"),
        (["--step-timeout=nan"], r".*--step-timeout: 'nan' is not a number from 0.1; .*"),
        (["--proceses=2"], r"command=local.py: unrecognized arguments: --proceses=2; see .* --help"),
        (["--distributed=auto"], r"--processes=2: not used with --distributed=auto, .*; leave it out"),
        (["--coordinator-port=70000"], r"--coordinator-port=70000: cannot be had; leave it out, or .*"),
    ],
)
def test_a_wrong_flag_is_one_line_and_2(job, flags, message):
    code, out, err = job.run(*flags)
    assert (code, out) == (2, "") and re.fullmatch(message + "\n", err) and not job.workdir.exists()


def test_without_a_command_the_line_shows_one():
    done = subprocess.run([sys.executable, LAUNCH / "local.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(r"command=: missing after --; write it like .* -- train .*\n", done.stderr)


def test_a_busy_port_is_noticed_before_anything_starts(job):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        code, out, err = job.run(f"--coordinator-port={port}")
    assert (code, out) == (2, "") and not job.workdir.exists()
    assert err == f"--coordinator-port={port}: cannot be had; leave it out, or end what listens there\n"
    code, out, _ = job.run(f"--coordinator-port={port}")
    assert code == 0 and f"127.0.0.1:{port}" in out


def test_an_unusable_workdir_is_left_to_the_command(job):
    (job.folder / "file").write_text("")
    job.workdir = job.folder / "file" / "run"
    code, _, err = job.run("--restarts=0")
    assert code == 3 and "NotADirectoryError" in err and "cmd-jax-launch-" in err.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_training_is_resumed(tmp_path):
    """Two real processes, the second killed once there is a checkpoint."""
    workdir, flags = tmp_path / "run", ["--processes=2", "--devices=2", "--step-timeout=120", "--"]
    flags += ["train", f"--config={ROOT}/tests/tiny.py:autoencoder", f"--workdir={workdir}"]
    flags += ["--config.train.steps=30", "--config.train.checkpoint_every=4", "--config.train.log_every=20"]
    running = subprocess.Popen(
        [sys.executable, LAUNCH / "local.py", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )  # fmt: skip
    ledger, end = workdir / "autoencoder" / "ledger.jsonl", time.monotonic() + 120
    while not ledger.exists() or '"step": 9' not in ledger.read_text():
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.02)
    os.kill(json.loads((workdir / "autoencoder" / "processes" / "1.json").read_text())["pid"], signal.SIGKILL)
    out, err = running.communicate(timeout=240)
    assert running.returncode == 0, err
    (line,) = (line for line in err.splitlines() if line.startswith("launch: "))
    assert re.match(r"launch: process 1 was killed by SIGKILL (at step \d+|before its first step); starting ", line)
    assert re.search(r"resuming autoencoder at step (8|12|16|20|24|28) of 30", out) and "Gloo" not in out + err
    assert json.loads((workdir / "autoencoder" / "summary.json").read_text())["step"] == 30


def stand_in(folder: Path, name: str, body: str):
    """A program of that name, found first."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def script(folder: Path, *command, **variables) -> subprocess.Popen:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    kept = {
        key: value for key, value in os.environ.items() if key not in ("VENV", "PYTHON", "RESTARTS", "SLURM_JOB_ID")
    }
    return subprocess.Popen(
        command, env=kept | {"PATH": path} | variables, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def ended(running: subprocess.Popen):
    out, err = running.communicate(timeout=60)
    return running.returncode, out, err


TRAIN = ["train", "--config=c.py:content", "--workdir=/shared/two words"]


def test_an_environment_serves_one_version_of_python(tmp_path):
    """Stand-ins: pythons that tell their version, as install.sh asks, make an environment, or run pip."""
    for version in ("3.10", "3.11", "3.13"):
        body = 'case "$*" in *venv*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/bin/activate" ;;\n'
        body += f"*pip*) echo pip of {version} ;;\n*) echo {version}; [ {version} != 3.10 ] ;; esac"
        stand_in(tmp_path, f"python{version}", body)
    stand_in(tmp_path, "python", 'exec "$VENV/bin/python" "$@"')
    for name in ("pyproject.toml", "requirements.txt"):
        (tmp_path / name).write_text("")

    def install(**variables):
        return ended(script(tmp_path, "bash", "-c", f". {LAUNCH}/install.sh test", **variables))

    code, out, err = install(PYTHON="python3.11", VENV=".venv")
    assert (code, err) == (0, "") and out.endswith("installing cmd_jax[test] into .venv\npip of 3.11\n")
    assert install(PYTHON="python3.11") == install(PYTHON="") == (0, "", "")  # there already
    code, out, err = install(PYTHON="python3.13")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"PYTHON=python3\.13: is 3\.13, but \.venv .*; name another folder, like VENV=\S+-3\.13\n", err)
    assert install(PYTHON="python3.13", VENV=".venv-3.13")[1].endswith("pip of 3.13\n")
    for wrong in ("python3.10", "python9"):
        code, out, err = install(PYTHON=wrong)
        assert (code, out) == (2, "") and re.fullmatch(f"PYTHON={wrong}: .*; name one, like .*\n", err)


@pytest.fixture
def slurm(tmp_path):
    """Start slurm.sbatch in a stand-in of a checkout."""
    for name in ("launch/env.sh", ".venv/bin/activate"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    stand_in(tmp_path, "scancel", "echo scancel $*; touch stop")
    stand_in(tmp_path, "scontrol", "echo scontrol $*")
    variables = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_SUBMIT_DIR": str(tmp_path)}
    return lambda *arguments, **more: script(
        tmp_path, "bash", str(LAUNCH / "slurm.sbatch"), *arguments, **variables | more
    )


def test_slurm_starts_a_failed_step_again_but_not_a_wrong_one(slurm, tmp_path):
    stand_in(tmp_path, "srun", 'printf "%s|" "$@"; echo x >> starts; exit "$(sed -n "$(wc -l < starts)p" codes)"')
    (tmp_path / "codes").write_text("3\n134\n0\n")
    code, out, err = ended(slurm(*TRAIN))
    assert code == 0 and out.count("|--distributed=auto|--config.processes.expected=4|") == 3
    assert "|python|-m|cmd_jax.main|train|--config=c.py:content|--workdir=/shared/two words|" in out
    assert err == (
        "launch: ended with code 3; starting again (1 of 3)\nlaunch: ended with code 134; starting again (2 of 3)\n"
    )
    (tmp_path / "codes").write_text("0\n0\n0\n2\n3\n3\n")
    assert ended(slurm(*TRAIN))[::2] == (2, "")
    code, _, err = ended(slurm(*TRAIN, RESTARTS="1"))
    assert code == 3 and err.endswith("launch: ended with code 3; gave up after 1 restarts\n")


def test_slurm_saves_before_the_time_limit_and_queues_again(slurm, tmp_path):
    stand_in(tmp_path, "srun", "touch begun; until [ -e stop ]; do sleep 0.05; done; echo saved")
    running = slurm(*TRAIN)
    end = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.02)
    running.send_signal(signal.SIGUSR1)
    code, out, err = ended(running)
    assert (code, err) == (0, "")
    assert out == (
        "scancel --signal=TERM 17\nsaved\nlaunch: the time limit is near; job 17 queues again\nscontrol requeue 17\n"
    )


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        (TRAIN, {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID=: missing; .*"),
        (["train"], {}, "--config=: missing; .*"),
        (["train", "--config=c", "--workdir=runs"], {}, "--workdir=: missing or relative; .*"),
        (TRAIN, {"RESTARTS": "x"}, "RESTARTS=x: not a number; .*"),
        (TRAIN, {"SLURM_SUBMIT_DIR": "/"}, "SLURM_SUBMIT_DIR=/: not the root of the checkout; .*"),
        (TRAIN, {"VENV": "none"}, "VENV=none: no environment there; .*"),
    ],
)
def test_what_slurm_lacks_is_one_line_and_2(slurm, arguments, variables, message):
    code, out, err = ended(slurm(*arguments, **variables))
    assert (code, out) == (2, "") and re.fullmatch(message + "\n", err), err


@pytest.fixture
def pod(tmp_path):
    """Start tpu_pod.sh with a gcloud that runs the commands for the workers here, in a home of their own."""
    (tmp_path / "home").mkdir()
    stand_in(
        tmp_path,
        "gcloud",
        f'cd "{tmp_path}"; echo "gcloud ${{*:1:4}}" >> calls; printf "%s\\n" "$@" | grep -v command= >> flags\n'
        'case "$4" in scp) cp "$5" home/cmd_jax.tar.gz ;; esac; cd home\n'
        'for a in "$@"; do case "$a" in --command=*) bash -c "${a#--command=}" || exit ;; esac; done',
    )
    return lambda *arguments, **more: script(
        tmp_path, str(LAUNCH / "tpu_pod.sh"), *arguments, **{"TPU_NAME": "cmd", "ZONE": "z", "PROJECT": "p"} | more
    )


def test_a_pod_is_set_up_started_and_stopped(pod, tmp_path):
    worker = tmp_path / "home" / "cmd_jax"
    environment = worker / ".venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "activate").write_text("")
    digest = subprocess.run(
        "cat pyproject.toml requirements.txt | sha256sum | cut -c1-16",
        shell=True, cwd=ROOT, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (worker / ".venv" / f"installed-{digest}-tpu").touch()  # as after an installation
    code, _, err = ended(pod("setup"))
    assert (code, err) == (0, "")
    assert (worker / "launch" / "local.py").exists() and (worker / "cmd_jax" / "main.py").exists()
    assert (tmp_path / "calls").read_text() == "gcloud compute tpus tpu-vm scp\ngcloud compute tpus tpu-vm ssh\n"
    flags = (tmp_path / "flags").read_text().split()
    assert all(flags.count(flag) == 2 for flag in ("--worker=all", "--zone=z", "--project=p"))

    # The supervisor itself was tried above.
    (worker / "launch" / "local.py").write_text(
        "import json, sys, time\njson.dump(sys.argv[1:], open('given', 'w'))\ntime.sleep(60)\n"
    )
    code, _, err = ended(pod("start", *TRAIN, STEP_TIMEOUT="600"))
    assert (code, err) == (0, "")
    pid = int((worker / "launch.pid").read_text())
    end = time.monotonic() + 30
    while not ((worker / "given").exists() and (worker / "given").read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    given = json.loads((worker / "given").read_text())
    own = ["--processes=1", "--distributed=auto", "--restarts=3", "--step-timeout=600"]
    assert given == [*own, "--", *TRAIN]
    code, _, err = ended(pod("start", *TRAIN))
    assert code == 2 and err.endswith(": runs already; stop it first\n")
    assert ended(pod("logs"))[0] == 0
    code, out, _ = ended(pod("stop"))
    assert code == 0 and out.endswith(": asked to save and end\n") and gone(pid)


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        ([], {}, "argument=: not known; use setup, start, logs or stop .*"),
        (["begin"], {}, "argument=begin: not known; .*"),
        (["stop", "now"], {}, "argument=now: not used with stop; leave it out"),
        (["logs"], {"TPU_NAME": ""}, "TPU_NAME=: missing; set it, like .*"),
        (["logs"], {"ZONE": ""}, "ZONE=: missing; set it, like .*"),
        (["start", "train"], {}, "--config=: missing; .*"),
        (["start", "train", "--config=c", "--workdir=runs"], {}, "--workdir=: missing or relative; .*"),
    ],
)
def test_what_a_pod_lacks_is_one_line_and_2(pod, tmp_path, arguments, variables, message):
    code, out, err = ended(pod(*arguments, **variables))
    assert (code, out) == (2, "") and re.fullmatch(message + "\n", err), err
    assert not (tmp_path / "calls").exists()


def test_gke_manifest_and_its_script(tmp_path):
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] == 4 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (text,) = container["args"]
    assert f"--config.processes.expected={job['parallelism']} " in text
    assert "$(" not in text  # Kubernetes would replace it
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "env.sh").write_text("")

    def run(python: str, workdir=tmp_path / "runs"):
        stand_in(tmp_path, "python", python)
        return script(tmp_path, *container["command"], text, WORKDIR=str(workdir))

    for wanted in (0, 2, 3):
        assert ended(run(f"exit {wanted}"))[0] == wanted
    running = run("trap 'echo saved; exit 0' TERM; touch begun; while :; do sleep 0.05; done")
    end = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert ended(running)[:2] == (143, "saved\n")
    code, _, err = ended(run("exit 0", workdir="/proc/runs"))
    assert code == 2 and err.splitlines()[-1].startswith("WORKDIR=/proc/runs: cannot be written; ")


def test_scripts_parse_and_their_flags_exist():
    texts = {name: (LAUNCH / name).read_text() for name in ("tpu_pod.sh", "slurm.sbatch", "gke_jobset.yaml")}
    for name in ("tpu_pod.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    helps = {
        command: subprocess.run(
            [sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for command in ("launch/local.py", "-m cmd_jax.main train")
    }
    for flag in ("--distributed", "--coordinator", "--num-processes", "--process-id", "--config", "--workdir"):
        assert flag in helps["-m cmd_jax.main train"]
    for text in (*texts.values(), (LAUNCH / "local.py").read_text().split('"""')[1]):
        for flag in re.findall(r"--(?:processes|distributed|restarts|step-timeout|devices)\b", text):
            assert flag in helps["launch/local.py"]
        for key in re.findall(r"--config\.([a-z_.]+)=", text):
            load(f"{ROOT}/configs/quickstart.py:autoencoder", {key: "1"})
        for specification in re.findall(r"--config=(configs/\S+)", text):
            load(str(ROOT / specification), {})
