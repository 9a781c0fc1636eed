"""Noise schedules of discrete-time diffusion and the subsets of their timesteps that samplers visit."""

import math
import operator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cmd_jax.errors import UserError, choose

SPACINGS = ("even", "ddim", "leading", "trailing", "linspace")
MOST_STEPS = 10**6  # of any process


def check_count(field: str, value, most: int | None = None) -> int:
    """`value` as an int if it is a whole number in 1..most, MOST_STEPS by default, else a UserError about `field`."""
    limit = "1 or more" if most is None else f"1 to {most}"
    try:
        count = operator.index(value)
    except TypeError:
        raise UserError(field, value, "not a whole number", f"use {limit}") from None
    if isinstance(value, bool) or count < 1:
        raise UserError(field, value, "must be a positive whole number", f"use {limit}")
    if count > MOST_STEPS:
        raise UserError(field, value, "more than any process has", f"use {limit}")
    if most is not None and count > most:
        raise UserError(field, value, f"more than the {most} training steps", f"use {limit}")
    return count


def linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Betas that grow linearly (DDPM, DiT): float64 [steps]."""
    return np.linspace(start, end, check_count("diffusion.timesteps", steps), dtype=np.float64)


def scaled_linear_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Betas whose square roots grow linearly (Stable Diffusion): float64 [steps]."""
    return np.linspace(start**0.5, end**0.5, check_count("diffusion.timesteps", steps), dtype=np.float64) ** 2


BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas}


def cosine_betas(steps: int = 1000) -> np.ndarray:
    """Betas of a squared-cosine alpha_bar, at most 0.999 (iDDPM): float64 [steps]."""
    time = np.arange(check_count("diffusion.timesteps", steps) + 1) / steps
    alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def spaced_timesteps(total: int, count: int, spacing: str = "even", offset: int = 0) -> np.ndarray:
    """`count` of the timesteps 0..total-1, rising: int64 [count].

    even: from 0 to total-1 with a fractional stride, rounded (iDDPM).
    ddim: multiples of an integer stride from 0 (iDDPM's "ddimN"); a count that no integer stride gives takes multiples
    of total/count rounded down, so that any count reaches the noisy end.
    leading, trailing, linspace are the `timestep_spacing` of diffusers' schedulers:
    leading: multiples of total // count from 0, plus `offset` (only this rule reads it), however far from the end.
    trailing: from total-1 down with the stride total / count, rounded; 0 is not reached.
    linspace: from 0 to total-1 with a fractional stride, each rounded.
    A single step is always the noisiest one: at timestep 0 the model would take pure noise for data.
    UserError: sampling.steps unless 1 <= count <= total, sampling.steps_offset if it leads out of 0..total-1.
    """
    choose("sampling.spacing", spacing, SPACINGS)
    count = check_count("sampling.steps", count, total)
    if count == 1:
        return np.array([total - 1])
    if spacing == "leading":
        stride = total // count
        room = total - 1 - stride * (count - 1)
        if not 0 <= offset <= room:
            problem = f"{count} steps of {stride} leave the {total} training steps"
            raise UserError("sampling.steps_offset", offset, problem, f"use 0 to {room}, or other sampling.steps")
        return stride * np.arange(count) + offset
    if spacing == "trailing":
        # A float range decides where halves round to, as in diffusers; its length may be one too many.
        return np.round(np.arange(total, 0, -total / count))[:count][::-1].astype(np.int64) - 1
    if spacing == "linspace":
        return np.round(np.linspace(0, total - 1, count)).astype(np.int64)
    if spacing == "even":
        # Summed, not multiplied: rounding then falls as in iDDPM's running index.
        return np.round(np.cumsum([0.0] + [(total - 1) / (count - 1)] * (count - 1))).astype(np.int64)
    stride = math.ceil(total / count)
    if len(range(0, total, stride)) == count:
        return np.arange(0, total, stride)
    return np.arange(count) * total // count


@dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete noise schedule; every table is float64 [steps] and index 0 is the least noisy step.

    betas: variance of the noise that each kept step adds, in (0, 1].
    timesteps: int [steps], the timestep of the original training schedule that the model is told at each kept step.
    end: alpha_bar before the first step, where sampling ends: 1 is clean data. With less, the first beta may be 0: a
        step that stays where it is.
    """

    betas: np.ndarray
    timesteps: np.ndarray
    end: float = 1.0

    def __post_init__(self):
        if self.betas.ndim != 1 or not len(self.betas) or self.timesteps.shape != self.betas.shape:
            raise ValueError(f"betas {self.betas.shape}, timesteps {self.timesteps.shape}: need equal, 1-D, not empty")
        positive = self.betas > 0
        positive[0] |= self.end < 1 and self.betas[0] == 0
        if not (np.all(positive) and np.all(self.betas <= 1)):
            shown = f"{self.betas.min():g}..{self.betas.max():g}"
            raise UserError("diffusion.betas", shown, "outside (0, 1]", "choose another start or end of the schedule")

    @classmethod
    def from_betas(cls, betas) -> "Schedule":
        """The full training schedule of `betas` [steps], timesteps 0..steps-1."""
        betas = np.asarray(betas, np.float64)
        return cls(betas, np.arange(len(betas)))

    def respace(self, timesteps, end: float = 1.0) -> "Schedule":
        """The schedule of a rising subset of this one's indices: same alpha_bar there, original timesteps kept."""
        kept = np.asarray(timesteps)
        if kept.ndim != 1 or not len(kept) or kept[0] < 0 or kept[-1] >= len(self) or np.any(np.diff(kept) <= 0):
            raise ValueError(f"timesteps must rise strictly within 0..{len(self) - 1}: {timesteps}")
        alpha_bar = self.alpha_bar[kept]
        return Schedule(1.0 - alpha_bar / np.append(end, alpha_bar[:-1]), self.timesteps[kept], end)

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        """Share of the data's variance that is left after each step."""
        return self.end * np.cumprod(1.0 - self.betas)

    @cached_property
    def alpha_bar_previous(self) -> np.ndarray:
        """alpha_bar one kept step earlier; `end` before the first."""
        return np.append(self.end, self.alpha_bar[:-1])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0); 0 at the first step."""
        return self.betas * (1.0 - self.alpha_bar_previous) / (1.0 - self.alpha_bar)

    @cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Log of the posterior variance, the zero of the first step replaced by its successor (iDDPM)."""
        if len(self) == 1:
            return np.log(self.betas)
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_x0(self) -> np.ndarray:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * np.sqrt(self.alpha_bar_previous) / (1.0 - self.alpha_bar)

    @cached_property
    def posterior_mean_x_t(self) -> np.ndarray:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1.0 - self.alpha_bar_previous) * np.sqrt(1.0 - self.betas) / (1.0 - self.alpha_bar)
