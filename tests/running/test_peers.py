"""The watch over peers, with real threads and processes. Times are short, and long enough for a busy machine."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watching import SLACK, TIMEOUT, Watch, until

from cmd_jax.errors import Stopped, UserError
from cmd_jax.running import peers

ROOT = Path(__file__).resolve().parents[2]


def beat(folder, index, run="this", **changes):
    record = {"run": run, "process": index, "count": 2, "host": f"host{index}", "pid": 40 + index, "step": 7}
    record |= {"state": "running", "message": "", "fault": "", "time": 0.0} | changes
    path = folder / "processes" / f"{index}.json"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(record))
    path.with_suffix(".new").replace(path)


def read(folder, index=0):
    return json.loads((folder / "processes" / f"{index}.json").read_text())


def test_a_heartbeat(tmp_path):
    with Watch(tmp_path, count=1) as watch:
        first = read(tmp_path)
        assert (first["run"], first["process"], first["count"], first["pid"]) == ("this", 0, 1, os.getpid())
        assert (first["step"], first["state"], first["message"]) == (None, "running", "")
        assert abs(first["time"] - time.time()) < 60
        watch.progress(41)
        until(lambda: read(tmp_path)["step"] == 41)
        assert read(tmp_path)["time"] > first["time"]
        # Python at work in the main thread does not hold the beats up.
        end, seen = time.monotonic() + TIMEOUT, set()
        while time.monotonic() < end:
            seen.add(read(tmp_path)["time"])
        assert len(seen) >= 3
    assert read(tmp_path)["state"] == "done"
    assert not watch.faults and not watch._thread.is_alive()


@pytest.mark.parametrize(
    "error, state, message",
    [
        (UserError("loss", "nan", "not finite", "look"), "failed", "loss=nan: not finite; look"),
        (ValueError("two\nlines"), "failed", "=2: process 0 crashed (ValueError: two lines); look at its log, then "),
        (Stopped("stopped early"), "failed", "stopped early"),
        (SystemExit(2), "failed", "=2: process 0 crashed (SystemExit: 2); look at its log, then "),
    ],
)
def test_leaving_by_an_error(tmp_path, error, state, message):
    with contextlib.suppress(type(error)), Watch(tmp_path):
        raise error
    record = read(tmp_path)
    assert record["state"] == state and message in record["message"]
    assert record["fault"] == ("peer-crashed" if "crashed" in message else "")


def test_a_crash_is_the_end_of_the_others_too(tmp_path):
    with Watch(tmp_path, count=2) as watch:
        beat(tmp_path, 1, state="failed", message="processes=2: process 1 crashed; look", fault="peer-crashed")
        reason, line, facts = watch.the_fault()[:3]
    assert (reason, line) == ("peer-crashed", "processes=2: process 1 crashed; look")
    assert facts["failed"]["process"] == 1


def test_a_silent_process_is_named_once_and_the_others_hear_of_it(tmp_path):
    with Watch(tmp_path, count=3) as watch, Watch(tmp_path, index=2, count=3) as other:
        watch.progress(9)
        beat(tmp_path, 1)
        reason, line, facts, seconds = watch.the_fault()
        assert reason == "lost-peer" and TIMEOUT <= seconds < TIMEOUT + SLACK
        age = facts["missing"][0].pop("age")
        assert TIMEOUT <= age < seconds + 0.1
        assert facts == {"missing": [{"process": 1, "host": "host1", "pid": 41, "step": 7}], "step": 9}
        assert line.startswith("processes=3: process 1 (host host1, pid 41) was last heard of 1")
        assert line.endswith(" s ago at step 7; the job ends; look at its log, then run the same command to resume")
        assert "\n" not in line
        assert (read(tmp_path)["state"], read(tmp_path)["message"]) == ("failed", line)
        # It finds so for itself, or is told.
        reason, line, _, _ = other.the_fault()
        assert reason == "lost-peer" and line.startswith("processes=3: process 1 (host host1, pid 41) was last heard")


def test_a_fault_that_another_process_found(tmp_path):
    with Watch(tmp_path, peer_timeout=60.0) as watch:
        watch.interval = 0.1
        beat(tmp_path, 1, state="failed", fault="stall", message="processes.stall_timeout=9: a stall; look")
        reason, line, facts, _ = watch.the_fault(10)
    assert (reason, line) == ("stall", "processes.stall_timeout=9: a stall; look")
    assert facts["failed"]["process"] == 1 and facts["failed"]["step"] == 7


def test_files_of_other_runs_and_rubbish_are_no_sign_of_life(tmp_path):
    beat(tmp_path, 1, run="before", state="failed", message="an old story")
    beat(tmp_path, 2, run="before", state="done")
    with Watch(tmp_path, count=5) as watch:
        until_fault = time.monotonic() + TIMEOUT + SLACK
        while not watch.fault.is_set() and time.monotonic() < until_fault:
            for index, text in ((3, "{torn"), (4, '["this"]')):
                (tmp_path / "processes" / f"{index}.json").write_text(f"{text} {time.time()}")
            beat(tmp_path, 1, run="before", time=time.time())
            time.sleep(0.05)
        reason, line, facts, seconds = watch.the_fault()
    assert reason == "lost-peer" and seconds >= TIMEOUT
    assert line.startswith("processes=5: process 1 was never heard of and process 2 was never heard of and process 3 ")
    assert [p["process"] for p in facts["missing"]] == [1, 2, 3, 4]
    assert facts["missing"][0]["step"] is None


def test_done_processes_may_be_silent_and_clocks_may_be_wrong(tmp_path):
    beat(tmp_path, 1, state="done")
    with Watch(tmp_path, count=3) as watch:
        for tick in range(int(1.5 * TIMEOUT / 0.1)):
            beat(tmp_path, 2, time=1e9 - 3600 * tick)
            time.sleep(0.1)
        assert not watch.faults
        # One that is done itself still waits for the others to come to their end.
        watch.done()
        assert watch.the_fault()[0] == "lost-peer"


def test_a_failed_process_ends_the_others_with_its_message(tmp_path):
    message = "data.root=/x: no such folder; give another"
    with Watch(tmp_path) as watch, Watch(tmp_path, index=1) as other:
        other.progress(3)
        other.fail(message)
        reason, line, facts, seconds = watch.the_fault()
        assert (reason, line) == ("peer-failed", message)
        assert facts["failed"]["process"] == 1 and facts["failed"]["step"] == 3
        assert seconds < TIMEOUT  # it is not waited for
        assert not other.faults


def test_who_failed_itself_reports_nobody_else(tmp_path):
    with Watch(tmp_path) as watch:
        watch.fail("mine")
        beat(tmp_path, 1, state="failed", message="theirs")
        time.sleep(TIMEOUT + 3 * watch.interval)
        assert not watch.faults and read(tmp_path)["message"] == "mine"


def test_a_stall(tmp_path):
    with Watch(tmp_path, count=1, stall_timeout=0.5) as watch:
        time.sleep(0.8)  # before the first step: preparations may take long
        for step in range(8):
            watch.progress(step)
            time.sleep(0.1)
        with watch.busy(), watch.busy():
            time.sleep(0.8)
        assert not watch.faults
        stopped = time.monotonic() - watch.begun
        reason, line, facts, seconds = watch.the_fault()
    assert reason == "stall" and 0.5 - 2 * watch.interval <= seconds - stopped < 0.5 + SLACK
    assert line.startswith("processes.stall_timeout=0.5: process 0 finished no step for 0.")
    assert line.endswith(" s, after step 7; look at flight/ and the logs, then run the same command to resume")
    assert facts["steps"] == {0: 7} and facts["step"] == 7


def test_a_stall_names_the_processes_furthest_behind(tmp_path):
    with Watch(tmp_path, count=4, stall_timeout=0.5, peer_timeout=60.0) as watch:
        watch.interval = 0.1
        for index, step in ((1, 8), (2, None), (3, None)):
            beat(tmp_path, index, step=step)
        watch.progress(8)
        reason, line, facts, _ = watch.the_fault(30)
    assert reason == "stall" and facts["steps"] == {0: 8, 1: 8, 2: None, 3: None}
    names = "process 2 (host host2, pid 42) before its first step, process 3 (host host3, pid 43) before its first step"
    assert f"after step 8; furthest behind: {names}; look" in line


def test_no_stall_timeout(tmp_path):
    with Watch(tmp_path, count=1) as watch:
        watch.progress(0)
        time.sleep(TIMEOUT)
        assert not watch.faults


def test_a_full_disk_is_survived_and_warned_of_once(tmp_path, monkeypatch, caplog):
    with Watch(tmp_path) as watch, Watch(tmp_path, index=1) as other:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(peers, "write_text", full)
        time.sleep(1.6 * TIMEOUT)
        assert not watch.faults and not other.faults
        warnings = [r.getMessage() for r in caplog.records]
        assert len(warnings) == 2 and all("No space left" in w for w in warnings)  # one a process
        other.fail("the disk is full; free space")
        assert watch.the_fault()[:2] == ("peer-failed", "the disk is full; free space")


SCRIPT = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from cmd_jax.running.peers import Peers
assert "jax" not in sys.modules

def on_fault(reason, line, facts):
    print(json.dumps([reason, line, facts, time.monotonic()]), flush=True)
    os._exit(3)

print("ready", flush=True)
sys.stdin.readline()
times = dict(peer_timeout={TIMEOUT}, stall_timeout=0.0, on_fault=on_fault)
with Peers(Path(sys.argv[1]), int(sys.argv[2]), 2, "this", **times) as peers:
    step = 0
    while True:
        peers.progress(step)
        step += 1
        time.sleep(0.02)
"""


@pytest.fixture
def pair(tmp_path):
    """Two processes that have begun to watch each other."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    commands = [[sys.executable, "-c", SCRIPT, str(tmp_path), str(index)] for index in range(2)]
    with contextlib.ExitStack() as stack:
        processes = []
        for command in commands:
            processes.append(stack.enter_context(subprocess.Popen(command, **pipes)))
            stack.callback(processes[-1].kill)
        assert [p.stdout.readline() for p in processes] == ["ready\n"] * 2
        for p in processes:
            p.stdin.write("go\n")
            p.stdin.flush()
        for index in range(2):
            until((tmp_path / "processes" / f"{index}.json").exists)
            until(lambda index=index: (read(tmp_path, index)["step"] or 0) > 3)
        yield processes


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_or_stopped_is_named_in_time(tmp_path, pair, number, victim):
    last = read(tmp_path, victim)
    pair[victim].send_signal(number)
    sent = time.monotonic()
    assert pair[1 - victim].wait(TIMEOUT + 5) == 3
    reason, line, facts, at = json.loads(pair[1 - victim].stdout.read())
    # Its last beat came up to one interval before.
    assert TIMEOUT * 0.7 <= at - sent < TIMEOUT + SLACK
    assert reason == "lost-peer"
    assert f"processes=2: process {victim} (host {last['host']}, pid {pair[victim].pid}) was last heard of" in line
    (missing,) = facts["missing"]
    assert missing["process"] == victim and missing["step"] >= last["step"]
    if number == signal.SIGSTOP:
        # When it comes back it ends too, and blames nobody else.
        pair[victim].send_signal(signal.SIGCONT)
        assert pair[victim].wait(TIMEOUT + 5) == 3
        assert json.loads(pair[victim].stdout.read())[1] == line


def test_a_pause_of_the_whole_machine_is_nobodys_fault(tmp_path, pair):
    for p in pair:
        p.send_signal(signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    for p in pair:
        p.send_signal(signal.SIGCONT)
    time.sleep(1.5 * TIMEOUT)
    assert [p.poll() for p in pair] == [None, None]
