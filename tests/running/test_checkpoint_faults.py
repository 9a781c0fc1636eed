"""Checkpoints that are damaged, cut off, too large for the disk, killed."""

import contextlib
import errno
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from checkpoints import answers, check_whole, hashed, in_children, largest, names_in, save, state_at, truncate

from cmd_jax.errors import UserError
from cmd_jax.running import checkpoint as checkpointing
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.hosts import digest
from cmd_jax.running.manifest import digest_of, verify, write_manifest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 3, 6)
    return folder


@pytest.fixture
def two(saved, tmp_path):
    """A stage folder with the checkpoints 3 and 6."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def warned(caplog):
    with caplog.at_level(logging.WARNING, "cmd_jax.running.checkpoint"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "cmd_jax.running.checkpoint"]


# Damage.


def test_200_flipped_bits_are_detected_or_harmless(tmp_path):
    save(tmp_path, 6)
    step, wanted = tmp_path / "checkpoints" / "6", digest(state_at(6))
    files = sorted(path for path in step.rglob("*") if path.is_file())
    rng, detected, harmless, hit = random.Random(0), 0, 0, set()
    for _ in range(200):
        path = rng.choice(files)
        good = path.read_bytes()
        byte, bit = rng.randrange(len(good)), rng.randrange(8)
        path.write_bytes(good[:byte] + bytes([good[byte] ^ 1 << bit]) + good[byte + 1 :])
        hit.add(path)
        with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as checkpoints:
            try:
                checkpoints.latest()
            except UserError as error:
                assert error.field == "checkpoint" and error.value == 6
                assert path.relative_to(step).as_posix() in error.problem
                detected += 1
            else:
                state, run = checkpoints.restore(state_at(0))
                assert digest(state) == wanted and run == {"step": 6}
                harmless += 1
        path.write_bytes(good)
    assert detected + harmless == 200 and detected >= 195 and hit == set(files)
    check_whole(tmp_path, 6)


def rewrite(**changes):
    """A manifest that is genuine but says something else."""

    def change(step):
        manifest = json.loads((step / "manifest.json").read_text()) | changes
        manifest["digest"] = digest_of(manifest)
        (step / "manifest.json").write_text(json.dumps(manifest))

    return change


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGE = {
    "truncated": (truncate, r"/d/\w+ has \d+ bytes, not \d+"),
    "zero bytes": (lambda step: os.truncate(step / "params" / "_METADATA", 0), "params/_METADATA has 0 bytes, not "),
    "deleted": (lambda step: largest(step).unlink(), r"/d/\w+ cannot be read \(No such file or directory\)"),
    "no item": (lambda step: shutil.rmtree(step / "ema"), r"ema/\S+ cannot be read"),
    "changed": (lambda step: (step / "run.json").write_text('{"step": 9}\n'), "run.json has another SHA-256"),
    "renamed": (rewrite(step=5), "is that of step 5 under another name"),
    "empty manifest": (lambda step: os.truncate(step / "manifest.json", 0), "manifest.json is damaged"),
    "other manifest": (lambda step: (step / "manifest.json").write_text("[1]"), "manifest.json is damaged"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "has no manifest.json"),
    "empty folder": (empty, "is an empty folder"),
}


@pytest.mark.parametrize(("harm", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_older_good_step_is_used_and_the_damaged_one_set_aside(two, warned, harm, problem):
    harm(two / "checkpoints" / "6")
    before = sorted(two.rglob("*"))
    check_whole(two, 3)
    assert sorted(two.rglob("*")) == before  # read_only
    with contextlib.closing(Checkpoints(two)) as checkpoints:
        assert checkpoints.latest() == 3
        assert names_in(two / "checkpoints") == ["3"] and names_in(two / "damaged") == ["6"]
        checkpoints.save(state_at(6), {"step": 6})
    check_whole(two, 6)
    quiet, loud = warned()
    for line in (quiet, loud):
        assert re.match(f"checkpoint 6 is not whole: .*{problem}.*; falling back to step 3", line)
    assert "moved" not in quiet and loud.endswith(f"; moved to {two / 'damaged' / '6'}")

    harm(two / "checkpoints" / "6")
    with contextlib.closing(Checkpoints(two)) as checkpoints:
        assert checkpoints.latest() == 3
    assert names_in(two / "damaged") == ["6", "6-1"]


@pytest.mark.parametrize("read_only", [True, False])
def test_nothing_starts_from_scratch_where_all_is_damaged(two, read_only):
    truncate(two / "checkpoints" / "3")
    truncate(two / "checkpoints" / "6")
    for _ in range(2):  # the second time too
        with contextlib.closing(Checkpoints(two, read_only=read_only)) as checkpoints:
            with pytest.raises(
                UserError, match="checkpoint=6: damaged: .* bytes, .*; no other one is whole; bring back"
            ):
                checkpoints.latest()
            with pytest.raises(UserError, match="checkpoint=6: damaged"):
                checkpoints.save(state_at(9), {})
            with pytest.raises(UserError, match="checkpoint=6: damaged"):
                checkpoints.restore(state_at(0))
    assert names_in(two / "checkpoints") == ["3", "6"]


def test_empty_step_folders_and_none_before_are_no_checkpoint(two, warned):
    empty(two / "checkpoints" / "3")
    empty(two / "checkpoints" / "6")
    with contextlib.closing(Checkpoints(two)) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="holds no checkpoint; train that stage first"):
            checkpoints.restore(state_at(0))
    assert [line.partition(":")[0] for line in warned()] == [f"checkpoint {n} is not whole" for n in (6, 3)]
    assert all("there is no older one; moved to" in line for line in warned())
    assert names_in(two / "damaged") == ["3", "6"]


def test_checkpoint_of_a_newer_format_is_refused(two):
    rewrite(format=2)(two / "checkpoints" / "6")
    with (
        contextlib.closing(Checkpoints(two)) as checkpoints,
        pytest.raises(
            UserError, match="written in format 2, this cmd_jax reads up to 1; use the cmd_jax that wrote it"
        ),
    ):
        checkpoints.latest()
    assert names_in(two / "checkpoints") == ["3", "6"]


def test_every_byte_that_is_used_is_read_once(two):
    step = two / "checkpoints" / "6"
    files = [path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()]
    files.remove("manifest.json")
    of_ema = [name for name in files if name == "run.json" or name.startswith("ema/")]
    assert 2 < len(of_ema) < len(files) / 3
    with hashed() as names, contextlib.closing(Checkpoints(two, read_only=True)) as checkpoints:
        assert [checkpoints.latest(), checkpoints.latest()] == [6, 6]
        checkpoints.restore(state_at(0))
    assert sorted(names) == sorted(files)
    with hashed() as names, contextlib.closing(Checkpoints(two, read_only=True, items=("ema",))) as checkpoints:
        assert digest(checkpoints.restore_item("ema")) == digest(state_at(6).ema)
        with pytest.raises(ValueError, match="params is none of the items"):
            checkpoints.restore_item("params")
    assert sorted(names) == sorted(of_ema)


@pytest.mark.parametrize("item", ["params", "ema", "run.json"])
def test_damage_counts_where_it_is_used(two, item):
    path = two / "checkpoints" / "6" / item
    path = max(path.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size) if path.is_dir() else path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    steps = []
    for items in (("ema",), checkpointing.ITEMS):
        with contextlib.closing(Checkpoints(two, read_only=True, items=items)) as checkpoints:
            steps.append(checkpoints.latest())
    assert steps == [6 if item == "params" else 3, 3]


def test_shares_of_the_hashing_are_all_of_it_and_alike(tmp_path):
    for name, size in {
        "ema/a": 1000,
        "ema/b": 900,
        "params/c": 800,
        "run.json": 10,
        "ema/d": 700,
        "ema/e": 600,
    }.items():
        (tmp_path / "5" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "5" / name).write_bytes(bytes(size))
    write_manifest(tmp_path / "5", 5)
    shares = []
    for part in range(2):
        with hashed() as names:
            verify(tmp_path / "5", ("ema",), part, 2)
        shares.append({name.rpartition("/")[2] for name in names})
    assert shares == [{"a", "d", "run.json"}, {"b", "e"}]


def test_reader_of_a_running_training_follows_it(two, warned, monkeypatch):
    """The step that it looks at is removed meanwhile."""

    def vanish(step, *arguments):
        if step.name == "3":
            monkeypatch.undo()
            save(two, 9, 12)  # which removes it
        verify(step, *arguments)

    shutil.rmtree(two / "checkpoints" / "6")
    monkeypatch.setattr(checkpointing, "verify", vanish)
    with contextlib.closing(Checkpoints(two, read_only=True)) as checkpoints:
        assert checkpoints.latest() == 12
    assert warned() == []


# A disk that is full, a process that is killed.


def no_room(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("told_by", ["wait", "close", "save"])
def test_manifest_without_room_keeps_the_step_before(two, monkeypatch, told_by):
    monkeypatch.setattr(checkpointing, "write_manifest", no_room)
    checkpoints = Checkpoints(two, keep=1)
    checkpoints.save(state_at(9), {})
    with pytest.raises(UserError) as error:
        checkpoints.save(state_at(12), {}) if told_by == "save" else getattr(checkpoints, told_by)()
    assert str(error.value) == (
        "checkpoint=9: could not be saved (No space left on device); the previous step 6 is intact; "
        "free space or mend the disk, then run the same command again"
    )
    assert names_in(two / "checkpoints") == ["3", "6"]
    monkeypatch.undo()
    checkpoints.save(state_at(9), {"step": 9})
    checkpoints.close()
    assert names_in(two / "checkpoints") == ["9"]
    check_whole(two, 9)


def save_under_limit(pipe, folder, limit, rows):
    """No file may grow above `limit` bytes; the kernel refuses to write more, as it does on a full disk."""
    with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
        state = state_at(9, rows)
        checkpoints.latest()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        checkpoints.save(state, {"step": 9})
        try:
            checkpoints.wait()
        except UserError as error:
            pipe.send(str(error))


@pytest.mark.parametrize("too_large", ["an array", "the manifest"])
def test_file_that_cannot_be_written_keeps_the_step_before(tmp_path, too_large):
    rows = 500 if too_large == "an array" else 1
    save(tmp_path, 3, 6, rows=rows, keep=1)
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    manifest = sizes.pop("manifest.json")
    limit = manifest + 100 if too_large == "an array" else manifest - 1
    assert (max(sizes.values()) > limit) == (too_large == "an array")
    (line,) = answers(in_children(save_under_limit, (tmp_path, limit, rows)))
    assert line.startswith("checkpoint=9: could not be saved (")
    assert "File too large" in line and "); the previous step 6 is intact; free space" in line
    assert names_in(tmp_path / "checkpoints") == ["6"]
    check_whole(tmp_path, 6, rows)
    save(tmp_path, 9, rows=rows)
    check_whole(tmp_path, 9, rows)


CROWDED = """
import gc, logging, resource, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
orbax_own = ocp.type_handlers.get_type_handler(jax.Array)
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.errors import UserError
from cmd_jax.state import TrainState
logging.basicConfig()
rng = np.random.default_rng(0)
tree = {str(i): jnp.asarray(rng.normal(size=(40, 30)).astype(np.float32)) for i in range(100)}
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(1, 4):
    checkpoints = Checkpoints(Path(sys.argv[1]))
    checkpoints.save(TrainState(jnp.int32(step), tree, tree, (tree,)), {})
    try:
        checkpoints.wait()
    except UserError as error:
        print(error)
    checkpoints.close()
    gc.collect()
assert ocp.type_handlers.get_type_handler(jax.Array) is orbax_own, "other users of Orbax save as we do"
"""


def test_arrays_that_find_no_room_are_told_of_once(tmp_path):
    """Not also by the tasks that Orbax forgets, nor by TensorStore, which answers to event loops that it has closed."""
    command = [sys.executable, "-c", CROWDED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    told = [line.partition(" (")[0] for line in done.stdout.splitlines()]
    assert told == [f"checkpoint={step}: could not be saved" for step in (1, 2, 3)]


def kill(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_kill(*arguments):
    write_manifest(*arguments)
    kill()


def remove_half_and_kill(path, **options):
    largest(path).unlink()
    kill()


POINTS = {
    "before the manifest": ("write_manifest", kill, 6),
    "after the manifest": ("write_manifest", write_and_kill, 6),
    "removing the old one": ("shutil.rmtree", remove_half_and_kill, 9),
}


def save_and_be_killed(pipe, folder, point):
    with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
        place, name = checkpointing, POINTS[point][0]
        if "." in name:
            place, name = shutil, "rmtree"
        setattr(place, name, POINTS[point][1])
        checkpoints.save(state_at(9), {"step": 9})


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_the_worst_moments_of_a_save(tmp_path, point):
    save(tmp_path, 6)
    ((process, _),) = in_children(save_and_be_killed, (tmp_path, point))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(names_in(tmp_path / "checkpoints")) == 2  # what the kill left there
    left = POINTS[point][2]
    check_whole(tmp_path, left)
    save(tmp_path, 12, keep=2)
    assert names_in(tmp_path / "checkpoints") == sorted([str(left), "12"])
    check_whole(tmp_path, 12)


def save_without_end(pipe, folder):
    with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
        step = checkpoints.latest() or 0
        pipe.send(step)
        while True:
            step += 1
            checkpoints.save(state_at(step), {"step": step})
            pipe.send(step - 1)  # which saving the next one has waited for


def test_killed_at_random_moments_the_newest_whole_step_is_there(tmp_path):
    rng, newest, left = random.Random(0), 0, set()
    for _ in range(10):
        ((process, pipe),) = in_children(save_without_end, (tmp_path,))
        for _ in range(1 + rng.randrange(4)):
            assert pipe.poll(60)
            durable = pipe.recv()
            assert durable >= newest
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                durable = pipe.recv()
        left |= {name.lstrip("0123456789") for name in names_in(tmp_path / "checkpoints")}
        with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as checkpoints:
            newest = checkpoints.latest() or 0
        assert durable <= newest <= durable + 1
        if newest:
            check_whole(tmp_path, newest)
    assert newest > 5 and ".saving" in left
