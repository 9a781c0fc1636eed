"""The image VAE of Stable Diffusion: pictures <-> the latents in which its UNet works (Rombach et al. 2022)."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from cmd_jax.errors import UserError
from cmd_jax.models.image_blocks import Attention, ResidualBlock, conv
from cmd_jax.models.layers import REMAT_POLICIES, dense, group_norm

NORM_EPSILON = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Moments(NamedTuple):
    """The Gaussian of a picture's latents before scaling; mean and log_variance [N,h,w,C] float32."""

    mean: jax.Array
    log_variance: jax.Array


class SelfAttention(nn.Module):
    """x [N,H,W,C] + attention of its cells to one another, with one head."""

    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        y = group_norm(self.groups, NORM_EPSILON, dtype=self.dtype, name="norm")(x)
        y = rearrange(y, "b h w c -> b (h w) c")
        y = Attention(1, bias=True, dtype=self.dtype, name="attention")(y, y)
        return x + rearrange(y, "b (h w) c -> b h w c", h=x.shape[1])


class _Half(nn.Module):
    """What encoder and decoder have in common; widths from the picture's level to that of the latents."""

    channels: int
    widths: tuple[int, ...]
    layers: int
    groups: int
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    def _block(self, block, *args, name):
        block = block if self.remat == "none" else nn.remat(block, policy=REMAT_POLICIES[self.remat])
        return block(*args, dtype=self.dtype, name=name)

    def _residual(self, x, level, name):
        return self._block(ResidualBlock, self.widths[level], self.groups, NORM_EPSILON, name=name)(x)

    def _middle(self, x):
        x = self._residual(x, -1, "mid_resnet_0")
        x = self._block(SelfAttention, self.groups, name="mid_attention_0")(x)
        return self._residual(x, -1, "mid_resnet_1")

    def _out(self, x):
        x = jax.nn.silu(group_norm(self.groups, NORM_EPSILON, dtype=jnp.float32, name="norm_out")(x))
        return conv(self.channels, dtype=jnp.float32, name="conv_out")(x)


class Encoder(_Half):
    """[N,H,W,3] -> [N,h,w,channels]."""

    @nn.compact
    def __call__(self, x):
        x = conv(self.widths[0], dtype=self.dtype, name="conv_in")(x)
        for i in range(len(self.widths)):
            for j in range(self.layers):
                x = self._residual(x, i, f"down_{i}_resnet_{j}")
            if i < len(self.widths) - 1:
                bottom_right = ((0, 1), (0, 1))
                halve = partial(conv, stride=2, padding=bottom_right, dtype=self.dtype)
                x = halve(self.widths[i], name=f"down_{i}_downsample")(x)
        return self._out(self._middle(x))


class Decoder(_Half):
    """[N,h,w,C] -> [N,H,W,channels]."""

    @nn.compact
    def __call__(self, x):
        x = self._middle(conv(self.widths[-1], dtype=self.dtype, name="conv_in")(x))
        for i, level in enumerate(reversed(range(len(self.widths)))):
            for j in range(self.layers + 1):
                x = self._residual(x, level, f"up_{i}_resnet_{j}")
            if level > 0:
                x = conv(self.widths[level], enlarge=True, dtype=self.dtype, name=f"up_{i}_upsample")(x)
        return self._out(x)


class VAE(nn.Module):
    """Pictures [N,H,W,3] in [-1,1] <-> scaled latents [N,h,w,C]; H and W are free multiples of `factor` = H/h = W/w.

    widths: channels of each level, from the picture's down. layers: residual blocks of a level of the encoder; the
    decoder has one more. scaling_factor: what latents are multiplied by to have unit variance, roughly.
    """

    channels: int
    latent_channels: int
    widths: tuple[int, ...]
    layers: int
    groups: int = 32
    scaling_factor: float = 0.18215
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @property
    def factor(self) -> int:
        return 2 ** (len(self.widths) - 1)

    def setup(self):
        settings = dict(widths=self.widths, layers=self.layers, groups=self.groups, remat=self.remat, dtype=self.dtype)
        pointwise = partial(dense, axes=("conv_in", "conv_out"))
        self.encoder = Encoder(2 * self.latent_channels, **settings)
        self.decoder = Decoder(self.channels, **settings)
        self.quant = pointwise(2 * self.latent_channels, dtype=jnp.float32)
        self.post_quant = pointwise(self.latent_channels, dtype=self.dtype)

    def encode(self, images) -> Moments:
        """[N,H,W,3] in [-1,1] -> moments of the unscaled latents."""
        rows, columns = images.shape[1:3]
        if rows % self.factor or columns % self.factor:
            problem = f"H and W must be multiples of {self.factor}, because the VAE has {len(self.widths)} levels"
            raise UserError("images", f"{rows}x{columns}", problem, f"use a multiple of {self.factor} for each")
        mean, log_variance = jnp.split(self.quant(self.encoder(images)), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    def latents(self, images, key=None):
        """[N,H,W,3] in [-1,1] -> scaled latents [N,h,w,C] float32: a sample with a key, else the mode."""
        mean, log_variance = self.encode(images)
        if key is not None:
            mean = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return mean * self.scaling_factor

    def decode(self, latents):
        """Scaled latents [N,h,w,C] -> pictures [N,H,W,3] float32, roughly in [-1,1]."""
        return self.decoder(self.post_quant(latents / self.scaling_factor))

    def __call__(self, images):
        return self.decode(self.latents(images))


def init_vae(vae: VAE, key):
    """Random parameters with their logical axes; their shapes do not depend on the size of pictures."""
    return vae.init(key, jnp.zeros((1, vae.factor, vae.factor, vae.channels)))["params"]
