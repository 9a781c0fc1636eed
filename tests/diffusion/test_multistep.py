import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cmd_jax.diffusion.gaussian import PREDICTIONS, Gaussian
from cmd_jax.diffusion.multistep import dpmpp_coefficients, dpmpp_timesteps
from cmd_jax.diffusion.schedules import (
    SPACINGS,
    Schedule,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    spaced_timesteps,
)
from cmd_jax.errors import UserError
from cmd_jax.models.conditions import Classes
from cmd_jax.stages import ContentStage, FrozenAutoencoder, MotionStage

SCALED = Schedule.from_betas(scaled_linear_betas())
# Ends at alpha_bar 0.9, far from the singular end of log signal-to-noise, so that the order of a solver shows early.
SMOOTH = Schedule.from_betas(np.append(0.1, np.linspace(1e-4, 1.5e-3, 3999)))
MEAN, VARIANCE = 0.7, 0.25
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 5, 2)), jnp.float32)


def gaussian_score(process):
    """The exact model of data from N(MEAN, VARIANCE), with two more channels if the process has a learned range."""

    def denoise(x, timesteps):
        ab = jnp.asarray(process.schedule.alpha_bar, jnp.float32)[timesteps.astype(jnp.int32)][:, None, None, None]
        residual = x - jnp.sqrt(ab) * MEAN
        x0 = MEAN + VARIANCE * jnp.sqrt(ab) / (ab * VARIANCE + 1 - ab) * residual
        eps = (x - jnp.sqrt(ab) * x0) / jnp.sqrt(1 - ab)
        out = {"eps": eps, "x0": x0, "v": jnp.sqrt(ab) * eps - jnp.sqrt(1 - ab) * x0}[process.prediction]
        return jnp.concatenate([out, 9.0 + out], axis=-1) if process.learned_range else out

    return denoise


def exact(x, start, end):
    """Where the probability-flow ODE of that data takes x from alpha_bar `start` to `end`."""
    scale = [np.sqrt(ab * VARIANCE + 1 - ab) for ab in (start, end)]
    return np.sqrt(end) * MEAN + scale[1] / scale[0] * (np.asarray(x, np.float64) - np.sqrt(start) * MEAN)


def error(solver, steps, prediction="eps", learned_range=False):
    process = Gaussian(SMOOTH, prediction, learned_range)
    sample = jax.jit(
        lambda x: process.sample(
            gaussian_score(process), x, None, steps=steps, solver=solver, spacing="linspace", to_clean=False
        )
    )
    return np.abs(sample(X) - exact(X, SMOOTH.alpha_bar[-1], SMOOTH.alpha_bar[0])).max()


@pytest.mark.parametrize("prediction, learned_range", [("eps", True), ("v", False), ("x0", False)])
def test_second_order_towards_the_exact_solution(prediction, learned_range):
    coarse, middle, fine = (error("dpmpp", n, prediction, learned_range) for n in (32, 64, 128))
    assert coarse < 5e-4
    assert 3.5 < coarse / middle < 5 and 3.5 < middle / fine < 5


def test_ddim_is_of_first_order_and_worse():
    coarse, middle, fine = (error("ddim", n) for n in (17, 33, 65))  # its last step stays at timestep 0
    assert 1.7 < coarse / middle < 2.4 and 1.7 < middle / fine < 2.4
    assert middle > 5 * error("dpmpp", 32)


def test_timesteps_visited():
    assert spaced_timesteps(1000, 10, "leading", 1).tolist() == list(range(1, 1000, 100))
    assert spaced_timesteps(1000, 7, "leading").tolist() == [0, 142, 284, 426, 568, 710, 852]
    assert spaced_timesteps(1000, 10, "trailing").tolist() == list(range(99, 1000, 100))
    assert spaced_timesteps(1000, 7, "trailing").tolist() == [142, 285, 428, 570, 713, 856, 999]
    assert spaced_timesteps(1000, 10, "linspace").tolist() == list(range(0, 1000, 111))
    assert dpmpp_timesteps(1000, 10, "linspace").tolist() == [100, 200, 300, 400, 500, 599, 699, 799, 899, 999]
    assert dpmpp_timesteps(1000, 10, "leading", 1).tolist() == list(range(91, 1000, 90))[:10]
    assert dpmpp_timesteps(1000, 10, "trailing").tolist() == list(range(99, 1000, 100))
    assert dpmpp_timesteps(1000, 3, "even").tolist() == [333, 666, 999]
    assert dpmpp_timesteps(1000, 9, "ddim").tolist() == list(range(100, 1000, 100))
    for spacing in ("leading", "trailing", "linspace"):
        assert spaced_timesteps(1000, 1, spacing).tolist() == [999]
    assert dpmpp_timesteps(1000, 1, "linspace").tolist() == [999]


@pytest.mark.parametrize("to_clean", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 9, 40])
def test_a_constant_x0_is_followed_exactly(steps, to_clean):
    end = 1.0 if to_clean else SCALED.alpha_bar[0]
    schedule = SCALED.respace(dpmpp_timesteps(1000, steps, "linspace"), end)
    of_x, of_x0, of_before = dpmpp_coefficients(schedule).T
    now, then = schedule.alpha_bar[::-1], schedule.alpha_bar_previous[::-1]
    assert then[-1] == end
    np.testing.assert_allclose(of_x * np.sqrt(1 - now), np.sqrt(1 - then), atol=1e-12)
    np.testing.assert_allclose(of_x * np.sqrt(now) + of_x0 + of_before, np.sqrt(then), atol=1e-12)
    if to_clean:
        assert of_x[-1] == of_before[-1] == 0 and of_x0[-1] == 1


def test_which_steps_are_of_first_order():
    def first_order(steps, end, *below):
        kept = dpmpp_timesteps(1000, steps, "linspace")
        return np.flatnonzero(dpmpp_coefficients(SCALED.respace(kept, end), *below)[:, 2] == 0).tolist()

    level = SCALED.alpha_bar[0]
    assert first_order(20, 1.0) == first_order(20, 1.0, 0) == [0, 19]
    assert first_order(20, level) == [0] and first_order(20, level, 1000) == [0, 19]
    assert first_order(14, level) == [0, 13] and first_order(14, level, 0) == [0]
    assert first_order(2, level, 0) == [0] and first_order(1, 1.0) == [0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_step_is_ddim(prediction):
    process = Gaussian(SCALED, prediction)
    sample = [process.sample(gaussian_score(process), X, None, steps=1, solver=s) for s in ("ddim", "dpmpp")]
    np.testing.assert_allclose(*sample, atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_nears_the_data(spacing):
    """Clean data from Gaussian noise: the law of the data, up to the little signal that the noisiest step holds."""
    process = Gaussian(Schedule.from_betas(linear_betas()))
    got = process.sample(gaussian_score(process), X, None, steps=30, solver="dpmpp", spacing=spacing)
    np.testing.assert_allclose(got, MEAN + np.sqrt(VARIANCE) * X, atol=0.03)


def test_where_ddim_ends():
    """Not to clean data: to the level of timestep 0; from timestep 0 itself that is a step on the spot."""
    process, told = Gaussian(SCALED, "x0"), []

    def constant(x, timesteps):
        jax.debug.callback(lambda t: told.append(float(t[0])), timesteps, ordered=True)
        return jnp.full_like(x, 0.3)

    options = dict(steps=10, spacing="leading", to_clean=False)
    got = process.sample(constant, X, None, steps_offset=1, **options)
    jax.effects_barrier()
    assert told == list(range(901, 0, -100))
    ab = SCALED.alpha_bar
    eps = (X - np.sqrt(ab[901]) * 0.3) / np.sqrt(1 - ab[901])
    np.testing.assert_allclose(got, np.sqrt(ab[0]) * 0.3 + np.sqrt(1 - ab[0]) * eps, atol=1e-5)
    for solver in ("ddim", "dpmpp"):
        assert np.all(np.isfinite(process.sample(constant, X, None, solver=solver, **options)))
    clean = process.sample(constant, X, None, **{**options, "to_clean": True})
    np.testing.assert_allclose(clean, 0.3, atol=1e-6)


def test_clip_holds_the_sample():
    for prediction in PREDICTIONS:
        process = Gaussian(SCALED, prediction, clip=0.8)
        sample = lambda p: p.sample(lambda x, t: jnp.full_like(x, -2.0), X, None, steps=10, solver="dpmpp")  # noqa: E731
        assert np.abs(sample(process)).max() <= 0.8 < np.abs(sample(Gaussian(SCALED, prediction))).max()


@pytest.mark.parametrize("name", ["content", "motion"])
def test_class_conditional_models_run_it(name):
    autoencoder = FrozenAutoencoder(tiny.config_of("autoencoder"), {"autoencoder": None})
    stage = {"content": ContentStage, "motion": MotionStage}[name](
        tiny.config_of(f"{name},kind=gaussian"), autoencoder, Classes(5)
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), shapes)
    content = jnp.asarray(rng.uniform(-1, 1, (3, *autoencoder.content_shape)), jnp.float32)

    @jax.jit
    def sample(label, content, keys):
        given = content if name == "motion" else None
        null = jnp.full_like(label, 5)
        return stage.sample(
            params, stage.frozen["statistics"], label, given, keys,
            guidance=3.0, null=null, steps=5, solver="dpmpp", eta=0.0,
        )  # fmt: skip

    labels, keys = jnp.array([0, 4, 2]), jax.random.split(jax.random.key(1), 3)
    whole = sample(labels, content, keys)
    assert whole.shape == (3, *stage.shape) and np.all(np.isfinite(whole))
    np.testing.assert_allclose(sample(labels[::-1], content[::-1], keys[::-1]), whole[::-1], rtol=1e-4, atol=1e-4)
    other = np.abs(sample(labels.at[1].set(3), content, keys) - whole).max(axis=(1, 2, 3))
    assert other[1] > 1e-3 > max(other[0], other[2])


def test_cosine_betas():
    betas = cosine_betas()
    assert betas.shape == (1000,) and betas[-1] == 0.999 and np.all(np.diff(betas) >= 0)
    # Facts about this schedule: half of the variance is left half-way, up to the small offset.
    alpha_bar = Schedule.from_betas(betas).alpha_bar
    assert alpha_bar[499] == pytest.approx(
        np.cos(0.508 / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    )
    with pytest.raises(UserError, match="^diffusion.timesteps=0: "):
        cosine_betas(0)


def test_bad_input():
    process, identity = Gaussian(SCALED), lambda x, t: x
    with pytest.raises(UserError, match="^sampling.steps=1000: more than the 999 training steps"):
        process.sample(identity, X, None, steps=1000, solver="dpmpp")
    with pytest.raises(UserError, match="^sampling.steps_offset=1: .*use 0 to 0, or other sampling.steps"):
        process.sample(identity, X, None, steps=1000, spacing="leading", steps_offset=1)
    with pytest.raises(UserError, match="^sampling.spacing=karras: .*leading, trailing, linspace"):
        process.sample(identity, X, None, steps=10, solver="dpmpp", spacing="karras")
    for solver in ("dpmpp", "ddpm"):
        with pytest.raises(UserError, match=f"^sampling.eta=0.5: {solver} has none"):
            process.sample(identity, X, None, steps=10, solver=solver, eta=0.5)
