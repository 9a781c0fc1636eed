import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.diffusion.gaussian import PREDICTIONS, Gaussian, discretized_log_likelihood, normal_kl
from cmd_jax.diffusion.schedules import Schedule, linear_betas, scaled_linear_betas
from cmd_jax.errors import UserError
from cmd_jax.keys import derive

SCHEDULE = Schedule.from_betas(linear_betas())
SHAPE = (3, 2, 4, 6, 2)  # B T H W C


def normal(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def oracle(process, x0):
    """The denoiser that knows the data; it finds its noise level by the original timestep it is told."""

    def denoise(x_t, timesteps):
        t = timesteps.astype(jnp.int32)
        eps = process.eps_from_x0(x0, x_t, t)
        mean = {"eps": eps, "v": process.v(x0, t, eps), "x0": x0}[process.prediction]
        return jnp.concatenate([mean, jnp.zeros_like(mean)], axis=-1) if process.learned_range else mean

    return denoise


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_invert_each_other(prediction):
    process = Gaussian(SCHEDULE, prediction)
    x0, noise, t = normal(0), normal(1), jnp.array([0, 400, 800])
    x_t = process.add_noise(x0, t, noise)
    mean = process.target(x0, t, noise)
    got_x0, got_eps = process.predict(mean, x_t, t)
    np.testing.assert_allclose(got_x0, x0, atol=2e-5)
    np.testing.assert_allclose(got_eps, noise, atol=2e-4)  # 1 - alpha_bar is 1e-4 at t=0
    np.testing.assert_allclose(process.eps_from_x0(x0, x_t, t), noise, atol=2e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipped_prediction_stays_consistent_with_x_t(prediction):
    process = Gaussian(SCHEDULE, prediction)
    x0, noise, t = 3 * normal(0), normal(1), jnp.array([100, 400, 800])
    x_t = process.add_noise(x0, t, noise)
    got_x0, got_eps = process.predict(process.target(x0, t, noise), x_t, t, clip=0.5)
    np.testing.assert_allclose(got_x0, np.clip(x0, -0.5, 0.5), atol=2e-5)
    np.testing.assert_allclose(process.add_noise(got_x0, t, got_eps), x_t, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("learned_range", [False, True])
def test_oracle_has_no_loss_and_is_told_original_timesteps(prediction, learned_range):
    process = Gaussian(SCHEDULE.respace([5, 300, 777]), prediction, learned_range)
    x0, noise, t = normal(0), normal(1), jnp.array([2, 0, 1])
    told = []

    def denoise(x_t, timesteps):
        told.append(timesteps)
        mean = process.target(x0, t, noise)
        return jnp.concatenate([mean, -jnp.ones_like(mean)], axis=-1) if learned_range else mean

    loss, metrics = process.loss(denoise, x0, t, noise)
    assert told[0].dtype == jnp.float32 and told[0].tolist() == [777, 5, 300]
    assert loss.shape == (3,) and all(value.shape == (3,) for value in metrics.values())
    np.testing.assert_allclose(metrics["mse"], 0, atol=1e-12)
    if learned_range:  # variance at the posterior's: no divergence where t > 0
        np.testing.assert_allclose(np.asarray(metrics["vb"])[[0, 2]], 0, atol=1e-3)


def test_normal_kl_and_likelihood():
    mean, other, a, b = 0.3, -0.5, np.log(0.4), np.log(2.0)
    x = np.linspace(-30, 30, 400_001)
    p = np.exp(-((x - mean) ** 2) / 0.8) / np.sqrt(2 * np.pi * 0.4)
    log_ratio = -((x - mean) ** 2) / 0.8 - 0.5 * a + (x - other) ** 2 / 4 + 0.5 * b
    np.testing.assert_allclose(normal_kl(mean, a, other, b), np.sum(p * log_ratio) * (x[1] - x[0]), rtol=1e-4)
    # The 256 bins are a distribution: their probabilities sum to one.
    values = jnp.linspace(-1, 1, 256)
    total = jnp.sum(jnp.exp(discretized_log_likelihood(values, jnp.float32(0.2), jnp.log(0.4))))
    np.testing.assert_allclose(total, 1.0, atol=1e-3)


def test_vlb_gradient_does_not_reach_the_mean_part():
    process = Gaussian(SCHEDULE, "eps", learned_range=True)
    x0, noise, t = 0.3 * normal(0), normal(1), jnp.array([0, 10, 600])

    def totals(mean, variance):
        out = jnp.concatenate([mean, variance], axis=-1)
        loss, metrics = process.loss(lambda x_t, timesteps: out, x0, t, noise)
        return jnp.stack([jnp.sum(value) for value in (loss, metrics["mse"], metrics["vb"])])

    gradients = jax.jit(jax.jacrev(totals, argnums=(0, 1)))(normal(2), 0.1 * normal(3))
    (loss_mean, mse_mean, vb_mean), (loss_variance, mse_variance, vb_variance) = map(np.asarray, gradients)
    assert np.all(vb_mean == 0) and np.all(mse_variance == 0)
    assert np.all(np.abs(vb_variance).reshape(3, -1).max(axis=1) > 0) and np.abs(mse_mean).max() > 0
    np.testing.assert_allclose(loss_mean, mse_mean, rtol=1e-6)
    np.testing.assert_allclose(loss_variance, vb_variance, rtol=1e-6)
    assert np.all(np.isfinite(loss_variance))


def test_draw_is_uniform_over_the_schedule():
    process = Gaussian(SCHEDULE.respace(np.arange(0, 1000, 250)))
    t, noise = jax.jit(process.draw)(jax.random.key(0), jnp.zeros((4000, 3, 5)))
    counts = np.bincount(t, minlength=4)
    assert counts.shape == (4,) and counts.min() > 880 and counts.max() < 1120  # 1000 +- 4 sigma
    assert noise.shape == (4000, 3, 5) and abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas, steps", [(linear_betas, 50), (linear_betas, 1), (scaled_linear_betas, 7)])
def test_ddim_with_an_oracle_recovers_x0(prediction, betas, steps):
    process = Gaussian(Schedule.from_betas(betas()), prediction, learned_range=steps == 7)
    x0 = normal(0)
    got = jax.jit(lambda x: process.sample(oracle(process, x0), x, None, steps=steps))(normal(1))
    assert got.shape == x0.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, x0, atol=1e-4 if prediction == "x0" else 2e-3)


@pytest.mark.parametrize("solver, eta", [("ddpm", 0.0), ("ddim", 1.0)])
def test_noisy_solvers_with_an_oracle_recover_x0(solver, eta):
    process, x0 = Gaussian(SCHEDULE, "v", learned_range=True), normal(0, (2, 3, 6))
    keys = jax.random.split(jax.random.key(5), 2)
    got = process.sample(oracle(process, x0), normal(1, (2, 3, 6)), keys, steps=20, solver=solver, eta=eta)
    np.testing.assert_allclose(got, x0, atol=2e-3)


@pytest.mark.parametrize("steps, learned_range", [(20, True), (1000, False)])
def test_ancestral_sampling_of_a_gaussian(steps, learned_range):
    """With the exact score, and with its exact reverse variance at any number of steps, DDPM gives the data's law."""
    mean, variance = 0.7, 0.25
    process = Gaussian(SCHEDULE, "eps", learned_range)
    kept = SCHEDULE.respace(np.round(np.linspace(0, 999, steps)).astype(int))

    def table(values, timesteps):
        return jnp.asarray(values, jnp.float32)[jnp.searchsorted(jnp.asarray(kept.timesteps), timesteps)][:, None, None]

    alpha_bar = kept.alpha_bar
    marginal = alpha_bar * variance + 1 - alpha_bar
    share = None
    if learned_range:
        left = variance * (1 - alpha_bar) / marginal  # variance of x0 given x_t
        exact = np.log(kept.posterior_variance + kept.posterior_mean_x0**2 * left)
        low, high = kept.posterior_log_variance, np.log(kept.betas)
        share = 2 * (exact - low) / (high - low) - 1

    def denoise(x_t, timesteps):
        eps = table(np.sqrt(1 - alpha_bar) / marginal, timesteps) * (x_t - table(np.sqrt(alpha_bar) * mean, timesteps))
        if not learned_range:
            return eps
        return jnp.concatenate([eps, jnp.broadcast_to(table(share, timesteps), eps.shape)], axis=-1)

    keys = jax.random.split(jax.random.key(2), 50)
    sample = jax.jit(lambda x, k: process.sample(denoise, x, k, steps=steps, solver="ddpm"))
    got = np.asarray(
        sample(normal(3, (50, 20, 20)), keys)
    )  # 20,000 values: s.e. of the mean 0.0035, of the variance 0.0025
    assert abs(got.mean() - mean) < 0.015
    assert abs(got.var() - variance) < 0.012


@pytest.mark.parametrize("solver, eta, make_key", [("ddpm", 0.0, jax.random.PRNGKey), ("ddim", 1.0, jax.random.key)])
def test_a_sample_does_not_depend_on_its_batch(solver, eta, make_key):
    process, x = Gaussian(SCHEDULE), normal(1)
    keys = jax.random.split(make_key(0), 3)

    @jax.jit
    def sample(x, keys):
        return process.sample(lambda x_t, t: 0.5 * jnp.tanh(x_t), x, keys, steps=10, solver=solver, eta=eta)

    whole = sample(x, keys)
    np.testing.assert_allclose(sample(x[1:2], keys[1:2]), whole[1:2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sample(x[::-1], keys[::-1]), whole[::-1], rtol=1e-5, atol=1e-5)
    assert np.abs(sample(x, keys[::-1]) - whole)[0].max() > 0.1


def test_noise_of_each_step_comes_from_each_samples_key():
    """With x0 predicted as zero, the noise added can be read off the samples that the model sees."""
    process, keys = Gaussian(SCHEDULE, "x0"), jax.random.split(jax.random.key(0), 2)
    seen = []

    def denoise(x_t, timesteps):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_t, ordered=True)
        return jnp.zeros_like(x_t)

    jax.block_until_ready(process.sample(denoise, normal(1, (2, 3, 5)), keys, steps=4, eta=1.0))
    jax.effects_barrier()
    kept = SCHEDULE.respace([0, 250, 500, 750])
    for i, before, after in zip((3, 2, 1), seen, seen[1:], strict=False):
        eps = before / np.sqrt(1 - kept.alpha_bar[i])
        sigma2 = kept.posterior_variance[i]
        added = (after - np.sqrt(1 - kept.alpha_bar_previous[i] - sigma2) * eps) / np.sqrt(sigma2)
        expected = [jax.random.normal(derive(key, "solver", i), (3, 5)) for key in keys]
        np.testing.assert_allclose(added, np.stack(expected), atol=1e-4)


@pytest.mark.parametrize("solver, prediction", [("ddim", "eps"), ("ddim", "v"), ("ddim", "x0"), ("ddpm", "eps")])
def test_clip_holds_the_sample(solver, prediction):
    keys = jax.random.split(jax.random.key(0), 2)

    def sample(clip):
        process = Gaussian(SCHEDULE, prediction, clip=clip)
        x = normal(1, (2, 3, 5))
        return process.sample(lambda x_t, t: jnp.full_like(x_t, -2.0), x, keys, steps=10, solver=solver)

    assert np.abs(sample(None)).max() > 0.8
    assert np.abs(sample(0.8)).max() <= 0.8


def test_sampling_tells_original_timesteps():
    process = Gaussian(SCHEDULE)
    for solver, expected in (("ddim", [0, 250, 500, 750]), ("ddpm", [0, 333, 666, 999])):
        seen = []

        def denoise(x_t, timesteps, seen=seen):
            jax.debug.callback(lambda t: seen.append(float(t[0])), timesteps, ordered=True)
            return x_t

        keys = jax.random.split(jax.random.key(0), 1)
        jax.block_until_ready(process.sample(denoise, normal(0, (1, 2, 3)), keys, steps=4, solver=solver))
        jax.effects_barrier()
        assert seen == expected[::-1]


def test_sampling_is_differentiable_and_low_precision_models_stay_float32():
    process = Gaussian(SCHEDULE, "v")

    def total(scale, x):
        denoise = lambda x_t, t: (scale * x_t).astype(jnp.bfloat16)  # noqa: E731
        got = process.sample(denoise, x, None, steps=5)
        assert got.dtype == jnp.float32
        return jnp.sum(got**2)

    gradient = jax.jit(jax.grad(total))(0.1, normal(0))
    assert np.isfinite(gradient) and gradient != 0


def test_bad_input():
    process, x = Gaussian(SCHEDULE), normal(0)
    identity = lambda x_t, t: x_t  # noqa: E731
    for steps in (0, -1, 1001):
        with pytest.raises(UserError, match=f"^sampling.steps={steps}: "):
            process.sample(identity, x, None, steps=steps)
    with pytest.raises(UserError, match="^sampling.solver=euler: .*ddim, ddpm"):
        process.sample(identity, x, None, steps=5, solver="euler")
    for eta in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"^sampling.eta={eta}: "):
            process.sample(identity, x, None, steps=5, eta=eta)
    with pytest.raises(UserError, match="^diffusion.prediction=epsilon: .*eps, v, x0"):
        Gaussian(SCHEDULE, "epsilon")
    for clip in (0, -1.0, float("nan")):
        with pytest.raises(UserError, match=f"^diffusion.clip={clip}: "):
            Gaussian(SCHEDULE, clip=clip)
    with pytest.raises(ValueError, match="even number of output channels"):
        Gaussian(SCHEDULE, learned_range=True).sample(lambda x_t, t: x_t[..., :1], x, None, steps=2)
