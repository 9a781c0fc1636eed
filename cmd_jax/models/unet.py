"""The text-conditional UNet of Stable Diffusion 1.x and 2.x (Rombach et al. 2022), denoiser of content frames."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from cmd_jax.errors import UserError
from cmd_jax.models.autoencoder import GEGLU
from cmd_jax.models.image_blocks import CELLS, Attention, ResidualBlock, conv
from cmd_jax.models.layers import REMAT_POLICIES, dense, group_norm, layer_norm
from cmd_jax.models.layout import constrain

TRANSFORMER_NORM_EPSILON = 1e-6  # of the GroupNorm before a transformer
LAYER_NORM_EPSILON = 1e-5


class TransformerBlock(nn.Module):
    """Attention of cells x [B,N,D] to one another, then to the text [B,L,E], then GEGLU; each on a residual."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, text):
        norm = partial(layer_norm, LAYER_NORM_EPSILON, dtype=self.dtype)
        attention = partial(Attention, self.heads, bias=False, dtype=self.dtype)
        x = constrain(x, ("act_batch", "act_token", "act_embed"))
        y = norm(name="norm1")(x)
        x = x + attention(name="self")(y, y)
        x = x + attention(name="cross")(norm(name="norm2")(x), text)
        return x + GEGLU(self.dtype, name="mlp")(norm(name="norm3")(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the cells of x [B,H,W,C], which attend to text [B,L,E] -> [B,H,W,C]."""

    heads: int
    depth: int
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, text):
        project = partial(dense, x.shape[-1], ("embed", "embed_out"), dtype=self.dtype)
        y = group_norm(self.groups, TRANSFORMER_NORM_EPSILON, dtype=self.dtype, name="norm")(x)
        y = project(name="proj_in")(rearrange(y, "b h w c -> b (h w) c"))
        for i in range(self.depth):
            y = TransformerBlock(self.heads, self.dtype, name=f"block_{i}")(y, text)
        return x + rearrange(project(name="proj_out")(y), "b (h w) c -> b h w c", h=x.shape[1])


def timestep_features(timesteps, features: int, cosines_first: bool, shift: float):
    """Sinusoidal features of timesteps [B] -> [B, features] float32, two halves; frequencies fall from 1 to 1e-4 (with
    shift 1; just short of it with 0)."""
    half = features // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles)) if cosines_first else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, axis=-1)


class UNet(nn.Module):
    """Denoiser: (sample [B,H,W,C], timesteps [B] in [0, 1000), text states [B,L,E]) -> noise or v [B,H,W,C'] float32.

    widths: channels of each level; each level but the last halves H and W, which must be multiples of `factor`.
    layers: residual blocks of a level on the way down; there is one more on the way up. down_attention, up_attention:
    whether the blocks of a level are followed by transformers of `transformer_depth` blocks, in the order in which the
    levels are met; the middle always has one. heads: number of attention heads of each level, the middle as the last.
    keep=True gives (prediction, kept [B,H,W,C'']): the deep features, which the last level on the way up takes beside
    its skips. reuse: those of another timestep; only the first level on the way down and the last one up are run then.
    """

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    layers: int
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    heads: tuple[int, ...]
    text_width: int
    transformer_depth: int = 1
    groups: int = 32
    norm_epsilon: float = 1e-5
    cosines_first: bool = True
    frequency_shift: float = 0.0
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @property
    def factor(self) -> int:
        return 2 ** (len(self.widths) - 1)

    @nn.compact
    def __call__(self, sample, timesteps, text, *, keep=False, reuse=None):
        rows, columns, channels = sample.shape[1:]
        if rows % self.factor or columns % self.factor:
            problem = f"H and W must be multiples of {self.factor}, because the UNet has {len(self.widths)} levels"
            raise UserError("sample", f"{rows}x{columns}", problem, f"use a multiple of {self.factor} for each")
        if channels != self.in_channels:
            raise UserError("sample", f"{channels} channels", f"the UNet takes {self.in_channels}", "use its latents")

        def rematted(block):
            return block if self.remat == "none" else nn.remat(block, policy=REMAT_POLICIES[self.remat])

        def layer(x, name, level, attention):
            residual = rematted(ResidualBlock)(
                self.widths[level], self.groups, self.norm_epsilon, self.dtype, name=name.format("resnet")
            )
            x = residual(x, time)
            if attention:
                x = rematted(SpatialTransformer)(
                    self.heads[level], self.transformer_depth, self.groups, self.dtype, name=name.format("attention")
                )(x, text)
            return x

        width = 4 * self.widths[0]
        time = timestep_features(timesteps, self.widths[0], self.cosines_first, self.frequency_shift)
        time = dense(width, ("timestep", "embed"), dtype=self.dtype, name="time_in")(time)
        time = dense(width, ("embed", "embed_out"), dtype=self.dtype, name="time_out")(jax.nn.silu(time))
        time = jax.nn.silu(time)  # all residual blocks begin with it

        levels = range(len(self.widths))
        run = levels if reuse is None else levels[:1]
        x = conv(self.widths[0], dtype=self.dtype, name="conv_in")(sample)
        skips = [x]
        for i in run:
            for j in range(self.layers):
                x = layer(x, f"down_{i}_{{}}_{j}", i, self.down_attention[i])
                skips.append(x)
            if i < run[-1]:
                x = conv(self.widths[i], stride=2, dtype=self.dtype, name=f"down_{i}_downsample")(x)
                skips.append(x)

        if reuse is None:
            x = layer(x, "mid_{}_0", -1, attention=True)
            x = layer(x, "mid_{}_1", -1, attention=False)
        else:
            x = reuse

        for level in reversed(run):
            i = levels[-1] - level
            kept = x
            for j in range(self.layers + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = layer(x, f"up_{i}_{{}}_{j}", level, self.up_attention[i])
            if level > 0:
                x = conv(self.widths[level], enlarge=True, dtype=self.dtype, name=f"up_{i}_upsample")(x)

        x = jax.nn.silu(group_norm(self.groups, self.norm_epsilon, dtype=jnp.float32, name="norm_out")(x))
        out = conv(self.out_channels, dtype=jnp.float32, name="conv_out")(x)
        return (out, nn.with_logical_constraint(kept, CELLS)) if keep else out


def init_unet(unet: UNet, key):
    """Random parameters with their logical axes; their shapes do not depend on the size of samples."""
    sample = jnp.zeros((1, unet.factor, unet.factor, unet.in_channels))
    return unet.init(key, sample, jnp.zeros(1), jnp.zeros((1, 1, unet.text_width)))["params"]
