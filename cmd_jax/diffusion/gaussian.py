"""Discrete-time Gaussian diffusion: forward process, named losses and reverse steps (CMD section 3).

DDPM, iDDPM and DDIM are here; the coefficients of DPM-Solver++(2M) are in `multistep`.
Arrays are [B, ...] with channels last; t is an int array [B] of indices into the schedule (0 is the least noisy).
Tables are float64, cast to float32 when indexed; all arithmetic on samples is float32.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.diffusion.guidance import split_range
from cmd_jax.diffusion.multistep import FIRST_ORDER_BELOW, dpmpp_coefficients, dpmpp_timesteps, most_timesteps
from cmd_jax.diffusion.plan import Planned
from cmd_jax.diffusion.schedules import Schedule, spaced_timesteps
from cmd_jax.errors import UserError, choose
from cmd_jax.keys import derive

PREDICTIONS = ("eps", "v", "x0")


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t): four float32 arrays [B,...,C]."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array
    x0: jax.Array


@dataclass(frozen=True)
class Gaussian:
    """Gaussian diffusion over a schedule.

    prediction: what the mean channels of the model mean: the noise, v = sqrt(ab) eps - sqrt(1 - ab) x0, or x0.
    learned_range: the model gives as many variance channels again, after the mean channels on the last axis; they place
        the log variance between the posterior's (-1) and beta's (+1).
    clip: while sampling, x0 is held within [-clip, clip] at every step.
    A model is a function denoise(x_t [B,...,C] float32, timesteps [B] float32, of the original schedule) -> out.
    """

    schedule: Schedule
    prediction: str = "eps"
    learned_range: bool = False
    clip: float | None = None
    solvers: ClassVar[tuple[str, ...]] = ("ddim", "ddpm", "dpmpp")

    def __post_init__(self):
        choose("diffusion.prediction", self.prediction, PREDICTIONS)
        check_clip(self.clip)

    # Training.

    def draw(self, key, x0):
        """Data [B,...] -> (t [B] uniform over the schedule, standard normal noise [B,...] float32)."""
        t = jax.random.randint(derive(key, "timestep"), x0.shape[:1], 0, len(self.schedule))
        return t, jax.random.normal(derive(key, "noise"), x0.shape, jnp.float32)

    def loss(self, denoise, x0, t, noise):
        """-> (loss [B], {"mse": [B]}, and {"vb": [B]} in bits with a learned range), means over all but the batch axis.

        With a learned range the loss is mse + vb, where vb sees the mean detached: it trains the variance only (iDDPM).
        """
        x0, noise = jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32)
        x_t = self.add_noise(x0, t, noise)
        out = denoise(x_t, self.timesteps(t))
        mean, variance = split_range(out, self.learned_range)
        mse = item_mean(jnp.square(mean - self.target(x0, t, noise)))
        if variance is None:
            return mse, {"mse": mse}
        detached = jnp.concatenate([jax.lax.stop_gradient(mean), variance], axis=-1)
        vb = self.variational_bound(detached, x0, x_t, t)
        return mse + vb, {"mse": mse, "vb": vb}

    def target(self, x0, t, noise):
        """What the mean channels should be: [B,...]."""
        if self.prediction == "v":
            return self.v(x0, t, noise)
        return noise if self.prediction == "eps" else x0

    def variational_bound(self, out, x0, x_t, t):
        """One term of the bound per item [B], bits per value: KL to the posterior, at t=0 the decoder's likelihood.

        That likelihood is of 8-bit values in [-1, 1], as in iDDPM and DiT, whatever the data.
        """
        true_mean, _, true_log_variance = self.posterior(x0, x_t, t)
        reverse = self.p_mean_variance(out, x_t, t)
        kl = normal_kl(true_mean, true_log_variance, reverse.mean, reverse.log_variance)
        nll = -discretized_log_likelihood(x0, reverse.mean, 0.5 * reverse.log_variance)
        return jnp.where(t == 0, item_mean(nll), item_mean(kl)) / math.log(2.0)

    # Forward process and conversions.

    def timesteps(self, t):
        """Schedule indices [B] -> the original timesteps that the model sees, float32 [B]."""
        return jnp.asarray(self.schedule.timesteps, jnp.float32)[t]

    def add_noise(self, x0, t, noise):
        """q(x_t | x0): data and noise [B,...] -> x_t."""
        signal, sigma = self._levels(t, x0)
        return signal * x0 + sigma * noise

    def v(self, x0, t, noise):
        """The v target [B,...] (Salimans & Ho)."""
        signal, sigma = self._levels(t, x0)
        return signal * noise - sigma * x0

    def eps_from_x0(self, x0, x_t, t):
        """The noise that x_t holds if x0 is its data."""
        signal, sigma = self._levels(t, x_t)
        return (x_t - signal * x0) / sigma

    def predict(self, mean, x_t, t, clip: float | None = None):
        """Mean channels [B,...,C] of the model -> (x0, eps), consistent with x_t also after the clip."""
        signal, sigma = self._levels(t, x_t)
        if self.prediction == "eps":
            x0, eps = (x_t - sigma * mean) / signal, mean
        elif self.prediction == "v":
            x0, eps = signal * x_t - sigma * mean, sigma * x_t + signal * mean
        else:
            x0, eps = mean, self.eps_from_x0(mean, x_t, t)
        if clip is None:
            return x0, eps
        x0 = jnp.clip(x0, -clip, clip)
        return x0, self.eps_from_x0(x0, x_t, t)

    def posterior(self, x0, x_t, t):
        """q(x_{t-1} | x_t, x0) -> (mean [B,...], variance, log variance; these two broadcast against it)."""
        s = self.schedule
        mean = _at(s.posterior_mean_x0, t, x_t) * x0 + _at(s.posterior_mean_x_t, t, x_t) * x_t
        return mean, _at(s.posterior_variance, t, x_t), _at(s.posterior_log_variance, t, x_t)

    def log_variance(self, variance, t):
        """Variance channels [B,...,C], nominally in [-1, 1] -> log variance of the reverse step (iDDPM)."""
        low = _at(self.schedule.posterior_log_variance, t, variance)
        high = _at(np.log(self.schedule.betas), t, variance)
        share = (variance + 1.0) / 2.0
        return share * high + (1.0 - share) * low

    def p_mean_variance(self, out, x_t, t, clip: float | None = None) -> Reverse:
        """Model output -> the reverse step; without a learned range its variance is the posterior's."""
        mean, variance = split_range(out, self.learned_range)
        x0, _ = self.predict(mean, x_t, t, clip)
        mean, *fixed = self.posterior(x0, x_t, t)
        if variance is None:
            return Reverse(mean, *(jnp.broadcast_to(value, x_t.shape) for value in fixed), x0)
        log_variance = self.log_variance(variance, t)
        return Reverse(mean, jnp.exp(log_variance), log_variance, x0)

    # Sampling.

    def ddim_step(self, out, x_t, t, noise=0.0, eta: float = 0.0):
        """x_t [B,...] -> the sample one kept step earlier (DDIM); eta > 0 needs `noise`, 1 is ancestral."""
        x0, eps = self.predict(split_range(out, self.learned_range)[0], x_t, t, self.clip)
        s = self.schedule
        sigma = eta * np.sqrt(s.posterior_variance)
        direction = np.sqrt(np.maximum(1.0 - s.alpha_bar_previous - sigma**2, 0.0))
        signal = _at(np.sqrt(s.alpha_bar_previous), t, x_t)
        return signal * x0 + _at(direction, t, x_t) * eps + _at(sigma, t, x_t) * noise

    def ddpm_step(self, out, x_t, t, noise):
        """x_t [B,...] -> an ancestral sample one kept step earlier; the last step (t=0) adds no noise."""
        reverse = self.p_mean_variance(out, x_t, t, self.clip)
        added = jnp.exp(0.5 * reverse.log_variance) * noise
        return reverse.mean + jnp.where(column(t > 0, x_t), added, 0.0)

    def most_steps(self, solver: str = "ddim", spacing: str | None = None, **_) -> int:
        """How many steps a solver can take, given other arguments of `sample`."""
        return most_timesteps(len(self.schedule), spacing) if solver == "dpmpp" else len(self.schedule)

    def _kept(self, steps: int, solver: str, spacing: str | None, steps_offset: int) -> np.ndarray:
        """The timesteps that `sample` visits, rising: int64 [evaluations]."""
        choose("sampling.solver", solver, self.solvers)
        spacing = spacing or {"ddim": "ddim", "ddpm": "even", "dpmpp": "linspace"}[solver]
        rule = dpmpp_timesteps if solver == "dpmpp" else spaced_timesteps
        return rule(len(self.schedule), steps, spacing, steps_offset)

    def levels(
        self, *, steps: int, solver: str = "ddim", spacing: str | None = None, steps_offset: int = 0, **_
    ) -> np.ndarray:
        """t/T at each evaluation of the model that `sample` makes, in order: float64 [evaluations]."""
        return self._kept(steps, solver, spacing, steps_offset)[::-1] / len(self.schedule)

    def sample(self, denoise, noise, keys, **options):
        """The whole reverse process: x_T [B,...] standard normal -> x0 [B,...] float32; options as of `integrate`."""
        return self.integrate(denoise, noise, keys, **options)[0]

    def integrate(
        self,
        denoise,
        noise,
        keys,
        *,
        steps: int,
        solver: str = "ddim",
        eta: float = 0.0,
        spacing: str | None = None,
        steps_offset: int = 0,
        to_clean: bool = True,
        first_order_below: int = FIRST_ORDER_BELOW,
    ):
        """The whole reverse process -> (x0 [B,...] float32, the memory of a Planned denoiser at the end).

        denoise: a model, or one of Planned evaluations, as many as `levels` gives.
        keys: one PRNG key per sample ([B] typed or [B,2] raw), from which the step of kept index i derives its own, so
            that a sample is the same in any batch. May be None where no noise is added: dpmpp, ddim with eta 0.
        steps: kept steps of the schedule, by the rule `spacing` of `spaced_timesteps`, for dpmpp of `dpmpp_timesteps`
            (None: ddim for ddim, even for ddpm, linspace for dpmpp).
        solver: ddim, ddpm (ancestral), dpmpp (DPM-Solver++(2M), deterministic, of second order).
        eta: 0 (deterministic) to 1, for ddim only.
        steps_offset: added to the timesteps of the spacing "leading".
        to_clean: ddim and dpmpp end at clean data; False: at training timestep 0 (Stable Diffusion's DDIM).
        first_order_below: in fewer steps than that the last one of dpmpp is of first order.
        UserError: sampling.steps, sampling.solver, sampling.spacing, sampling.steps_offset, sampling.eta.
        """
        kept = self._kept(steps, solver, spacing, steps_offset)
        if not 0.0 <= eta <= 1.0:
            raise UserError("sampling.eta", eta, "outside 0 to 1", "use 0 for deterministic sampling")
        if eta and solver != "ddim":
            raise UserError("sampling.eta", eta, f"{solver} has none", "use 0, or the solver ddim")
        end = 1.0 if to_clean or solver == "ddpm" else float(self.schedule.alpha_bar[0])
        process = replace(self, schedule=self.schedule.respace(kept, end))
        model = Planned.of(denoise)
        noise, backwards = jnp.asarray(noise, jnp.float32), jnp.arange(len(kept))[::-1]
        kinds = model.which(np.arange(len(kept)))

        def predict(memory, kind, x, i):
            t = jnp.full(x.shape[:1], i)
            return t, *model(memory, kind, x, process.timesteps(t))

        def step(carry, inputs):
            (x, memory), (i, kind) = carry, inputs
            t, memory, out = predict(memory, kind, x, i)
            fresh = _noise(keys, i, x.shape[1:]) if solver == "ddpm" or eta > 0 else 0.0
            if solver == "ddpm":
                return (process.ddpm_step(out, x, t, fresh), memory), None
            return (process.ddim_step(out, x, t, fresh, eta), memory), None

        def multistep(carry, inputs):
            (x, x0_before, memory), (i, (of_x, of_x0, of_before), kind) = carry, inputs
            t, memory, out = predict(memory, kind, x, i)
            x0, _ = process.predict(split_range(out, self.learned_range)[0], x, t, self.clip)
            return (of_x * x + of_x0 * x0 + of_before * x0_before, x0, memory), None

        if solver != "dpmpp":
            return jax.lax.scan(step, (noise, model.memory), (backwards, kinds))[0]
        coefficients = dpmpp_coefficients(process.schedule, first_order_below).T
        inputs = backwards, tuple(jnp.asarray(coefficients, jnp.float32)), kinds
        (x0, _, memory), _ = jax.lax.scan(multistep, (noise, jnp.zeros_like(noise), model.memory), inputs)
        return x0, memory

    def _levels(self, t, x):
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)) at t, broadcast against x."""
        alpha_bar = self.schedule.alpha_bar
        return _at(np.sqrt(alpha_bar), t, x), _at(np.sqrt(1.0 - alpha_bar), t, x)


def column(values, x):
    """[B] -> [B,1,...,1] with the rank of x."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1))


def item_mean(x):
    """[B,...] -> [B], the mean of each item."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def check_clip(clip) -> None:
    """UserError (diffusion.clip) unless clip is None or a positive number."""
    if clip is not None and not clip > 0:
        raise UserError("diffusion.clip", clip, "must be positive", "use 1.0 for pixels, None for no clipping")


def normal_kl(mean, log_variance, other_mean, other_log_variance):
    """KL(N(mean, variance) || N(other)) in nats, elementwise."""
    ratio = log_variance - other_log_variance
    return 0.5 * (jnp.exp(ratio) - ratio - 1.0 + jnp.square(mean - other_mean) * jnp.exp(-other_log_variance))


def discretized_log_likelihood(x, mean, log_std):
    """Log probability in nats, elementwise, of the 8-bit bin around x in [-1, 1]; the end bins reach to infinity.

    The normal distribution function is the tanh approximation, as in the losses this is compared with.
    """
    half_bin, tiny = 1.0 / 255.0, 1e-12

    def cdf(z):
        return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    below, above = cdf((x - mean - half_bin) * jnp.exp(-log_std)), cdf((x - mean + half_bin) * jnp.exp(-log_std))
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1.0 - below, above - below))
    return jnp.log(jnp.maximum(probability, tiny))


def _at(table: np.ndarray, t, x):
    """Float64 table -> float32 entries at t [B], broadcast against x."""
    return column(jnp.asarray(table, jnp.float32)[t], x)


def _noise(keys, i, shape):
    """Normal noise [B, *shape] for step i, each sample from its own key."""
    return jax.vmap(lambda key: jax.random.normal(derive(key, "solver", i), shape, jnp.float32))(keys)
