"""How activations lie on the mesh: by the logical axes of their dimensions, and the rules that are in force.

Where no rules or no mesh are set (`sharding.partitioning`) nothing here does anything.
"""

import contextlib
import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

CELLS = ("act_batch", "act_token", None, "act_embed")  # of pictures [B, H, W, C]: rows of cells as tokens are


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The axes of the mesh that the rules split a logical axis over."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(a for a in dict(nn.get_logical_axis_rules()).get(axis) or () if a in sizes)


def splitting(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> list[tuple[str, ...]]:
    """The axes of the mesh over which each dimension of an array with these logical axes is split. A mesh axis splits
    the first dimension that asks for it and that it divides; the last ones of a dimension are tried first."""
    sizes, taken, found = jax.sharding.get_abstract_mesh().shape, set(), []
    for size, axis in zip(shape, axes, strict=True):
        split = ()
        for name in reversed(mesh_axes(axis)):
            if name not in taken and size % math.prod(sizes[a] for a in (name, *split)) == 0:
                split = (name, *split)
        taken.update(split)
        found.append(split)
    return found


def spec_of(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(*(split or None for split in splitting(shape, axes)))


def constrain(x, axes: tuple[str | None, ...]):
    """x, laid out by its logical axes; a dimension of None is whole on each device."""
    if not nn.get_logical_axis_rules() or jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, axes))


def ways(size: int, axis: str, beside: str | None = None) -> int:
    """Into how many parts the mesh splits a dimension of that size and logical axis, by axes that do not split
    another dimension, `beside`, already."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in splitting((0, size), (beside, axis))[1])


def splits(*axes: str, beside: str | None = None) -> bool:
    """Whether one of these logical axes lies on more than one device, by mesh axes that do not split another."""
    sizes, others = jax.sharding.get_abstract_mesh().shape, mesh_axes(beside)
    return any(sizes[name] > 1 for axis in axes for name in mesh_axes(axis) if name not in others)


def relaid(x, axes: tuple[str | None, ...]):
    """`constrain` where tokens or frames are split; else x, whose layout goes without saying."""
    return constrain(x, axes) if splits("act_token", "act_time") else x


def gathered(x):
    """Rows [B, ...], each whole on every device that has a part of it, or of what guidance made of it."""
    if not splits("act_token", "act_time", "act_guided", beside="act_batch"):
        return x
    return constrain(x, ("act_batch", *(None for _ in x.shape[1:])))


@contextlib.contextmanager
def rows_are(axis: str):
    """Within it the rows of a batch lie as the logical axis `axis` does, and nothing else over the same mesh axes."""
    rules, sizes = dict(nn.get_logical_axis_rules()), jax.sharding.get_abstract_mesh().shape
    batch = rules.get("act_batch", ())
    # Not by axes of one device: programs, and their names in caches, are then those without this.
    rows = tuple(a for a in mesh_axes(axis) if sizes[a] > 1 or a in batch)
    others = {n: tuple(a for a in axes if a not in rows) if n.startswith("act_") else axes for n, axes in rules.items()}
    with nn.logical_axis_rules(tuple((others | {"act_batch": rows}).items()) if rules else ()):
        yield


def with_own_queries(attend, query, key, value, axes: tuple[str | None, ...]):
    """attend(query, key, value) by each device of its own queries [..., N, heads, head_dim], to all keys and values
    [..., M, heads, head_dim] of the same leading dimensions and heads; axes: logical ones of the queries' up to N."""
    spec = spec_of(query.shape, (*axes, "heads", None))
    whole = PartitionSpec(*spec[:-3], None, *spec[-2:])
    return jax.shard_map(attend, in_specs=(spec, whole, whole), out_specs=spec, check_vma=False)(query, key, value)
