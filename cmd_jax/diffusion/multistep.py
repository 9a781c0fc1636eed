"""DPM-Solver++(2M): x0 predictions of two steps extrapolated in log signal-to-noise (Lu et al. 2022, algorithm 2)."""

import numpy as np

from cmd_jax.diffusion.schedules import Schedule, check_count, spaced_timesteps

# Below this many steps the last one is of first order: the extrapolation is too long there (as in diffusers).
FIRST_ORDER_BELOW = 15


def dpmpp_timesteps(total: int, count: int, spacing: str, offset: int = 0) -> np.ndarray:
    """`count` of the timesteps 0..total-1, rising: int64 [count].

    The rules of `spaced_timesteps` that begin at 0 or the offset (all but trailing) are cut for one step more, whose
    least noisy timestep is left out: a last step from there would gain nothing, and one of second order to there
    extrapolates too far, since log signal-to-noise changes fastest near clean data.
    UserError (sampling.steps) unless 1 <= count <= `most_timesteps`.
    """
    if spacing == "trailing":
        return spaced_timesteps(total, count, spacing)
    count = check_count("sampling.steps", count, most_timesteps(total, spacing))
    return spaced_timesteps(total, count + 1, spacing, offset)[1:]


def most_timesteps(total: int, spacing: str | None) -> int:
    """How many of `total` timesteps `dpmpp_timesteps` can keep."""
    return total if spacing == "trailing" else total - 1


def dpmpp_coefficients(schedule: Schedule, first_order_below: int = FIRST_ORDER_BELOW) -> np.ndarray:
    """What each step makes of (x_t, its x0, the x0 of the step before): float64 [steps, 3], noisiest step first.

    The first step is of first order (DDIM), having no step before; the last one where it ends at clean data, whose log
    signal-to-noise is infinite, or where there are fewer steps than `first_order_below`.
    """
    now, then = schedule.alpha_bar[::-1], schedule.alpha_bar_previous[::-1]
    sigma, sigma_then = np.sqrt(1.0 - now), np.sqrt(1.0 - then)
    keep = sigma_then / sigma
    gain = np.sqrt(then) - keep * np.sqrt(now)
    second = np.ones(len(schedule), bool)
    second[0] = False
    if schedule.end == 1.0 or len(schedule) < first_order_below:
        second[-1] = False
    # Half this step's length over the length of the step before: x0 is extrapolated to the middle of the step.
    log_snr = np.log(now / (1.0 - now))
    inside = np.flatnonzero(second)
    extrapolation = np.zeros(len(schedule))
    length = np.log(then[inside] / (1.0 - then[inside])) - log_snr[inside]
    extrapolation[inside] = 0.5 * length / (log_snr[inside] - log_snr[inside - 1])
    return np.stack([keep, gain * (1.0 + extrapolation), -gain * extrapolation], axis=1)
