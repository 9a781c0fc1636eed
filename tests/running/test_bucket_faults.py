"""Checkpoints in buckets that are damaged, cut off, killed in the middle, or whose store does not answer."""

import contextlib
import logging
import os
import queue
import random
import re
import signal
import time

import pytest
from checkpoints import check_whole, in_children, save, state_at

from cmd_jax.errors import Unavailable, UserError, exit_code
from cmd_jax.files import as_path
from cmd_jax.running.array_store import check_lengths
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.hosts import digest
from cmd_jax.running.manifest import Damaged, verify
from cmd_jax.running.steps import steps_in

PLACE = "run/autoencoder"
STEPS = f"{PLACE}/checkpoints"


def folder_in(bucket):
    return as_path(f"{bucket}/{PLACE}")


@pytest.fixture
def warned(caplog):
    with caplog.at_level(logging.WARNING, "cmd_jax.running"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("cmd_jax.running")]


# Damage.


def test_100_flipped_bits_in_objects_are_all_found(gcs_stub):
    folder = folder_in(gcs_stub)
    save(folder, 3, 6)
    objects = gcs_stub.objects(f"{STEPS}/6/")
    rng, names = random.Random(0), sorted(objects)
    for number in range(100):
        name = names[number] if number < len(names) else rng.choice(names)
        gcs_stub.flip(name, rng.randrange(len(objects[name])), rng.randrange(8))
        item = name.removeprefix(f"{STEPS}/6/").split("/")[0]
        with pytest.raises(Damaged, match=name.removeprefix(f"{STEPS}/6/")):
            verify(folder / "checkpoints" / "6", (item,))
        if number % 50 == 0:
            check_whole(folder, 3)
        gcs_stub.put(name, objects[name])
    check_whole(folder, 6)


def largest(bucket):
    return max(bucket.objects(f"{STEPS}/6/ema/").items(), key=lambda item: len(item[1]))


def cut_off(bucket):
    name, data = largest(bucket)
    bucket.put(name, data[:-1])


DAMAGE = {
    "cut off": (cut_off, r"ema/\S+ has \d+ bytes, not \d+"),
    "missing": (lambda bucket: bucket.delete(largest(bucket)[0]), r"ema/\S+ cannot be read \(no such object"),
    "no manifest to speak of": (lambda bucket: bucket.put(f"{STEPS}/6/manifest.json", b"[1]"), "manifest.json is dama"),
}


@pytest.mark.parametrize(("harm", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_the_older_step_is_used_and_the_damaged_one_copied_aside(gcs, warned, harm, problem):
    folder = folder_in(gcs)
    save(folder, 3, 6)
    for name in (f"{STEPS}/6/ema/d/foreign", f"{STEPS}/6/notes", f"{STEPS}/6/"):
        gcs.put(name, b"")
    check_whole(folder, 6)  # foreign objects are nobody's concern
    harm(gcs)
    before = gcs.objects(f"{STEPS}/6/")
    check_whole(folder, 3)  # read_only
    assert gcs.objects(f"{STEPS}/6/") == before
    gcs.put(f"{PLACE}/damaged/6/run.json", b"of an earlier time")
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.latest() == 3
        assert gcs.names(f"{STEPS}/6/") == []
        aside = gcs.names(f"{PLACE}/damaged/6-1/")
        names = {name.removeprefix(f"{STEPS}/6/") for name in before if not name.endswith("/")}
        assert {name.removeprefix(f"{PLACE}/damaged/6-1/") for name in aside} == names
        checkpoints.save(state_at(6), {"step": 6})
    check_whole(folder, 6)
    assert all(line.startswith("checkpoint 6 is not whole: ") for line in warned())
    assert re.search(f"{problem}.*; falling back to step 3; moved to {folder}/damaged/6-1$", warned()[-1])


def test_nothing_starts_from_scratch_where_all_is_damaged(gcs):
    folder = folder_in(gcs)
    save(folder, 6)
    cut_off(gcs)
    before = gcs.names()
    with (
        contextlib.closing(Checkpoints(folder)) as checkpoints,
        pytest.raises(UserError, match="checkpoint=6: damaged: .* bytes, .*; no other one is whole; bring back"),
    ):
        checkpoints.latest()
    assert gcs.names() == before


# Killed. An object is there whole or not at all: what a kill can leave are the states after each change of one.


class Recorded(dict):
    """The objects of a bucket of the stub, and `states`: what they were after each change."""

    def __init__(self, objects):
        super().__init__(objects)
        self.states = []

    def __setitem__(self, name, stored):
        super().__setitem__(name, stored)
        self.states.append(dict(self))

    def __delitem__(self, name):
        super().__delitem__(name)
        self.states.append(dict(self))

    def pop(self, name, *default):
        found = super().pop(name, *default)
        self.states.append(dict(self))
        return found


def test_killed_at_any_object_of_a_save_the_step_before_or_this_one_is_whole(gcs_stub):
    folder, buckets = folder_in(gcs_stub), gcs_stub.server.server.buckets
    save(folder, 6)
    buckets[gcs_stub.name] = recorded = Recorded(buckets[gcs_stub.name])
    save(folder, 9, keep=1)
    newest, sizes = [], []
    for number, state in enumerate(recorded.states):
        buckets[gcs_stub.name] = dict(state)
        with contextlib.closing(Checkpoints(folder, read_only=True, items=("step",))) as checkpoints:
            newest.append(checkpoints.latest())
        sizes.append(len(state))
        if number in (len(recorded.states) // 4, newest.index(9) if 9 in newest else -1):
            check_whole(folder, newest[-1])
    committed = newest.index(9)
    assert newest == committed * [6] + (len(newest) - committed) * [9]
    assert f"{STEPS}/9/manifest.json" in recorded.states[committed]
    assert f"{STEPS}/6/manifest.json" not in recorded.states[committed + 1]
    assert committed > 25 and len(newest) - committed > 20  # each object that was written, and removed
    for state in (recorded.states[committed // 2], recorded.states[(committed + len(newest)) // 2]):
        buckets[gcs_stub.name] = dict(state)
        save(folder, 12, keep=2)
        check_whole(folder, 12)
        assert not steps_in(folder).look()[1]


def save_without_end(pipe, environment, url):
    os.environ.update(environment)
    with contextlib.closing(Checkpoints(as_path(url), keep=1)) as checkpoints:
        step = checkpoints.latest() or 0
        while True:
            step += 1
            checkpoints.save(state_at(step), {"step": step})
            checkpoints.wait()
            pipe.send(step)


class Deadly(dict):
    """Objects of a bucket of the stub; whoever writes the object `name` is killed: the process that `pid` tells."""

    def __init__(self, objects, name):
        super().__init__(objects)
        self.name, self.pid = name, queue.SimpleQueue()

    def __setitem__(self, name, stored):
        super().__setitem__(name, stored)
        if name == self.name:
            os.kill(self.pid.get(timeout=60), signal.SIGKILL)


def test_killed_in_a_save_the_next_run_goes_on_from_the_newest_whole_step(gcs_stub):
    buckets = gcs_stub.server.server.buckets
    for name, left in (("3/params/manifest.ocdbt", 2), ("3/manifest.json", 3)):
        buckets[gcs_stub.name] = deadly = Deadly(buckets[gcs_stub.name], f"{STEPS}/{name}")
        ((process, _),) = in_children(save_without_end, (gcs_stub.server.environment, f"{gcs_stub}/{PLACE}"))
        deadly.pid.put(process.pid)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        there, begun = steps_in(folder_in(gcs_stub)).look()
        assert there[0] == left and begun == [3] * (left == 2)
        check_whole(folder_in(gcs_stub), left)


# A store that does not answer, or says no.


FAULTS = {
    "503": ({"share": 1.0, "kinds": ("503",), "only": "upload"}, r"cannot be reached \(.*503", 3),
    "cut": ({"share": 1.0, "kinds": ("drop",), "only": "upload"}, r"cannot be reached \(", 3),
    "no right": ({"deny": "write"}, r".*(403|no right).*", 2),
}


@pytest.mark.parametrize(("faults", "problem", "code"), FAULTS.values(), ids=FAULTS)
def test_a_save_that_cannot_be_written_keeps_the_step_before(gcs_stub, monkeypatch, faults, problem, code):
    folder = folder_in(gcs_stub)
    save(folder, 6)
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "0.5")
    with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
        assert checkpoints.latest() == 6
        gcs_stub.server.order(**faults)
        begun = time.monotonic()
        checkpoints.save(state_at(9), {"step": 9})
        told = rf"^checkpoint=9: could not be saved \({problem}.*; the previous step 6 is intact"
        with pytest.raises(UserError, match=told) as error:
            checkpoints.wait()
        assert exit_code(error.value) == code and time.monotonic() - begun < 20
        gcs_stub.server.order()
        check_whole(folder, 6)
        checkpoints.save(state_at(9), {"step": 9})
    check_whole(folder, 9)


class Cutting(dict):
    """Objects of a bucket of the stub, which keeps half of what TensorStore uploads of the EMA, and says nothing."""

    def __setitem__(self, name, stored):
        if "/ema/ocdbt.process_0/d/" in name and len(stored.data) > 10_000:
            stored.data = stored.data[: len(stored.data) // 2]
        super().__setitem__(name, stored)


def test_an_upload_that_the_store_cut_off_fails_the_save(gcs_stub):
    """TensorStore compares no sums. The manifest, made of what was read back, would vouch for half an array."""
    folder, buckets = folder_in(gcs_stub), gcs_stub.server.server.buckets
    save(folder, 6, rows=1000)
    buckets[gcs_stub.name] = Cutting(buckets[gcs_stub.name])
    with pytest.raises(UserError, match=r"^checkpoint=9: could not be saved \(.*; the previous step 6 is intact"):
        save(folder, 9, rows=1000)
    check_whole(folder, 6, rows=1000)
    # The index of the process was cut off with it, without which nothing is merged; it may be in another object too.
    name, data = largest(gcs_stub)
    gcs_stub.put(name, data[: len(data) // 2])
    with pytest.raises(RuntimeError, match=r"^ema/ocdbt\S+ has \d+ bytes, not \d+$"):
        check_lengths(folder / "checkpoints" / "6" / "ema")


def test_a_store_that_does_not_answer_is_not_taken_for_damage(gcs_stub, monkeypatch):
    folder = folder_in(gcs_stub)
    save(folder, 3, 6)
    before = gcs_stub.names()
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "0.3")
    for faults, kind, code in (({"share": 1.0}, Unavailable, 3), ({"deny": "read"}, PermissionError, 2)):
        for only in ("", "GET .*alt=media"):
            gcs_stub.server.order(**faults, **({"only": only} if "share" in faults else {}))
            with contextlib.closing(Checkpoints(folder)) as checkpoints, pytest.raises(UserError) as error:
                checkpoints.latest()
            assert isinstance(error.value.__cause__, kind) and exit_code(error.value) == code
    gcs_stub.server.order()
    assert gcs_stub.names() == before
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        assert checkpoints.latest() == 6
        gcs_stub.server.order(share=1.0)
        with pytest.raises(Unavailable, match="cannot be reached"):
            checkpoints.restore(state_at(0))


def test_a_tenth_of_requests_that_fail_changes_no_bit(gcs_stub, monkeypatch):
    folder = folder_in(gcs_stub)
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "3")
    gcs_stub.server.order(share=0.1, seed=1)
    save(folder, 3, 6, 9)
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.latest() == 9
        assert digest(checkpoints.restore(state_at(0))[0]) == digest(state_at(9))
    failed = [status for _, _, status in gcs_stub.server.seen if status in (0, 429, 503)]
    assert len(failed) > 10
    gcs_stub.server.order()
    check_whole(folder, 9)
    assert steps_in(folder).look() == ([9, 6], [])
