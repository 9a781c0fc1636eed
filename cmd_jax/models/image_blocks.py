"""What the UNet and the VAE of Stable Diffusion share: convolutions, residual blocks, attention, resampling."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from cmd_jax.models.attention import attend
from cmd_jax.models.layers import dense, group_norm
from cmd_jax.models.layout import CELLS, constrain


def conv(features: int, *, stride: int = 1, padding=1, dtype, name: str) -> nn.Conv:
    """A 3x3 convolution with logical axes."""
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=padding,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), ("conv_height", "conv_width", "conv_in", "conv_out")
        ),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        name=name,
    )


class ResidualBlock(nn.Module):
    """x [B,H,W,C] + two normalised convolutions of it -> [B,H,W,channels]; time features [B,E] are added in between."""

    channels: int
    groups: int
    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, time=None):
        norm = partial(group_norm, self.groups, self.epsilon, dtype=self.dtype)
        convolve = partial(conv, self.channels, dtype=self.dtype)
        x = constrain(x, CELLS)
        y = convolve(name="conv1")(jax.nn.silu(norm(name="norm1")(x)))
        if time is not None:
            y = y + dense(self.channels, ("embed", "conv_out"), dtype=self.dtype, name="time")(time)[:, None, None]
        y = convolve(name="conv2")(jax.nn.silu(norm(name="norm2")(y)))
        if x.shape[-1] != self.channels:
            x = dense(self.channels, ("conv_in", "conv_out"), dtype=self.dtype, name="shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Multi-head attention of x [B,N,D] to context [B,M,E] -> [B,N,D]; bias: whether queries, keys and values have one.

    heads must divide D.
    """

    heads: int
    bias: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        width = x.shape[-1]
        project = partial(dense, width, ("embed", "heads"), use_bias=self.bias, dtype=self.dtype)
        query, key, value = (
            rearrange(project(name=name)(source), "b n (h d) -> b n h d", h=self.heads)
            for name, source in (("query", x), ("key", context), ("value", context))
        )
        x = rearrange(attend(query, key, value), "b n h d -> b n (h d)")
        return dense(width, ("heads", "embed"), dtype=self.dtype, name="out")(x)


def enlarge(x):
    """Each cell four times: [B,H,W,C] -> [B,2H,2W,C]."""
    return repeat(x, "b h w c -> b (h 2) (w 2) c")
