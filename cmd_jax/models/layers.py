"""What the models share: layers whose parameters carry logical axes, patches, scanned blocks."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _product(x, kernel):
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@jax.custom_vjp
def multiply(x, kernel):
    """x [..., K] times kernel [K, M] -> [..., M]; the gradient of the kernel contracts x with that of the result.

    Left to itself JAX contracts them in the other order and transposes what comes out, which takes a CPU 1.5 times as
    long (docs/performance.md). Elsewhere the two are the same product in another layout.
    """
    return _product(x, kernel)


def _multiply_forward(x, kernel):
    return _product(x, kernel), (x, kernel)  # and not multiply, in which remat's "dots" would see no product to save


def _multiply_backward(kept, gradient):
    x, kernel = kept
    outer = tuple(range(x.ndim - 1))
    return (
        jax.lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ()))),
        jax.lax.dot_general(x, gradient, ((outer, outer), ((), ()))),
    )


multiply.defvjp(_multiply_forward, _multiply_backward)


def dense(features: int, axes: tuple[str, str], *, init: Callable | None = None, **kwargs) -> nn.Dense:
    """A Dense layer with logical axes (input, output) on its kernel; Xavier-uniform unless `init` is given."""
    init = init or nn.initializers.xavier_uniform()
    return nn.Dense(
        features,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-1:]),
        dot_general=lambda x, kernel, *_, **__: multiply(x, kernel),
        **kwargs,
    )


# For what costs less to compute again than to write down and read back: the backward pass keeps the arguments alone.
# What stops the compiler from merging the two computations is not asked for: in a scan nothing can.
recomputed = partial(jax.checkpoint, prevent_cse=False)


@recomputed
def gated(value, gate):
    """value times the exact GELU of gate, gate Phi(gate), computed in float32.

    jax.nn.gelu takes 2.7 times as long on a CPU, for digits far below 1e-7.
    """
    wide = gate.astype(jnp.float32)
    return value * (0.5 * wide * (1 + jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(gate.dtype)


@recomputed
def gelu_tanh(x):
    """GELU in the approximation by tanh."""
    return jax.nn.gelu(x, approximate=True)


@partial(recomputed, static_argnums=(3, 4))
def modulated_norm(x, shift, scale, epsilon: float, dtype):
    """LayerNorm of x [B, N, D] without parameters, times 1 + scale, plus shift, both [B, D], of a condition.

    Statistics are float32; what they normalise is of that dtype.
    """
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    return wide.astype(dtype) * (1 + scale[:, None]) + shift[:, None]


def layer_norm(epsilon: float, *, dtype, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over the channels; statistics are float32."""
    return nn.remat(nn.LayerNorm, prevent_cse=False)(
        epsilon=epsilon,
        use_fast_variance=False,  # the difference of two large squares loses the digits that the variance is made of
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        dtype=dtype,
        name=name,
    )


def group_norm(groups: int, epsilon: float, *, dtype, name: str) -> nn.GroupNorm:
    """GroupNorm over cells and the channels of a group; statistics are float32."""
    return nn.GroupNorm(
        num_groups=groups,
        epsilon=epsilon,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        dtype=dtype,
        name=name,
    )


def patchify(x, patch: int):
    """Cut a grid into patches: [..., H, W, C] -> [..., H/p, W/p, p*p*C], each flattened as (row, column, C)."""
    return rearrange(x, "... (h p) (w q) c -> ... h w (p q c)", p=patch, q=patch)


class Unpatchify(nn.Module):
    """Transposed convolution with kernel = stride = p, as one matrix product: [..., h, w, D] -> [..., h*p, w*p, C].

    Float32, since it is the last projection of whatever it ends.
    """

    patch: int
    channels: int
    init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x):
        size = self.patch * self.patch * self.channels
        kernel = self.param(
            "kernel", nn.with_logical_partitioning(self.init, ("embed", "patch")), (x.shape[-1], size), jnp.float32
        )
        bias = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros, ("channels",)), (self.channels,), jnp.float32
        )
        x = multiply(x.astype(jnp.float32), kernel.astype(jnp.float32))
        x = rearrange(x, "... h w (p q c) -> ... (h p) (w q) c", p=self.patch, q=self.patch)
        return x + bias.astype(jnp.float32)


def scanned(block: type[nn.Module], depth: int, remat: str, broadcast: int) -> Callable:
    """`depth` copies of `block` run by lax.scan, parameters stacked on a leading `layers` axis.

    The block maps (x, *broadcast arguments) -> (x, None). remat: a name of REMAT_POLICIES.
    """
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * broadcast,
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
