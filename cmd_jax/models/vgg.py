"""LPIPS on VGG16 (Zhang et al. 2018): a perceptual loss of the autoencoder, and a score of reconstructions."""

from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cmd_jax.errors import UserError

# (channels, index of each convolution in torchvision's `features`); a 2x2 max-pool stands between blocks.
BLOCKS = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)))
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# Tensors of the lpips package's own state dicts that hold nothing of their own.
REPEATED = ("scaling_layer.shift", "scaling_layer.scale", *(f"lins.{k}.model.1.weight" for k in range(len(BLOCKS))))
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

    H and W are free but at least 16 (four poolings). The weights come from `lpips_params`.
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


def _places() -> dict[str, tuple]:
    """{torch name: (its shape, path of our parameter)}."""
    places, inputs = {}, 3
    for k, (channels, indices) in enumerate(BLOCKS):
        for i, index in enumerate(indices, start=1):
            name, conv = f"net.slice{k + 1}.{index}", f"conv{k + 1}_{i}"
            places[f"{name}.weight"] = (channels, inputs, 3, 3), ("vgg", conv, "kernel")
            places[f"{name}.bias"] = (channels,), ("vgg", conv, "bias")
            inputs = channels
        places[f"lin{k}.model.1.weight"] = (1, channels, 1, 1), (f"tap{k + 1}",)
    return places


def _copies(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the lpips package's own state dicts repeat: constants, and the taps under a second name."""
    constants = {"shift": SHIFT, "scale": SCALE}
    copies = {f"scaling_layer.{n}": np.array(v, np.float32).reshape(1, 3, 1, 1) for n, v in constants.items()}
    return copies | {f"lins.{k}.model.1.weight": state_dict[f"lin{k}.model.1.weight"] for k in range(len(BLOCKS))}


def lpips_params(state_dict: dict[str, np.ndarray]) -> dict:
    """Parameters of `LPIPS` from torch weights named `net.slice{K}.{I}.weight|bias` (OIHW) and `lin{K}.model.1.weight`.

    What the lpips package repeats in its state dicts, as REPEATED lists it, may be there and is compared.
    Raises UserError that names the tensors that are missing, left over, of another shape or not what they repeat.
    """
    places = _places()

    def refuse(names, problem):
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UserError("lpips", shown, problem, "give the state dict of LPIPS with a VGG16 trunk")

    if missing := sorted(places.keys() - state_dict.keys()):
        refuse(missing, "missing from the weights")
    if extra := sorted(state_dict.keys() - places.keys() - set(REPEATED)):
        refuse(extra, "not a tensor of LPIPS on VGG16")
    expected = {name: shape for name, (shape, _) in places.items()}
    if wrong := [f"{n} {state_dict[n].shape}, expected {s}" for n, s in expected.items() if state_dict[n].shape != s]:
        refuse(wrong, "of another shape")
    copies = {name: copy for name, copy in _copies(state_dict).items() if name in state_dict}
    # A file in half precision holds rounded constants.
    if other := [n for n, c in copies.items() if not np.allclose(state_dict[n].astype(np.float32), c, rtol=1e-2)]:
        refuse(other, "not what LPIPS on VGG16 repeats there")

    params = {}
    for name, (_, path) in places.items():
        value = np.asarray(state_dict[name], np.float32)
        ours = value.reshape(-1) if len(path) == 1 else value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        params[path] = ours
    return traverse_util.unflatten_dict(params)


def lpips_state(params, repeated: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """The torch weights that `lpips_params` would read as these, in their dtypes, and the named ones of REPEATED."""
    flat, state = traverse_util.flatten_dict(params), {}
    for name, (shape, path) in _places().items():
        value = np.asarray(flat[path])
        state[name] = (value.transpose(3, 2, 0, 1) if value.ndim == 4 else value).reshape(shape)
    copies = _copies(state)
    return state | {name: copies[name].astype(state["lin0.model.1.weight"].dtype) for name in repeated}
