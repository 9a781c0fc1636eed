import json
import logging
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import environment

from cmd_jax import defaults
from cmd_jax.files import as_path
from cmd_jax.models.conditions import Classes
from cmd_jax.running import flight as flight_module
from cmd_jax.running.flight import FlightRecord, explain, nonfinite
from cmd_jax.sharding import make_mesh, partitioning
from cmd_jax.stages import ContentStage, FrozenAutoencoder
from cmd_jax.state import TrainState, train_step

ROOT = Path(__file__).resolve().parents[2]
B, H, W, DEPTH, CLASSES = 4, 8, 16, 3, 5
KEY = jax.random.key(3)


def strict(text: str):
    """JSON as other readers take it: without NaN and Infinity."""

    def refuse(token):
        raise AssertionError(f"a bare {token}")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def content():
    """A content stage of three blocks, with latents in its batches."""
    config, autoencoder = defaults.stage("content"), defaults.stage("autoencoder")
    for c in (config, autoencoder):
        c.data.update(frames=4, height=H, width=W)
    autoencoder.model.update(patch=4, width=16, depth=1, heads=2, head_dim=8, motion_channels=4)
    config.model.update(patch=4, width=16, depth=DEPTH, heads=2)
    config.diffusion.update(kind="flow", learned_range=False, clip=0.0)
    stage = ContentStage(config, FrozenAutoencoder(autoencoder, {"autoencoder": {}}), Classes(CLASSES))
    boxed, rng = jax.eval_shape(stage.init, KEY), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), nn.unbox(boxed))
    batch = {
        "content": rng.normal(size=(B, H, W, 3)).astype(np.float32),
        "motion": np.zeros((B, 4, 6, 4), np.float32),
        "label": np.arange(B, dtype=np.int32),
        "id": np.array([31, 7, 31, 900], np.int32),  # a clip may be there twice
    }
    mesh = make_mesh(config.mesh)
    with partitioning(mesh, config.rules):
        yield SimpleNamespace(stage=stage, boxed=boxed, params=params, batch=batch)


def state_of(params):
    return TrainState(jnp.int32(6), params, params, ())


def changed(tree, name: str, index, value):
    """The tree with one value of one array replaced."""

    def one(path, x):
        x = np.array(x)
        if jax.tree_util.keystr(path, simple=True, separator="/") == name:
            x[index] = value
        return x

    return jax.tree_util.tree_map_with_path(one, tree)


def explained(content, params=None, batch=None, **options):
    state = state_of(content.params if params is None else params)
    batch, stage = content.batch if batch is None else batch, content.stage
    return explain(stage.loss, state, stage.frozen, batch, KEY, content.boxed, **options)


def test_nan_in_the_parameters_of_one_layer(content):
    params = changed(content.params, "blocks/mlp_in/kernel", (1, 2, slice(0, 5)), np.nan)
    wanted = {"blocks/mlp_in/kernel": {"count": 5, "of": 3 * 16 * 64, "layers": [0, 5, 0]}}
    assert nonfinite(params, content.boxed) == wanted
    found = explained(content, params)
    assert found["parameters"] == wanted
    assert np.isnan(found["loss"]) and found["batch"] == {}
    modules = found["modules"]
    # The first block is sound and the two others are not; before that layer only the gradients are broken.
    assert modules["DiT/embed"] == {"calls": 1, "outputs": 0, "gradients": 1}
    assert modules["DiT/blocks/query"] == {"calls": 3, "outputs": 1, "gradients": 3}
    assert modules["DiT/blocks/mlp_in"] == {"calls": 3, "outputs": 2, "gradients": 3}
    assert modules["DiT/blocks"] == {"calls": 3, "outputs": 2, "gradients": 3}
    names = list(modules)
    assert names.index("DiT/embed") < names.index("DiT/blocks/query") < names.index("DiT/blocks/mlp_in")
    assert found["gradients"]["blocks/query/kernel"]["layers"] == [256] * 3
    # The finite values are still told.
    largest = found["max_abs"]["parameters"]["blocks/mlp_in/kernel"]
    assert largest[0] == pytest.approx(np.abs(content.params["blocks"]["mlp_in"]["kernel"][0]).max(), rel=5e-3)
    assert len(largest) == DEPTH and all(0 < x < 1 for x in largest)


def test_an_overflow_is_followed_to_its_module(content):
    """Nothing that goes in is broken, everything that comes out is."""
    params = changed(content.params, "blocks/mlp_out/kernel", (2, slice(None), 3), 3e38)
    found = explained(content, params)
    assert not np.isfinite(found["loss"]) and found["parameters"] == {} and found["batch"] == {}
    first = next(name for name, counts in found["modules"].items() if counts["outputs"])
    assert first == "DiT/blocks/mlp_out" and found["modules"][first]["outputs"] == 1  # the last layer
    assert found["max_abs"]["parameters"]["blocks/mlp_out/kernel"][2] == 3e38


def test_nan_clips_are_named_by_id(content, tmp_path):
    video = content.batch["content"].copy()
    video[0, 1, 2, 0], video[3, :, :, 1] = np.inf, np.nan
    video[1, 0, 0, 0] = -40.04
    found = explained(content, batch=content.batch | {"content": video})
    assert found["batch"] == {31: {"content": 1}, 900: {"content": H * W}}
    assert found["parameters"] == {}
    assert found["max_abs"]["batch"] == {"content": 40.0, "motion": 0.0}
    flight = FlightRecord(tmp_path)
    flight.note(6, {"loss": jnp.float32(jnp.nan)}, [31, 7, 31, 900])
    text = flight.write("nan", **found).read_text()
    record = strict(text)
    assert record["facts"]["batch"] == {"31": {"content": 1}, "900": {"content": H * W}}
    assert record["facts"]["loss"] == "nan"
    assert record["steps"] == [{"step": 6, "metrics": {"loss": "nan"}, "ids": [31, 7, 31, 900]}]
    assert len(text.splitlines()) < 200 and max(map(len, text.splitlines())) < 200


def test_it_is_the_very_step_that_was_refused(content):
    accumulate = 2  # by microbatches and keys of their own
    found = explained(content, accumulate=accumulate)
    assert found["modules"] == found["parameters"] == found["gradients"] == found["batch"] == {}

    def gradient_size(gradients, opt_state, params):
        return gradients, jax.tree.map(lambda x: jnp.abs(x).max(), gradients)

    step = partial(
        train_step, loss_fn=content.stage.loss, ema_decay=0.0, accumulate=accumulate,
        optimizer=optax.GradientTransformation(None, gradient_size),
    )  # fmt: skip
    state = state_of(content.params).replace(opt_state=jax.tree.map(lambda x: np.float32(0), content.params))
    after, metrics = jax.jit(step)(state, content.stage.frozen, content.batch, jnp.int32(6), KEY)
    assert bool(metrics["applied"])
    assert found["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-6)
    for name in ("query", "mlp_out"):
        ours, wanted = found["max_abs"]["gradients"][f"blocks/{name}/kernel"], after.opt_state["blocks"][name]["kernel"]
        assert max(ours) == pytest.approx(float(wanted), rel=6e-3)  # three digits


def test_a_gradient_alone_that_is_not_finite():
    module = nn.Dense(3)

    def loss(params, frozen, batch, key):
        y = module.apply({"params": params}, batch["x"])
        root = jnp.sqrt(0.0 * y[:, 1].sum())
        return y.mean() + root - jax.lax.stop_gradient(root), {}

    batch = {"x": np.ones((2, 4), np.float32), "id": np.arange(2)}
    params = module.init(KEY, batch["x"])["params"]
    found = explain(loss, state_of(params), {}, batch, KEY, params)
    assert np.isfinite(found["loss"]) and found["parameters"] == {}
    assert found["gradients"] == {"bias": {"count": 1, "of": 3}, "kernel": {"count": 4, "of": 12}}
    assert found["modules"] == {"Dense": {"calls": 1, "outputs": 0, "gradients": 1}}


def test_nonfinite_without_logical_axes():
    tree = {"a": [np.array([1.0, np.inf]), np.array([3])], "b": jnp.array([[jnp.nan, 0]], jnp.bfloat16), "c": KEY}
    assert nonfinite(tree) == {"a/0": {"count": 1, "of": 2}, "b": {"count": 1, "of": 2}}
    assert nonfinite({"a": np.ones(3)}) == {}


def test_the_record_holds_the_last_steps(tmp_path):
    flight = FlightRecord(tmp_path, process=3, length=4)
    empty = flight.write("error", message="early")
    assert empty == tmp_path / "flight" / "start-error-process3.json"
    assert strict(empty.read_text())["steps"] == []
    for step in range(10):
        flight.note(step, {"loss": step / 2, "norm": float("inf")}, list(range(step, step + 2)))
    given = {"a": np.float32(-np.inf), "b": np.arange(3), "path": tmp_path, "none": None}
    path = flight.write("nan", message="x", map=given)
    assert path == tmp_path / "flight" / "0000009-nan-process3.json"
    record = strict(path.read_text())
    assert [s["step"] for s in record["steps"]] == [6, 7, 8, 9]
    assert record["steps"][-1] == {"step": 9, "metrics": {"loss": 4.5, "norm": "inf"}, "ids": [9, 10]}
    assert record["facts"] == {
        "message": "x",
        "map": {"a": "-inf", "b": [0, 1, 2], "path": str(tmp_path), "none": None},
    }
    assert (record["reason"], record["process"], record["pid"]) == ("nan", 3, os.getpid())
    assert record["host"] and record["time"].startswith("20") and "jax" in record["versions"]
    assert "threads" not in record
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("reason", ["stall", "lost-peer"])
def test_a_stall_tells_where_every_thread_is(tmp_path, reason):
    let_go = threading.Event()

    def waits_for_a_collective():
        let_go.wait(60)

    thread = threading.Thread(target=waits_for_a_collective, name="stuck")
    thread.start()
    try:
        record = strict(FlightRecord(tmp_path).write(reason, missing=[{"process": 1, "age": 60.2}]).read_text())
    finally:
        let_go.set()
        thread.join()
    stack = next(lines for name, lines in record["threads"].items() if name.startswith("stuck ("))
    assert any("waits_for_a_collective: let_go.wait(60)" in line for line in stack)
    assert any(name.startswith("MainThread (") for name in record["threads"])
    assert record["facts"]["missing"] == [{"process": 1, "age": 60.2}]


def test_a_record_that_cannot_be_written_hides_no_fault(tmp_path, caplog):
    (tmp_path / "flight").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert FlightRecord(tmp_path).write("nan") is None
    assert "no flight record" in caplog.text


def test_steps_are_noted_while_another_thread_writes(tmp_path):
    flight, ended = FlightRecord(tmp_path, length=50), threading.Event()

    def note():
        step = 0
        while not ended.is_set():
            flight.note(step, {"loss": 1.0}, [step])
            step += 1

    thread = threading.Thread(target=note)
    thread.start()
    try:
        for _ in range(20):
            steps = [s["step"] for s in strict(flight.write("error").read_text())["steps"]]
            assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True
    finally:
        ended.set()
        thread.join()


TWO = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import flax.linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from cmd_jax.running.flight import explain
from cmd_jax.models.layers import dense
from cmd_jax.state import TrainState

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
module = dense(6, ("embed", "mlp"))
def loss(params, frozen, batch, key):
    return jnp.mean(module.apply({"params": params}, batch["x"])), {}

def put(x, *spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index])

kernel, x = np.ones((4, 6), np.float32), np.ones((8, 4), np.float32)
kernel[3, 1] = np.nan  # lives on process 0 and 1 as a part
x[6, 2] = np.inf  # lives on process 1
params = {"kernel": put(kernel, "fsdp"), "bias": put(np.zeros(6, np.float32))}
state = TrainState(put(np.int32(0)), params, params, ())
batch = {"x": put(x, ("data", "fsdp")), "id": put(np.arange(8, dtype=np.int32) + 50, ("data", "fsdp"))}
boxed = jax.eval_shape(lambda key: module.init(key, x)["params"], jax.random.key(0))
with jax.set_mesh(mesh):
    print(json.dumps(explain(loss, state, {}, batch, jax.random.key(0), boxed)))
"""


def test_two_processes_find_the_same():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(2)}
    processes = [subprocess.Popen([sys.executable, "-c", TWO, address, str(i)], **pipes) for i in range(2)]
    try:
        outputs = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert str(first) == str(second)  # NaN is not equal to itself
    assert first["batch"] == {"56": {"x": 1}}
    assert first["parameters"] == {"kernel": {"count": 1, "of": 24}}
    assert first["modules"] == {"Dense": {"calls": 1, "outputs": 1, "gradients": 0}}


def test_where_the_bucket_is_what_went_wrong_it_is_kept_here(gcs_stub, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(flight_module, "PATIENCE", 0.1)
    record = FlightRecord(as_path(f"{gcs_stub}/run/motion"))
    assert str(record.write("nan")) == f"{gcs_stub}/run/motion/flight/start-nan-process0.json"
    gcs_stub.server.order(share=1.0, kinds=("503",))
    path = record.write("nan")
    assert path == tmp_path / "cache/flight" / gcs_stub.name / "run/motion/flight/start-nan-process0.json"
    assert strict(path.read_text())["reason"] == "nan"
    assert [str(path) in r.getMessage() for r in caplog.records] == [False, True]
