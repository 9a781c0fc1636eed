import numpy as np
import pytest

from cmd_jax.diffusion.schedules import Schedule, linear_betas, scaled_linear_betas, spaced_timesteps
from cmd_jax.errors import UserError


def test_known_betas():
    linear, scaled = linear_betas(), scaled_linear_betas()
    assert linear.dtype == scaled.dtype == np.float64 and linear.shape == scaled.shape == (1000,)
    np.testing.assert_allclose(linear[[0, 999]], [1e-4, 0.02], rtol=1e-12)
    np.testing.assert_allclose(scaled[[0, 999]], [0.00085, 0.012], rtol=1e-12)
    # Facts about the published schedules: what is left of the data at the noisiest step.
    np.testing.assert_allclose(Schedule.from_betas(linear).alpha_bar[-1], 4.0358e-5, rtol=1e-4)
    np.testing.assert_allclose(Schedule.from_betas(scaled).alpha_bar[-1], 4.6601e-3, rtol=1e-4)
    np.testing.assert_allclose(np.diff(np.sqrt(scaled)), np.diff(np.sqrt(scaled))[0], rtol=1e-9)


@pytest.mark.parametrize("spacing", ["even", "ddim"])
@pytest.mark.parametrize(
    "total, count", [(1000, 1), (1000, 2), (1000, 7), (1000, 60), (1000, 600), (1000, 1000), (9, 9), (1, 1)]
)
def test_any_count_rises_and_reaches_the_noisy_end(total, count, spacing):
    kept = spaced_timesteps(total, count, spacing)
    assert len(kept) == count and kept[0] >= 0 and kept[-1] < total and np.all(np.diff(kept) > 0)
    assert total - kept[-1] <= np.ceil(total / count)
    if count > 1:
        assert kept[0] == 0


def test_spacing_rules():
    assert spaced_timesteps(10, 4, "even").tolist() == [0, 3, 6, 9]
    assert spaced_timesteps(10, 4, "ddim").tolist() == [0, 3, 6, 9]
    assert spaced_timesteps(10, 5, "even").tolist() == [0, 2, 4, 7, 9]
    assert spaced_timesteps(10, 5, "ddim").tolist() == [0, 2, 4, 6, 8]
    assert spaced_timesteps(10, 1, "ddim").tolist() == [9]


def test_respacing_keeps_alpha_bar_and_original_timesteps():
    full = Schedule.from_betas(scaled_linear_betas())
    once = full.respace(spaced_timesteps(1000, 100))
    twice = once.respace([3, 40, 99])
    np.testing.assert_allclose(twice.alpha_bar, full.alpha_bar[once.timesteps[[3, 40, 99]]], rtol=1e-12)
    assert twice.timesteps.tolist() == once.timesteps[[3, 40, 99]].tolist()
    assert len(twice) == 3


def test_posterior_tables():
    schedule = Schedule.from_betas(linear_betas(5, 0.1, 0.5))
    before, after = schedule.alpha_bar_previous, schedule.alpha_bar
    assert before[0] == 1 and np.all(before[1:] == after[:-1])
    assert schedule.posterior_variance[0] == 0
    # Bayes' rule for two Gaussians: precisions add up.
    precision = (1 - schedule.betas[1:]) / schedule.betas[1:] + 1 / (1 - before[1:])
    np.testing.assert_allclose(schedule.posterior_variance[1:], 1 / precision, rtol=1e-12)
    assert schedule.posterior_log_variance[0] == np.log(schedule.posterior_variance[1])
    # The posterior mean of a noise-free x_t is the noise-free x_{t-1}.
    mean = schedule.posterior_mean_x0 + schedule.posterior_mean_x_t * np.sqrt(after)
    np.testing.assert_allclose(mean, np.sqrt(before), rtol=1e-12)
    single = schedule.respace([4])
    assert np.all(np.isfinite(single.posterior_log_variance)) and single.posterior_mean_x0[0] == pytest.approx(1)


@pytest.mark.parametrize("count", [0, -3, 1001, 2.5, True, "many"])
def test_bad_step_counts(count):
    with pytest.raises(UserError, match=rf"^sampling\.steps={count}: ") as error:
        spaced_timesteps(1000, count)
    assert "use 1 to 1000" in str(error.value)


def test_bad_schedules():
    with pytest.raises(UserError, match="^sampling.spacing=log: "):
        spaced_timesteps(1000, 10, "log")
    for betas in (linear_betas, scaled_linear_betas):
        with pytest.raises(UserError, match="^diffusion.timesteps=0: "):
            betas(0)
    with pytest.raises(UserError, match="^diffusion.betas="):
        Schedule.from_betas(linear_betas(10, 0.0, 0.02))
    with pytest.raises(UserError, match="^diffusion.betas="):
        Schedule.from_betas([0.1, np.nan])
    for kept in ([3, 2], [0, 10], [-1, 2], []):
        with pytest.raises(ValueError, match="rise strictly"):
            Schedule.from_betas(linear_betas(10)).respace(kept)
