import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.diffusion.schedules import cosine_betas, linear_betas, scaled_linear_betas
from cmd_jax.errors import UserError
from cmd_jax.interop import folders
from cmd_jax.interop.schedulers import from_scheduler_config

# Stable Diffusion's, as diffusers writes it.
DDIM = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
# As older versions wrote it, with fewer keys.
PNDM = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
DPM = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf, "use_karras_sigmas": False}
OWN_DPM = {"solver": "dpmpp", "spacing": "linspace", "steps_offset": 0, "to_clean": True, "first_order_below": 15}
OWN_DDIM = {"solver": "ddim", "spacing": "leading", "steps_offset": 1, "to_clean": False}


@pytest.mark.parametrize("config", [DDIM, PNDM])
def test_stable_diffusion(config):
    process, options = from_scheduler_config(config)
    np.testing.assert_allclose(process.schedule.betas, scaled_linear_betas(1000, 0.00085, 0.012), rtol=1e-12)
    assert (process.prediction, process.learned_range, process.clip) == ("eps", False, None)
    assert options == OWN_DDIM
    other, options = from_scheduler_config(config, "dpmpp")
    assert options == OWN_DPM
    assert np.array_equal(other.schedule.betas, process.schedule.betas)


def test_fields_of_no_scheduler_are_noted_once(caplog):
    folders.note.cache_clear()
    for _ in range(2):
        assert from_scheduler_config({**DDIM, "tensor_format": "pt"})[1] == OWN_DDIM
    (record,) = caplog.records
    assert "tensor_format" in record.getMessage()


def test_what_a_config_leaves_out():
    process, options = from_scheduler_config({"_class_name": "DDIMScheduler"})
    np.testing.assert_allclose(process.schedule.betas, linear_betas(), rtol=1e-12)
    assert process.clip == 1.0
    assert options == {"solver": "ddim", "spacing": "leading", "steps_offset": 0, "to_clean": True}
    process, options = from_scheduler_config(DPM)
    assert process.clip is None and options == OWN_DPM
    assert from_scheduler_config(DPM, "ddim")[1] == {**OWN_DDIM, "steps_offset": 0, "to_clean": True}
    assert from_scheduler_config({"_class_name": "PNDMScheduler"})[1] == {**OWN_DDIM, "steps_offset": 0}
    assert from_scheduler_config({"_class_name": "EulerDiscreteScheduler"})[1]["spacing"] == "linspace"
    json.dumps(options)


@pytest.mark.parametrize(
    "changes, attribute, value",
    [
        ({"prediction_type": "v_prediction"}, "prediction", "v"),
        ({"prediction_type": "sample"}, "prediction", "x0"),
        ({"clip_sample": True, "clip_sample_range": 2}, "clip", 2.0),
        ({"variance_type": "learned_range"}, "learned_range", True),
        ({"variance_type": "fixed_small"}, "learned_range", False),
    ],
)
def test_settings_of_the_process(changes, attribute, value):
    assert getattr(from_scheduler_config({**DDIM, **changes})[0], attribute) == value


def test_training_schedules():
    def betas(**changes):
        return from_scheduler_config({**DDIM, **changes})[0].schedule.betas

    linear = betas(beta_schedule="linear", beta_start=1e-3, beta_end=0.01, num_train_timesteps=50)
    np.testing.assert_allclose(linear, linear_betas(50, 1e-3, 0.01), rtol=1e-12)
    assert np.array_equal(betas(beta_schedule="squaredcos_cap_v2"), cosine_betas())


@pytest.mark.parametrize(
    "changes, key, value",
    [
        ({"timestep_spacing": "trailing"}, "spacing", "trailing"),
        ({"final_sigmas_type": "sigma_min"}, "to_clean", False),
        ({"lower_order_final": False}, "first_order_below", 0),
        ({"euler_at_final": True}, "first_order_below", math.inf),
    ],
)
def test_settings_of_dpmpp(changes, key, value):
    assert from_scheduler_config({**DPM, **changes})[1] == {**OWN_DPM, key: value}


@pytest.mark.parametrize("solver, first, last", [("ddim", 901, 1), ("dpmpp", 999, 100)])
def test_the_options_are_arguments_of_sample(solver, first, last):
    process, options = from_scheduler_config(DDIM, solver)
    told = []

    def denoise(x, timesteps):
        jax.debug.callback(lambda t: told.append(float(t[0])), timesteps, ordered=True)
        return 0.5 * x

    got = process.sample(denoise, jnp.ones((1, 2, 2, 4)), None, steps=10, **options)
    jax.effects_barrier()
    assert np.all(np.isfinite(got)) and (told[0], told[-1], len(told)) == (first, last, 10)


@pytest.mark.parametrize("folder", ["tiny-sd15", "tiny-sd21"])
def test_timesteps_of_the_reference_runs(folder):
    path = Path(__file__).parents[1] / "fixtures" / folder
    config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    with np.load(path / "reference.npz") as reference:
        expected = {"ddim": reference["ddim10_timesteps"], "dpmpp": reference["dpmpp2m10_timesteps"]}
    for solver, timesteps in expected.items():
        process, options = from_scheduler_config(config, solver)
        told = []

        def denoise(x, t, told=told):
            jax.debug.callback(lambda t: told.append(int(t[0])), t, ordered=True)
            return x

        process.sample(denoise, jnp.ones((1, 1)), None, steps=10, **options)
        jax.effects_barrier()
        assert told == timesteps.tolist()


@pytest.mark.parametrize(
    "config, said",
    [
        (
            {**DDIM, "_class_name": "FlowMatchEulerDiscreteScheduler"},
            "_class_name=FlowMatchEulerDiscreteScheduler: not on",
        ),
        ({}, "_class_name=None: not one of the choices; use one of DDIMScheduler, PNDMScheduler, "),
        ({**DDIM, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True: not supported; set it to False"),
        ({**DDIM, "thresholding": True}, "thresholding=True: not supported"),
        ({**DDIM, "trained_betas": [0.1, 0.2]}, "trained_betas=.*: not supported; set it to None"),
        ({**DDIM, "beta_schedule": "sigmoid"}, "beta_schedule=sigmoid: not one of the choices; use one of linear, sca"),
        ({**DDIM, "prediction_type": "flow"}, "prediction_type=flow: .*use one of epsilon, v_prediction, sample"),
        ({**DDIM, "timestep_spacing": "karras"}, "timestep_spacing=karras: .*leading, trailing, linspace"),
        ({**DDIM, "num_train_timesteps": 0}, "num_train_timesteps=0: must be a positive whole number"),
        ({**DDIM, "num_train_timesteps": "1000"}, "num_train_timesteps=1000: not a whole number"),
        ({**DDIM, "beta_start": None}, "beta_start=None: not a positive number"),
        ({**DDIM, "beta_end": 1.2}, "beta_end=1.2: not below 1"),
        ({**DDIM, "steps_offset": -1}, "steps_offset=-1: not a whole number >= 0"),
        ({**DDIM, "steps_offset": 1.5}, "steps_offset=1.5: not a whole number >= 0"),
        ({**DDIM, "set_alpha_to_one": "no"}, "set_alpha_to_one=no: not one of the choices; use one of True, False"),
        ({**DDIM, "clip_sample": True, "clip_sample_range": 0}, "clip_sample_range=0: not a positive number"),
        ({**DDIM, "variance_type": "learned"}, "variance_type=learned: .*not supported"),
        (
            {**DPM, "algorithm_type": "sde-dpmsolver++"},
            r"algorithm_type=sde-dpmsolver\+\+: not supported; set it to dpms",
        ),
        ({**DPM, "solver_order": 3}, "solver_order=3: not supported; set it to 2"),
        ({**DPM, "solver_type": "heun"}, "solver_type=heun: not supported; set it to midpoint"),
        ({**DPM, "use_karras_sigmas": True}, "use_karras_sigmas=True: not supported"),
        ({**DPM, "lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1: not supported"),
        ({**DPM, "final_sigmas_type": "half"}, "final_sigmas_type=half: .*zero, sigma_min"),
    ],
)
def test_what_is_refused(config, said):
    with pytest.raises(UserError, match=f"^scheduler.{said}"):
        from_scheduler_config(config)


def test_other_refusals():
    with pytest.raises(UserError, match="^sampling.solver=ddpm: not one of the choices; use one of ddim, dpmpp"):
        from_scheduler_config(DDIM, "ddpm")
    with pytest.raises(UserError, match="^scheduler=list: not a JSON object"):
        from_scheduler_config([DDIM])
