import asyncio
import contextlib
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from cmd_jax.errors import UserError
from cmd_jax.running.checkpoint import ITEMS, Checkpoints
from cmd_jax.running.hosts import check_tree, digest, to_host
from cmd_jax.running.lock import lock_folder
from cmd_jax.running.manifest import verify
from cmd_jax.state import TrainState
from cmd_jax.trained import load_trained

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture(scope="module")
def folder():
    return tiny.trained() / "autoencoder"


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_digest_sees_names_shapes_dtypes_and_bits():
    x = np.arange(6, dtype=np.float32)
    trees = [{"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": x.view(np.int32)}, {"a": np.nextafter(x, 9)}, {"a": -x}]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest({"a": x, "b": x}) == digest({"b": jnp.asarray(x), "a": x.copy()})


def state_at(step):
    """Arrays that tell the step, with the optimiser's own containers."""
    w = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)
    params = {"layer": {"w": jnp.asarray(w), "b": jnp.full(3, step, jnp.bfloat16)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, mu_dtype=jnp.float32))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return TrainState(jnp.int32(step), params, jax.tree.map(jnp.negative, params), opt_state)


@contextlib.contextmanager
def opened(folder, **options):
    with contextlib.closing(Checkpoints(folder, **options)) as checkpoints:
        yield checkpoints


def save(folder, *steps, **options):
    with opened(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step), {"position": step})


def steps_in(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_newest_checkpoints_are_kept_and_restored_with_optimiser_and_run(tmp_path):
    save(tmp_path, 1, 2, 3, 3)
    assert steps_in(tmp_path) == ["2", "3"]
    with opened(tmp_path) as checkpoints:
        restored, run = checkpoints.restore(state_at(0))
        assert checkpoints.latest() == 3
        count = checkpoints.restore_item("opt_state")
        assert int(checkpoints.restore_item("step")) == 3
    assert digest(restored) == digest(state_at(3))
    assert jax.tree.structure(restored) == jax.tree.structure(state_at(3))
    assert run == {"position": 3}
    assert len(jax.tree.leaves(count)) == len(jax.tree.leaves(state_at(3).opt_state))


def test_as_many_are_kept_however_often_the_run_was_started(tmp_path):
    for steps, keep, left in (
        ((1, 2, 3), 5, ["1", "2", "3"]),
        ((4,), 5, ["1", "2", "3", "4"]),
        ((5, 6, 7), 5, ["3", "4", "5", "6", "7"]),
        ((), 1, ["3", "4", "5", "6", "7"]),  # what is there is left alone until there is something newer
        ((8,), 3, ["6", "7", "8"]),
    ):
        save(tmp_path, *steps, keep=keep)
        assert steps_in(tmp_path) == left


def test_only_complete_older_checkpoints_are_counted_and_removed(tmp_path):
    """An emptied one would else take the place of one that a fall back needs; a newer one is none of ours to judge."""
    save(tmp_path, 2, 4, 6, keep=3)
    for path in (tmp_path / "checkpoints" / "4").rglob("*"):
        if path.is_file():
            path.unlink()
    with opened(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 6
        (tmp_path / "checkpoints" / "9").mkdir()
        checkpoints.save(state_at(7), {})
        checkpoints.wait()
        assert steps_in(tmp_path) == ["6", "7", "9"]
    save(tmp_path, 8, keep=2)  # which sets the empty one aside
    assert steps_in(tmp_path) == ["7", "8"]


@pytest.mark.parametrize("name", ["exp[lr=1e-2]", "a**b?{x}!", "-x \u00e9\u65e5\u672c 100%25 #~", 'new\nline\t"$'])
def test_a_folder_may_have_any_name(tmp_path, name):
    """Orbax globs its own paths: in the first it would merge nothing of what it wrote, and the second it refuses."""
    folder = tmp_path / name / "stage"
    save(folder, 1, 2)
    with opened(folder) as checkpoints:
        restored, run = checkpoints.restore(state_at(0))
        checkpoints.save(state_at(3), {})
    assert digest(restored) == digest(state_at(2)) and run == {"position": 2}
    assert steps_in(folder) == ["2", "3"] and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["gs:/run", "logs:/logs", "a\\b", "\udcff"])
def test_a_folder_that_the_array_store_cannot_name_is_refused_before_anything_is_made(tmp_path, name):
    for open_folder in (Checkpoints, lock_folder):
        with pytest.raises(UserError, match=r"^workdir=.* (is not UTF-8|holds (gs:|\\)), .*rename it, or give another"):
            open_folder(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_link_is_followed_before_its_parent_is_taken(tmp_path):
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    save(tmp_path / "link" / ".." / "run", 1)
    assert steps_in(tmp_path / "far" / "run") == ["1"] and not (tmp_path / "run").exists()


def test_nothing_is_committed_that_was_not_merged(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._handlers["ema"], "finalize", lambda folder: None)
        checkpoints.save(state_at(2), {})
        with pytest.raises(UserError, match="checkpoint=2: could not be saved .*the parts of ema.*step 1 is intact"):
            checkpoints.wait()
    assert steps_in(tmp_path) == ["1"]


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    with opened(tmp_path) as checkpoints:
        state = state_at(5)
        checkpoints.save(state, {})
        jax.block_until_ready(step(step(state)))
        checkpoints.wait()
        assert digest(checkpoints.restore(state_at(0))[0]) == digest(state_at(5))


def test_a_running_event_loop_may_save_and_restore(tmp_path):
    """As in a notebook, whose cells run within one."""

    async def cell():
        save(tmp_path, 1, 2)
        with opened(tmp_path) as checkpoints:
            return checkpoints.restore(state_at(0))

    restored, run = asyncio.run(cell())
    assert digest(restored) == digest(state_at(2)) and run == {"position": 2}


def test_manifest_lists_every_file_with_size_and_hash(tmp_path):
    save(tmp_path, 4)
    step = tmp_path / "checkpoints" / "4"
    manifest = json.loads((step / "manifest.json").read_text())
    files = {p.relative_to(step).as_posix(): p for p in step.rglob("*") if p.is_file()}
    del files["manifest.json"]
    assert manifest["format"] == 1 and manifest["step"] == 4 and manifest["files"].keys() == files.keys()
    for name, path in files.items():
        content = path.read_bytes()
        assert manifest["files"][name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {name.split("/")[0] for name in files} == {"step", "params", "ema", "opt_state", "run.json"}
    verify(step, ITEMS)


def test_failed_and_cut_off_saves_leave_nothing_behind_at_the_next_start(tmp_path):
    for name in ("7.saving", "3.deleting"):
        (tmp_path / "checkpoints" / name / "params").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / "12").write_text("a file")
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() is None
    assert steps_in(tmp_path) == ["12", "3.deleting", "7.saving", "notes"]
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
    assert steps_in(tmp_path) == ["12", "notes"]


def test_host_copies_are_those_of_the_devices():
    host = to_host(state_at(2))
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(host))
    assert digest(host) == digest(state_at(2))


def test_reading_leaves_the_saves_of_a_running_training_alone(folder, tmp_path):
    copy = tmp_path / "autoencoder"
    shutil.copytree(folder, copy)
    with contextlib.closing(Checkpoints(copy)) as writer:
        unfinished = copy / "checkpoints" / "7.saving"
        unfinished.mkdir()
        before = sorted(p.name for p in copy.rglob("*"))
        load_trained(copy, "autoencoder")
        assert sorted(p.name for p in copy.rglob("*")) == before
        assert writer.latest() == tiny.STEPS


def test_likely_field_of_a_mismatch_is_named():
    found = {"a": np.zeros((3, 64)), "w": np.zeros((16, 64))}
    wanted = {"a": np.zeros((3, 96)), "w": np.zeros((24, 96))}
    config = {"model": {"width": 16, "depth": 3, "kind": "dit"}, "seed": 16}
    with pytest.raises(UserError) as error:
        check_tree("checkpoint 6: params", found, wanted, "use the config it was trained with", config)
    assert str(error.value) == (
        "checkpoint 6: params/a=((3, 64), 'float64'): this config wants ((3, 96), 'float64'); "
        "use the config it was trained with (likely model.width=16)"
    )


def test_checkpoint_of_another_width_names_parameter_and_shapes(folder):
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        params = checkpoints.restore_item("params")
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        wider = jax.tree_util.tree_unflatten(tree, [np.zeros([2 * n for n in x.shape], x.dtype) for _, x in flat])
        path, first = flat[0]
        with pytest.raises(UserError) as error:
            checkpoints.restore_item("params", wider)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert error.value.field == f"checkpoint 6: params/{name}"
        assert str(first.shape) in str(error.value)
        assert str(tuple(2 * n for n in first.shape)) in str(error.value)
        with pytest.raises(UserError, match="no such array"):
            checkpoints.restore_item("params", {})
