"""How activations lie on meshes, of shapes alone."""

import contextlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from cmd_jax import defaults
from cmd_jax.models import layout
from cmd_jax.sharding import SAMPLING_AXES

SPLIT = ("guidance", "tensor")
RULES = dict(defaults.RULES) | {"act_token": SPLIT, "act_time": SPLIT}
RULES |= {"act_guided": SAMPLING_AXES[:3], "act_picture": SAMPLING_AXES}


@contextlib.contextmanager
def within(*sizes, rules=RULES):
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh(sizes, SAMPLING_AXES)),
        nn.logical_axis_rules(tuple(rules.items())),
    ):
        yield


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((4, 16, 64, 8), ("act_batch", "act_time", "act_token", None), (SAMPLING_AXES[:2], SPLIT, None, None)),
        ((4, 4, 64, 8), ("act_batch", "act_time", "act_token", None), (SAMPLING_AXES[:2], "tensor", "guidance", None)),
        ((4, 6, 64, 8), ("act_batch", "act_time", "act_token", None), (SAMPLING_AXES[:2], "guidance", "tensor", None)),
        ((4, 5, 7, 8), ("act_batch", "act_time", "act_token", None), (SAMPLING_AXES[:2], None, None, None)),
        ((1, 64), ("act_batch", "act_token"), ("fsdp", SPLIT)),
        ((3, 64), (None, "act_token"), (None, SPLIT)),
    ],
)
def test_a_mesh_axis_splits_the_first_dimension_that_it_divides(shape, axes, spec):
    with within(2, 1, 2, 4):
        assert layout.spec_of(shape, axes) == PartitionSpec(*spec)


def test_rows_may_be_those_of_guidance_or_pictures():
    cells = (8, 64, 64, 3)
    with within(2, 1, 2, 2):
        assert layout.spec_of(cells, layout.CELLS) == PartitionSpec(("data", "fsdp"), SPLIT, None, None)
        with layout.rows_are("act_guided"):
            assert layout.spec_of(cells, layout.CELLS) == PartitionSpec(
                ("data", "fsdp", "guidance"), "tensor", None, None
            )
        with layout.rows_are("act_picture"):
            assert layout.spec_of(cells, layout.CELLS) == PartitionSpec(("data", "fsdp", *SPLIT), None, None, None)
        assert layout.spec_of(cells, layout.CELLS) == PartitionSpec(("data", "fsdp"), SPLIT, None, None)
    with within(2, 4, 1, 1), layout.rows_are("act_picture"):  # axes of one device change nothing
        assert layout.mesh_axes("act_batch") == ("data", "fsdp")


def test_frames_are_shared_by_the_devices_that_the_batch_leaves():
    for sizes, frames, shared in (
        ((1, 1, 2, 4), 16, 8),
        ((2, 2, 1, 2), 16, 2),
        ((1, 1, 2, 4), 4, 4),
        ((8, 1, 1, 1), 16, 1),
    ):
        with within(*sizes):
            assert layout.ways(frames, "act_picture", beside="act_batch") == shared
            assert layout.splits("act_token") == (math.prod(sizes[2:]) > 1)


def test_without_rules_or_mesh_nothing_happens():
    x = jnp.zeros((3, 5))
    assert layout.constrain(x, ("act_batch", "act_token")) is layout.relaid(x, ("act_batch", "act_token")) is x
    with nn.logical_axis_rules(tuple(RULES.items())), layout.rows_are("act_guided"):
        assert layout.constrain(x, ("act_batch", "act_token")) is x
    assert (layout.ways(16, "act_picture"), layout.splits("act_token")) == (1, False)
