"""What the UNet and the VAE of Stable Diffusion share: convolutions, residual blocks, attention, resampling."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from cmd_jax.models.attention import attend
from cmd_jax.models.layers import dense, group_norm
from cmd_jax.models.layout import CELLS, constrain


def conv(features: int, *, stride: int = 1, padding=1, enlarge: bool = False, dtype, name: str) -> nn.Conv:
    """A 3x3 convolution with logical axes; enlarge: of x with each cell four times, [B,H,W,C] -> [B,2H,2W,features]."""
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
        conv_general_dilated=_convolve_enlarged if enlarge else None,
        name=name,
    )


def _convolve_enlarged(x, kernel, *_, dimension_numbers, **__):
    """As that of nn.Conv, for 3x3 kernels on cells that stand four times each.

    Of the nine values under a kernel at most four differ. So each of the four places in a cell has a 2x2 convolution of
    the small x, with sums of the kernel's entries: 4/9 of the products, and the large x never exists.
    """
    convolve = partial(jax.lax.conv_general_dilated, x, window_strides=(1, 1), dimension_numbers=dimension_numbers)
    rows = [
        jnp.stack([convolve(rhs=_half(_half(kernel, 0, i), 1, j), padding=((1 - i, i), (1 - j, j))) for j in (0, 1)], 3)
        for i in (0, 1)
    ]
    return rearrange(jnp.stack(rows, 2), "b h i w j c -> b (h i) (w j) c")


def _half(kernel, axis: int, place: int):
    """Entries of a kernel of 3 on that axis that meet the same cell, summed: of the first or second place in a cell."""
    first, middle, last = jnp.split(kernel, 3, axis)
    pair = (first + middle, last) if place else (first, middle + last)
    return jnp.concatenate(pair, axis)


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
