import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from cmd_jax.checkpoint import Checkpoints, Trained, digest, export, load_trained, read_json
from cmd_jax.errors import UserError
from cmd_jax.state import TrainState

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compiles():
        yield


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
    return TrainState(jnp.int32(step), {"w": jnp.full(3, step, jnp.float32)}, {"w": jnp.zeros(3)}, (jnp.float32(step),))


def test_newest_checkpoints_are_kept_and_restored(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(state_at(step))
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        restored = checkpoints.restore(state_at(0))
    assert isinstance(restored, TrainState)
    assert digest(restored) == digest(state_at(3))


def test_reading_leaves_the_saves_of_a_running_training_alone(folder, tmp_path):
    copy = tmp_path / "autoencoder"
    shutil.copytree(folder, copy)
    with contextlib.closing(Checkpoints(copy)) as writer:
        unfinished = copy / "checkpoints" / "7.orbax-checkpoint-tmp"
        unfinished.mkdir()
        before = sorted(p.name for p in copy.rglob("*"))
        load_trained(copy, "autoencoder")
        assert sorted(p.name for p in copy.rglob("*")) == before
        assert writer.latest() == tiny.STEPS


def test_folder_weights_file_and_half_precision_agree(folder, tmp_path):
    from_folder = load_trained(folder, "autoencoder")
    from_file = load_trained(folder / "ema.safetensors", "autoencoder")
    assert from_file.config.to_dict() == from_folder.config.to_dict()
    assert from_file.facts == from_folder.facts
    assert from_folder.facts["digest"] == read_json(folder / "summary.json")["digests"]["ema"]
    assert digest(from_file.params) == digest(from_folder.params) == from_folder.facts["digest"]

    export(tmp_path / "half.safetensors", from_folder, np.float16)
    half = load_trained(tmp_path / "half.safetensors", "autoencoder")
    assert half.facts == from_folder.facts  # the digest is that of the original
    exact = leaves(from_folder.params)
    for name, x in leaves(half.params).items():
        assert x.dtype == np.float32
        assert np.abs(x - exact[name]).max() <= 1e-3 * np.abs(exact[name]).max()
    assert (tmp_path / "half.safetensors").stat().st_size < 0.7 * (folder / "ema.safetensors").stat().st_size


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


def test_what_is_no_trained_stage_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="is a autoencoder stage; give one of the content stage"):
        load_trained(folder, "content")
    with pytest.raises(UserError, match="holds no trained motion stage; train the motion stage there first"):
        load_trained(tmp_path, "motion")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_trained(tmp_path, "autoencoder")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(UserError, match="no such file"):
        load_trained(tmp_path / "missing.safetensors", "autoencoder")
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="holds no config of cmd_jax"):
        load_trained(tmp_path / "foreign.safetensors", "autoencoder")


def test_export_keeps_config_and_facts(tmp_path):
    trained = Trained(tiny.config_of("motion"), {"a": {"b": np.eye(2)}}, {"class_names": ["é, ü"], "digest": "x"})
    export(tmp_path / "x.safetensors", trained)
    again = load_trained(tmp_path / "x.safetensors", "motion")
    assert again.facts == trained.facts
    assert again.config.model.to_dict() == trained.config.model.to_dict()
    assert np.array_equal(again.params["a"]["b"], np.eye(2))
