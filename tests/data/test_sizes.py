"""Clips of several sizes: which one a clip takes, and batches of one size each."""

import numpy as np
import pytest
from data.clip_files import numbered, write_clip

from cmd_jax import defaults
from cmd_jax.config import check
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.pipeline import BucketPlan, FixedPlan
from cmd_jax.data.sizes import nearest_size, sizes_of
from cmd_jax.errors import UserError

SIZES = ((32, 64), (32, 32), (64, 32))
BUCKETS = np.repeat([0, 1, 2], [9, 4, 14])


def config(buckets: str, stage="autoencoder", **data):
    config = defaults.stage(stage)
    config.data.update(source="folder", root="x", height=32, width=64, buckets=buckets, **data)
    return config


def test_a_clip_takes_the_size_nearest_to_its_aspect():
    assert sizes_of(config("32x32, 64x32").data) == SIZES
    widths, heights = np.array([1920, 640, 500, 1080, 90]), np.array([1080, 480, 500, 1920, 45])
    assert nearest_size(widths, heights, SIZES).tolist() == [0, 1, 1, 2, 0]


@pytest.mark.parametrize("text", ["32", "32x", "32x32x3", "32x64", "32x32,32x32", "0x32", "999999x2", "32x33"])
def test_sizes_that_cannot_be(text):
    with pytest.raises(UserError) as raised:
        check(config(text))
    assert raised.value.field == "data.buckets"


def test_no_buckets_where_one_size_is_drawn_or_stored():
    with pytest.raises(UserError, match="shapes"):
        check(_with(config("32x32"), "data", source="shapes"))
    with pytest.raises(UserError, match="one size"):
        check(_with(config("32x32", "motion"), "latents", starts=1))
    with pytest.raises(UserError, match="one size"):
        check(_with(config("32x32", "motion"), "latents", normalize=True))
    with pytest.raises(UserError, match="position"):
        check(_with(config("32x32", "motion"), "model", position="table"))


def _with(config, group, **values):
    config[group].update(**values)
    return config


def test_batches_hold_one_bucket_each_and_every_clip_once_an_epoch():
    plan = BucketPlan(np.arange(len(BUCKETS)), BUCKETS, 4, seed=3)
    assert plan.batches == 2 + 1 + 3
    epochs = [[plan.ids(epoch * plan.batches + step) for step in range(plan.batches)] for epoch in range(3)]
    for epoch in epochs:
        assert all(len(set(BUCKETS[ids])) == 1 for ids in epoch)
        assert len(set(np.concatenate(epoch))) == plan.batches * 4
    order = [[int(BUCKETS[ids[0]]) for ids in epoch] for epoch in epochs]
    assert len(set(map(tuple, order))) > 1
    again = BucketPlan(np.arange(len(BUCKETS)), BUCKETS, 4, seed=3)
    assert np.array_equal(again.ids(plan.batches + 2), epochs[1][2])
    assert {int(i) for epoch in epochs for ids in epoch for i in ids} == set(range(len(BUCKETS)))


def test_a_bucket_smaller_than_a_batch_is_named():
    with pytest.raises(UserError) as raised:
        BucketPlan(np.arange(len(BUCKETS)), BUCKETS, 5, seed=0)
    assert (raised.value.field, raised.value.value) == ("train.batch_size", 5)


def test_a_folder_s_clips_are_fitted_to_the_size_nearest_to_them(tmp_path):
    for name, (height, width) in {"a": (32, 64), "b": (48, 48), "c": (80, 40)}.items():
        write_clip(tmp_path / f"{name}.mp4", numbered(4, height, width))
    source = FolderSource(tmp_path, frames=4, height=32, width=64, further_sizes=SIZES[1:])
    assert source.buckets.tolist() == [0, 1, 2]
    shapes = [source.clip(i, np.random.default_rng(0))[0].shape for i in range(3)]
    assert shapes == [(4, *size, 3) for size in SIZES]
    assert source.fingerprint != FolderSource(tmp_path, frames=4, height=32, width=64).fingerprint


def test_indices_of_a_split_and_their_buckets_go_together():
    indices = np.flatnonzero(np.arange(len(BUCKETS)) % 9)
    ids = np.concatenate([BucketPlan(indices, BUCKETS[indices], 2, seed=0).ids(step) for step in range(60)])
    assert set(ids.tolist()) == set(indices.tolist())
    fixed = FixedPlan(indices, 4, 0, BUCKETS[indices])
    batches = [[fixed.id(step, row) for row in range(4)] for step in range(fixed.batches)]
    assert all(len(set(BUCKETS[ids])) == 1 for ids in batches)
    assert set(sum(batches, [])) == set(indices.tolist())
