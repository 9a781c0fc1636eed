"""Configs of the CMD reference's models and of facebook's DiT: their keys, and what tensors tell of them."""

import math
import re

import numpy as np

from cmd_jax.errors import UserError, choose, nearest
from cmd_jax.interop.folders import is_size
from cmd_jax.models.autoencoder import MODES
from cmd_jax.models.dit import NORM_EPSILON, SIZES

MOTION_ORDERS = ("as_stored", "rows_first")
IGNORED_KEYS = ("model", "std", "seed", "frames", "image_size")  # no weight depends on them
# Fields of our modules -> keys.
AUTOENCODER = {"channels": "channels", "patch": "patch_size", "width": "hidden_dim", "depth": "depth", "heads": "heads",
               "head_dim": "head_dim", "motion_channels": "motion_channels", "mode": "mode"}  # fmt: skip
DENOISER = {"patch": "patch_size", "width": "hidden_size", "depth": "depth", "heads": "heads"}
DIT_KEYS = ("input_size", "in_channels", *DENOISER.values())
CONTENT_KEYS = ("content_size", "content_channels", "content_patch_size")
OPTIONAL_KEYS = {"learn_sigma": True, "num_classes": None, "frequency_shift": 0, "mlp_epsilon": NORM_EPSILON}
DIT_SIZES = {key: ("x_embedder.proj.weight", i) for i, key in enumerate(("hidden_size", "in_channels", "patch_size"))}
CONTENT_SIZES = {key: ("keyframe_embedder.proj.weight", i) for i, key in enumerate(CONTENT_KEYS) if i}
TOLD = {  # sizes that a tensor's dimension tells
    "autoencoder": {
        **{key: ("to_output.1.weight", i) for i, key in enumerate(("hidden_dim", "channels", "patch_size"))},
        "motion_channels": ("pre_xt.weight", 0),
    },
    "content_dit": DIT_SIZES,
    "motion_dit": DIT_SIZES | CONTENT_SIZES,
}


def complete(kind: str, given: dict, state_dict: dict[str, np.ndarray]) -> dict:
    """A config for `load`: what is given, and what the tensors tell of the rest.

    Not told: an autoencoder's heads and mode; the heads of a DiT of none of the usual SIZES; the grid of a denoiser,
    except for the side of a content DiT's square that has a stored table.
    """

    def size(name: str, dim: int) -> int | None:
        shape = state_dict[name].shape if name in state_dict else ()
        return shape[dim] if dim < len(shape) and 0 not in shape else None  # what is empty can have any size

    told = {key: size(*place) for key, place in TOLD[kind].items()}
    blocks = [re.match(r"(?:encoder\.layers|blocks)\.(\d{1,4})\.", name) for name in state_dict]
    told["depth"] = max((int(block[1]) + 1 for block in blocks if block), default=None)
    config = {key: value for key, value in told.items() if value is not None} | given
    if kind == "autoencoder":
        inner, heads = (size("encoder.layers.0.0.fn.qkv.weight", 0) or 0) // 3, config.get("heads")
        return {"head_dim": inner // heads} | config if type(heads) is int and heads > 0 else config
    for depth, width, heads in SIZES.values():
        if [config.get("depth"), config.get("hidden_size")] == [depth, width]:
            config = {"heads": heads} | config
    if rows := size("y_embedder.embedding_table.weight", 0):
        config.setdefault("num_classes", rows - 1)
    patch, channels, values = told["patch_size"], told["in_channels"], size("final_layer.linear.bias", 0)
    if patch and channels and values:
        config.setdefault("learn_sigma", values == 2 * patch**2 * channels)
    side = math.isqrt(size("pos_embed", 1) or 0)
    if kind == "content_dit" and patch and side and side**2 == size("pos_embed", 1):
        config.setdefault("input_size", [side * patch] * 2)
    return config


def check_keys(config: dict, required: tuple[str, ...], optional: tuple[str, ...] = ()):
    known = (*required, *optional)
    for key in config:
        if key not in known and key not in IGNORED_KEYS:
            raise UserError("config", key, "not a key of this kind of model", f"did you mean {nearest(key, known)[0]}?")
    for key in required:
        if key not in config:
            raise UserError("config", key, "missing from the config", "give the size the weights were trained with")
        sizes = config[key]
        if key == "mode":
            choose("config.mode", sizes, MODES)
            continue
        pair = key in ("input_size", "content_size") and isinstance(sizes, list | tuple) and len(sizes) == 2
        sizes = sizes if pair else [sizes]
        if not all(map(is_size, sizes)):
            raise UserError(f"config.{key}", config[key], "not a positive whole number", "give the size of the weights")


def grid_of(config: dict, size: str, patch: str) -> tuple[int, int]:
    """Rows and columns of patches."""
    sides = config[size] if isinstance(config[size], list | tuple) else (config[size],) * 2
    if any(n % config[patch] for n in sides):
        raise UserError(
            f"config.{size}", config[size], f"not divisible by {patch}={config[patch]}", "change one of them"
        )
    return sides[0] // config[patch], sides[1] // config[patch]
