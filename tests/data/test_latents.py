"""Statistics of latents from sums."""

import numpy as np
import pytest

from cmd_jax.data.latents import ChannelStatistics, LatentStatistics, Sums
from cmd_jax.stages import denormalize, normalize


def sums_of(values) -> dict:
    sums = Sums()
    for x in values:
        sums.add(x)
    return sums.as_json()


def test_statistics_make_latents_zero_mean_and_unit_variance():
    rng = np.random.default_rng(0)
    latents = {
        "content": rng.normal([1, 2, 3], [0.5, 1, 2], (20, 2, 4, 3)).astype(np.float32),
        "motion": rng.normal(-0.3, 0.1, (20, 3, 6, 2)).astype(np.float32),
    }
    parts = [{name: sums_of(x[rows]) for name, x in latents.items()} for rows in (slice(7), slice(7, 7), slice(7, 20))]
    statistics = LatentStatistics.of(parts).arrays()
    for name, values in latents.items():
        scaled = normalize(values, statistics[name])
        axes = tuple(range(values.ndim - 1))
        np.testing.assert_allclose(scaled.mean(axes), 0, atol=1e-6)
        np.testing.assert_allclose(scaled.std(axes), 1, atol=1e-6)
        back = denormalize(scaled, statistics[name])
        np.testing.assert_allclose(back, values, atol=1e-6)
    unit = LatentStatistics.unit(3, 2)
    assert unit.motion == ChannelStatistics((0.0, 0.0), (1.0, 1.0)) and unit.content.std == (1.0, 1.0, 1.0)


def test_channels_that_never_change_have_a_deviation():
    statistics = ChannelStatistics.of([sums_of(np.full((5, 2, 1), 0.1, np.float32))])
    assert statistics.mean[0] == pytest.approx(0.1) and statistics.std == (1e-6,)
