"""The watch over peers, by objects of a bucket."""

import time

import pytest
from watching import SLACK, TIMEOUT, Watch, until

from cmd_jax.errors import Unavailable
from cmd_jax.files import as_path, read_json


@pytest.fixture
def stub(gcs_stub):
    return gcs_stub.server


@pytest.fixture
def folder(gcs_stub):
    return as_path(f"{gcs_stub}/run")


def read(folder, index=0):
    return read_json(folder / "processes" / f"{index}.json")


def silence(watch):
    """Its process is killed: nothing more is written."""
    watch._leaving.set()
    watch._thread.join()
    watch._state["state"] = "gone"


def test_whose_object_changes_no_more_is_lost(folder):
    (folder / "processes" / "1.json").write_text("of an earlier run")
    with Watch(folder, count=3) as watch, Watch(folder, 1, 3) as other, Watch(folder, 2, 3) as dead:
        for process in (watch, other, dead):
            process.progress(4)
        time.sleep(1.5 * TIMEOUT)
        assert not watch.faults and not other.faults and read(folder, 1)["step"] == 4
        silence(dead)
        for process in (watch, other):
            reason, line, facts, _ = process.the_fault(TIMEOUT + 2 * SLACK)
            assert reason == "lost-peer" and "process 2 (host " in line and "at step 4" in line
            assert process is other or facts["missing"][0]["process"] == 2


@pytest.mark.parametrize("server", ["gcs", "s3"])
def test_a_failed_process_is_heard_of_at_once(request, server):
    folder, times = as_path(f"{request.getfixturevalue(server)}/run"), {"peer_timeout": 20.0, "interval": 0.1}
    with Watch(folder, **times) as watch, Watch(folder, 1, **times) as other:
        until(lambda: 1 in watch._records)
        other.progress(3)
        other.fail("data.root=/x: no such folder; give another")
        reason, line, facts, _ = watch.the_fault()
    assert (reason, line) == ("peer-failed", "data.root=/x: no such folder; give another")
    assert facts["failed"]["step"] == 3


def test_a_process_that_misses_its_store_is_no_reason_to_give_up(tmp_path):
    """The others end by a fault that another start may mend, and not as for what the user must."""
    with Watch(tmp_path) as watch:
        error = Unavailable(None, "cannot be reached", "gs://bkt/x")
        with pytest.raises(Unavailable), Watch(tmp_path, 1):
            raise error
        assert watch.the_fault()[:2] == ("unavailable", read(tmp_path, 1)["message"])
    assert read(tmp_path, 1)["message"].startswith("file=gs://bkt/x: cannot be reached; run the same command again")


def test_what_it_asks_of_the_store(folder, stub):
    """Of each process and beat one object and one list; what is in the objects of others, once."""
    watches = [Watch(folder, index, 4) for index in range(4)]
    for watch in watches:
        watch.__enter__()
    until(lambda: all(len(watch._records) == 4 for watch in watches))
    before = len(stub.seen)
    time.sleep(TIMEOUT)
    asked = stub.seen[before:]
    for watch in watches:
        watch.__exit__(None, None, None)
    writes = sum("/upload/" in path for _, path, _ in asked)
    lists = sum(method == "GET" and "prefix=" in path for method, path, _ in asked)
    reads = sum("alt=media" in path for method, path, _ in asked if method == "GET")
    assert 8 <= writes <= 48 and abs(writes - lists) <= 6
    assert reads <= writes / 2  # a beat that came late; in the old way three for each


def test_a_store_that_does_not_answer_is_nobodys_fault(folder, stub, caplog):
    with Watch(folder) as watch, Watch(folder, 1) as other:
        until(lambda: 1 in watch._records and 0 in other._records)
        stub.order(share=1.0, kinds=("503",))
        time.sleep(2 * TIMEOUT)
        stub.order()
        time.sleep(0.6 * TIMEOUT)
        assert not watch.faults and not other.faults
        assert 1 <= len(caplog.records) <= 2 and all("heartbeat" in r.getMessage() for r in caplog.records)
        silence(other)
        assert watch.the_fault(TIMEOUT + SLACK)[0] == "lost-peer"


def test_a_stall_tells_where_the_others_are(folder):
    times = {"peer_timeout": 20.0, "interval": 0.1}
    with Watch(folder, stall_timeout=0.5, **times) as watch, Watch(folder, 1, **times) as other:
        until(lambda: 1 in watch._records)
        watch.progress(8)
        other.progress(7)
        reason, _, facts, _ = watch.the_fault(10)
    assert reason == "stall" and facts["steps"] == {0: 8, 1: 7}
