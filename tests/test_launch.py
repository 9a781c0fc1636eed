"""The supervisor, with a made-up module that beats and dies as it is told."""

import importlib.util
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
from types import SimpleNamespace

import pytest
from processes import alive, gone

from cmd_jax.buckets import BucketPath
from cmd_jax.running.runtime import SAME_REQUEST

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

# `python -m trainee train --workdir=DIR --do=PLAN`: PLAN is JSON, {"START": {"PROCESS": ACTION}} for the first starts.
TRAINEE = r"""
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
    facts = dict(run=str(start), process=index, count=2, host="h", pid=os.getpid(), step=step, state=state, fault="")
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
        print("F1122 12:21:58.089562 client.h:80] Terminating process", file=sys.stderr, flush=True)
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
"""


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


def test_each_process_gets_its_number_the_port_and_the_devices(job):
    """And a log; the screen shows what process 0 says."""
    code, out, err = job.run("--devices=3", environment={"XLA_FLAGS": "--xla_cpu_use_thunk_runtime=true"})
    logs = [(job.workdir / f"launch-{i}.log").read_text() for i in range(2)]
    assert (code, out, err) == (0, logs[0], "") and all(log.endswith("done\n") for log in logs)
    commands = [json.loads(re.match("started (.*)", log)[1]) for log in logs]
    for index, command in enumerate(commands):
        assert command[:2] == ["train", f"--workdir={job.workdir}"]
        assert command[3:] == [
            "--distributed=explicit", commands[0][4], "--num-processes=2", f"--process-id={index}",
        ]  # fmt: skip
        assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d+", command[4])
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
    assert err == f"launch: process 1 was killed (SIGKILL) at step 3; starting again (1 of 3); output: {log}\n"
    assert code == 0 and job.starts() == [2, 2] and out.count("done") == 2 and log.read_text().count("done") == 1


def test_an_abort_is_one_line_and_the_restarts_are_counted(job):
    code, _, err = job.run("--restarts=1", first={"1": "abort"}, second={"1": "abort", "0": "stubborn"})
    log = job.workdir / "launch-1.log"
    assert code == 3 and job.starts() == [2, 2]
    assert err == (
        f"launch: process 1 aborted (SIGABRT) at step 3; starting again (1 of 1); output: {log}\n"
        f"launch: process 1 aborted (SIGABRT) at step 3; gave up after 1 restarts; output: {log}\n"
    )
    assert log.read_text().count("Terminating process") == 2


@pytest.mark.parametrize(("zero", "one"), [("wrong", "wrong"), ("wait", "wrong"), ("wrong", "wait")])
def test_an_error_of_the_user_is_shown_once_and_not_tried_again(job, zero, one):
    code, _, err = job.run(first={"0": zero, "1": one})
    assert (code, err) == (2, "config.sede=1: no such key; did you mean config.seed\n")
    assert max(job.starts()) == 1  # the second may be ended before it begins


@pytest.mark.parametrize("code", [0, 1])
def test_what_a_process_says_is_not_what_it_did(job, code):
    """A user's error is exit code 2, and a request to stop is a signal, whatever is printed."""
    said = "config.sede=1: no such key; did you mean config.seed\nstopped by signal 15 after step 5; saved\n"
    (job.folder / "talker.py").write_text(f"import sys; print({said!r}, end=''); sys.exit({code})")
    ended, out, err = job.run("--module=talker", "--processes=1", "--restarts=0")
    assert (ended, out) == (3 if code else 0, said)
    assert bool(code) == bool(err) == err.startswith("launch: process 0 ended with code 1 before its first step; ")


def test_the_process_at_fault_may_end_after_the_one_that_noticed(job):
    code, _, err = job.run(first={"0": "peer-lost", "1": "wrong later"})
    assert (code, err) == (2, "process 1 was silent\ndisk=full: no space; free some\n")
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
    for again in (number, signal.SIGHUP, number):  # as of a terminal that closes, or a machine that shuts down
        running.send_signal(again)
        time.sleep(0.005)
    code, out, err = job.end(running)
    assert code == 0 and err == f"launch: stopped by {number.name}\n" and time.monotonic() - begun < 5
    assert out.endswith("stopped by signal 15 after step 5; saved\ndone\n")


def test_a_stop_of_one_process_is_a_stop_and_no_fault(job):
    running = job.start(first={"0": "wait", "1": "wait"})
    pid, _ = job.await_file("waits-1", "waits-0")
    os.kill(pid, signal.SIGTERM)
    code, _, err = job.end(running)
    assert (code, err) == (0, "") and job.starts() == [1, 1]


def test_a_second_signal_kills(job):
    running = job.start(first={"0": "stubborn", "1": "wait with child"})
    (child,) = job.await_file("child")
    job.await_file("waits-1", "starts-0")
    running.send_signal(signal.SIGTERM)
    time.sleep(SAME_REQUEST + 0.3)
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
        (["--processes=0"], r"--processes=0: not a number from 1; give 1 or more"),
        (["--processes=1.5"], r"command=local.py: argument --processes: invalid int value: '1.5'; see .* --help"),
        (["--step-timeout=nan"], r"--step-timeout=nan: not a number from 0.1; .*"),
        (["--proceses=2"], r"command=local.py: unrecognized arguments: --proceses=2; see .* --help"),
        (["--distributed=auto"], r"--processes=2: not used with --distributed=auto, .*; leave it out"),
    ],
)
def test_a_wrong_flag_is_one_line_and_2(job, flags, message):
    code, out, err = job.run(*flags)
    assert (code, out) == (2, "") and re.fullmatch(message + "\n", err) and not job.workdir.exists()


def test_without_a_command_the_line_shows_one():
    done = subprocess.run([sys.executable, LAUNCH / "local.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(r"command=: missing after --; write it like .* -- train .*\n", done.stderr)


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
    assert re.match(r"launch: process 1 was killed \(SIGKILL\) (at step \d+|before its first step); starting ", line)
    assert re.search(r"resuming autoencoder at step (8|12|16|20|24|28) of 30", out)
    assert json.loads((workdir / "autoencoder" / "summary.json").read_text())["step"] == 30


def test_a_workdir_in_a_bucket(gcs_stub, tmp_path, monkeypatch):
    """Heartbeats are read there, by a process of its own; logs are files of this machine; no folder "gs:"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    specification = importlib.util.spec_from_file_location("local", LAUNCH / "local.py")
    local = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(local)
    supervisor = local.Supervisor(*local.parse(["--step-timeout=9", "--", "train", f"--workdir={gcs_stub}/run"]))
    beat = dict(run="a", process=0, count=2, host="h", pid=7, step=3, time=time.time(), state="running")
    beat |= dict(fault="", message="")
    for process, facts in enumerate((beat, beat | {"process": 1, "pid": 8}, beat | {"run": "b", "pid": 9})):
        (BucketPath(f"{gcs_stub}/run") / f"content/processes/{process}.json").write_text(json.dumps(facts))
    supervisor.processes = [SimpleNamespace(popen=SimpleNamespace(pid=7))]
    supervisor.begun, supervisor.steps, supervisor.moved, supervisor.looked = time.time(), {}, 0.0, 0.0
    assert [b["pid"] for b in supervisor.heartbeats()] == [7, 8]
    assert supervisor.stall() == "" and supervisor.steps == {0: 3, 1: 3}
    assert [log.parent.parent for log in supervisor.logs] == [tmp_path] and not Path("gs:").exists()
    # What cannot be read is no news.
    monkeypatch.setattr(local, "ask_for_heartbeats", lambda _: (_ for _ in ()).throw(OSError()))
    supervisor.looked = 0.0
    assert supervisor.stall() == "" and supervisor.steps == {0: 3, 1: 3}
