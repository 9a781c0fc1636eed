"""How samples are made: the settings of a call, and what stages and mesh can do of them."""

import operator
from dataclasses import dataclass, replace

from cmd_jax.defaults import DTYPES, SEEDS
from cmd_jax.diffusion.schedules import check_count
from cmd_jax.errors import UserError, choose
from cmd_jax.sharding import check_batch


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample, an argument of each call of a Sampler.

    batch_size: samples at once, a multiple of the mesh's data x fsdp.
    guidance: weight >= 0 of classifier-free guidance; 1 or None: none, at half the cost.
    negative: the text that guidance leads away from; "": the empty text.
    content_solver, motion_solver: ddim, ddpm or dpmpp, of flow matching euler or heun; "": the stage's own.
    eta: 0 to 1, the noise that ddim adds.
    dtype: of the matrix products of denoisers and decoder, float32 or bfloat16; "": as they were trained.
    """

    batch_size: int = 8
    seed: int = 0
    guidance: float | None = 4.0
    negative: str = ""
    content_steps: int = 50
    content_solver: str = ""
    motion_steps: int = 100
    motion_solver: str = ""
    eta: float = 0.0
    dtype: str = ""

    @property
    def static(self) -> "SamplingSettings":
        """What a program is compiled for, beside the shapes of its batch; the rest are its arguments."""
        return replace(self, batch_size=1, seed=0, guidance=None, negative="")


DEFAULTS = SamplingSettings()


def resolve(settings: SamplingSettings, denoisers: dict, mesh) -> SamplingSettings:
    """The settings, solvers by their names; UserError for what these stages cannot do on this mesh.

    denoisers: {"content", "motion"}, DiffusionStages, or {} where none is asked.
    """
    check_count("sampling.batch_size", settings.batch_size)
    check_batch("sampling.batch_size", settings.batch_size, mesh)
    choose("sampling.dtype", settings.dtype, ("", *DTYPES))
    if not 0 <= operator.index(settings.seed) < SEEDS:
        raise UserError("seed", settings.seed, "none that random keys have", f"use 0 to {SEEDS - 1}")
    if not 0 <= settings.eta <= 1:
        raise UserError("sampling.eta", settings.eta, "outside 0 to 1", "use 0 for deterministic sampling")
    for name, stage in denoisers.items():
        if wanted := getattr(settings, f"{name}_solver"):
            choose(f"sampling.{name}_solver", wanted, stage.solvers)
        process, options = stage.solver(wanted)
        solver, steps = options["solver"], getattr(settings, f"{name}_steps")
        if settings.eta and solver != "ddim":
            problem = f"the {name} solver is {solver}, not ddim"
            raise UserError("sampling.eta", settings.eta, problem, "set it to 0.0")
        check_count(f"sampling.{name}_steps", steps, process.most_steps(**options))
        settings = replace(settings, **{f"{name}_solver": solver})
    return settings
