import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.diffusion.flow import Flow
from cmd_jax.errors import UserError

SHAPE = (3, 2, 4, 6, 2)  # B T H W C


def normal(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_loss_is_zero_for_the_true_velocity_only():
    flow, x0, noise, t = Flow(), normal(0), normal(1), jnp.array([0.1, 0.5, 0.9])
    told = []

    def denoise(x_t, timesteps):
        told.append((x_t, timesteps))
        return noise - x0

    loss, metrics = flow.loss(denoise, x0, t, noise)
    assert loss.shape == metrics["mse"].shape == (3,)
    np.testing.assert_allclose(loss, 0, atol=1e-12)
    np.testing.assert_allclose(told[0][1], [100, 500, 900], rtol=1e-6)
    np.testing.assert_allclose(told[0][0][2], 0.1 * x0[2] + 0.9 * noise[2], atol=1e-6)
    loss, _ = flow.loss(lambda x_t, timesteps: jnp.zeros_like(x_t), x0, t, noise)
    np.testing.assert_allclose(loss, jnp.mean((noise - x0) ** 2, axis=(1, 2, 3, 4)), rtol=1e-5)


def test_times_are_logit_normal():
    t, noise = Flow(time_mean=-0.5, time_std=0.8).draw(jax.random.key(0), jnp.zeros((20000, 2)))
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() + 0.5) < 0.03 and abs(logit.std() - 0.8) < 0.03
    assert t.dtype == jnp.float32 and t.min() > 0 and t.max() < 1 and noise.shape == (20000, 2)


@pytest.mark.parametrize("solver", Flow.solvers)
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_an_oracle_recovers_x0(solver, steps):
    x0 = normal(0)

    def denoise(x_t, timesteps):
        return (x_t - x0) / (timesteps / 1000).reshape(-1, 1, 1, 1, 1)

    got = jax.jit(lambda x: Flow().sample(denoise, x, None, steps=steps, solver=solver))(normal(1))
    np.testing.assert_allclose(got, x0, atol=1e-4)


def test_order_of_the_solvers():
    """Gaussian data has a known velocity and a known map from noise to data; halving the step shows the order."""
    mean, std, x = 0.7, 0.5, normal(1, (2, 4, 6))

    def denoise(x_t, timesteps):
        t = (timesteps / 1000)[:, None, None]
        centred = (x_t - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        return t * centred - (mean + (1 - t) * std**2 * centred)

    def error(solver, steps, shift=1.0):
        found = Flow().sample(denoise, x, None, steps=steps, solver=solver, shift=shift)
        return np.abs(found - (mean + std * x)).max()

    assert 1.7 < error("euler", 40) / error("euler", 80) < 2.3
    assert 3.2 < error("heun", 20) / error("heun", 40) < 5.0
    assert error("heun", 20) < error("euler", 80)
    assert 3.2 < error("ab2", 20) / error("ab2", 40) < 5.0 and error("ab2", 40) < error("euler", 80)
    assert error("ab2", 20, 2.0) / error("ab2", 40, 2.0) > 3.2


@pytest.mark.parametrize(
    "solver, expected",
    [
        ("euler", [1000, 750, 500, 250]),
        ("heun", [1000, 750, 750, 500, 500, 250, 250]),
        ("ab2", [1000, 750, 500, 250]),
    ],
)
def test_model_calls(solver, expected):
    seen = []

    def denoise(x_t, timesteps):
        jax.debug.callback(lambda t: seen.append(float(t[0])), timesteps, ordered=True)
        return x_t

    jax.block_until_ready(Flow().sample(denoise, normal(0, (1, 2, 3)), None, steps=4, solver=solver))
    jax.effects_barrier()
    assert seen == expected


@pytest.mark.parametrize("solver", Flow.solvers)
def test_a_sample_does_not_depend_on_its_batch_and_clip_holds(solver):
    def sample(x, clip=None):
        return Flow(clip=clip).sample(lambda x_t, t: -2 * jnp.tanh(x_t), x, None, steps=6, solver=solver)

    x = normal(1)
    np.testing.assert_allclose(sample(x[1:2]), sample(x)[1:2], rtol=1e-5, atol=1e-5)
    assert np.abs(sample(x)).max() > 0.8
    assert np.abs(sample(x, clip=0.8)).max() <= 0.8
    assert np.abs(sample(x, clip=100.0) - sample(x)).max() < 1e-4


def test_a_shift_multiplies_the_odds_of_noise():
    even, moved = (Flow().levels(steps=5, solver="heun", shift=shift) for shift in (1.0, 3.0))
    assert even.tolist() == [1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2] and moved[0] == 1
    np.testing.assert_allclose(moved[1:] / (1 - moved[1:]), 3 * even[1:] / (1 - even[1:]))
    x0 = normal(0)

    def denoise(x_t, timesteps):  # the step of every grid ends where the next begins
        return (x_t - x0) / (timesteps / 1000).reshape(-1, 1, 1, 1, 1)

    np.testing.assert_allclose(Flow().sample(denoise, normal(1), None, steps=5, shift=3.0), x0, atol=1e-4)


def test_differentiable():
    def total(scale):
        return jnp.sum(Flow().sample(lambda x_t, t: scale * x_t, normal(0), None, steps=4, solver="heun") ** 2)

    gradient = jax.jit(jax.grad(total))(0.5)
    assert np.isfinite(gradient) and gradient != 0


def test_bad_input():
    x = normal(0)
    with pytest.raises(UserError, match="^sampling.solver=ddim: .*euler, heun"):
        Flow().sample(lambda x_t, t: x_t, x, None, steps=5, solver="ddim")
    for steps in (0, -2):
        with pytest.raises(UserError, match=f"^sampling.steps={steps}: "):
            Flow().sample(lambda x_t, t: x_t, x, None, steps=steps)
    with pytest.raises(UserError, match="^sampling.shift=0.0: "):
        Flow().sample(lambda x_t, t: x_t, x, None, steps=3, shift=0.0)
    with pytest.raises(UserError, match="^diffusion.clip=0: "):
        Flow(clip=0)
    assert Flow.prediction == "velocity" and Flow().learned_range is False
