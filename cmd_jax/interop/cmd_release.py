"""Weights of the CMD reference and of facebook's DiT: torch names and layouts in, our modules and parameters out, and
back."""

import logging
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import UserError, choose
from cmd_jax.interop.cmd_config import (
    AUTOENCODER,
    CONTENT_KEYS,
    DENOISER,
    DIT_KEYS,
    MOTION_ORDERS,
    OPTIONAL_KEYS,
    check_keys,
    grid_of,
)
from cmd_jax.interop.tensors import (
    LAYOUTS,
    POINTWISE,
    Mismatch,
    Tensor,
    check,
    layer,
    shapes,
    to_params,
    to_state_dict,
)
from cmd_jax.interop.weights import Weights
from cmd_jax.models.autoencoder import Autoencoder
from cmd_jax.models.dit import TIMESTEP_FEATURES, DiT, sincos_table

log = logging.getLogger(__name__)

TABLES = {"pos_embed": "positions", "keyframe_pos_embed": "content_positions"}  # torch name -> ours
ALSO_CALLED = {"content_pos_embed": "keyframe_pos_embed"}
GRID = ("input_size", "patch_size")
LARGEST_TABLE = 2**28  # numbers
# Rotary tables that the release's autoencoder holds and never uses, whatever the width of its heads.
UNUSED = {
    f"{side}.{name}": table.astype(np.float32)
    for side in ("encoder", "decoder")
    for name, table in (
        ("frame_rot_emb.inv_freqs", 10000.0 ** (-np.arange(32) / 32)),
        ("image_rot_emb.scales", 2.0 ** np.linspace(0, math.log2(5), 16)),
    )
}

# Layouts of torch's weights -> ours: a linear map, and convolutions with kernel = stride.
LINEAR = LAYOUTS[2]
PATCHES, UNPATCHES = "o c p q -> (p q c) o", "i c p q -> i (p q c)"


def load(kind: str, config: dict, state_dict: dict[str, np.ndarray]):
    """A model of the reference from its torch weights -> (module, params) for `module.apply({"params": params}, ...)`.

    kind: "autoencoder", "motion_dit" or "content_dit" (facebook's DiT has the same names). state_dict: torch layout
    (conv OIHW, linear [out,in]), any float dtype; params are float32 and may share its memory.

    config, by kind; sizes are an int or a pair:
      autoencoder: hidden_dim, patch_size, channels, motion_channels, depth, heads, head_dim, mode.
      content_dit: input_size [H,W], patch_size, in_channels, hidden_size, depth, heads; learn_sigma (default true);
        num_classes (default none: no class table), without the null class; frequency_shift and mlp_epsilon of `DiT`.
      motion_dit: the same with input_size [T,h+w], and content_size [H,W], content_channels, content_patch_size.
        motion_order: "as_stored" takes the reference's latents (columns, then rows), "rows_first" the ones of our
        autoencoder; the halves have the proportions of content_size.
    Position tables are taken from `pos_embed` and `keyframe_pos_embed`, or `content_pos_embed`, where the weights hold
    them. Otherwise a motion DiT gets the reference's table, that of a square grid with as many tokens; a content DiT
    that of its own grid.

    The module takes and gives channels-last arrays; the autoencoder's motion latent has rows first.
    Raises UserError for a bad config, and for a tensor that is missing, left over or of another shape: it names the
    tensor, its shapes and the config field that is likely wrong.
    """
    module, tensors, tables = _described(kind, config)
    weights = Weights.of(_usual(kind, tables, state_dict))
    check(tensors, weights, partial(_refusal, kind, config, tensors, weights))
    return module, to_params(tensors, weights)


def _usual(kind: str, tables: list["Table"], state_dict: dict) -> dict:
    """The state dict with all tables under their usual names, rows first if that is wanted, and nothing unused."""
    state = dict(state_dict)
    for old, name in ALSO_CALLED.items():
        if old in state and name not in state:
            state[name] = state.pop(old)
    for name, table in UNUSED.items() if kind == "autoencoder" else ():
        found = state.pop(name) if name in state and state[name].shape == table.shape else table
        if not np.allclose(found, table, rtol=1e-2):  # halves are rounded
            log.warning("%s is not the release's table; nothing depends on it, and converting back writes that", name)
    for table in tables:
        name, shape = table.tensor.name, table.tensor.shape
        if name not in state:
            state[name] = table.make()[None]
        if table.halves and state[name].shape == shape:
            state[name] = table.exchanged(state[name], table.halves[0])
    return state


def _refusal(kind: str, config: dict, tensors: list[Tensor], weights: Weights, mismatch: Mismatch) -> UserError:
    """Names the field of the config that is likely wrong, or else the kind."""
    field = "kind"
    if mismatch.misshapen:
        name, (has, right) = next(iter(mismatch.misshapen.items()))
        fields = next(tensor.fields for tensor in tensors if name in tensor.names)
        if len(has) == len(right):
            field = next(f for f, n, size in zip(fields, has, right, strict=True) if n != size)
    elif name := next(iter([*mismatch.missing, *mismatch.extra]), None):
        field = _deciding(name, config, weights.tensors)
    if field == "kind":
        return UserError("kind", kind, mismatch.problem, "give the whole weights of such a model, or the right kind")
    return UserError(f"config.{field}", config.get(field), mismatch.problem, f"set {field} as the weights were trained")


def _deciding(name: str, config: dict, names: Iterable[str]) -> str:
    """The field of the config that decides whether there is such a tensor."""
    if name.startswith("y_embedder."):
        return "num_classes"
    block = re.match(r"(?:(?:en|de)coder\.layers|blocks)\.(\d+)\.", name)
    if block is None or (int(block[1]) < config["depth"] and any(n.startswith(block[0]) for n in names)):
        return "kind"
    return "depth"


def state_dict(kind: str, config: dict, params) -> dict[str, np.ndarray]:
    """The torch weights that `load` would read as these params, in their dtypes; kind and config as there.

    All that strict loading wants there: position tables, and the rotary tables that the autoencoder does not use.
    """
    _, tensors, tables = _described(kind, config)
    state = to_state_dict(tensors, params)
    for table in tables:
        if table.halves:
            state[table.tensor.name] = table.exchanged(state[table.tensor.name], table.halves[1])
    unused = UNUSED if kind == "autoencoder" else {}
    dtype = next(iter(state.values())).dtype
    return state | {name: table.astype(dtype) for name, table in unused.items()}


def model(kind: str, config: dict):
    """-> (module, its parameters as a tree of ShapeDtypeStructs); kind and config as for `load`."""
    module, tensors, _ = _described(kind, config)
    return module, shapes(tensors)


def _described(kind: str, config: dict):
    """-> (module, all Tensors, [Table])."""
    describe = {"autoencoder": _autoencoder, "motion_dit": _motion_dit, "content_dit": _content_dit}
    choose("kind", kind, describe)
    if "model" in config:
        choose("config.model", config["model"], (kind,))
    return describe[kind](config)


def _layer(name: str, paths, pattern: str, *dims: tuple[str, int], **more) -> list[Tensor]:
    """`layer` with the (config field, size) of each dimension; field "kind" for a fixed size."""
    fields, shape = zip(*dims, strict=True)
    return layer(name, paths, pattern, shape, fields, **more)


def _autoencoder(config: dict):
    check_keys(config, tuple(AUTOENCODER.values()))
    width, channels, patch, motion = (
        (key, config[key]) for key in ("hidden_dim", "channels", "patch_size", "motion_channels")
    )
    inner = config["heads"] * config["head_dim"]
    depth, values, one = config["depth"], ("patch_size", patch[1] ** 2 * channels[1]), ("kind", 1)

    def block(side, part, paths, *dims, **more):
        paths = " ".join(f"{side}/blocks/{path}" for path in paths.split())
        return _layer(f"{side}.layers.{{}}.{part}", paths, LAYOUTS[len(dims)], *dims, layers=depth, **more)

    def blocks(side):
        tensors = []
        for i, axis in enumerate(("time", "space")):
            qkv = f"{axis}/query {axis}/key {axis}/value"
            tensors += block(side, f"{i}.norm", f"{axis}_norm", width, kernel="scale")
            tensors += block(side, f"{i}.fn.qkv", qkv, ("head_dim", 3 * inner), width)
            tensors += block(side, f"{i}.fn.proj", f"{axis}/out", width, ("head_dim", inner))
        tensors += block(side, "2.norm", "mlp_norm", width, kernel="scale")
        tensors += block(side, "2.fn.net.0", "mlp/value mlp/gate", ("kind", 8 * width[1]), width)
        return tensors + block(side, "2.fn.net.3", "mlp/out", width, ("kind", 4 * width[1]))

    # The transposed convolutions come first: their shapes tell width, channels and patch apart.
    tensors = [
        *_layer("to_output.1", "to_video", UNPATCHES, width, channels, patch, patch, bias=1),
        *_layer("to_logit.1", "content_logits", UNPATCHES, width, channels, patch, patch, bias=1),
        *_layer("encoder.to_patch_embedding", "embed_video", LINEAR, width, values),
        *blocks("encoder"),
        *_layer("pre_yt", "rows_to_motion", POINTWISE, motion, width, one, one),
        *_layer("pre_xt", "columns_to_motion", POINTWISE, motion, width, one, one),
        *_layer("to_patch_embedding_xy", "embed_content", LINEAR, width, values),
        *_layer("post_yt", "embed_rows", POINTWISE, width, motion, one, one),
        *_layer("post_xt", "embed_columns", POINTWISE, width, motion, one, one),
        *blocks("decoder"),
    ]
    module = Autoencoder(**{ours: config[theirs] for ours, theirs in AUTOENCODER.items()}, position="none")
    return module, tensors, []


class Table(NamedTuple):
    """A position table, which a state dict need not hold: [1, tokens, D] in torch, [tokens, D] in ours.

    grid: rows and columns of tokens. make() -> the table [tokens, D] where there is none. halves: (columns, rows) of
    patches along the grid's second axis as torch has them, where ours has the rows first; or None.
    """

    tensor: Tensor
    grid: tuple[int, int]
    make: Callable[[], np.ndarray]
    halves: tuple[int, int] | None

    def exchanged(self, table: np.ndarray, first: int) -> np.ndarray:
        """Torch's table with the first half of the grid's second axis, of that many patches, behind the other one."""
        rows = np.reshape(table, (*self.grid, -1))
        return np.concatenate([rows[:, first:], rows[:, :first]], axis=1).reshape(table.shape)


def _table(name: str, config: dict, size: str, grid: tuple[int, int], make, halves=None) -> Table:
    width = config["hidden_size"]
    if width % 4:
        raise UserError("config.hidden_size", width, "not divisible by 4", "give a multiple of 4")
    if math.prod((*grid, width)) > LARGEST_TABLE:
        raise UserError(f"config.{size}", config[size], "a grid larger than any model's", "give the size it has")
    shape, fields = (1, math.prod(grid), width), ("kind", size, "hidden_size")
    return Table(Tensor(TABLES[name], name, shape, "1 n d -> n d", fields=fields), grid, make, halves)


def _content_dit(config: dict):
    check_keys(config, DIT_KEYS, tuple(OPTIONAL_KEYS))
    grid = grid_of(config, *GRID)
    table = _table("pos_embed", config, "input_size", grid, partial(sincos_table, *grid, config["hidden_size"]))
    module, tensors = _dit(config)
    return module, [table.tensor, *tensors], [table]


def _motion_dit(config: dict):
    check_keys(config, (*DIT_KEYS, *CONTENT_KEYS), (*OPTIONAL_KEYS, "motion_order"))
    order = choose("config.motion_order", config.get("motion_order", "as_stored"), MOTION_ORDERS)
    grid, content_grid = (grid_of(config, *keys) for keys in (GRID, CONTENT_KEYS[::2]))
    halves = _halves(grid, content_grid, config) if order == "rows_first" else None
    tables = [
        _table(name, config, size, cells, partial(_square_table, config, name, size, cells), turned)
        for name, size, cells, turned in (
            ("pos_embed", "input_size", grid, halves),
            ("keyframe_pos_embed", "content_size", content_grid, None),
        )
    ]
    width, patch = ("hidden_size", config["hidden_size"]), ("content_patch_size", config["content_patch_size"])
    channels = "content_channels", config["content_channels"]
    embed = _layer("keyframe_embedder.proj", "embed_content", PATCHES, width, channels, patch, patch)
    module, tensors = _dit(config, content_patch=patch[1])
    return module, [*(table.tensor for table in tables), *embed, *tensors], tables


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


def _halves(grid: tuple[int, int], content_grid: tuple[int, int], config: dict) -> tuple[int, int]:
    """How many of the patches along h+w are columns, and how many are rows."""
    height, width = content_grid
    columns, rest = divmod(grid[1] * width, height + width)
    if rest:
        problem = f"{grid[1]} patches along h+w don't divide as content_size={config['content_size']} does"
        raise UserError("config.motion_order", "rows_first", problem, "use as_stored, or correct the sizes")
    return columns, grid[1] - columns


def _dit(config: dict, content_patch: int = 0):
    """The trunk that both denoisers share -> (module, [Tensor])."""
    config = OPTIONAL_KEYS | config
    width, channels, patch = ((key, config[key]) for key in ("hidden_size", "in_channels", "patch_size"))
    classes, learn_sigma = config["num_classes"], config["learn_sigma"]
    choose("config.learn_sigma", learn_sigma, (True, False))
    for key, below in (("frequency_shift", TIMESTEP_FEATURES // 2), ("mlp_epsilon", 1)):
        if type(config[key]) not in (int, float) or not 0 <= config[key] < below:
            problem = f"not a number from zero to {below}"
            raise UserError(f"config.{key}", config[key], problem, f"leave it out, it is {OPTIONAL_KEYS[key]}")
    if width[1] % config["heads"]:
        problem = f"does not divide hidden_size={width[1]}"
        raise UserError("config.heads", config["heads"], problem, "set heads as the weights were trained")
    out_channels = channels[1] * (2 if learn_sigma else 1)

    def wide(times):
        return "kind", times * width[1]

    def block(name, paths, *dims):
        return _layer(f"blocks.{{}}.{name}", paths, LINEAR, *dims, layers=config["depth"])

    tensors = [
        *_layer("x_embedder.proj", "embed", PATCHES, width, channels, patch, patch),
        *_layer("t_embedder.mlp.0", "time_in", LINEAR, width, ("kind", TIMESTEP_FEATURES)),
        *_layer("t_embedder.mlp.2", "time_out", LINEAR, width, width),
        *block("attn.qkv", "blocks/query blocks/key blocks/value", ("hidden_size", 3 * width[1]), width),
        *block("attn.proj", "blocks/out", width, width),
        *block("mlp.fc1", "blocks/mlp_in", wide(4), width),
        *block("mlp.fc2", "blocks/mlp_out", width, wide(4)),
        *block("adaLN_modulation.1", "blocks/modulation", wide(6), width),
        *_layer("final_layer.adaLN_modulation.1", "final_modulation", LINEAR, wide(2), width),
        *_layer("final_layer.linear", "final", LINEAR, ("learn_sigma", patch[1] ** 2 * out_channels), width),
    ]
    if classes is not None:
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
            raise UserError("config.num_classes", classes, "not a number of classes", "give a whole number, or None")
        shape, fields = (classes + 1, width[1]), ("num_classes", "hidden_size")
        tensors.append(
            Tensor("label/embedding", "y_embedder.embedding_table.weight", shape, "n d -> n d", fields=fields)
        )
    module = DiT(
        **{ours: config[theirs] for ours, theirs in DENOISER.items()},
        out_channels=out_channels,
        classes=classes,
        content_patch=content_patch,
        position="table",
        frequency_shift=config["frequency_shift"],
        mlp_epsilon=config["mlp_epsilon"],
    )
    return module, tensors
