"""How samples are made: the settings of a call, and what stages and mesh can do of them."""

import operator
from dataclasses import dataclass, fields, replace

from cmd_jax.defaults import DTYPES, SEEDS
from cmd_jax.diffusion.flow import Flow
from cmd_jax.diffusion.plan import parse_reuse
from cmd_jax.diffusion.schedules import check_count
from cmd_jax.errors import UserError, choose
from cmd_jax.sampling.layouts import Layouts


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample, an argument of each call of a Sampler.

    batch_size: samples at once; of a sampler whose mesh was chosen a multiple of its data x fsdp.
    guidance: weight >= 0 of classifier-free guidance; 1 or None: none, at half the cost.
    negative: the text that guidance leads away from; "": the empty text.
    guidance_from, guidance_to: the levels of noise, as t/T in 0..1, between which guidance is; outside it is 1.
    content_solver, motion_solver: ddim, ddpm or dpmpp, of flow matching euler, heun or ab2; "": the stage's own.
    content_shift, motion_shift: of the grid of times of flow matching; above 1 steps are shorter near noise.
    content_reuse, motion_reuse: the evaluations, like "3,4,6" with 0 the noisiest, that reuse what is deep in the
        network from the one before; `cmd-jax calibrate` writes such lists.
    eta: 0 to 1, the noise that ddim adds.
    dtype: of the matrix products of denoisers and autoencoder, float32 or bfloat16; "": that of the sampler, whose
    weights are read in it, or as they were trained. Weights in bfloat16 are not computed with in float32.
    """

    batch_size: int = 8
    seed: int = 0
    guidance: float | None = 4.0
    negative: str = ""
    guidance_from: float = 0.0
    guidance_to: float = 1.0
    content_steps: int = 50
    content_solver: str = ""
    content_shift: float = 1.0
    content_reuse: str = ""
    motion_steps: int = 100
    motion_solver: str = ""
    motion_shift: float = 1.0
    motion_reuse: str = ""
    eta: float = 0.0
    dtype: str = ""

    @classmethod
    def of(cls, config, **changes) -> "SamplingSettings":
        """How a sample config says to sample."""
        names = {field.name for field in fields(cls)} & {*config.sampling}
        return cls(**{"seed": config.seed, **{name: config.sampling[name] for name in names}, **changes})

    @property
    def static(self) -> "SamplingSettings":
        """What a program is compiled for, beside the shapes of its batch; the rest are its arguments."""
        return replace(self, batch_size=1, seed=0, guidance=None, negative="")

    def run_of(self, name: str) -> dict:
        """The keyword arguments of `DiffusionStage.sample` for "content" or "motion"."""
        solver, steps, shift, reuse = (getattr(self, f"{name}_{key}") for key in ("solver", "steps", "shift", "reuse"))
        options = {"eta": self.eta} if self.eta else {}
        options |= {"shift": shift} if shift != 1 else {}
        interval, reuse = (self.guidance_from, self.guidance_to), parse_reuse(reuse, f"sampling.{name}_reuse")
        return {"solver": solver, "steps": steps, "interval": interval, "reuse": reuse, **options}


DEFAULTS = SamplingSettings()


def resolve(settings: SamplingSettings, denoisers: dict, layouts: Layouts, dtype: str = "") -> SamplingSettings:
    """The settings, solvers by their names; UserError for what these stages and devices cannot do.

    denoisers: {"content", "motion"}, DiffusionStages, or {} where none is asked. dtype: of a Sampler.
    """
    check_count("sampling.batch_size", settings.batch_size)
    layouts.check(settings.batch_size)
    choose("sampling.dtype", settings.dtype, ("", *DTYPES))
    if (settings.dtype or dtype) != dtype and dtype == "bfloat16":
        problem = f"the weights were read in {dtype}"
        raise UserError("sampling.dtype", settings.dtype, problem, "leave it out, or load the sampler with that dtype")
    settings = replace(settings, dtype=settings.dtype or dtype)
    if not 0 <= operator.index(settings.seed) < SEEDS:
        raise UserError("seed", settings.seed, "none that random keys have", f"use 0 to {SEEDS - 1}")
    if not 0 <= settings.eta <= 1:
        raise UserError("sampling.eta", settings.eta, "outside 0 to 1", "use 0 for deterministic sampling")
    low, high = settings.guidance_from, settings.guidance_to
    if not 0 <= low <= high <= 1:
        problem = f"not from 0 to sampling.guidance_to={high:g} within 0 to 1"
        raise UserError("sampling.guidance_from", low, problem, "use 0.0 and 1.0 to guide always")
    for name, stage in denoisers.items():
        if wanted := getattr(settings, f"{name}_solver"):
            choose(f"sampling.{name}_solver", wanted, stage.solvers)
        process, options = stage.solver(wanted)
        solver, steps = options["solver"], getattr(settings, f"{name}_steps")
        if settings.eta and solver != "ddim":
            problem = f"the {name} solver is {solver}, not ddim"
            raise UserError("sampling.eta", settings.eta, problem, "set it to 0.0")
        check_count(f"sampling.{name}_steps", steps, process.most_steps(**options))
        shift = getattr(settings, f"{name}_shift")
        if shift != 1 and not isinstance(process, Flow):
            problem = f"the {name} stage is not one of flow matching, whose times alone can be shifted"
            raise UserError(f"sampling.{name}_shift", shift, problem, "set it to 1.0")
        if not shift > 0:
            raise UserError(f"sampling.{name}_shift", shift, "must be positive", "use 1.0 for even steps")
        settings = replace(settings, **{f"{name}_solver": solver})
        stage.kinds(guided=settings.guidance not in (None, 1), **settings.run_of(name))
    return settings
