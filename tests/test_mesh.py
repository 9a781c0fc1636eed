"""Meshes: their sizes, presets, slices, and the batches they split."""

import dataclasses

import numpy as np
import pytest
from meshes import abstract, mesh_config, refusal

from cmd_jax.errors import UserError
from cmd_jax.sharding import (
    MESH_AXES,
    check_batch,
    make_mesh,
    mesh_sizes,
)


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
