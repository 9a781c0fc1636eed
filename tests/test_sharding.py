"""Rules and meshes. What is named check_... test_eight_devices.py runs on eight devices."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from cmd_jax import defaults
from cmd_jax.errors import UserError
from cmd_jax.keys import derive
from cmd_jax.models.autoencoder import Autoencoder
from cmd_jax.models.discriminator import PatchDiscriminator
from cmd_jax.models.dit import DiT
from cmd_jax.models.vgg import LPIPS
from cmd_jax.sharding import (
    BATCH_AXES,
    LOGICAL_AXES,
    MESH_AXES,
    check_batch,
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


def abstract(*sizes):
    return AbstractMesh(sizes, MESH_AXES)


def spec(shape, names, table=defaults.RULES, sizes=(2, 2, 2)):
    return tuple(shardings_of(boxed(shape, names), abstract(*sizes), table).spec)


def mesh_config(**changes):
    config = defaults.stage("content").mesh.copy_and_resolve_references()
    config.update(changes)
    return config


def refusal(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value)


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
        for sizes in ((2, 2, 2), (1, 1, 1)):
            shardings_of(params, abstract(*sizes), defaults.RULES)  # refuses dimensions that collide
    assert names | activations == set(LOGICAL_AXES) == set(RULES)
    assert activations == {name for name in LOGICAL_AXES if name.startswith("act_")}
    assert RULES["act_batch"] == BATCH_AXES
    check_rules(defaults.RULES)


def test_the_mesh_is_filled_or_refused():
    assert dict(make_mesh(mesh_config()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes, problem in {
        (3, 1, 1): "mesh=3x1x1: does not make the 1 devices here; use for example 1x1x1 (dp) (data x fsdp x tensor)",
        (-1, 2, 1): "mesh=-1x2x1: does not make the 1 devices here; ",
        (0, 1, 1): "mesh=0x1x1: sizes must be positive, at most one of them -1; set mesh.data=-1",
        (-1, -1, 1): "mesh=-1x-1x1: sizes must be positive, at most one of them -1; ",
        (-2, 1, 1): "mesh=-2x1x1: sizes must be positive, ",
    }.items():
        assert refusal(make_mesh, mesh_config(**dict(zip(MESH_AXES, sizes, strict=True)))).startswith(problem)


@pytest.mark.parametrize(
    "changes, sizes",
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"preset": "dp"}, (8, 1, 1)),
        ({"preset": "fsdp"}, (1, 8, 1)),
        ({"preset": "tp"}, (1, 1, 8)),
        ({"preset": "fsdp_tp"}, (1, 4, 2)),
        ({"preset": "fsdp_tp", "tensor": 4}, (1, 2, 4)),
        ({"preset": "fsdp", "fsdp": -1, "data": 1}, (1, 8, 1)),
        ({"preset": "dp", "slices": 2}, (8, 1, 1)),
        ({"preset": "fsdp", "slices": 2}, (2, 4, 1)),
        ({"preset": "tp", "slices": 4}, (4, 1, 2)),
        ({"preset": "fsdp_tp", "slices": 2}, (2, 2, 2)),
    ],
)
def test_sizes_on_eight_devices(changes, sizes):
    assert mesh_sizes(mesh_config(**changes), 8) == sizes


def test_a_preset_fits_a_single_device_too():
    for preset in ("dp", "fsdp", "tp", "fsdp_tp"):
        assert mesh_sizes(mesh_config(preset=preset), 1) == (1, 1, 1)


def test_sizes_that_do_not_fit_list_those_that_do():
    eight = "1x1x8 (tp), 1x2x4, 1x4x2 (fsdp_tp), 1x8x1 (fsdp), 2x1x4, 2x2x2, 2x4x1, 4x1x2, 4x2x1, 8x1x1 (dp)"
    use = "use for example {} (data x fsdp x tensor)"
    assert refusal(mesh_sizes, mesh_config(data=3), 8) == (
        f"mesh=3x1x1: does not make the 8 devices here; {use.format(eight)}"
    )
    assert refusal(mesh_sizes, mesh_config(data=2, fsdp=-1, tensor=3), 8).startswith("mesh=2x-1x3: does not make the 8")
    assert refusal(mesh_sizes, mesh_config(preset="fsdp_tp", tensor=3), 8).startswith("mesh=fsdp_tp 1x2x3: does not ")
    # Each of them is right, and of many the presets and what is near to what was asked.
    many = refusal(mesh_sizes, mesh_config(data=3, fsdp=20, tensor=4), 256).partition("use for example ")[2]
    shapes = [tuple(map(int, word.split(" ")[0].split("x"))) for word in many.split(" and ")[0].split(", ")]
    assert len(shapes) == 12 and {np.prod(shape) for shape in shapes} == {256}
    assert {(256, 1, 1), (1, 256, 1), (1, 1, 256), (1, 128, 2), (4, 16, 4), (2, 32, 4)} < set(shapes)
    assert many.endswith(" and 33 more (data x fsdp x tensor)")
    # The data axis spans the slices.
    sliced = refusal(mesh_sizes, mesh_config(data=1, fsdp=8, slices=2), 8)
    assert sliced == (
        "mesh=1x8x1: the data axis is 1, which the mesh.slices=2 that it spans do not divide; "
        + use.format("2x1x4 (tp), 2x2x2 (fsdp_tp), 2x4x1 (fsdp), 4x1x2, 4x2x1, 8x1x1 (dp)")
    )


def test_a_preset_refuses_sizes_that_contradict_it():
    assert refusal(mesh_sizes, mesh_config(preset="fdsp"), 8) == (
        "mesh.preset=fdsp: not one of the choices; use one of dp, fsdp, tp, fsdp_tp"
    )
    remedy = "leave it out, or set the sizes without a preset"
    for changes, problem in (
        ({"preset": "fsdp", "data": 2}, "mesh.data=2: mesh.preset=fsdp makes it 1"),
        ({"preset": "dp", "fsdp": 2}, "mesh.fsdp=2: mesh.preset=dp makes it 1"),
        ({"preset": "tp", "tensor": 4}, "mesh.tensor=4: mesh.preset=tp makes it 8"),
        ({"preset": "fsdp", "tensor": -1}, "mesh.tensor=-1: mesh.preset=fsdp makes it 1"),
        ({"preset": "fsdp_tp", "fsdp": 8}, "mesh.fsdp=8: mesh.preset=fsdp_tp makes it 4"),
    ):
        assert refusal(mesh_sizes, mesh_config(**changes), 8) == f"{problem}; {remedy}"


@dataclasses.dataclass(frozen=True)
class Host:
    """A device of a CPU or GPU process."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def chips(slices, side=4):
    """Slices of side x side chips, four to a process, as JAX orders them."""
    for s in range(slices):
        for i in range(side * side):
            yield Chip(s * 1000 + i, (s * side * side + i) // 4, s, (i % side, i // side, 0))


def ids(mesh):
    return np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices)


def test_the_data_axis_spans_processes_where_devices_have_no_slices():
    hosts = [Host(id, id // 4) for id in range(8)]
    plain = np.arange(8).reshape(2, 2, 2)
    assert np.array_equal(ids(make_mesh(mesh_config(data=2, fsdp=2, tensor=2), hosts)), plain)
    assert np.array_equal(ids(make_mesh(mesh_config(data=2, fsdp=2, tensor=2, slices=2), hosts)), plain)
    assert np.array_equal(ids(make_mesh(mesh_config(slices=2), hosts)), np.arange(8).reshape(8, 1, 1))
    interleaved = [Host(id, id % 2) for id in range(8)]
    grid = ids(make_mesh(mesh_config(preset="fsdp", slices=2), interleaved))
    assert grid.shape == (2, 4, 1) and [set(row.ravel() % 2) for row in grid] == [{0}, {1}]
    number = "the number of processes that the 8 devices here belong to is 2"
    assert refusal(make_mesh, mesh_config(slices=4), hosts) == f"mesh.slices=4: {number}; set mesh.slices=2"
    assert refusal(make_mesh, mesh_config(slices=2), hosts[:7]) == (
        "mesh.slices=2: they have different numbers of devices: 4, 3; start the job on equal ones"
    )
    # Each node of GPUs calls itself a slice, which must not forbid to split a parameter over several of them.
    gpus = [Chip(id, id // 4, id // 4, (0, 0, 0), platform="gpu", device_kind="H200") for id in range(8)]
    assert np.array_equal(ids(make_mesh(mesh_config(preset="fsdp"), gpus)), np.arange(8).reshape(1, 8, 1))
    assert ids(make_mesh(mesh_config(preset="fsdp", slices=2), gpus)).shape == (2, 4, 1)


def test_the_data_axis_spans_the_slices_of_tpus():
    for changes, shape in (
        ({"preset": "fsdp"}, (2, 16, 1)),
        ({"preset": "fsdp_tp"}, (2, 8, 2)),  # which splits an axis of the 4x4 torus
        ({"preset": "tp"}, (2, 1, 16)),
        ({"data": 8, "fsdp": -1}, (8, 4, 1)),
    ):
        mesh = make_mesh(mesh_config(slices=2, **changes), list(chips(2)))
        assert mesh.devices.shape == shape and mesh.axis_names == MESH_AXES
        half = shape[0] // 2
        for rows, chosen in ((mesh.devices[:half], 0), (mesh.devices[half:], 1)):
            assert {device.slice_index for device in rows.flat} == {chosen}
    assert make_mesh(mesh_config(preset="fsdp_tp"), list(chips(1))).devices.shape == (1, 8, 2)
    wrong = "the number of slices that the 32 devices here belong to is 2; set mesh.slices=2"
    for slices in (1, 4, 8):  # 8 processes are no slices
        assert refusal(make_mesh, mesh_config(slices=slices), list(chips(2))) == f"mesh.slices={slices}: {wrong}"


@pytest.mark.parametrize("batch, nearest", [(30, 32), (9, 8), (3, 8), (21, 24)])
def test_a_batch_that_does_not_divide_names_both_numbers_and_the_nearest(batch, nearest):
    mesh = abstract(4, 2, 3)  # tensor does not split the batch
    with pytest.raises(UserError) as error:
        check_batch("train.batch_size", batch, mesh)
    assert str(error.value) == f"train.batch_size={batch}: not divisible by the 8 data x fsdp shards; use {nearest}"
    check_batch("train.batch_size", 24, mesh)


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
