"""LPIPS on VGG16 (Zhang et al. 2018): a perceptual loss of the autoencoder, and a score of reconstructions."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmd_jax.errors import UserError

# (channels, index of each convolution in torchvision's `features`); a 2x2 max-pool stands between blocks.
BLOCKS = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)))
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
KERNEL_AXES = ("conv_height", "conv_width", "conv_in", "conv_out")


class VGG16Features(nn.Module):
    """The convolutions of VGG16: [N,H,W,3] -> five feature maps, each at half the resolution of the one before."""

    precision: jax.lax.PrecisionLike

    @nn.compact
    def __call__(self, x):
        features = []
        for block, (channels, indices) in enumerate(BLOCKS, start=1):
            if block > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i in range(1, len(indices) + 1):
                x = nn.Conv(
                    channels,
                    (3, 3),
                    padding=1,
                    dtype=jnp.float32,
                    precision=self.precision,
                    kernel_init=nn.with_logical_partitioning(nn.initializers.he_normal(), KERNEL_AXES),
                    bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("conv_out",)),
                    name=f"conv{block}_{i}",
                )(x)
                x = nn.relu(x)
            features.append(x)
        return features


class LPIPS(nn.Module):
    """Perceptual distance of image pairs: a, b [N,H,W,3] in [-1,1] -> [N] float32, 0 for equal images.

    H and W are free but at least 16 (four poolings). The weights come from `cmd_jax.interop.lpips`.
    precision: of the convolutions. The default keeps TPUs and GPUs at full float32, which a score needs.
    """

    precision: jax.lax.PrecisionLike = "highest"

    @nn.compact
    def __call__(self, a, b):
        if a.shape != b.shape or a.shape[-1] != 3 or min(a.shape[1:3]) < 16:
            raise UserError(
                "lpips", f"{a.shape} against {b.shape}", "not two equal shapes [N,H,W,3] with H, W >= 16", "resize them"
            )
        vgg = VGG16Features(self.precision, name="vgg")
        shift, scale = jnp.array(SHIFT, jnp.float32), jnp.array(SCALE, jnp.float32)
        # Two passes and no concatenation: the batch axis may be sharded.
        features = zip(vgg((a - shift) / scale), vgg((b - shift) / scale), strict=True)
        distance = 0.0
        for tap, (x, y) in enumerate(features, start=1):
            weight = self.param(
                f"tap{tap}",
                nn.with_logical_partitioning(nn.initializers.constant(1 / x.shape[-1]), ("conv_out",)),
                (x.shape[-1],),
                jnp.float32,
            )
            # Summed elementwise, not as a product of matrices: accelerators would round that to bfloat16.
            distance += jnp.mean(jnp.sum(weight * (_unit(x) - _unit(y)) ** 2, axis=-1), axis=(1, 2))
        return distance


def _unit(x):
    """Feature vectors of length one along the last axis; a dead cell stays zero and has a finite gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.maximum(square, 1e-20)) + 1e-10)
