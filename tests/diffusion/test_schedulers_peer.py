"""Whole runs of a toy model against diffusers' own schedulers."""

import jax.numpy as jnp
import numpy as np
import peer
import pytest
from peer import diffusers, torch

from cmd_jax.diffusion.flow import Flow
from cmd_jax.diffusion.schedules import spaced_timesteps
from cmd_jax.interop.schedulers import CLASSES, DDIM, DPMPP, TRAINING, from_scheduler_config

pytestmark = peer.grouped
STABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
X = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)


def theirs(scheduler, steps, learned_range=False):
    """-> (sample, timesteps visited)."""
    scheduler.set_timesteps(steps)
    x = torch.tensor(X) * scheduler.init_noise_sigma
    clipped = {"use_clipped_model_output": True} if isinstance(scheduler, diffusers.DDIMScheduler) else {}
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x) * (float(t) / 1000), t, x, **clipped).prev_sample
    return x.numpy(), scheduler.timesteps.tolist()


def ours(config, steps, solver=""):
    process, options = from_scheduler_config(dict(config), solver)

    def denoise(x, timesteps):
        return jnp.sin(3 * x) * timesteps[:, None, None, None] / 1000

    return np.asarray(process.sample(denoise, jnp.asarray(X), None, steps=steps, **options))


def assert_same_run(scheduler, steps):
    expected, _ = theirs(scheduler, steps)
    got = ours({**scheduler.config, "_class_name": type(scheduler).__name__}, steps)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "steps, options",
    [
        (10, dict(steps_offset=1, set_alpha_to_one=False, clip_sample=False)),
        (7, dict(clip_sample=False)),
        (50, dict(set_alpha_to_one=False)),
        (25, dict(timestep_spacing="trailing", clip_sample=True, clip_sample_range=0.7)),
    ],
)
def test_ddim(steps, options, prediction):
    assert_same_run(diffusers.DDIMScheduler(**STABLE, prediction_type=prediction, **options), steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "steps, options",
    [
        (10, {}),
        (2, {}),
        (25, dict(timestep_spacing="leading", steps_offset=1)),
        (20, dict(timestep_spacing="trailing", final_sigmas_type="sigma_min")),
        (7, dict(final_sigmas_type="sigma_min", lower_order_final=False)),
        (9, dict(final_sigmas_type="sigma_min")),
        (20, dict(final_sigmas_type="sigma_min", euler_at_final=True)),
        (12, dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_train_timesteps=500)),
    ],
)
def test_dpmpp(steps, options, prediction):
    assert_same_run(diffusers.DPMSolverMultistepScheduler(prediction_type=prediction, **{**STABLE, **options}), steps)


def test_cosine_schedule():
    # Ends at beta 0.999, where an eps model is ill-conditioned: x0 is predicted.
    options = dict(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False)
    assert_same_run(diffusers.DDIMScheduler(**options), 10)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_for_any_number_of_steps(spacing):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    for steps in range(2, 1001):
        scheduler.set_timesteps(steps)
        visited = scheduler.timesteps.numpy()[:steps]  # at 61 trailing steps, for one, a timestep -1 follows
        assert np.array_equal(spaced_timesteps(1000, steps, spacing), visited[::-1]), steps


def test_dpmpp_from_a_ddim_config_is_the_class_with_its_defaults():
    expected, _ = theirs(diffusers.DPMSolverMultistepScheduler(**STABLE), 10)
    config = {**STABLE, "_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1}
    got = ours(config, 10, "dpmpp")
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_ddim_visits_what_a_pndm_config_states():
    """PNDM's own timesteps are those, one of them twice."""
    scheduler = diffusers.PNDMScheduler(**STABLE, steps_offset=1, skip_prk_steps=True)
    _, visited = theirs(scheduler, 10)
    assert sorted(set(visited)) == spaced_timesteps(1000, 10, "leading", 1).tolist()


@pytest.mark.parametrize("name", CLASSES)
def test_what_classes_mean_by_keys_left_out(name):
    config = getattr(diffusers, name)().config
    own = TRAINING | (DPMPP if name == "DPMSolverMultistepScheduler" else DDIM) | CLASSES[name]
    for key, value in own.items():
        if key in config and key != "variance_type":
            assert config[key] == value, key


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_with_shifted_times(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 9, 9))
    x = torch.tensor(X)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x) * (float(t) / 1000), t, x).prev_sample
    denoise = lambda x, timesteps: jnp.sin(3 * x) * timesteps[:, None, None, None] / 1000  # noqa: E731
    got = Flow().sample(denoise, jnp.asarray(X), None, steps=9, shift=shift)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * Flow().levels(steps=9, shift=shift), rtol=1e-5)
    assert np.abs(got - x.numpy()).max() <= 1e-4 * np.abs(got).max()
