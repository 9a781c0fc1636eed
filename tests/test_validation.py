"""Clips that training does not see, and the loss on them."""

import numpy as np
import pytest
import tiny

from cmd_jax import prepare as preparing
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.data.splits import cut
from cmd_jax.report.console import make_console
from cmd_jax.sharding import make_mesh

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
    found = prepared(run, tmp_path, latents__cache_clips=96, **HELD)
    held = cut(ShapesSource(clips=48, frames=4, height=16, width=24).keys(), 0.25, 0)
    assert found.clips == 96 and found.metadata.data.clips == 36
    assert found.split.validation.tolist() == [*held.validation, *(held.validation + 48)]
    rows = [found.read(i, None) for i in found.split.train]
    latents = {name: np.stack([row[name] for row in rows]) for name in ("content", "motion")}
    assert found.metadata.statistics == LatentStatistics.of(latents)
    assert "trained with data.validation=0.0, data.validation_seed=0: it may know" in capsys.readouterr().out


def test_statistics_of_uncached_latents_are_of_training_clips(run, tmp_path, monkeypatch):
    taken, encode = [], preparing.encode_clips

    def noted(read, encoder, params, indices, *more):
        taken.extend(indices)
        return encode(read, encoder, params, indices, *more)

    (tmp_path / "content").mkdir()
    monkeypatch.setattr(preparing, "encode_clips", noted)
    monkeypatch.setattr(preparing, "STATISTICS_CLIPS", 72)
    found = prepared(run, tmp_path, latents__cache_clips=0, **HELD)
    assert sorted(taken) == sorted(np.repeat(found.split.train, 2)) and len(found.split.validation) == 12
