"""Datasets in buckets: the batches and fingerprints of the local ones, what is damaged, what is fetched when."""

import jax
import numpy as np
import pytest
from data.datasets import write_records

from cmd_jax import defaults
from cmd_jax.data.dataset import DatasetSource
from cmd_jax.data.pipeline import BatchPlan, batches, video_reader
from cmd_jax.sharding import make_mesh

SIZE = {"frames": 4, "height": 24, "width": 32}
RNG = np.random.default_rng(0)
VIDEOS = [RNG.integers(0, 255, (6 + i % 3, 24, 32, 3), np.uint8) for i in range(12)]
CLIPS = [(video, i % 2, f"{i}.avi", ("a", "b")) for i, video in enumerate(VIDEOS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    write_records(out, CLIPS, ("x", "y"), shards=4)
    return out


def copied(made, bucket, at="data"):
    for path in made.rglob("*"):
        if path.is_file():
            bucket.put(f"{at}/{path.relative_to(made)}", path.read_bytes())
    return f"{bucket}/{at}"


def read(source, steps=6):
    plan, mesh = BatchPlan(len(source), 4, seed=0), make_mesh(defaults.stage("content").mesh)
    options = {"start": 0, "stop": steps, "threads": 2, "prefetch": 2, "shelf": source.shelf}
    return [jax.tree.map(np.asarray, batch) for batch in batches(video_reader(source), plan, mesh, **options)]


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_batches_are_those_of_the_disk(kind, made, request):
    url = copied(made, request.getfixturevalue(kind))
    ours, theirs = DatasetSource(url, **SIZE), DatasetSource(made, **SIZE)
    assert ours.fingerprint == theirs.fingerprint
    for a, b in zip(read(ours), read(theirs), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
