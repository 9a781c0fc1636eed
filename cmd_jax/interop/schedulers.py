"""Sampling as a diffusers folder's `scheduler/scheduler_config.json` describes it: a process and solver options."""

import math

from cmd_jax.diffusion.gaussian import Gaussian
from cmd_jax.diffusion.multistep import FIRST_ORDER_BELOW
from cmd_jax.diffusion.schedules import Schedule, check_count, cosine_betas, linear_betas, scaled_linear_betas
from cmd_jax.errors import UserError, choose
from cmd_jax.interop.folders import note_unknown

SOLVERS = ("ddim", "dpmpp")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
TRAINING = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "variance_type": None,
    "clip_sample": False,
    "clip_sample_range": 1.0,
}
DDIM = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
DPMPP = {
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "euler_at_final": False,
}
# What a config of each class means by a key that it leaves out, where that differs from the above.
CLASSES = {
    "DDIMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "DDPMScheduler": {"clip_sample": True},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace"},
    "LMSDiscreteScheduler": {"timestep_spacing": "linspace"},
}
# Settings that change what is computed, with the values under which nothing changes.
UNSUPPORTED = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
}
UNSUPPORTED_DPMPP = {
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "lambda_min_clipped": (-math.inf, "-Infinity", None),
}
# Settings of what is unsupported, and of solvers that are not here.
FREE = ("dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps", "flow_shift", "use_dynamic_shifting",
        "time_shift_type", "interpolation_type", "sigma_min", "sigma_max", "timestep_type")  # fmt: skip
KNOWN = (*TRAINING, *DDIM, *DPMPP, *UNSUPPORTED, *UNSUPPORTED_DPMPP, *FREE)


def from_scheduler_config(config: dict, solver: str = "") -> tuple[Gaussian, dict]:
    """A scheduler_config.json -> (process, keyword arguments of `process.sample`, all but `steps`).

    solver: "ddim", "dpmpp", or "" for the one that the config is for: dpmpp for DPMSolverMultistepScheduler, else ddim.
    The training schedule, the prediction and the clip hold for both solvers. Spacing, offset and where sampling ends
    are the config's for the solver it is for, and the defaults of diffusers' class for the other one: a folder with a
    DDIM config, as Stable Diffusion's, runs dpmpp over "linspace" timesteps down to clean data.
    PNDMScheduler (Stable Diffusion 1.5 and 2.1-base as published), DDPM, Euler and LMS configs describe the same kind
    of training; their own solvers are not here, and ddim visits the timesteps that they state.

    Three differences from diffusers: DDIM steps to the level of the timestep visited next, also where the spacing is
    uneven (there, always N // steps lower; the same for "leading"); where x0 is clipped, the noise is recomputed from
    it (there, by `use_clipped_model_output`); a single step of ddim starts at the noisiest timestep.
    UserError, fields scheduler.KEY or sampling.solver: unknown classes, and settings that would change the result.
    """
    if not isinstance(config, dict):
        problem = "not a JSON object"
        raise UserError("scheduler", type(config).__name__, problem, "give the folder's scheduler_config.json")
    name = choose("scheduler._class_name", config.get("_class_name"), CLASSES)
    note_unknown("scheduler/scheduler_config.json", config, KNOWN)
    own = "dpmpp" if name == "DPMSolverMultistepScheduler" else "ddim"
    solver = choose("sampling.solver", solver or own, SOLVERS)
    _check(config, UNSUPPORTED)
    if own == "dpmpp":
        _check(config, UNSUPPORTED_DPMPP)
    stated = TRAINING | CLASSES[name] | config
    options = (DDIM if solver == "ddim" else DPMPP) | (CLASSES[name] | config if solver == own else {})
    return _process(stated), {"solver": solver, **_solver_options(solver, options)}


def fields(config: dict) -> dict:
    """The fields of a scheduler_config.json that training and sampling depend on, with defaults, and its solver."""
    process, options = from_scheduler_config(config)
    own = DDIM if options["solver"] == "ddim" else DPMPP
    stated = {key: (CLASSES[config["_class_name"]] | config).get(key, value) for key, value in (TRAINING | own).items()}
    # Other variances are but ways to draw from a model that has none.
    stated["variance_type"] = "learned_range" if process.learned_range else None
    return stated | {"solver": options["solver"]}


def _check(config: dict, allowed: dict) -> None:
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            remedy = f"set it to {values[0]} in scheduler_config.json if the model allows"
            raise UserError(f"scheduler.{key}", config[key], "not supported", remedy)


def _process(config: dict) -> Gaussian:
    steps = check_count("scheduler.num_train_timesteps", config["num_train_timesteps"])
    kind = choose("scheduler.beta_schedule", config["beta_schedule"], BETAS)
    if kind == "squaredcos_cap_v2":
        betas = cosine_betas(steps)
    else:
        betas = (linear_betas if kind == "linear" else scaled_linear_betas)(
            steps, _beta(config, "beta_start"), _beta(config, "beta_end")
        )
    prediction = PREDICTIONS[choose("scheduler.prediction_type", config["prediction_type"], PREDICTIONS)]
    variance = config["variance_type"]
    if variance == "learned":
        problem = "variance channels that are log variances are not supported"
        raise UserError("scheduler.variance_type", variance, problem, "use a model with learned_range or none")
    clip = None
    if _flag(config, "clip_sample"):
        clip = _number(config, "clip_sample_range")
    return Gaussian(Schedule.from_betas(betas), prediction, variance == "learned_range", clip)


def _solver_options(solver: str, config: dict) -> dict:
    offset = config["steps_offset"]
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise UserError("scheduler.steps_offset", offset, "not a whole number >= 0", "use 0 or 1")
    options = {
        "spacing": choose("scheduler.timestep_spacing", config["timestep_spacing"], SPACINGS),
        "steps_offset": offset,
    }
    if solver == "ddim":
        return {**options, "to_clean": _flag(config, "set_alpha_to_one")}
    end = choose("scheduler.final_sigmas_type", config["final_sigmas_type"], ("zero", "sigma_min"))
    below = FIRST_ORDER_BELOW if _flag(config, "lower_order_final") else 0
    if _flag(config, "euler_at_final"):
        below = math.inf
    return {**options, "to_clean": end == "zero", "first_order_below": below}


def _flag(config: dict, key: str) -> bool:
    return choose(f"scheduler.{key}", config[key], (True, False))


def _number(config: dict, key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"scheduler.{key}", value, "not a positive number", "mend scheduler_config.json")
    return float(value)


def _beta(config: dict, key: str) -> float:
    value = _number(config, key)
    if value >= 1:
        raise UserError(f"scheduler.{key}", value, "not below 1", "use for example 0.00085 to 0.012")
    return value
