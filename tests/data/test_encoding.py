"""Encoding over the mesh, and a store that is filled while it is read."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from data.test_pipeline import CountedSource
from data.test_store import KEYS, plan

from cmd_jax import defaults
from cmd_jax.data.encoding import Encoder, Filler, measure
from cmd_jax.data.pipeline import BatchPlan, batches, order_of, video_reader
from cmd_jax.data.store import begin_store, folder_of
from cmd_jax.sharding import make_mesh

CLIPS, WINDOWS, SHARD, BATCH = 5, 13, 4, 4


def encode(params, batch):
    video = batch["video"].astype(jnp.float32)
    return {"content": params * video[:, 1], "motion": video[:, :, 0, :1], "label": batch["label"]}


@pytest.fixture
def encoder():
    read, config = video_reader(CountedSource(CLIPS)), defaults.stage("content")
    window = lambda number: read(number % CLIPS, np.random.default_rng((0, 2, number)))  # noqa: E731
    options = {"batch_size": BATCH, "threads": 2, "prefetch": 1}
    return Encoder(window, encode, np.float32(-1), make_mesh(config.mesh), config.rules, **options)


def test_windows_are_encoded_in_their_order(encoder):
    assert (encoder.groups, encoder.group, encoder.writes) == (1, 0, True)
    wanted = np.random.default_rng(0).permutation(WINDOWS)
    parts = list(encoder([wanted]))
    assert [len(part["label"]) for part in parts] == [4, 4, 4, 1]
    content, motion, label = (np.concatenate([part[name] for part in parts]) for name in ("content", "motion", "label"))
    assert label.tolist() == (wanted % CLIPS).tolist()
    assert (content == -(wanted % CLIPS)[:, None, None, None]).all()
    draws = [np.random.default_rng((0, 2, number)).integers(256) for number in wanted]
    assert motion[:, 0, 0, 0].tolist() == draws  # what a window draws belongs to its number


def store_of(folder, encoder, **changes):
    arrays = {"content": {"dtype": "float32", "shape": [2, 4, 3]}, "motion": {"dtype": "float32", "shape": [3, 1, 3]}}
    told = plan(arrays=arrays, clips=CLIPS, examples=WINDOWS, shard=SHARD) | changes
    store = begin_store(folder_of(folder, "cmd"), told, lambda: (order_of(WINDOWS, 0, 0), KEYS))
    lines = []
    return Filler(store, encoder, str, {}, lines.append), lines


def read(filler, plan, stop, **options):
    data = batches(filler.store.read, plan, filler.encoder.mesh, start=0, stop=stop, threads=2, prefetch=1)
    return filler.filled(plan, range(stop), data, options.get("stopped", lambda: False), contextlib.nullcontext)


def test_a_store_is_filled_as_far_as_batches_need_it(tmp_path, encoder):
    filler, lines = store_of(tmp_path, encoder)
    plan = BatchPlan(WINDOWS, BATCH, 0)
    found = []
    for step, batch in enumerate(read(filler, plan, stop=6)):
        found.append(batch)
        assert sorted(filler.missing) == list(range(min(step + 2, 4), 4))  # the first epoch needs a shard a step
        assert filler.store.complete == (step >= 2)
    assert len(found) == 6 and lines[-1].startswith("encoded 13 clips at ") and "4 of 4 shards" in lines[-1]
    for step, batch in enumerate(found):
        ids = plan.ids(step)
        assert batch["id"].tolist() == ids.tolist() and batch["label"].tolist() == (ids % CLIPS).tolist()
        assert (np.asarray(batch["content"]) == -(ids % CLIPS)[:, None, None, None]).all()
    again, _ = store_of(tmp_path, encoder)
    encoder.read = None  # it is all there
    assert not again.missing and len(list(read(again, plan, stop=2))) == 2


def test_another_order_waits_for_all_that_it_needs(tmp_path, encoder):
    filler, _ = store_of(tmp_path, encoder)
    plan = BatchPlan(WINDOWS, BATCH, seed=1)
    batch = next(data := read(filler, plan, stop=3))
    assert batch["id"].tolist() == plan.ids(0).tolist()
    assert filler.missing.isdisjoint(filler.store.shards_of(plan.ids(0)).tolist())
    data.close()


def test_a_request_to_stop_ends_the_batches_between_two_shards(tmp_path, encoder):
    filler, _ = store_of(tmp_path, encoder)
    calls = iter([False, False, True])
    assert len(list(read(filler, BatchPlan(WINDOWS, BATCH, 0), stop=6, stopped=lambda: next(calls)))) == 1
    assert sorted(filler.missing) == [2, 3] == filler.store.missing()


def test_a_failure_while_filling_ends_those_who_wait(tmp_path, encoder):
    filler, _ = store_of(tmp_path, encoder)
    data = read(filler, BatchPlan(WINDOWS, BATCH, 0), stop=6)
    next(data)
    encoder.read = None
    with pytest.raises(TypeError):
        next(data)
    with pytest.raises(RuntimeError, match="nobody fills"):
        filler.store.read(int(filler.store.order[-1]))


def test_statistics_without_a_store_are_those_of_a_store_of_the_same_windows(tmp_path, encoder):
    filler, _ = store_of(tmp_path, encoder)
    kept, measured = filler.statistics(), measure(encoder, WINDOWS)
    assert not filler.missing
    for ours, theirs in ((kept.content, measured.content), (kept.motion, measured.motion)):
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-12)
        np.testing.assert_allclose(ours.std, theirs.std, rtol=1e-12)
