"""Mesh, the rules that map logical axes to it, and what they make of parameters. Unknown and colliding names raise."""

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cmd_jax.errors import UserError, choose
from cmd_jax.models.attention import asked

MESH_AXES = ("data", "fsdp", "tensor")  # of training
SAMPLING_AXES = ("data", "fsdp", "guidance", "tensor")
BATCH_AXES = ("data", "fsdp")
PRESETS = {"dp": "data", "fsdp": "fsdp", "tp": "tensor", "fsdp_tp": "fsdp"}  # the axis that each lets fill the devices
UNSET = {"data": -1, "fsdp": 1, "guidance": 1, "tensor": 1}  # sizes that a config has as long as nobody sets them
SHAPES_IN_ERROR = 12
LOGICAL_AXES = {  # what each name stands for
    "act_batch": "clips of a batch",
    "act_time": "frames",
    "act_token": "tokens",
    "act_embed": "hidden width of activations",
    "layers": "stacked blocks",
    "embed": "hidden width, as input of a kernel",
    "embed_out": "hidden width, as output of a square kernel",
    "heads": "heads times head width",
    "mlp": "hidden width of feed-forward layers",
    "modulation": "shifts, scales and gates",
    "norm": "scales and biases of norms",
    "patch": "values of one patch",
    "channels": "channels of a video",
    "motion": "channels of a motion latent",
    "timestep": "sinusoidal timestep features",
    "classes": "rows of the class table",
    "token": "rows of a table of positions or tokens",
    "conv_height": "height of a kernel",
    "conv_width": "width of a kernel",
    "conv_time": "time extent of a kernel",
    "conv_in": "input channels of a convolution",
    "conv_out": "output channels of a convolution",
}


def make_mesh(config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of the axes data, fsdp and tensor, and of sampling guidance, over `devices`, by default all there are.

    config: the `mesh` group {preset, data, fsdp, tensor, slices}, of a sample config also guidance. One size may be -1
    to fill the devices. The data axis is outermost, so that the devices of a host hold neighbouring rows of a batch,
    except where a TPU's network has another order. With `slices` above 1 the data axis spans them: TPU slices, or hosts
    where there is no such thing.

    Raises UserError for sizes that do not make the devices (it lists those that do), for sizes that contradict the
    preset, and for `slices` that the devices do not have.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = _check_slices(config.slices, devices)
    axes, sizes = axes_of(config), mesh_sizes(config, len(devices))
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:])), devices,
            process_is_granule=len(_slices_of(devices)) == 1, allow_split_physical_axes=True,
        )  # fmt: skip
    elif devices[0].platform == "tpu":
        # Where an axis of the mesh can be a whole axis of the torus it is; 4x4 chips have none for tensor=2.
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:  # jax.make_mesh takes each host of GPUs for a slice, and refuses several
        grid = np.asarray(devices).reshape(sizes)
    return mesh_over(grid, axes)


def mesh_over(grid: np.ndarray, axes: tuple[str, ...]) -> Mesh:
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def axes_of(config) -> tuple[str, ...]:
    """Of the mesh of a `mesh` group: guidance splits the batch of sampling only."""
    return tuple(axis for axis in SAMPLING_AXES if axis in config)


def is_unset(config) -> bool:
    """Whether nobody has said how a `mesh` group's devices are used."""
    return not config.preset and config.slices == 1 and all(config[axis] == UNSET[axis] for axis in axes_of(config))


def _slices_of(devices) -> Counter:
    """How many devices each slice has; platforms without slices have one."""
    return Counter(getattr(d, "slice_index", 0) for d in devices)


def _check_slices(slices: int, devices) -> int:
    found, unit = _slices_of(devices), "slices"
    if devices[0].platform != "tpu":
        if slices == 1:
            return slices
        if len(found) == 1:
            found, unit = Counter(d.process_index for d in devices), "processes"
    if len(found) != slices:
        problem = f"the number of {unit} that the {len(devices)} devices here belong to is {len(found)}"
        raise UserError("mesh.slices", slices, problem, f"set mesh.slices={len(found)}")
    if len(set(found.values())) > 1:
        problem = f"they have different numbers of devices: {', '.join(map(str, found.values()))}"
        raise UserError("mesh.slices", slices, problem, "start the job on equal ones")
    return slices


def mesh_sizes(config, count: int) -> tuple[int, ...]:
    """The sizes of the axes of a config's `mesh` group on `count` devices; errors as of `make_mesh`."""
    axes, slices = axes_of(config), config.slices
    sizes = {axis: config[axis] for axis in axes}
    shown = "x".join(str(size) for size in sizes.values())
    if any(s == 0 or s < -1 for s in sizes.values()) or list(sizes.values()).count(-1) > 1 + bool(config.preset):
        raise UserError("mesh", shown, "sizes must be positive, at most one of them -1", "set mesh.data=-1")
    if config.preset:
        choose("mesh.preset", config.preset, PRESETS)
        wanted = _preset_sizes(axes, config.preset, count, slices, sizes)
        shown = f"{config.preset} {'x'.join(map(str, wanted))}"
        for axis, size in zip(axes, wanted, strict=True):
            fills = -1 if axis == PRESETS[config.preset] else size
            if sizes[axis] not in (size, fills, UNSET[axis]):
                problem = f"mesh.preset={config.preset} makes it {size}"
                raise UserError(f"mesh.{axis}", sizes[axis], problem, "leave it out, or set the sizes without a preset")
        filled = wanted
    else:
        known = math.prod(s for s in sizes.values() if s > 0)
        filled = tuple(count // known if s == -1 else s for s in sizes.values())
    if math.prod(filled) != count:
        problem = f"does not make the {count} devices here"
        raise UserError("mesh", shown, problem, _valid_shapes(axes, filled, count, slices))
    if filled[0] % slices:
        problem = f"the data axis is {filled[0]}, which the mesh.slices={slices} that it spans do not divide"
        raise UserError("mesh", shown, problem, _valid_shapes(axes, filled, count, slices))
    return filled


def _preset_sizes(axes, preset: str, count: int, slices: int, given: dict) -> tuple[int, ...]:
    """The sizes of a preset; all but dp use the data axis for nothing but the slices. given: those of the config, of
    which guidance stays, and a tensor above 1 of fsdp_tp."""
    guidance, tensor = max(given.get("guidance", 1), 1), given.get("tensor", 1)
    inside = count // slices // guidance
    tensor = tensor if tensor > 1 else min(2, inside)  # a single device has nothing to split
    data, fsdp, tensor = {
        "dp": (slices * inside, 1, 1),
        "fsdp": (slices, inside, 1),
        "tp": (slices, 1, inside),
        "fsdp_tp": (slices, inside // tensor, tensor),
    }[preset]
    return tuple({"data": data, "fsdp": fsdp, "guidance": guidance, "tensor": tensor}[axis] for axis in axes)


def _valid_shapes(axes, sizes, count: int, slices: int) -> str:
    """All shapes that make `count` devices, or of many the presets' and those nearest to `sizes`."""
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    shapes = [
        (d, f, *g, count // math.prod((d, f, *g)))
        for d in divisors for f in divisors for g in ([(1,), (2,)] if "guidance" in axes else [()])
        if d % slices == 0 and count % math.prod((d, f, *g)) == 0
    ]  # fmt: skip
    names = {_preset_sizes(axes, preset, count, slices, {}): preset for preset in reversed(PRESETS)}
    shown = shapes
    if len(shapes) > SHAPES_IN_ERROR:
        # A size of 0 stands for one that had no devices left to fill.
        far = {s: sum(abs(math.log(a / max(b, 1))) for a, b in zip(s, sizes, strict=True)) for s in shapes}
        chosen = sorted(shapes, key=lambda shape: (shape not in names, far[shape]))[:SHAPES_IN_ERROR]
        shown = sorted(chosen)
    texts = ["x".join(map(str, shape)) + (f" ({names[shape]})" if shape in names else "") for shape in shown]
    more = f" and {len(shapes) - len(shown)} more" if len(shown) < len(shapes) else ""
    return f"use for example {', '.join(texts)}{more} ({' x '.join(axes)})"


def check_rules(rules) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The config's rules table as flax wants it: one rule for each of LOGICAL_AXES, to known mesh axes.

    Axes of activations may meet in one array, so no two of them may share a mesh axis, whatever its size; but where
    frames and tokens do, frames take it.
    """
    checked, activations = {}, {}
    for name, axes in rules:
        choose("rules", name, LOGICAL_AXES)
        axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        if name in checked:
            raise UserError("rules", name, "has two rules", "leave one")
        for axis in axes:
            choose(f"rules.{name}", axis, SAMPLING_AXES if name.startswith("act_") else MESH_AXES)
            if axes.count(axis) > 1:
                raise UserError(f"rules.{name}", axis, "stands there twice", "leave one")
            shared = "act_token" if name == "act_time" else name
            if name.startswith("act_") and activations.setdefault(axis, shared) != shared:
                problem = f"{activations[axis]} is split over it already"
                raise UserError(f"rules.{name}", axis, problem, "map one of the two to another axis or to ()")
        checked[name] = axes
    for name in LOGICAL_AXES:
        if name not in checked:
            raise UserError("rules", name, "no rule for this logical axis", f'add ("{name}", ()) to the rules table')
    return tuple(checked.items())


@contextlib.contextmanager
def partitioning(mesh: Mesh, rules, attention: str = "auto"):
    """Within it, logical constraints of the models are laid out on `mesh` by `rules`, and `attention` is the kernel
    that `models.attention.attend` takes.

    Two more rules follow from that of a batch's rows: those of guidance, two a clip, are also split over the guidance
    axis, and the frames of clips, as pictures of the image VAE, over all axes.
    """
    rules = check_rules(rules)
    batch = dict(rules)["act_batch"]
    more = {"act_guided": ("guidance",), "act_picture": SAMPLING_AXES}
    rows = tuple((name, (*batch, *(a for a in axes if a not in batch))) for name, axes in more.items())
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules + rows), asked(attention, mesh.devices.flat[0]):
        yield


class Placed(NamedTuple):
    """Where an array of a tree lies.

    name: its path. axes: its logical axes, () if it has none. reason: which dimensions stay whole though a rule would
    split them, and for an array that is whole on each device in any case why; else "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str, ...]
    sharding: NamedSharding
    reason: str

    @property
    def spec(self) -> PartitionSpec:
        return self.sharding.spec

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """On each device."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize

    @property
    def whole(self) -> bool:
        """Whether each device holds all of it."""
        return self.sharding.shard_shape(self.shape) == self.shape


def _place(name: str, leaf, mesh: Mesh, table: dict[str, tuple[str, ...]]) -> Placed:
    """The one decision where an array goes: `leaf` is logically partitioned, or whole on each device."""
    if not isinstance(leaf, nn.LogicallyPartitioned):
        reason = "it has no logical axes"
        return Placed(name, leaf.shape, np.dtype(leaf.dtype), (), NamedSharding(mesh, PartitionSpec()), reason)
    spec, taken, undivided, single = [], {}, [], []
    for axis, size in zip(leaf.names, leaf.value.shape, strict=True):
        if axis not in table:
            raise UserError("rules", axis, f"no rule for this logical axis of {name}", "add it to the rules table")
        for mesh_axis in table[axis]:
            if mesh_axis in taken:
                problem = f"{name} has {taken[mesh_axis]} split over it already"
                raise UserError(f"rules.{axis}", mesh_axis, problem, "map one of the two to another axis or to ()")
            taken[mesh_axis] = axis
        ways = math.prod(mesh.shape[a] for a in table[axis])
        shown = " x ".join(f"{a}={mesh.shape[a]}" for a in table[axis])
        spec.append((table[axis] or None) if size % ways == 0 else None)
        if size % ways:
            undivided.append(f"{axis} {size} not divisible by {shown}")
        elif table[axis] and ways == 1:
            single.append(f"{axis} split over {shown}")
    placed = Placed(
        name, leaf.value.shape, np.dtype(leaf.value.dtype), leaf.names, NamedSharding(mesh, PartitionSpec(*spec)), ""
    )
    reasons = [*undivided, *single] or ["no rule maps any of its axes"]
    return placed._replace(reason=", ".join(reasons if placed.whole else undivided))


def _place_all(boxed, mesh: Mesh, rules, name: str):
    table, is_boxed = dict(check_rules(rules)), lambda x: isinstance(x, nn.LogicallyPartitioned)

    def place(path, leaf):
        return _place("/".join(filter(None, (name, _path(path)))), leaf, mesh, table)

    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_boxed)


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings_of(boxed, mesh: Mesh, rules):
    """Shardings of a tree of logically partitioned (abstract) arrays; unboxed leaves are replicated.

    A dimension that its mesh axes do not divide stays whole. UserError for an axis without a rule, and for two
    dimensions of an array that rules split over the same mesh axis, whatever its size.
    """
    return jax.tree.map(
        lambda placed: placed.sharding, _place_all(boxed, mesh, rules, ""), is_leaf=lambda x: isinstance(x, Placed)
    )


def abstract(init, mesh, rules):
    """What init(key) would make, as ShapeDtypeStructs laid out on the mesh by the rules."""
    boxed = jax.eval_shape(init, jax.random.key(0))

    def one(x, sharding):
        # nn.unbox would constrain it, which only arrays can be.
        x = x.unbox(apply_constraint=False) if isinstance(x, nn.LogicallyPartitioned) else x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    is_boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(one, boxed, shardings_of(boxed, mesh, rules), is_leaf=is_boxed)


def layout(boxed, mesh: Mesh, rules, name: str = "") -> list[Placed]:
    """What `shardings_of` makes of each array of the tree, and why; `name` goes before their paths."""
    return jax.tree.leaves(_place_all(boxed, mesh, rules, name), is_leaf=lambda x: isinstance(x, Placed))


def replicated_report(records: list[Placed], above: int) -> list[str]:
    """A line for each array of more than `above` values that is whole on each device, on a mesh meant to split them."""
    return [
        f"{r.name} {list(r.shape)}, {r.size:,} values, is whole on each device: {r.reason}"
        for r in records
        if r.whole and r.size > above and r.sharding.mesh.shape["fsdp"] * r.sharding.mesh.shape["tensor"] > 1
    ]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over the data and fsdp axes, outermost dimension first."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def few_of_each(batch, mesh: Mesh, count: int):
    """The first rows of each way of a batch [B, ...], as few as give `count` in all, split as before; sends nothing."""
    each, split = -(-count // batch_ways(mesh)), PartitionSpec(BATCH_AXES)
    return jax.tree.map(jax.shard_map(lambda x: x[:each], mesh=mesh, in_specs=split, out_specs=split), batch)


def rows_of_all(batch, mesh: Mesh, count: int, start=0):
    """The `count` rows of a batch [B, ...] from `start` on, of a smaller one all, whole on each device, which never
    holds more of the others' rows."""

    def rows(x, start):
        size = min(count, len(x) * batch_ways(mesh))
        place = jax.lax.axis_index(BATCH_AXES) * len(x) + jnp.arange(len(x)) - start
        place = jnp.where(place < 0, size, place)  # dropped as those beyond are, not counted from the end
        mine = jnp.zeros((size, *x.shape[1:]), x.dtype).at[place].set(x, mode="drop")
        return jax.lax.psum(mine, BATCH_AXES)

    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    taken = jax.shard_map(rows, mesh=mesh, in_specs=(split, whole), out_specs=whole)
    return jax.tree.map(lambda x: taken(x, start), batch)


def check_batch(field: str, batch_size: int, mesh: Mesh, accumulate: int = 1):
    """The batch, or each of its `accumulate` microbatches, must split evenly over the batch axes of the mesh."""
    ways = batch_ways(mesh) * accumulate
    if batch_size % ways:
        nearest = max(ways, round(batch_size / ways) * ways)
        shards = f"the {batch_ways(mesh)} data x fsdp shards"
        problem = f"not divisible by {shards}" + (f" x {accumulate} microbatches" if accumulate > 1 else "")
        raise UserError(field, batch_size, problem, f"use {nearest}")
