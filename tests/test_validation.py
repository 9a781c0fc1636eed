"""Clips that training does not see, and the loss on them."""

import contextlib
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cmd_jax import prepare as preparing
from cmd_jax import train as training
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.data.splits import cut
from cmd_jax.data.store import folder_of, open_store
from cmd_jax.errors import Stopped, UserError
from cmd_jax.keys import derive
from cmd_jax.performance.goodput import Clock
from cmd_jax.report.console import make_console
from cmd_jax.running.peers import Peers
from cmd_jax.sharding import make_mesh
from cmd_jax.trained import load_trained
from cmd_jax.validation import Validation

pytestmark = pytest.mark.xdist_group("tiny")
HELD = {"data__validation": 0.25}


@pytest.fixture(scope="module")
def run():
    return tiny.trained()


def prepared(run, workdir, **changes):
    config = tiny.config_of("content", latents__autoencoder=run / "autoencoder", **changes)
    return preparing.prepare(config, workdir, make_mesh(config.mesh), make_console(), False)


def test_latents_of_clips_held_out_are_in_no_batch_and_in_no_statistics(run, tmp_path, capsys):
    """Each clip is encoded twice: both examples are on its side."""
    (tmp_path / "content").mkdir()
    found = prepared(run, tmp_path, latents__starts=2, latents__store_shard=10, **HELD)
    held = cut(ShapesSource(clips=48, frames=4, height=16, width=24).keys(), 0.25, 0)
    assert found.clips == 96 and found.metadata.data.clips == 36
    assert found.split.validation.tolist() == [*held.validation, *(held.validation + 48)]
    rows = [found.read(i) for i in found.split.train]
    for name in ("content", "motion"):
        values = np.concatenate([row[name].reshape(-1, row[name].shape[-1]) for row in rows]).astype(np.float64)
        statistics = getattr(found.metadata.statistics, name)
        np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-9)
        np.testing.assert_allclose(statistics.std, values.std(0), rtol=1e-9)
    assert sorted(found.filler.store.order[:24]) == found.split.validation.tolist()
    assert "trained with data.validation=0.0, data.validation_seed=0: it may know" in capsys.readouterr().out


def test_statistics_of_uncached_latents_are_of_training_clips(run, tmp_path, monkeypatch):
    taken, clip = [], ShapesSource.clip

    def noted(self, index, rng=None):
        taken.append(index)
        return clip(self, index, rng)

    (tmp_path / "content").mkdir()
    monkeypatch.setattr(ShapesSource, "clip", noted)
    monkeypatch.setattr(preparing, "STATISTICS_CLIPS", 72)
    found = prepared(run, tmp_path, latents__starts=0, **HELD)
    assert sorted(taken) == sorted(np.repeat(found.split.train, 2)) and len(found.split.validation) == 12


def trained(run, workdir, **changes):
    """-> (its lines of metrics but for the times, its summary)."""
    path = {"latents__autoencoder": run / "autoencoder"}
    summary = training.train(tiny.config_of("content", **path, **HELD, **changes), workdir)
    lines = [json.loads(line) for line in (workdir / "content" / "metrics.jsonl").read_text().splitlines()]
    timings = ("steps_per_second", "clips_per_second", "data_wait", "wall_seconds")
    timings += ("tflops_per_device", "process_memory_gib")
    return [{key: value for key, value in line.items() if key not in timings} for line in lines], summary


@pytest.fixture(scope="module")
def validated(run, tmp_path_factory):
    """A run that is validated every second step; while it is, its peers know that it is busy."""
    workdir, busy, depth = tmp_path_factory.mktemp("validated"), Peers.busy, []
    measured = Validation.__call__

    @contextlib.contextmanager
    def noted(self):
        depth.append(self)
        with busy(self):
            yield
        depth.pop()

    def checked(self, params):
        assert len(depth) == 1
        return measured(self, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Peers, "busy", noted)
        patch.setattr(Validation, "__call__", checked)
        return workdir, *trained(run, workdir, train__validate_every=2, train__checkpoint_every=2)


def losses_of(lines):
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def test_the_loss_is_that_of_the_ema_on_the_clips_held_out(run, validated):
    """Twelve of them in three batches, at timesteps and noise of their own."""
    workdir, lines, _ = validated
    assert [*losses_of(lines)] == [2, 4, 6] and len(set(losses_of(lines).values())) == 3
    last = lines[-1]
    assert last.keys() == {"step", "validation_loss", "validation_mse"}
    config = tiny.config_of("content", latents__autoencoder=run / "autoencoder", **HELD)
    found = preparing.prepare(config, workdir, make_mesh(config.mesh), make_console(), True)
    params, values = load_trained(workdir / "content", "content").params, []
    for number, ids in enumerate(found.split.validation.reshape(3, 4)):
        rows = [found.read(i, None) for i in ids]
        batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
        key = derive(derive(jax.random.key(0), "validation", number), "microbatch", 0)
        values.append(float(found.stage.loss(params, found.stage.frozen, batch, key)[0]))
    assert last["validation_loss"] == pytest.approx(np.mean(values), rel=1e-5)


def test_no_bit_of_the_training_depends_on_it(run, validated, tmp_path):
    _, lines, summary = validated
    alone, other = trained(run, tmp_path, train__validate_every=0)
    assert other["digests"] == summary["digests"]
    assert [line for line in lines if "loss" in line] == alone


def test_a_run_that_was_stopped_before_its_validation_makes_up_for_it(run, validated, tmp_path, monkeypatch, capsys):
    """Who asks to stop is not kept waiting for it."""
    scalars, measured = training.Metrics.scalars, []

    def interrupt(self, step, values):
        scalars(self, step, values)
        measured.extend([step] * ("validation_loss" in values))
        if measured == [2] and step == 2:  # step 3 brings the request; step 4 is the last, and one of a validation
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.Metrics, "scalars", interrupt)
    changes = {"train__validate_every": 2, "train__checkpoint_every": 2}
    with pytest.raises(Stopped):
        trained(run, tmp_path, **changes)
    assert measured == [2]
    lines, summary = trained(run, tmp_path, **changes)
    assert lines == validated[1] and summary["digests"] == validated[2]["digests"]
    assert measured == [2, 4, 6]
    out = capsys.readouterr().out
    assert all(f"content {step}/6  validation_loss " in out for step in (2, 4, 6))


def test_a_loss_that_was_lower_before_is_named(tmp_path, capsys):
    options, console = tiny.config_of("content", train__steps=100).train, make_console()
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "validation_loss": 0.5, "wall_seconds": 1.0}\n')
    with contextlib.closing(training.Metrics(tmp_path, 20)) as metrics:
        log = training.StepLog("content", options, 20, str, metrics, None, console, Clock(), dict)
        for step, loss in ((30, 0.625), (40, 0.25), (50, 0.75)):
            log.validated(step, {"loss": loss})
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition("validation_loss ")[2] for line in shown] == [
        "0.625 (at 10 it was 0.5)",
        "0.25",
        "0.75 (at 40 it was 0.25)",
    ]
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert b"validation_loss" in events.read_bytes()


def test_a_validation_needs_clips_held_out():
    with pytest.raises(UserError, match="^train.validate_every=10: "):
        tiny.config_of("content", train__validate_every=10)


def test_a_validation_encodes_what_training_does_not_need(run, tmp_path):
    """Of a store that two steps do not fill."""
    few = {"latents__store_shard": 4, "latents__normalize": False, "train__steps": 2, "train__validation_clips": 3}
    lines, _ = trained(run, tmp_path, train__validate_every=2, **few)
    store = open_store(folder_of(tmp_path / "latents", "cmd"))
    assert store.missing() == list(range(5, 12))  # three shards are held out, two are trained on
    assert [*losses_of(lines)] == [2]
