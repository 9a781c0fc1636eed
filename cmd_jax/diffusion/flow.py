"""Flow matching on the straight path from data (t=0) to noise (t=1): loss, and integration back."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.diffusion.gaussian import check_clip, column, item_mean
from cmd_jax.diffusion.plan import Planned
from cmd_jax.diffusion.schedules import check_count
from cmd_jax.errors import UserError, choose
from cmd_jax.keys import derive

# The model is told 1000 t, so that timestep features made for 1000-step diffusion serve both.
TIME_SCALE = 1000.0


@dataclass(frozen=True)
class Flow:
    """Rectified flow: x_t = (1 - t) x0 + t noise, the model predicts the velocity noise - x0. Arrays [B, ...], float32.

    time_mean, time_std: logit-normal training times, t = sigmoid(time_mean + time_std * normal).
    clip: while sampling, the x0 that the velocity points to is held within [-clip, clip].
    A model is a function denoise(x_t [B,...,C], 1000 t [B]) -> velocity [B,...,C].
    """

    time_mean: float = 0.0
    time_std: float = 1.0
    clip: float | None = None
    solvers: ClassVar[tuple[str, ...]] = ("euler", "heun", "ab2")
    prediction: ClassVar[str] = "velocity"
    learned_range: ClassVar[bool] = False

    def __post_init__(self):
        check_clip(self.clip)

    def draw(self, key, x0):
        """Data [B,...] -> (t [B] float32 in (0,1), standard normal noise [B,...])."""
        normal = jax.random.normal(derive(key, "timestep"), x0.shape[:1], jnp.float32)
        t = jax.nn.sigmoid(self.time_mean + self.time_std * normal)
        return t, jax.random.normal(derive(key, "noise"), x0.shape, jnp.float32)

    def add_noise(self, x0, t, noise):
        """The point of the path at t [B]."""
        t = column(t, x0)
        return (1.0 - t) * x0 + t * noise

    def loss(self, denoise, x0, t, noise):
        """-> (squared error of the velocity [B], {"mse": [B]}), means over all but the batch axis."""
        x0, noise = jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32)
        velocity = jnp.asarray(denoise(self.add_noise(x0, t, noise), TIME_SCALE * t), jnp.float32)
        mse = item_mean(jnp.square(velocity - (noise - x0)))
        return mse, {"mse": mse}

    def most_steps(self, solver: str = "euler") -> int | None:
        """How many steps a solver can take: any number."""
        return None

    def levels(self, *, steps: int, solver: str = "euler", shift: float = 1.0) -> np.ndarray:
        """t at each evaluation of the model that `sample` makes, in order: float64 [evaluations]."""
        ends = shifted(np.arange(steps, 0, -1) / steps, shift)
        return np.repeat(ends, 2)[1:] if solver == "heun" else ends

    def sample(self, denoise, noise, keys, **options):
        """x at t=1 [B,...] standard normal -> x0 [B,...] float32; options as of `integrate`."""
        return self.integrate(denoise, noise, keys, **options)[0]

    def integrate(self, denoise, noise, keys, *, steps: int, solver: str = "euler", shift: float = 1.0):
        """x at t=1 [B,...] standard normal -> (x0 [B,...] float32, the memory of a Planned denoiser at the end).

        denoise: a model, or one of Planned evaluations, as many as `levels` gives.
        solver: euler; heun, which averages the velocities at both ends of a step (2 steps - 1 model calls; its last
            step is an Euler step, which keeps second order and never asks the model about t=0, where no training time
            lies); ab2 (Adams-Bashforth of second order), which extrapolates from the velocity of the step before to the
            middle of a step, at the cost of euler; its first step is one of euler.
        shift: of the grid of times, which is uniform with 1; above it steps are shorter near noise, see `shifted`.
        keys: unused, all solvers are deterministic. UserError: sampling.steps, sampling.solver, sampling.shift.
        """
        choose("sampling.solver", solver, self.solvers)
        steps = check_count("sampling.steps", steps)
        if not shift > 0:
            raise UserError("sampling.shift", shift, "must be positive", "use 1 for a uniform grid")
        model = Planned.of(denoise)

        def velocity(memory, kind, x, t):
            memory, out = model(memory, kind, x, jnp.full(x.shape[:1], TIME_SCALE * t))
            out = jnp.asarray(out, jnp.float32)
            if self.clip is None:
                return memory, out
            return memory, (x - jnp.clip(x - t * out, -self.clip, self.clip)) / t

        def step(carry, inputs):
            (x, before, memory), (i, (kind, second_kind)) = carry, inputs
            # Times count down from 1: step i ends at i / steps.
            now, then = shifted((i + 1) / steps, shift), shifted(i / steps, shift)
            memory, first = velocity(memory, kind, x, now)
            if solver == "euler":
                return (x + (then - now) * first, None, memory), None
            if solver == "ab2":
                middle = 0.5 * (then - now) / (now - shifted((i + 2) / steps, shift))
                slope = first + jnp.where(i == steps - 1, 0.0, middle) * (first - before)
                return (x + (then - now) * slope, first, memory), None
            memory, second = jax.lax.cond(
                i == 0, lambda: (memory, first), lambda: velocity(memory, second_kind, x + (then - now) * first, then)
            )
            return (x + (then - now) * 0.5 * (first + second), None, memory), None

        noise, numbers = jnp.asarray(noise, jnp.float32), np.arange(steps)
        if solver == "heun":
            kinds = model.which(2 * numbers), model.which(np.minimum(2 * numbers + 1, 2 * steps - 2))
        else:
            kinds = model.which(numbers), None
        start = noise, jnp.zeros_like(noise) if solver == "ab2" else None, model.memory
        (x0, _, memory), _ = jax.lax.scan(step, start, (jnp.arange(steps, dtype=jnp.float32)[::-1], kinds))
        return x0 if self.clip is None else jnp.clip(x0, -self.clip, self.clip), memory


def shifted(t, shift: float):
    """Times t in 0..1, moved towards noise by `shift` above 1: odds t / (1 - t) times it (Esser et al. 2024)."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)
