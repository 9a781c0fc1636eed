"""Rules and meshes. Run as a script it holds what needs eight devices; a test starts it so."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from cmd_jax import defaults
from cmd_jax.errors import UserError
from cmd_jax.models.autoencoder import Autoencoder
from cmd_jax.models.discriminator import PatchDiscriminator
from cmd_jax.models.dit import DiT
from cmd_jax.models.vgg import LPIPS
from cmd_jax.sharding import BATCH_AXES, LOGICAL_AXES, MESH_AXES, check_batch, check_rules, make_mesh, shardings_of

ROOT = Path(__file__).parents[1]
RULES = dict(defaults.RULES)


def boxed(*shape_and_names):
    shape, names = shape_and_names
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def spec(shape, names, rules=defaults.RULES, sizes=(2, 2, 2)):
    return tuple(shardings_of(boxed(shape, names), AbstractMesh(sizes, MESH_AXES), rules).spec)


def test_parameters_are_split_by_the_rules_where_they_divide():
    assert spec((6, 8), ("embed", "mlp")) == ("fsdp", "tensor")
    assert spec((5, 8), ("embed", "mlp")) == (None, "tensor")
    assert spec((6, 7), ("embed", "mlp")) == ("fsdp", None)
    assert spec((3, 4, 6), ("layers", "heads", "embed")) == (None, "tensor", "fsdp")
    assert spec((4,), ("norm",)) == (None,)
    both = (("embed", ("data", "fsdp")), ("mlp", "tensor"))
    assert spec((8, 8), ("embed", "mlp"), both) == (("data", "fsdp"), "tensor")
    assert spec((6, 8), ("embed", "mlp"), both) == (None, "tensor")  # 6 over 2x2 stays whole
    twice = (("embed", "fsdp"), ("mlp", ("fsdp",)))
    assert spec((6, 8), ("embed", "mlp"), twice) == ("fsdp", None)  # an axis splits one dimension only
    plain = shardings_of({"step": jax.ShapeDtypeStruct((), jnp.int32)}, AbstractMesh((2, 2, 2), MESH_AXES), both)
    assert tuple(plain["step"].spec) == ()


def test_unknown_names_raise_on_both_sides():
    with pytest.raises(UserError, match="^rules=embde: not one of the choices; use one of .*embed"):
        check_rules((("embde", ("fsdp",)),))
    with pytest.raises(UserError, match="^rules.embed=model: not one of the choices; use one of data, fsdp, tensor"):
        check_rules((("embed", ("fsdp", "model")),))
    with pytest.raises(UserError, match="^rules=embed: has two rules; "):
        check_rules((("embed", ("fsdp",)), ("embed", ())))
    with pytest.raises(UserError, match="^rules=mlp: no rule for this logical axis"):
        spec((6, 8), ("embed", "mlp"), (("embed", ("fsdp",)),))
    with pytest.raises(ValueError):
        spec((6, 8), ("embed",))  # a dimension without a name
    assert check_rules([["embed", None], ["mlp", "tensor"]]) == (("embed", ()), ("mlp", ("tensor",)))


def test_every_axis_of_every_module_has_a_rule(monkeypatch):
    activations = set()
    real = nn.with_logical_constraint

    def record(x, names, *arguments, **options):
        assert len(names) == x.ndim
        activations.update(names)
        return real(x, names, *arguments, **options)

    monkeypatch.setattr(nn, "with_logical_constraint", record)
    video, image = jnp.zeros((1, 8, 16, 32, 3)), jnp.zeros((1, 16, 32, 3))
    small = {"patch": 4, "width": 16, "depth": 1, "heads": 2}
    one, label = jnp.zeros(1), jnp.zeros(1, jnp.int32)
    dit = partial(DiT, out_channels=6, classes=3, **small)
    inits = [
        (Autoencoder(**small, head_dim=8), (video,)),
        (Autoencoder(**small, head_dim=8, content="mean", position="none"), (video,)),
        (dit(), (image, one, label)),
        (dit(position="table", content_patch=4), (image, one, label, image)),
        (PatchDiscriminator(dimensions=2, base_channels=4), (image,)),
        (PatchDiscriminator(dimensions=3, base_channels=4), (video,)),
        (LPIPS(), (image, image)),
    ]
    names = set()
    for module, inputs in inits:
        params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
        for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)[0]:
            assert is_box(leaf) and len(leaf.names) == leaf.value.ndim, jax.tree_util.keystr(path)
            names |= set(leaf.names)
    assert names | activations == set(LOGICAL_AXES) == set(RULES)
    assert activations == {name for name in LOGICAL_AXES if name.startswith("act_")}
    assert RULES["act_batch"] == BATCH_AXES
    check_rules(defaults.RULES)


def test_the_mesh_is_filled_or_refused():
    assert dict(make_mesh({"data": -1, "fsdp": 1, "tensor": 1}).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes, problem in {
        (3, 1, 1): "mesh=3x1x1: does not make the 1 devices here; use for example 1x1x1",
        (-1, 2, 1): "mesh=-1x2x1: does not make the 1 devices here; ",
        (0, 1, 1): "mesh=0x1x1: sizes must be positive, at most one of them -1; set mesh.data=-1",
        (-1, -1, 1): "mesh=-1x-1x1: sizes must be positive, at most one of them -1; ",
        (-2, 1, 1): "mesh=-2x1x1: sizes must be positive, ",
    }.items():
        with pytest.raises(UserError) as error:
            make_mesh(dict(zip(MESH_AXES, sizes, strict=True)))
        assert str(error.value).startswith(problem)


@pytest.mark.parametrize("batch, nearest", [(30, 32), (9, 8), (3, 8), (21, 24)])
def test_a_batch_that_does_not_divide_names_both_numbers_and_the_nearest(batch, nearest):
    mesh = AbstractMesh((4, 2, 3), MESH_AXES)  # tensor does not split the batch
    with pytest.raises(UserError) as error:
        check_batch("train.batch_size", batch, mesh)
    assert str(error.value) == f"train.batch_size={batch}: not divisible by the 8 data x fsdp shards; use {nearest}"
    check_batch("train.batch_size", 24, mesh)


def test_eight_devices():
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {quick}"}
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=os.environ | flags | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["mesh", "batches", "state", "command"]


def on_eight_devices():
    import contextlib
    import io
    import tempfile

    from cmd_jax.data.pipeline import BatchPlan, batches, local_rows
    from cmd_jax.main import main
    from cmd_jax.sharding import batch_sharding, partitioning
    from cmd_jax.stages import AutoencoderStage
    from cmd_jax.state import init_state, make_optimizer, train_step

    mesh = make_mesh({"data": 2, "fsdp": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    try:
        make_mesh({"data": 3, "fsdp": 1, "tensor": 1})
    except UserError as error:
        assert str(error).endswith("does not make the 8 devices here; use for example 1x8x1, 2x4x1, 4x2x1, 8x1x1")
    print("mesh")

    rng = np.random.default_rng(0)
    videos = rng.integers(0, 256, (11, 4, 8, 16, 3), np.uint8)
    read = lambda index, rng: {"video": videos[index], "label": np.int32(index)}  # noqa: E731
    plan = BatchPlan(11, 8, seed=0)
    one, two = batches(read, plan, mesh, start=3, stop=5, threads=2, prefetch=2)
    assert local_rows(8, mesh) == list(range(8))
    for step, batch in ((3, one), (4, two)):
        assert np.array_equal(batch["label"], plan.ids(step)) and np.array_equal(batch["video"], videos[plan.ids(step)])
        assert batch["video"].sharding == batch_sharding(mesh)
        # Four shards of two clips, each on the two devices of the tensor axis.
        assert [s.data.shape[0] for s in batch["video"].addressable_shards] == [2] * 8
        assert len({s.index[0].start for s in batch["video"].addressable_shards}) == 4
    print("batches")

    config = defaults.stage("autoencoder")
    config.data.update(frames=4, height=8, width=16)
    config.model.update(patch=4, width=16, depth=2, heads=2, head_dim=8, motion_channels=3)
    config.optimizer.learning_rate = 1e-3
    stage, optimizer = AutoencoderStage(config), make_optimizer(config.optimizer)
    with partitioning(mesh, config.rules):
        state = init_state(stage, optimizer, 0, mesh, config.rules)
        kernel = gate_of(state)
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
        for array in (kernel, *moments):
            assert {s.data.shape for s in array.addressable_shards} == {(2, 8, 32)}, array.sharding  # of 2, 16, 64
        assert len(moments) == 2 * 2 * 2  # mu and nu of value and gate of encoder and decoder
        layout, key = jax.tree.map(lambda x: x.sharding, state), jax.random.key(1)
        alone = jax.tree.map(np.asarray, (state.params, one))
        step = partial(train_step, loss_fn=stage.loss, optimizer=optimizer, ema_decay=0.9)
        step = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        state, metrics = step(state, stage.frozen, one, jnp.int32(0), key)
        assert bool(metrics["applied"]) and gate_of(state).sharding == gate_of(layout)
    params, batch = alone
    loss, _ = jax.jit(stage.loss)(params, stage.frozen, batch, jax.random.fold_in(key, 0))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    print("state")

    for flags, message in {
        "--config.train.batch_size=12": "train.batch_size=12: not divisible by the 8 data x fsdp shards; use 16",
        "--config.mesh.data=3": "mesh=3x1x1: does not make the 8 devices here; use for example 1x8x1, 2x4x1, 4x2x1, "
        "8x1x1",
    }.items():
        error = io.StringIO()
        with contextlib.redirect_stderr(error), tempfile.TemporaryDirectory() as workdir:
            assert main(["train", "--config=configs/quickstart.py", f"--workdir={workdir}", flags]) == 2
        assert error.getvalue() == message + "\n", error.getvalue()
    print("command")


def gate_of(state):
    return state.params["autoencoder"]["encoder"]["blocks"]["mlp"]["gate"]["kernel"]


if __name__ == "__main__":
    on_eight_devices()
