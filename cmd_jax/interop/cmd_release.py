"""Weights of the CMD reference and of facebook's DiT: torch names and layouts in, our modules and parameters out."""

import math
import re

import jax
import numpy as np

from cmd_jax.errors import UserError, choose, nearest
from cmd_jax.models.autoencoder import MODES, Autoencoder
from cmd_jax.models.dit import TIMESTEP_FEATURES, DiT, sincos_table

MOTION_ORDERS = ("as_stored", "rows_first")
IGNORED_KEYS = ("model", "std", "seed", "frames", "image_size")  # no weight depends on them
AUTOENCODER_KEYS = ("hidden_dim", "patch_size", "channels", "motion_channels", "depth", "heads", "head_dim", "mode")
DIT_KEYS = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "heads")
CONTENT_KEYS = ("content_size", "content_channels", "content_patch_size")
OPTIONAL_KEYS = {"learn_sigma": True, "num_classes": None}


def load(kind: str, config: dict, state_dict: dict[str, np.ndarray]):
    """A model of the reference from its torch weights -> (module, params) for `module.apply({"params": params}, ...)`.

    kind: "autoencoder", "motion_dit" or "content_dit" (facebook's DiT has the same names). state_dict: torch layout
    (conv OIHW, linear [out,in]), any float dtype; params are float32 and may share its memory.

    config, by kind; sizes are an int or a pair:
      autoencoder: hidden_dim, patch_size, channels, motion_channels, depth, heads, head_dim, mode.
      content_dit: input_size [H,W], patch_size, in_channels, hidden_size, depth, heads; learn_sigma (default true);
        num_classes (default none: no class table), without the null class.
      motion_dit: the same with input_size [T,h+w], and content_size [H,W], content_channels, content_patch_size.
        motion_order: "as_stored" takes the reference's latents (columns, then rows), "rows_first" the ones of our
        autoencoder; the halves have the proportions of content_size.
    Position tables are taken from `pos_embed` and `content_pos_embed` where the weights hold them. Otherwise a motion
    DiT gets the reference's table, that of a square grid with as many tokens; a content DiT that of its own grid.

    The module takes and gives channels-last arrays; the autoencoder's motion latent has rows first.
    Raises UserError for a bad config, and for a tensor that is missing, left over or of another shape: it names the
    tensor, its shapes and the config field that is likely wrong.
    """
    loaders = {"autoencoder": _autoencoder, "motion_dit": _motion_dit, "content_dit": _content_dit}
    choose("kind", kind, loaders)
    if "model" in config:
        choose("config.model", config["model"], (kind,))
    reader = _Reader(kind, config, state_dict)
    module, params = loaders[kind](config, reader)
    reader.refuse_rest()
    return module, params


class _Reader:
    """Hands out tensors as float32, each checked against the shape that the config implies."""

    def __init__(self, kind: str, config: dict, state_dict: dict[str, np.ndarray]):
        self.kind, self.config, self.names, self.rest = kind, config, tuple(state_dict), dict(state_dict)

    def __contains__(self, name):
        return name in self.rest

    def __call__(self, name: str, *dims: tuple[str, int]) -> np.ndarray:
        """The tensor with one (config field, size) for each of its dimensions; field "kind" for a fixed size."""
        expected = tuple(size for _, size in dims)
        if name not in self.rest:
            raise self._error(self._field(name), f"the weights lack {name} {expected}")
        value = self.rest.pop(name)
        if value.shape != expected:
            pairs = zip(expected, value.shape, strict=False)
            wrong = [i for i, (e, n) in enumerate(pairs) if e != n] if value.ndim == len(dims) else []
            fields = [dims[i][0] for i in wrong] or ["kind"]
            raise self._error(fields[0], f"{name} has shape {tuple(value.shape)}, expected {expected}")
        return np.asarray(value, np.float32)

    def refuse_rest(self):
        if self.rest:
            name, *others = self.rest
            more = f" and {len(others)} more tensors" if others else ""
            shown = f"{name} {tuple(self.rest[name].shape)}{more}"
            raise self._error(self._field(name), f"the model has no place for {shown}")

    def _field(self, name):
        """The config field that decides whether there is such a tensor."""
        if name.startswith("y_embedder."):
            return "num_classes"
        block = re.match(r"(?:(?:en|de)coder\.layers|blocks)\.(\d+)\.", name)
        if block is None:
            return "kind"
        present = any(n.startswith(block[0]) for n in self.names)
        return "kind" if present and int(block[1]) < self.config["depth"] else "depth"

    def _error(self, field, problem):
        if field == "kind":
            return UserError("kind", self.kind, problem, "give the whole weights of such a model, or the right kind")
        return UserError(f"config.{field}", self.config.get(field), problem, f"set {field} as the weights were trained")


def _check(config: dict, required: tuple[str, ...], optional: tuple[str, ...] = ()):
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
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
            raise UserError(f"config.{key}", config[key], "not a positive whole number", "give the size of the weights")


def _grid(config: dict, size: str, patch: str) -> tuple[int, int]:
    """Rows and columns of patches."""
    sides = config[size] if isinstance(config[size], list | tuple) else (config[size],) * 2
    if any(n % config[patch] for n in sides):
        raise UserError(
            f"config.{size}", config[size], f"not divisible by {patch}={config[patch]}", "change one of them"
        )
    return sides[0] // config[patch], sides[1] // config[patch]


def _linear(read, name, outputs, inputs) -> dict:
    weight, bias = read(f"{name}.weight", outputs, inputs), read(f"{name}.bias", outputs)
    return {"kernel": weight.T, "bias": bias}


def _pointwise(read, name, outputs, inputs) -> dict:
    """A 1x1 convolution."""
    one = ("kind", 1)
    weight, bias = read(f"{name}.weight", outputs, inputs, one, one), read(f"{name}.bias", outputs)
    return {"kernel": weight[:, :, 0, 0].T, "bias": bias}


def _patch_conv(read, name, outputs, inputs, patch) -> dict:
    """A convolution with kernel = stride -> matrix [p*p*C, D]."""
    weight, bias = read(f"{name}.weight", outputs, inputs, patch, patch), read(f"{name}.bias", outputs)
    return {"kernel": weight.transpose(2, 3, 1, 0).reshape(-1, outputs[1]), "bias": bias}


def _unpatch_conv(read, name, inputs, outputs, patch) -> dict:
    """A transposed convolution with kernel = stride, [in,out,p,p] -> matrix [D, p*p*C]."""
    weight, bias = read(f"{name}.weight", inputs, outputs, patch, patch), read(f"{name}.bias", outputs)
    return {"kernel": weight.transpose(0, 2, 3, 1).reshape(inputs[1], -1), "bias": bias}


def _split(layer: dict, parts: int) -> list[dict]:
    """The layers that torch stores as one, stacked along their outputs."""
    kernels, biases = (np.split(layer[part], parts, axis=-1) for part in ("kernel", "bias"))
    return [{"kernel": kernel, "bias": bias} for kernel, bias in zip(kernels, biases, strict=True)]


def _attention(read, name, width, inner) -> dict:
    query, key, value = _split(_linear(read, f"{name}.qkv", (inner[0], 3 * inner[1]), width), 3)
    return {"query": query, "key": key, "value": value, "out": _linear(read, f"{name}.proj", width, inner)}


def _stack(blocks: list[dict]) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def _autoencoder(config: dict, read: _Reader):
    _check(config, AUTOENCODER_KEYS)
    width, channels, patch, motion = (
        (key, config[key]) for key in ("hidden_dim", "channels", "patch_size", "motion_channels")
    )
    inner = ("head_dim", config["heads"] * config["head_dim"])
    values = ("patch_size", patch[1] ** 2 * channels[1])

    def block(name):
        norms = [
            {"scale": read(f"{name}.{i}.norm.weight", width), "bias": read(f"{name}.{i}.norm.bias", width)}
            for i in range(3)
        ]
        hidden = ("kind", 4 * width[1])
        value, gate = _split(_linear(read, f"{name}.2.fn.net.0", ("kind", 8 * width[1]), width), 2)
        return {
            "time_norm": norms[0],
            "time": _attention(read, f"{name}.0.fn", width, inner),
            "space_norm": norms[1],
            "space": _attention(read, f"{name}.1.fn", width, inner),
            "mlp_norm": norms[2],
            "mlp": {"value": value, "gate": gate, "out": _linear(read, f"{name}.2.fn.net.3", width, hidden)},
        }

    def blocks(side):
        return {"blocks": _stack([block(f"{side}.layers.{i}") for i in range(config["depth"])])}

    # The transposed convolutions come first: their shapes tell width, channels and patch apart.
    params = {
        "to_video": _unpatch_conv(read, "to_output.1", width, channels, patch),
        "content_logits": _unpatch_conv(read, "to_logit.1", width, channels, patch),
        "embed_video": _linear(read, "encoder.to_patch_embedding", width, values),
        "encoder": blocks("encoder"),
        "rows_to_motion": _pointwise(read, "pre_yt", motion, width),
        "columns_to_motion": _pointwise(read, "pre_xt", motion, width),
        "embed_content": _linear(read, "to_patch_embedding_xy", width, values),
        "embed_rows": _pointwise(read, "post_yt", width, motion),
        "embed_columns": _pointwise(read, "post_xt", width, motion),
        "decoder": blocks("decoder"),
    }
    module = Autoencoder(
        channels=channels[1],
        patch=patch[1],
        width=width[1],
        depth=config["depth"],
        heads=config["heads"],
        head_dim=config["head_dim"],
        motion_channels=motion[1],
        mode=config["mode"],
        position="none",
    )
    return module, params


def _content_dit(config: dict, read: _Reader):
    _check(config, DIT_KEYS, tuple(OPTIONAL_KEYS))
    grid = _grid(config, "input_size", "patch_size")
    positions = _stored_table(config, read, "pos_embed", "input_size", grid)
    if positions is None:
        positions = sincos_table(*grid, config["hidden_size"])
    return _dit(config, read, {"positions": positions})


def _motion_dit(config: dict, read: _Reader):
    _check(config, (*DIT_KEYS, *CONTENT_KEYS), (*OPTIONAL_KEYS, "motion_order"))
    order = choose("config.motion_order", config.get("motion_order", "as_stored"), MOTION_ORDERS)
    width, patch = ("hidden_size", config["hidden_size"]), ("content_patch_size", config["content_patch_size"])

    def table(name, size, grid):
        stored = _stored_table(config, read, name, size, grid)
        return _square_table(config, name, size, grid) if stored is None else stored

    grid, content_grid = _grid(config, "input_size", "patch_size"), _grid(config, "content_size", "content_patch_size")
    positions = table("pos_embed", "input_size", grid)
    params = {
        "positions": _swap_halves(positions, grid, content_grid, config) if order == "rows_first" else positions,
        "content_positions": table("content_pos_embed", "content_size", content_grid),
        "embed_content": _patch_conv(
            read, "keyframe_embedder.proj", width, ("content_channels", config["content_channels"]), patch
        ),
    }
    return _dit(config, read, params, content_patch=patch[1])


def _stored_table(config: dict, read: _Reader, name: str, size: str, grid: tuple[int, int]):
    """The table that the weights hold, [tokens, D], or None."""
    if config["hidden_size"] % 4:
        raise UserError("config.hidden_size", config["hidden_size"], "not divisible by 4", "give a multiple of 4")
    if name not in read:
        return None
    return read(name, ("kind", 1), (size, math.prod(grid)), ("hidden_size", config["hidden_size"]))[0]


def _square_table(config: dict, name: str, size: str, grid: tuple[int, int]) -> np.ndarray:
    """The reference's: made for a square grid of as many tokens, whatever the real one is."""
    tokens = math.prod(grid)
    side = math.isqrt(tokens)
    if side * side != tokens:
        problem = f"{grid[0]}x{grid[1]} tokens are no square number, and the reference's position tables are square"
        raise UserError(
            f"config.{size}",
            config[size],
            problem,
            f"add the table {name} [1,{tokens},{config['hidden_size']}] to the weights",
        )
    return sincos_table(side, side, config["hidden_size"])


def _swap_halves(table, grid: tuple[int, int], content_grid: tuple[int, int], config: dict) -> np.ndarray:
    """Positions of (columns, rows) -> those of (rows, columns), [tokens, D]."""
    height, width = content_grid
    columns, rest = divmod(grid[1] * width, height + width)
    if rest:
        problem = f"{grid[1]} patches along h+w don't divide as content_size={config['content_size']} does"
        raise UserError("config.motion_order", "rows_first", problem, "use as_stored, or correct the sizes")
    table = table.reshape(*grid, -1)
    return np.concatenate([table[:, columns:], table[:, :columns]], axis=1).reshape(math.prod(grid), -1)


def _dit(config: dict, read: _Reader, params: dict, content_patch: int = 0):
    """The trunk that both denoisers share; `params` holds what comes before it."""
    config = OPTIONAL_KEYS | config
    width, channels, patch = ((key, config[key]) for key in ("hidden_size", "in_channels", "patch_size"))
    classes, learn_sigma = config["num_classes"], config["learn_sigma"]
    choose("config.learn_sigma", learn_sigma, (True, False))
    if width[1] % config["heads"]:
        problem = f"does not divide hidden_size={width[1]}"
        raise UserError("config.heads", config["heads"], problem, "set heads as the weights were trained")
    out_channels = channels[1] * (2 if learn_sigma else 1)

    def block(name):
        hidden = ("kind", 4 * width[1])
        return {
            **_attention(read, f"{name}.attn", width, width),
            "mlp_in": _linear(read, f"{name}.mlp.fc1", hidden, width),
            "mlp_out": _linear(read, f"{name}.mlp.fc2", width, hidden),
            "modulation": _linear(read, f"{name}.adaLN_modulation.1", ("kind", 6 * width[1]), width),
        }

    params = params | {
        "embed": _patch_conv(read, "x_embedder.proj", width, channels, patch),
        "time_in": _linear(read, "t_embedder.mlp.0", width, ("kind", TIMESTEP_FEATURES)),
        "time_out": _linear(read, "t_embedder.mlp.2", width, width),
        "blocks": _stack([block(f"blocks.{i}") for i in range(config["depth"])]),
        "final_modulation": _linear(read, "final_layer.adaLN_modulation.1", ("kind", 2 * width[1]), width),
        "final": _linear(read, "final_layer.linear", ("learn_sigma", patch[1] ** 2 * out_channels), width),
    }
    if classes is not None:
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
            raise UserError("config.num_classes", classes, "not a number of classes", "give a whole number, or None")
        table = read("y_embedder.embedding_table.weight", ("num_classes", classes + 1), width)
        params["label"] = {"embedding": table}
    module = DiT(
        out_channels=out_channels,
        patch=patch[1],
        width=width[1],
        depth=config["depth"],
        heads=config["heads"],
        classes=classes,
        content_patch=content_patch,
        position="table",
    )
    return module, params
