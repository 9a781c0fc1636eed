"""Mesh, the rules that map logical axes to it, and sharded initialisation. Unknown axis names raise."""

import contextlib
import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cmd_jax.errors import UserError, choose

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
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
    "token": "rows of a stored position table",
    "conv_height": "height of a kernel",
    "conv_width": "width of a kernel",
    "conv_time": "time extent of a kernel",
    "conv_in": "input channels of a convolution",
    "conv_out": "output channels of a convolution",
}


def make_mesh(shape) -> Mesh:
    """Mesh over all devices from {"data", "fsdp", "tensor"} sizes, one of which may be -1 to fill the rest."""
    sizes, devices = [shape[a] for a in MESH_AXES], jax.devices()
    shown = "x".join(map(str, sizes))
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise UserError("mesh", shown, "sizes must be positive, at most one of them -1", "set mesh.data=-1")
    known = math.prod(s for s in sizes if s > 0)
    filled = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(filled) != len(devices):
        divisors = [d for d in range(1, len(devices) + 1) if len(devices) % d == 0]
        valid = ", ".join(f"{d}x{len(devices) // d}x1" for d in divisors)
        raise UserError("mesh", shown, f"does not make the {len(devices)} devices here", f"use for example {valid}")
    devices = np.asarray(devices).reshape(filled)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_rules(rules) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The config's rules table as flax wants it; every name on both sides must be known."""
    checked = []
    for name, axes in rules:
        choose("rules", name, LOGICAL_AXES)
        axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in axes:
            choose(f"rules.{name}", axis, MESH_AXES)
        if name in dict(checked):
            raise UserError("rules", name, "has two rules", "leave one")
        checked.append((name, axes))
    return tuple(checked)


@contextlib.contextmanager
def partitioning(mesh: Mesh, rules):
    """Within it, logical constraints of the models are laid out on `mesh` by `rules`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(check_rules(rules)):
        yield


def shardings_of(boxed, mesh: Mesh, rules):
    """Shardings of a tree of logically partitioned (abstract) arrays; unboxed leaves are replicated.

    A dimension that its mesh axes do not divide stays whole, and so does one whose mesh axes an earlier one has taken.
    """
    table = dict(check_rules(rules))

    def spec_of(leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        spec, taken = [], set()
        for name, size in zip(leaf.names, leaf.value.shape, strict=True):
            if name not in table:
                raise UserError(
                    "rules", name, "no rule for this logical axis of a parameter", "add it to the rules table"
                )
            axes = table[name]
            fits = axes and taken.isdisjoint(axes) and size % math.prod(mesh.shape[a] for a in axes) == 0
            spec.append(axes if fits else None)
            taken |= set(axes if fits else ())
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(spec_of, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are split over the data and fsdp axes, outermost dimension first."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def check_batch(field: str, batch_size: int, mesh: Mesh, accumulate: int = 1):
    """The batch, or each of its `accumulate` microbatches, must split evenly over the batch axes of the mesh."""
    ways = batch_ways(mesh) * accumulate
    if batch_size % ways:
        nearest = max(ways, round(batch_size / ways) * ways)
        shards = f"the {batch_ways(mesh)} data x fsdp shards"
        problem = f"not divisible by {shards}" + (f" x {accumulate} microbatches" if accumulate > 1 else "")
        raise UserError(field, batch_size, problem, f"use {nearest}")
