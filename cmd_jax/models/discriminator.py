"""Patch discriminators for the autoencoder's optional adversarial term, and their losses (paper appendix B)."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmd_jax.errors import UserError, choose
from cmd_jax.models.layers import group_norm

KERNEL = 4
NORM_EPSILON = 1e-6


class PatchDiscriminator(nn.Module):
    """Judges every patch on its own (PatchGAN, Isola et al. 2017), over images or over clips.

    [B,H,W,C] (dimensions=2) or [B,T,H,W,C] (dimensions=3), in [-1,1] -> (logits, features): logits [B,h,w,1] or
    [B,t,h,w,1] float32, high for real; features, the `layers` + 1 hidden activations, for `feature_matching_loss`.

    `layers` convolutions have stride 2, two more stride 1. An axis too short to be halved down to less than the
    kernel's 4 cells keeps its length, so that no tap of a kernel sees padding only: 8 frames or 16x16 pixels are
    enough at any depth. GroupNorm in all hidden layers but the first, because batch statistics would be a state that a
    resumed run has to carry.

    dimensions: 2 or 3. base_channels: width of the first layer, doubled by each of the next up to 8 times.
    dtype: of the convolutions.
    """

    dimensions: int
    base_channels: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        choose("dimensions", self.dimensions, (2, 3))
        if x.ndim != self.dimensions + 2:
            raise UserError(
                "dimensions", self.dimensions, f"the input has shape {x.shape}", "use 2 for images, 3 for clips"
            )
        features = []
        for layer in range(self.layers + 1):
            channels = self.base_channels * min(2**layer, 8)
            halve = layer < self.layers
            x = self._conv(channels, [2 if halve and n >= 2 * KERNEL else 1 for n in x.shape[1:-1]], f"conv{layer}")(x)
            if layer > 0:
                groups = channels // math.gcd(16, channels)
                x = group_norm(groups, NORM_EPSILON, dtype=self.dtype, name=f"norm{layer}")(x)
            x = nn.leaky_relu(x, 0.2)
            features.append(x)
        return self._conv(1, [1] * self.dimensions, "logits", jnp.float32)(x), features

    def _conv(self, channels: int, strides: Sequence[int], name: str, dtype=None) -> nn.Conv:
        axes = ("conv_time", "conv_height", "conv_width")[-self.dimensions :]
        # He's gain for leaky ReLU 0.2: the signal keeps its size at any width, normalised or not.
        init = nn.initializers.variance_scaling(2 / (1 + 0.2**2), "fan_in", "truncated_normal")
        return nn.Conv(
            channels,
            (KERNEL,) * self.dimensions,
            strides=strides,
            padding="SAME",
            dtype=dtype or self.dtype,
            kernel_init=nn.with_logical_partitioning(init, (*axes, "conv_in", "conv_out")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("conv_out",)),
            name=name,
        )


def hinge_discriminator_loss(real_logits, fake_logits):
    """Hinge loss of the discriminator, logits of any shape -> scalar: 0 once real >= 1 and fake <= -1, 2 when blind."""
    real, fake = real_logits.astype(jnp.float32), fake_logits.astype(jnp.float32)
    return jnp.mean(nn.relu(1 - real)) + jnp.mean(nn.relu(1 + fake))


def hinge_generator_loss(fake_logits):
    """Hinge loss of the generator, logits of any shape -> scalar: the lower, the more the fakes pass for real."""
    return -jnp.mean(fake_logits.astype(jnp.float32))


def feature_matching_loss(real_features, fake_features):
    """L1 distance of the discriminator's activations, averaged over its layers -> scalar (weight 4 in appendix B).

    The real features are targets: no gradient flows into them.
    """
    distances = [
        jnp.mean(jnp.abs(jax.lax.stop_gradient(real).astype(jnp.float32) - fake.astype(jnp.float32)))
        for real, fake in zip(real_features, fake_features, strict=True)
    ]
    return sum(distances) / len(distances)
