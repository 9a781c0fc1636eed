"""The lock in a bucket: who may have it, and for how long. Leases are short; those of runs are as in `SECONDS`."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cmd_jax.errors import Unavailable, UserError, exit_code
from cmd_jax.files import as_path, read_json
from cmd_jax.running import lease
from cmd_jax.running.flight import FlightRecord
from cmd_jax.running.lease import Lease, is_gone, this_process
from cmd_jax.running.watch import watched

ROOT = Path(__file__).resolve().parents[2]
SLACK = 5.0  # seconds that a busy machine may add
ELSEWHERE = {"host": "other", "boot": "another", "namespace": "pid:[1]", "pid": os.getpid(), "started": "1"}


@pytest.fixture(params=["gcs_stub", "s3"])
def path(request):
    """Of a lock on a server that knows preconditions."""
    return as_path(f"{request.getfixturevalue(request.param)}/run/.lock")


@pytest.fixture
def stub(gcs_stub):
    return gcs_stub.server


@pytest.fixture
def stub_path(gcs_stub):
    return as_path(f"{gcs_stub}/run/.lock")


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(lease, "LOOK", 0.1)
    monkeypatch.setattr(lease, "PAUSE", 0.0)


def take(path, seconds=1):
    return Lease(path, "trains in it", "workdir", seconds=seconds)


def record(**changes) -> bytes:
    """A lock's content, of a live process on another machine."""
    of = {"holder": "somebody", **ELSEWHERE, "renewal": 1, "seconds": 1, "state": "held"}
    return json.dumps(of | changes).encode()


def dead_process() -> dict:
    process = subprocess.Popen(["true"])
    process.wait()
    return this_process() | {"pid": process.pid, "started": "12"}


@pytest.mark.parametrize("before", ["nothing", "free", "gone"])
def test_of_eight_at_once_one_has_it(path, before):
    if before != "nothing":
        path.write_bytes(record(state="free") if before == "free" else record(**dead_process(), seconds=60))
    begun, ended, have, refused = threading.Barrier(8), threading.Barrier(8), [], []

    def run():
        begun.wait()
        try:
            with take(path, seconds=30) as lock:
                have.append(lock)
                lock.check()
                ended.wait(20)
        except UserError as e:
            refused.append(str(e))
            ended.wait(20)

    start = time.monotonic()
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(have) == 1 and len(refused) == 7
    me = f"another process trains in it (host {this_process()['host']}, pid {os.getpid()})"
    assert all(line.startswith(f"workdir={path.parent}: {me}; ") for line in refused)
    assert time.monotonic() - start < 10  # nobody waited for it to lapse
    assert json.loads(path.read_bytes())["state"] == "free"


def test_what_was_released_is_taken_at_once(path):
    begun = time.monotonic()
    for _ in range(2):
        with take(path, seconds=30) as lock:
            assert lock.held() and lock.exact
            lock.check()
        assert not lock.held()
        lock.release()
    assert time.monotonic() - begun < SLACK
    assert [p.name for p in path.parent.iterdir()] == [".lock"]


def test_a_lock_that_nobody_renews_is_taken_when_it_lapses(stub_path, caplog):
    path, begun = stub_path, time.monotonic()
    path.write_bytes(record(seconds=1))
    with take(path) as lock:
        assert 1.0 < time.monotonic() - begun < 2 + SLACK
        lock.check()
    (line,) = (r.getMessage() for r in caplog.records)
    assert line.startswith(
        f"workdir={path.parent}: another process trains in it (host other, pid {os.getpid()}); waiti"
    )


@pytest.mark.parametrize("skew", [-600, 600])  # of the server against this machine
@pytest.mark.parametrize("age, waits", [(62, False), (40, True)])
def test_its_age_is_told_by_the_clock_of_the_server(stub_path, stub, age, waits, skew):
    path = stub_path
    stub.order(skew=skew)
    path.write_bytes(record(seconds=60))
    stub.order(skew=skew + age)
    lock = take(path)
    thread = threading.Thread(target=lock.__enter__, daemon=True)
    thread.start()
    thread.join(0.5 if waits else 2 * SLACK)
    assert thread.is_alive() == waits and lock.held() != waits
    if waits:
        path.write_bytes(record(state="free"))
        thread.join(SLACK)
    lock.release()


def test_a_live_one_on_another_machine_is_seen_to_live(stub_path):
    path = stub_path
    path.write_bytes(record(seconds=60))
    timer = threading.Timer(0.3, path.write_bytes, (record(seconds=60, renewal=2),))
    timer.start()
    begun = time.monotonic()
    with pytest.raises(UserError, match="another process trains in it .host other") as error, take(path):
        pass
    assert exit_code(error.value) == 2 and time.monotonic() - begun < lease.LOOK + SLACK
    timer.join()


def test_what_is_no_lock_of_ours_is_respected_for_a_lease(stub_path, stub):
    path = stub_path
    for content in (b"", b"{torn", b"[]", record(seconds=10**6), record(pid="1")):
        stub.order()
        path.write_bytes(content)
        stub.order(skew=lease.SECONDS + 2)
        with take(path) as lock:
            lock.check()


def test_processes():
    me = this_process()
    assert not is_gone(me) and is_gone(dead_process())
    assert is_gone(me | {"started": "1"})  # its number was given to another
    for name in ("host", "boot", "namespace"):
        assert not is_gone(dead_process() | {name: "other"})


def test_who_cannot_renew_it_gives_up_before_it_lapses(stub_path, stub):
    path, lost = stub_path, threading.Event()
    lines = []
    with take(path, seconds=2) as lock:
        lock.on_lost = lambda line: (lines.append((line, time.monotonic())), lost.set())
        time.sleep(0.6)
        assert lock.held()
        stub.order(share=1.0, kinds=("503",))
        failing = time.monotonic()
        assert lost.wait(2 + SLACK)
        assert not lock.held()
        with pytest.raises(Unavailable):
            lock.check()
        ((line, at),) = lines
        assert at - failing < 2 and line.startswith(f"workdir={path.parent}: its lock could not be renewed for 2 s (")
        stub.order()
    assert json.loads(path.read_bytes())["state"] == "held"  # it was not his any more to release


def test_who_finds_it_taken_has_lost_it(path):
    lost, lines = threading.Event(), []
    with take(path, seconds=2) as lock:
        path.write_bytes(record(seconds=60))
        with pytest.raises(Unavailable, match="another process took it over .host other"):
            lock.check()
        assert not lock.held()
        lock.on_lost = lambda line: (lines.append(line), lost.set())  # told though it comes late
        assert lost.wait(SLACK)
    assert len(lines) == 1 and "another process took it over (host other" in lines[0]
    assert json.loads(path.read_bytes())["holder"] == "somebody"


def test_a_renewal_whose_answer_got_lost_was_no_other_s(path, monkeypatch):
    def unheard(*arguments):
        write(*arguments)
        raise Unavailable(None, "cut off", str(path))

    write = lease.write_if
    with take(path, seconds=30) as lock:
        monkeypatch.setattr(lease, "write_if", unheard)
        lock.check()
        monkeypatch.setattr(lease, "write_if", write)
        until, _ = lock._until, time.sleep(0.01)
        lock.check()
        assert lock.held() and lock._until > until


ZOMBIE = """
import sys, time
from cmd_jax.running import lease
from cmd_jax.running.flight import FlightRecord
lease.PAUSE = 0.0
lease._machine = lambda: {"boot": "another", "namespace": "pid:[1]"}
from cmd_jax.files import as_path, read_json
path = as_path(sys.argv[1])
with lease.Lease(path, "trains in it", "workdir") as lock:
    lock.on_lost = lambda line: print("lost", line, flush=True)
    for step in range(10_000):
        lock.check()
        path.with_name("step").write_text(str(step))
        print("step", flush=True)
        time.sleep(0.02)
"""


@contextlib.contextmanager
def holder(path, code):
    """A process that has the lock, and has begun to write."""
    command = [sys.executable, "-c", code, str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as process:
        try:
            assert process.stdout.readline() == "step\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def test_a_process_that_slept_over_its_lease_commits_nothing(stub_path, stub):
    with holder(stub_path, ZOMBIE) as process:
        process.send_signal(signal.SIGSTOP)
        stub.order(skew=lease.SECONDS + 2)
        with take(stub_path) as lock:
            before = int(stub_path.with_name("step").read_text())
            process.send_signal(signal.SIGCONT)
            out, err = process.communicate(timeout=10)
            lock.check()
            # What it was at when it slept may come to its end; nothing else does.
            assert int(stub_path.with_name("step").read_text()) <= before + 1
        assert process.returncode == 1 and "Unavailable" in err and "took it over" in err


def test_a_killed_process_of_this_machine_is_followed_at_once(stub_path):
    with holder(stub_path, "\n".join(line for line in ZOMBIE.splitlines() if "_machine" not in line)) as process:
        with pytest.raises(UserError, match=f"pid {process.pid}"), take(stub_path):
            pass
        process.kill()
        process.wait()
        begun = time.monotonic()
        with take(stub_path) as lock:
            lock.check()
        assert time.monotonic() - begun < SLACK


def test_a_server_without_preconditions_is_warned_of_once(gcs, caplog):
    path = as_path(f"{gcs}/run/.lock")
    with take(path, seconds=1) as lock:
        lock.check()
        (line,) = (r.getMessage() for r in caplog.records)
        assert "ignores preconditions" in line and "\n" not in line and not lock.exact
        path.write_bytes(record())  # it is found out all the same
        with pytest.raises(Unavailable, match="took it over"):
            lock.check()


def test_faults_of_the_store(gcs_stub, stub, monkeypatch):
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "0.2")
    stub.order(share=1.0, kinds=("503",))
    with pytest.raises(UserError) as error, take(as_path(f"{gcs_stub}/run/.lock")):
        pass
    assert exit_code(error.value) == 3 and str(error.value).startswith(f"workdir={gcs_stub}/run: cannot be locked (")
    stub.order()
    with pytest.raises(UserError) as error, take(as_path("gs://no-such-bucket/run/.lock")):
        pass
    assert exit_code(error.value) == 2


@pytest.fixture
def run(stub_path):
    """A run that holds the lock, as `train` sets it up: folder, lock, what a stop calls, with what it ended."""
    folder, ended, stop = stub_path.parent, queue.SimpleQueue(), SimpleNamespace(farewell="bye", calls=[])
    stop.first = stop.calls.append
    options = SimpleNamespace(peer_timeout=20.0, stall_timeout=0.0)
    with take(stub_path, seconds=30) as lock, watched(folder, options, FlightRecord(folder), stop, ended.put, lock):
        yield folder, lock, stop, ended


def test_a_run_that_lost_its_lock_ends_to_be_started_again(run, capsys):
    folder, lock, _, ended = run
    lock.path.write_bytes(record())
    with pytest.raises(Unavailable):
        lock.check()
    assert ended.get(timeout=2 * SLACK) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"workdir={folder}: another process took it over (host other")
    beat = read_json(folder / "processes" / "0.json")
    assert (beat["state"], beat["fault"], beat["message"]) == ("failed", "lost-lock", line)
    assert [path.name for path in (folder / "flight").iterdir()] == ["start-lost-lock-process0.json"]
    assert json.loads(lock.path.read_bytes())["holder"] == "somebody"


def test_who_cannot_reach_the_store_does_not_outlive_his_lock(run, stub, capsys):
    _, lock, _, ended = run
    stub.order(hang=True)
    lost = time.monotonic()
    lock._until = 0.0
    assert ended.get(timeout=30 * lease.MARGIN) == 3 and time.monotonic() - lost < 30 * lease.MARGIN
    assert "could not be renewed" in capsys.readouterr().err


def test_a_run_that_is_stopped_early_releases_it(run):
    _, lock, stop, _ = run
    for call in stop.calls:  # what a signal does before the process ends at once
        call()
    assert json.loads(lock.path.read_bytes())["state"] == "free" and not lock.held()
