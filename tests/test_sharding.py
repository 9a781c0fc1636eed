"""Rules and meshes. What is named check_... test_eight_devices.py runs on eight devices."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import abstract, mesh_config, refusal

from cmd_jax import defaults
from cmd_jax.keys import derive
from cmd_jax.models import autoencoder
from cmd_jax.models import dit as dit_module
from cmd_jax.models.autoencoder import Autoencoder
from cmd_jax.models.discriminator import PatchDiscriminator
from cmd_jax.models.dit import DiT
from cmd_jax.models.vgg import LPIPS
from cmd_jax.sharding import (
    BATCH_AXES,
    LOGICAL_AXES,
    check_rules,
    layout,
    make_mesh,
    mesh_sizes,
    replicated_report,
    shardings_of,
)

RULES = dict(defaults.RULES)


def boxed(*shape_and_names):
    shape, names = shape_and_names
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def rules(**changes):
    return tuple((RULES | changes).items())


def spec(shape, names, table=defaults.RULES, sizes=(2, 2, 2)):
    return tuple(shardings_of(boxed(shape, names), abstract(*sizes), table).spec)


def test_parameters_are_split_by_the_rules_where_they_divide():
    assert spec((6, 8), ("embed", "mlp")) == ("fsdp", "tensor")
    assert spec((5, 8), ("embed", "mlp")) == (None, "tensor")
    assert spec((6, 7), ("embed", "mlp")) == ("fsdp", None)
    assert spec((3, 4, 6), ("layers", "heads", "embed")) == (None, "tensor", "fsdp")
    assert spec((4,), ("norm",)) == (None,)
    both = rules(embed=("data", "fsdp"))
    assert spec((8, 8), ("embed", "mlp"), both) == (("data", "fsdp"), "tensor")
    assert spec((6, 8), ("embed", "mlp"), both) == (None, "tensor")  # 6 over 2x2 stays whole
    plain = shardings_of({"step": jax.ShapeDtypeStruct((), jnp.int32)}, abstract(2, 2, 2), both)
    assert tuple(plain["step"].spec) == ()


def test_unknown_names_raise_on_both_sides():
    assert refusal(check_rules, (("embde", ("fsdp",)),)).startswith("rules=embde: not one of the choices; use one of ")
    problem = "rules.embed=model: not one of the choices; use one of data, fsdp, tensor"
    assert refusal(check_rules, rules(embed=("fsdp", "model"))) == problem
    assert refusal(check_rules, (*defaults.RULES, ("embed", ()))) == "rules=embed: has two rules; leave one"
    for name in ("mlp", "act_time"):
        table = tuple((n, axes) for n, axes in defaults.RULES if n != name)
        missing = f'rules={name}: no rule for this logical axis; add ("{name}", ()) to the rules table'
        assert refusal(check_rules, table) == refusal(spec, (6, 8), ("embed", "mlp"), table) == missing
    nameless = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,), jnp.float32), ("width",))
    problem = refusal(shardings_of, {"block": {"bias": nameless}}, abstract(1, 1, 1), defaults.RULES)
    assert problem.startswith("rules=width: no rule for this logical axis of block/bias; ")
    with pytest.raises(ValueError):
        spec((6, 8), ("embed",))  # a dimension without a name
    loose = dict(check_rules([[n, None if n == "norm" else "tensor" if n == "mlp" else a] for n, a in RULES.items()]))
    assert (loose["norm"], loose["mlp"]) == ((), ("tensor",))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1)])
def test_colliding_names_raise_whatever_the_mesh(sizes):
    tree = {"mlp": {"kernel": boxed((6, 8), ("embed", "mlp"))}}
    for table in (rules(mlp=("fsdp",)), rules(mlp=("tensor", "fsdp"))):
        assert refusal(shardings_of, tree, abstract(*sizes), table) == refusal(
            layout, tree, abstract(*sizes), table
        ) == (
            "rules.mlp=fsdp: mlp/kernel has embed split over it already; map one of the two to another axis or to ()"
        )  # fmt: skip
    # The same two names in one table are no mistake as long as no parameter has both.
    assert spec((6, 8), ("patch", "mlp"), rules(mlp=("fsdp",)), sizes) == (None, "fsdp")
    problem = "rules.act_embed=fsdp: act_batch is split over it already; map one of the two to another axis or to ()"
    assert refusal(check_rules, rules(act_embed=("tensor", "fsdp"))) == problem
    assert dict(check_rules(rules(act_embed="tensor")))["act_embed"] == ("tensor",)
    assert refusal(check_rules, rules(mlp=("tensor", "tensor"))) == "rules.mlp=tensor: stands there twice; leave one"


def test_the_layout_says_why_an_array_is_whole():
    tree = {
        "split": boxed((6, 8), ("embed", "mlp")),
        "half": boxed((5, 8), ("embed", "mlp")),
        "odd": boxed((5, 7), ("embed", "mlp")),
        "thin": boxed((6, 3), ("embed", "motion")),
        "norm": boxed((4,), ("norm",)),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    records = {r.name: r for r in layout(tree, abstract(2, 2, 4), defaults.RULES, "params")}
    assert list(records) == [f"params/{name}" for name in sorted(tree)]
    found = {name.removeprefix("params/"): (r.bytes, r.whole, r.reason) for name, r in records.items()}
    assert found == {
        "split": (6 * 8 * 4 // 8, False, ""),
        "half": (5 * 8 * 4 // 4, False, "embed 5 not divisible by fsdp=2"),
        "odd": (5 * 7 * 4, True, "embed 5 not divisible by fsdp=2, mlp 7 not divisible by tensor=4"),
        "thin": (6 * 3 * 4 // 2, False, ""),
        "norm": (16, True, "no rule maps any of its axes"),
        "step": (4, True, "it has no logical axes"),
    }
    split = records["params/split"]
    assert (split.shape, split.dtype, split.axes) == ((6, 8), np.float32, ("embed", "mlp"))
    assert tuple(split.spec) == ("fsdp", "tensor")
    (thin,) = layout(tree["thin"], abstract(4, 1, 2), defaults.RULES, "thin")
    assert (thin.name, thin.whole, thin.reason) == ("thin", True, "embed split over fsdp=1")
    (both,) = layout(boxed((6,), ("embed",)), abstract(2, 2, 1), rules(embed=("data", "fsdp")))
    assert (both.whole, both.reason) == (True, "embed 6 not divisible by data=2 x fsdp=2")


def test_large_parameters_that_are_whole_are_reported_where_they_should_not_be():
    tree = {"wide": boxed((100, 30), ("embed", "motion")), "norm": boxed((3000,), ("norm",))}
    report = lambda above, *sizes: replicated_report(layout(tree, abstract(*sizes), defaults.RULES), above)  # noqa: E731
    wide = "wide [100, 30], 3,000 values, is whole on each device: "
    norm = "norm [3000], 3,000 values, is whole on each device: no rule maps any of its axes"
    assert report(2999, 1, 8, 1) == [norm, f"{wide}embed 100 not divisible by fsdp=8"]
    assert report(2999, 4, 1, 2) == [norm, f"{wide}embed split over fsdp=1"]
    assert report(2999, 1, 4, 2) == [norm]
    assert report(3000, 1, 8, 1) == []
    assert report(0, 8, 1, 1) == []  # dp: copies are what it is for


def test_every_axis_of_every_module_has_a_rule(monkeypatch):
    activations = set()

    def record(x, names):
        assert len(names) == x.ndim
        activations.update(names)
        return x

    for module in (autoencoder, dit_module):
        monkeypatch.setattr(module, "constrain", record)
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
        for sizes in ((2, 2, 2), (1, 1, 1)):
            shardings_of(params, abstract(*sizes), defaults.RULES)  # refuses dimensions that collide
    assert names | activations == set(LOGICAL_AXES) == set(RULES)
    assert activations == {name for name in LOGICAL_AXES if name.startswith("act_")}
    assert RULES["act_batch"] == BATCH_AXES
    check_rules(defaults.RULES)


def check_mesh():
    from cmd_jax.data.pipeline import BatchPlan, batches, local_rows
    from cmd_jax.sharding import batch_sharding, partitioning
    from cmd_jax.stages import AutoencoderStage
    from cmd_jax.state import init_state, make_optimizer, train_step

    mesh = make_mesh(mesh_config(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()

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
    loss, _ = jax.jit(stage.loss)(params, stage.frozen, batch, derive(key, "step", 0))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def check_command():
    import contextlib
    import io
    import tempfile

    from cmd_jax.main import main

    for flags, message in {
        "--config.train.batch_size=12": "train.batch_size=12: not divisible by the 8 data x fsdp shards; use 16",
        "--config.mesh.data=3": refusal(mesh_sizes, mesh_config(data=3), 8),
        "--config.mesh.slices=2": "mesh.slices=2: the number of processes that the 8 devices here belong to is 1; "
        "set mesh.slices=1",
    }.items():
        error = io.StringIO()
        with contextlib.redirect_stderr(error), tempfile.TemporaryDirectory() as workdir:
            arguments = ["--config=configs/quickstart.py", f"--workdir={workdir}", "--distributed=off", flags]
            assert main(["train", *arguments]) == 2
        assert error.getvalue() == message + "\n", error.getvalue()


def check_presets():
    """States of the three stages, born in the shards that `layout` foretells; kernels of blocks in eighths."""
    import tiny

    from cmd_jax.models.conditions import Classes
    from cmd_jax.sharding import partitioning
    from cmd_jax.stages import AutoencoderStage, FrozenAutoencoder, diffusion_stage
    from cmd_jax.state import TrainState, init_state, make_optimizer

    autoencoder = FrozenAutoencoder(tiny.config_of("autoencoder"), {"autoencoder": {}})
    for name in ("autoencoder", "content", "motion"):
        config = tiny.config_of(name, model__width=16, model__depth=2)
        optimizer = make_optimizer(config.optimizer)
        if name == "autoencoder":
            stage = AutoencoderStage(config)
        else:
            stage = diffusion_stage(config, autoencoder, Classes(7), {})
        params = jax.eval_shape(stage.init, jax.random.key(0))
        opt_state = jax.eval_shape(optimizer.init, params)
        tree = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, params, opt_state)
        for preset in ("fsdp", "tp", "fsdp_tp"):
            mesh = make_mesh(mesh_config(preset=preset))
            with partitioning(mesh, config.rules):
                state = init_state(stage, optimizer, 0, mesh, config.rules)
            placed = layout(tree, mesh, config.rules)
            arrays = jax.tree_util.tree_flatten_with_path(state)[0]
            kernels, sides = 0, set()
            for record, (path, array) in zip(placed, arrays, strict=True):
                assert record.name == jax.tree_util.keystr(path, simple=True, separator="/")
                shards = array.addressable_shards
                assert len(shards) == 8 and {shard.data.nbytes for shard in shards} == {record.bytes}, record
                if "/blocks/" in record.name and record.name.endswith("kernel"):
                    assert {shard.data.size for shard in shards} == {array.size // 8}, record
                    assert len({str(shard.index) for shard in shards}) == 8  # eight parts, no copies
                    kernels += 1
                    sides.add(record.name.split("/")[0])
            # Each parameter, its average and its two moments.
            assert sides == {"params", "ema", "opt_state"}
            assert kernels == 4 * {"autoencoder": 2 * 11, "content": 7, "motion": 7}[name]


def gate_of(state):
    return state.params["autoencoder"]["encoder"]["blocks"]["mlp"]["gate"]["kernel"]
