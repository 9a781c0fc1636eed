"""I3D on RGB (Carreira & Zisserman 2017), Inception-v1 inflated to 3-D: the Kinetics-400 logits that FVD compares."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cmd_jax.errors import UserError

CLASSES = 400
# (name, kernel side, stride, channels) of a convolution; (name, window, strides) of a max-pool; (name, channels of the
# six convolutions) of an Inception block.
STEM = (
    ("conv_1a", 7, 2, 64),
    ("pool_2a", (1, 3, 3), (1, 2, 2)),
    ("conv_2b", 1, 1, 64),
    ("conv_2c", 3, 1, 192),
    ("pool_3a", (1, 3, 3), (1, 2, 2)),
)
INCEPTION = (
    ("mixed_3b", (64, 96, 128, 16, 32, 32)),
    ("mixed_3c", (128, 128, 192, 32, 96, 64)),
    ("pool_4a", (3, 3, 3), (2, 2, 2)),
    ("mixed_4b", (192, 96, 208, 16, 48, 64)),
    ("mixed_4c", (160, 112, 224, 24, 64, 64)),
    ("mixed_4d", (128, 128, 256, 24, 64, 64)),
    ("mixed_4e", (112, 144, 288, 32, 64, 64)),
    ("mixed_4f", (256, 160, 320, 32, 128, 128)),
    ("pool_5a", (2, 2, 2), (2, 2, 2)),
    ("mixed_5b", (256, 160, 320, 32, 128, 128)),
    ("mixed_5c", (384, 192, 384, 48, 128, 128)),
)
BRANCHES = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")  # of an Inception block, as the paper's figure has them in order
AVERAGE = (2, 7, 7)  # window of the last pool: T, H, W
KERNEL_AXES = ("conv_time", "conv_height", "conv_width", "conv_in", "conv_out")


def max_pool(x, window: tuple[int, int, int], strides: tuple[int, int, int]):
    """[B,T,H,W,C] pooled with TensorFlow's SAME padding; the padding counts as zeros."""
    padding = jax.lax.padtype_to_pads(x.shape[1:4], window, strides, "SAME")
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return nn.max_pool(x, window, strides, "VALID")


class StoredNorm(nn.Module):
    """BatchNorm with the statistics of its training: [..., C] -> same."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        def parameter(name, init):
            return self.param(name, nn.with_logical_partitioning(init, ("norm",)), x.shape[-1:], jnp.float32)

        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale, bias = parameter("scale", ones), parameter("bias", zeros)
        mean, variance = parameter("mean", zeros), parameter("variance", ones)
        factor = scale / jnp.sqrt(variance + self.epsilon)
        return x * factor + (bias - mean * factor)


class Unit(nn.Module):
    """A cubic convolution with SAME padding, normalised and rectified: [B,T,H,W,C] -> [B,T',H',W',channels]."""

    channels: int
    side: int
    epsilon: float
    stride: int = 1
    precision: jax.lax.PrecisionLike = "highest"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(
            self.channels,
            (self.side,) * 3,
            strides=self.stride,
            padding="SAME",
            use_bias=False,
            precision=self.precision,
            kernel_init=nn.with_logical_partitioning(nn.initializers.he_normal(), KERNEL_AXES),
            name="conv",
        )(x)
        return nn.relu(StoredNorm(self.epsilon, name="norm")(x))


class Inception(nn.Module):
    """A point, two narrow paths to cubes of 3, and a pool, side by side: [B,T,H,W,C] -> same with other channels."""

    channels: tuple[int, ...]
    epsilon: float
    precision: jax.lax.PrecisionLike = "highest"

    @nn.compact
    def __call__(self, x):
        def unit(branch, x):
            side = 3 if branch in ("b1b", "b2b") else 1
            channels = self.channels[BRANCHES.index(branch)]
            return Unit(channels, side, self.epsilon, precision=self.precision, name=branch)(x)

        paths = (
            unit("b0", x),
            unit("b1b", unit("b1a", x)),
            unit("b2b", unit("b2a", x)),
            unit("b3b", max_pool(x, (3, 3, 3), (1, 1, 1))),
        )
        return jnp.concatenate(paths, axis=-1)


class I3D(nn.Module):
    """Clips [B,T,H,W,3] in [-1,1] -> logits [B,400], float32. T at least 9; H and W 193 to 224, as trained 224.

    epsilon: of the normalisations; 1e-5 in the usual PyTorch port, 1e-3 in the original. Scores must say which.
    precision: of the convolutions. The default keeps TPUs and GPUs at full float32, which a score needs.
    """

    epsilon: float = 1e-5
    precision: jax.lax.PrecisionLike = "highest"

    @nn.compact
    def __call__(self, video):
        if video.ndim != 5 or video.shape[-1] != 3 or video.shape[1] < 9 or not _trained_size(video.shape[2:4]):
            remedy = "resize the frames to 224x224"
            raise UserError("i3d", video.shape, "not [B,T,H,W,3] with T >= 9 and H, W of 193 to 224", remedy)
        x = video.astype(jnp.float32)
        for name, *sizes in STEM + INCEPTION:
            if name.startswith("pool"):
                x = max_pool(x, *sizes)
            elif name.startswith("mixed"):
                x = Inception(*sizes, self.epsilon, self.precision, name=name)(x)
            else:
                side, stride, channels = sizes
                x = Unit(channels, side, self.epsilon, stride, self.precision, name=name)(x)
        x = nn.avg_pool(x, AVERAGE, (1, 1, 1), "VALID")
        logits = nn.Dense(
            CLASSES,
            precision=self.precision,
            kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("conv_in", "classes")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("classes",)),
            name="logits",
        )(x)
        return logits.mean(axis=(1, 2, 3))


def _trained_size(sides: tuple[int, int]) -> bool:
    """Whether a thirty-second of both, rounded up, is what the last pool spans."""
    return all(-(-side // 32) == AVERAGE[1] for side in sides)
