"""Flow matching on the straight path from data (t=0) to noise (t=1): loss, and Euler or Heun integration back."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from cmd_jax.diffusion.gaussian import check_clip, column, item_mean
from cmd_jax.diffusion.schedules import check_count
from cmd_jax.errors import choose
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
    solvers: ClassVar[tuple[str, ...]] = ("euler", "heun")
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

    def sample(self, denoise, noise, keys, *, steps: int, solver: str = "euler"):
        """x at t=1 [B,...] standard normal -> x0 [B,...] float32, on a uniform grid of `steps` steps.

        Heun averages the velocities at both ends of a step (2 steps - 1 model calls); its last step is an Euler step,
        which keeps second order and never asks the model about t=0, where no training time lies.
        keys: unused, both solvers are deterministic. UserError: sampling.steps, sampling.solver.
        """
        choose("sampling.solver", solver, self.solvers)
        steps = check_count("sampling.steps", steps)

        def velocity(x, t):
            out = jnp.asarray(denoise(x, jnp.full(x.shape[:1], TIME_SCALE * t)), jnp.float32)
            if self.clip is None:
                return out
            return (x - jnp.clip(x - t * out, -self.clip, self.clip)) / t

        def step(x, i):
            # Times count down from 1: step i ends at i / steps.
            now, then = (i + 1) / steps, i / steps
            first = velocity(x, now)
            if solver == "euler":
                return x + (then - now) * first, None
            second = jax.lax.cond(i == 0, lambda: first, lambda: velocity(x + (then - now) * first, then))
            return x + (then - now) * 0.5 * (first + second), None

        x0, _ = jax.lax.scan(step, jnp.asarray(noise, jnp.float32), jnp.arange(steps, dtype=jnp.float32)[::-1])
        return x0 if self.clip is None else jnp.clip(x0, -self.clip, self.clip)
