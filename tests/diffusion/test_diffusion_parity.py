"""Against the numbers of tests/fixtures/diffusion.npz (images there are NCHW)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.diffusion.gaussian import Gaussian
from cmd_jax.diffusion.schedules import Schedule, linear_betas, spaced_timesteps

FIXTURE = np.load(Path(__file__).parents[1] / "fixtures" / "diffusion.npz")
SCHEDULE = Schedule.from_betas(linear_betas())
PROCESS = Gaussian(SCHEDULE, "eps", learned_range=True)


def image(name):
    return jnp.asarray(np.moveaxis(FIXTURE[name], 1, -1))


def assert_close(ours, name):
    reference = FIXTURE[name]
    reference = np.moveaxis(reference, 1, -1) if reference.ndim == 4 else reference
    assert ours.shape == reference.shape
    assert np.abs(np.asarray(ours) - reference).max() <= 1e-4 * np.abs(reference).max()


def toy(x_t, timesteps):
    eps = jnp.sin(3 * x_t) * timesteps[:, None, None, None] / 1000
    return jnp.concatenate([eps, jnp.zeros_like(eps)], axis=-1)


@pytest.mark.parametrize("name, count, spacing", [("full", 1000, "even"), ("50", 50, "even"), ("ddim50", 50, "ddim")])
def test_schedules(name, count, spacing):
    schedule = SCHEDULE.respace(spaced_timesteps(1000, count, spacing))
    assert np.array_equal(schedule.timesteps, FIXTURE[f"{name}_timesteps"])
    np.testing.assert_allclose(schedule.betas, FIXTURE[f"{name}_betas"], rtol=0, atol=1e-10)


def test_add_noise():
    assert_close(PROCESS.add_noise(image("x0"), FIXTURE["t"], image("noise")), "x_t")


def test_p_mean_variance():
    reverse = PROCESS.p_mean_variance(image("model_out"), image("x_t"), FIXTURE["t"])
    assert_close(reverse.mean, "mean")
    assert_close(reverse.variance, "variance")
    assert_close(reverse.log_variance, "log_variance")
    assert_close(reverse.x0, "pred_xstart")
    clipped = PROCESS.p_mean_variance(image("model_out"), image("x_t"), FIXTURE["t"], clip=1.0)
    assert_close(clipped.mean, "mean_clipped")
    assert np.abs(clipped.x0).max() <= 1.0


def test_loss():
    out = image("model_out")
    loss = jax.jit(lambda x0, t, noise: PROCESS.loss(lambda x_t, timesteps: out, x0, t, noise))
    loss, metrics = loss(image("x0"), FIXTURE["t"], image("noise"))
    assert_close(loss, "loss")
    assert_close(metrics["mse"], "mse")
    assert_close(metrics["vb"], "vb")
    # Per item too: the last items are far below the largest.
    np.testing.assert_allclose(metrics["vb"], FIXTURE["vb"], rtol=1e-4)


@pytest.mark.parametrize("name, clip", [("ddim_out", None), ("ddim_out_clipped", 1.0)])
def test_whole_ddim_runs(name, clip):
    process = Gaussian(SCHEDULE, "eps", learned_range=True, clip=clip)
    sample = jax.jit(lambda x: process.sample(toy, x, None, steps=50, spacing="even"))
    assert_close(sample(image("xT")), name)
