"""Checkpoints of many devices and of several processes."""

import contextlib
import os
import resource
import shutil
import socket

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import answers, check_whole, hashed, in_children, names_in, save, state_at, truncate
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cmd_jax.errors import Unavailable, UserError
from cmd_jax.files import as_path
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.hosts import digest, to_host
from cmd_jax.state import TrainState


def sharded_state(mesh, step=0):
    """state_at, split over a mesh of two axes -> (state, the ShapeDtypeStructs that ask for it)."""
    specs = TrainState(*(PartitionSpec(*axes) for axes in ((), ("x", "y"), ("y", "x"), ())))
    state = state_at(step)
    parts = TrainState(specs.step, {"w": specs.params}, {"w": specs.ema}, (specs.opt_state,))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), parts)

    def place(x, sharding):
        whole = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: whole[index])

    state = jax.tree.map(place, state, shardings)
    return state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def mesh_of(*shape):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def devices(count):
    """In a child process; several must not take programs from a cache (see distributed.start)."""
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_enable_compilation_cache", False)


def reshard(pipe, folder):
    devices(8)
    state, digests, shards = sharded_state(mesh_of(8, 1), 1)[0], [], []
    for step, shape in enumerate([(8, 1), (2, 4), (1, 1), (8, 1)], 1):
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            if step > 1:
                state, _ = checkpoints.restore(sharded_state(mesh_of(*shape))[1])
            digests.append(digest([state.params, state.ema, state.opt_state]))
            held = state.params["w"].addressable_shards
            shards.append((len(held), *held[0].data.shape))
            checkpoints.save(state.replace(step=jnp.int32(step)), {})
    pipe.send((digests, shards))


def test_resharded_over_8_2x4_1_and_8_devices_the_bits_are_the_same(tmp_path):
    ((digests, shards),) = answers(in_children(reshard, (tmp_path,)))
    state = state_at(1)
    assert digests == 4 * [digest([state.params, state.ema, state.opt_state])]
    assert shards == [(8, 2, 8), (8, 8, 2), (1, 16, 8), (8, 2, 8)]


def error_of(function, *arguments):
    try:
        return function(*arguments)
    except UserError as error:
        return str(error)


def one_of_two(pipe, index, port, work):
    """What a process of two makes of the folders that the test has prepared."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    devices(2)
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh, told = mesh_of(2, 2), {}
    for name in ("damaged", "older"):
        with contextlib.closing(Checkpoints(work / name)) as checkpoints:
            told[name] = error_of(checkpoints.latest)
    with contextlib.closing(Checkpoints(work / f"good{index}")) as checkpoints:  # each looks at another disk
        told["apart"] = error_of(checkpoints.latest)
    with contextlib.closing(Checkpoints(work / "good", keep=1)) as checkpoints, jax.set_mesh(mesh):
        with hashed() as told["hashed"]:
            told["good"] = checkpoints.latest()
        told["digest"] = checkpoints.digest("ema")
        state, run = checkpoints.restore(sharded_state(mesh)[1])
        told["restored"] = run, digest(state)
        told["held"] = len(state.params["w"].addressable_shards), to_host(state) is None
        checkpoints.save(sharded_state(mesh, 9)[0], {"step": 9})
        checkpoints.wait()
        if index == 1:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        checkpoints.save(sharded_state(mesh, 12)[0], {"step": 12})
        told["failed"] = error_of(checkpoints.wait)
        if index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        told["latest"] = checkpoints.latest()
    pipe.send(told)


def test_two_processes_decide_and_fail_together_and_one_restores_what_they_saved(tmp_path):
    for name in ("good", "damaged", "older"):
        save(tmp_path / name, *([3, 6] if name == "older" else [6]))
        if name != "good":
            truncate(tmp_path / name / "checkpoints" / "6")
    for index in (0, 1):
        shutil.copytree(tmp_path / "good", tmp_path / f"good{index}")
    truncate(tmp_path / "good1" / "checkpoints" / "6")
    files = [path for path in (tmp_path / "good" / "checkpoints" / "6").rglob("*") if path.is_file()]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    first, second = answers(in_children(one_of_two, (0, port, tmp_path), (1, port, tmp_path)))
    assert first["damaged"] == second["damaged"] and "checkpoint=6: damaged: " in first["damaged"]
    assert first["older"] == second["older"] == 3
    assert first["good"] == second["good"] == 6
    # Each hashed its share, and nothing is set aside because of what another one sees.
    assert len(first["hashed"]) + len(second["hashed"]) == len({*first["hashed"], *second["hashed"]}) == len(files) - 1
    assert abs(len(first["hashed"]) - len(second["hashed"])) <= 1
    assert first["digest"] == second["digest"]
    assert first["apart"].replace("good0", "good1") == second["apart"]
    assert "process 1 sees another one than process 0: " in first["apart"]
    assert names_in(tmp_path / "good1" / "checkpoints") == ["6"]
    assert first["restored"] == second["restored"] == ({"step": 6}, digest(state_at(6)))
    assert (first["held"], second["held"]) == ((2, False), (2, True))
    assert first["failed"].startswith(
        "checkpoint=12: could not be saved (process 1 failed to write its part); the prev"
    )
    assert second["failed"].startswith("checkpoint=12: could not be saved (") and "File too large" in second["failed"]
    assert first["latest"] == second["latest"] == 9
    assert names_in(tmp_path / "good" / "checkpoints") == ["9"]
    check_whole(tmp_path / "good", 9)


async def cannot_write(*arguments, **options):
    raise Unavailable(None, "cannot be reached")


def one_of_two_in_a_bucket(pipe, index, port, environment, url):
    os.environ.update(environment)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    devices(2)
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh, told = mesh_of(2, 2), {}
    with contextlib.closing(Checkpoints(as_path(url), keep=1)) as checkpoints, jax.set_mesh(mesh):
        with hashed() as told["hashed"]:
            told["latest"] = [checkpoints.latest()]
        state, run = checkpoints.restore(sharded_state(mesh)[1])
        told["restored"] = run, digest(state)
        checkpoints.save(sharded_state(mesh, 9)[0], {"step": 9})
        checkpoints.wait()
        told["latest"].append(checkpoints.latest())
        if index == 1:
            checkpoints._handlers["ema"].async_save = cannot_write
        checkpoints.save(sharded_state(mesh, 12)[0], {"step": 12})
        told["failed"] = error_of(checkpoints.wait)
        told["latest"].append(checkpoints.latest())
    pipe.send(told)


def test_two_processes_save_into_a_bucket_what_one_restores(gcs):
    folder = as_path(f"{gcs}/run")
    save(folder, 3, 6)
    gcs.put("run/checkpoints/9/ema/ocdbt.process_1/manifest.ocdbt", b"of an unfinished save")
    files = [name for name in gcs.names("run/checkpoints/6/") if not name.endswith("manifest.json")]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (port, gcs.server.environment, str(folder))
    first, second = answers(in_children(one_of_two_in_a_bucket, (0, *arguments), (1, *arguments)))
    assert first["latest"] == second["latest"] == [6, 9, 9]
    # Each hashed its share.
    assert len(first["hashed"]) + len(second["hashed"]) == len({*first["hashed"], *second["hashed"]}) == len(files)
    assert first["restored"] == second["restored"] == ({"step": 6}, digest(state_at(6)))
    failed = "checkpoint=12: could not be saved ({}); the previous step 9 is intact"
    assert first["failed"].startswith(failed.format("process 1 failed to write its part"))
    assert second["failed"].startswith(failed.format("cannot be reached"))
    assert {name.split("/")[2] for name in gcs.names("run/checkpoints/")} == {"9"}
    parts = {name.split("/")[4] for name in gcs.names("run/checkpoints/9/params/") if "ocdbt.process_" in name}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    check_whole(folder, 9)
