"""Weights of the CMD reference and of facebook's DiT: torch names and layouts in, our modules and parameters out, and
back."""

import logging
import math
import re
from functools import partial

import numpy as np

from cmd_jax.errors import UserError, choose, nearest
from cmd_jax.interop.state_dicts import Reader, Tensor, layer, shapes, to_params, to_state_dict
from cmd_jax.interop.weights import flatten, unflatten
from cmd_jax.models.autoencoder import MODES, Autoencoder
from cmd_jax.models.dit import NORM_EPSILON, SIZES, TIMESTEP_FEATURES, DiT, sincos_table

log = logging.getLogger(__name__)

MOTION_ORDERS = ("as_stored", "rows_first")
IGNORED_KEYS = ("model", "std", "seed", "frames", "image_size")  # no weight depends on them
AUTOENCODER_KEYS = ("hidden_dim", "patch_size", "channels", "motion_channels", "depth", "heads", "head_dim", "mode")
DIT_KEYS = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "heads")
CONTENT_KEYS = ("content_size", "content_channels", "content_patch_size")
OPTIONAL_KEYS = {"learn_sigma": True, "num_classes": None, "frequency_shift": 0, "mlp_epsilon": NORM_EPSILON}
TABLES = {"pos_embed": "positions", "keyframe_pos_embed": "content_positions"}  # torch name -> ours
ALSO_CALLED = {"content_pos_embed": "keyframe_pos_embed"}
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

# Layouts of torch's weights -> ours: a linear map, a 1x1 convolution, and convolutions with kernel = stride.
LINEAR, POINTWISE = "o i -> i o", "o i 1 1 -> i o"
PATCHES, UNPATCHES = "o c p q -> (p q c) o", "i c p q -> i (p q c)"
ATTENTION = ("query", "key", "value")


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
    read = Reader(kind, config, {_usual(name, state_dict): array for name, array in state_dict.items()})
    params = {table.path: table.read(read) for table in tables} | to_params(tensors, read)
    if kind == "autoencoder":
        _read_unused(read)
    read.refuse_rest()
    return module, unflatten(params)


def _usual(name: str, state_dict: dict) -> str:
    usual = ALSO_CALLED.get(name, name)
    return name if usual in state_dict else usual


def _read_unused(read: Reader):
    for name, table in UNUSED.items():
        if name in read and not np.allclose(read(name, ("kind", table.size)), table, rtol=1e-2):  # halves are rounded
            log.warning("%s is not the release's table; nothing depends on it, and converting back writes that", name)


def state_dict(kind: str, config: dict, params) -> dict[str, np.ndarray]:
    """The torch weights that `load` would read as these params, in their dtypes; kind and config as there.

    All that strict loading wants there: position tables, and the rotary tables that the autoencoder does not use.
    """
    _, tensors, tables = _described(kind, config)
    flat = flatten(params)
    state = {table.name: table.to_torch(flat[table.path]) for table in tables} | to_state_dict(tensors, flat)
    dtype = np.asarray(next(iter(flat.values()))).dtype
    return state | ({name: table.astype(dtype) for name, table in UNUSED.items()} if kind == "autoencoder" else {})


def model(kind: str, config: dict):
    """-> (module, its parameters as a tree of ShapeDtypeStructs); kind and config as for `load`."""
    module, tensors, tables = _described(kind, config)
    return module, unflatten(shapes(tensors) | shapes(table.tensor for table in tables))


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


def _described(kind: str, config: dict):
    """-> (module, [Tensor], [Table])."""
    describe = {"autoencoder": _autoencoder, "motion_dit": _motion_dit, "content_dit": _content_dit}
    choose("kind", kind, describe)
    if "model" in config:
        choose("config.model", config["model"], (kind,))
    return describe[kind](config)


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


def _autoencoder(config: dict):
    _check(config, AUTOENCODER_KEYS)
    width, channels, patch, motion = (
        (key, config[key]) for key in ("hidden_dim", "channels", "patch_size", "motion_channels")
    )
    inner = config["heads"] * config["head_dim"]
    values, one = ("patch_size", patch[1] ** 2 * channels[1]), ("kind", 1)

    def blocks(side):
        def names(part):
            return f"{side}.layers.{{}}.{part}"

        def norm(part, path):
            roles = (("weight", "scale"), ("bias", "bias"))
            return [Tensor(names(f"{part}.{r}"), (width,), (f"{path}/{s}",), "o -> o", depth) for r, s in roles]

        def linear(part, path, parts, *dims):
            return layer(names(part), tuple(f"{path}/{p}" for p in parts), LINEAR, dims, layers=depth)

        depth, tensors = config["depth"], []
        for i, path in enumerate((f"{side}/blocks/time", f"{side}/blocks/space")):
            tensors += norm(f"{i}.norm", f"{path}_norm")
            tensors += linear(f"{i}.fn.qkv", path, ATTENTION, ("head_dim", 3 * inner), width)
            tensors += linear(f"{i}.fn.proj", path, ("out",), width, ("head_dim", inner))
        path = f"{side}/blocks/mlp"
        tensors += norm("2.norm", f"{path}_norm")
        tensors += linear("2.fn.net.0", path, ("value", "gate"), ("kind", 8 * width[1]), width)
        return tensors + linear("2.fn.net.3", path, ("out",), width, ("kind", 4 * width[1]))

    def one_layer(name, path, pattern, *dims, **more):
        return layer(name, (path,), pattern, dims, **more)

    # The transposed convolutions come first: their shapes tell width, channels and patch apart.
    tensors = [
        *one_layer("to_output.1", "to_video", UNPATCHES, width, channels, patch, patch, bias=channels),
        *one_layer("to_logit.1", "content_logits", UNPATCHES, width, channels, patch, patch, bias=channels),
        *one_layer("encoder.to_patch_embedding", "embed_video", LINEAR, width, values),
        *blocks("encoder"),
        *one_layer("pre_yt", "rows_to_motion", POINTWISE, motion, width, one, one),
        *one_layer("pre_xt", "columns_to_motion", POINTWISE, motion, width, one, one),
        *one_layer("to_patch_embedding_xy", "embed_content", LINEAR, width, values),
        *one_layer("post_yt", "embed_rows", POINTWISE, width, motion, one, one),
        *one_layer("post_xt", "embed_columns", POINTWISE, width, motion, one, one),
        *blocks("decoder"),
    ]
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
    return module, tensors, []


class Table:
    """A position table, which a state dict need not hold: [1, tokens, D] in torch, [tokens, D] in ours.

    make() -> the table [tokens, D] where there is none. halves: (columns, rows) of patches along the grid's second axis
    as torch has them, where ours has the rows first; or None.
    """

    def __init__(self, name: str, config: dict, size: str, grid: tuple[int, int], make, halves=None):
        if config["hidden_size"] % 4:
            raise UserError("config.hidden_size", config["hidden_size"], "not divisible by 4", "give a multiple of 4")
        dims = (("kind", 1), (size, math.prod(grid)), ("hidden_size", config["hidden_size"]))
        if math.prod((*grid, config["hidden_size"])) > LARGEST_TABLE:
            raise UserError(f"config.{size}", config[size], "a grid larger than any model's", "give the size it has")
        self.name, self.path, self.grid, self.make, self.halves = name, TABLES[name], grid, make, halves
        self.tensor = Tensor(name, dims, (self.path,), "1 n d -> n d")

    def read(self, read: Reader) -> np.ndarray:
        table = self.tensor.to_ours(read(self.name, *self.tensor.dims)) if self.name in read else self.make()
        return self._turn(table, self.halves[0]) if self.halves else table

    def to_torch(self, table: np.ndarray) -> np.ndarray:
        return self.tensor.to_torch(self._turn(table, self.halves[1]) if self.halves else table)

    def _turn(self, table, first: int):
        """Exchange the first half of the grid's second axis, of that many patches, and the other one."""
        table = np.asarray(table).reshape(*self.grid, -1)
        return np.concatenate([table[:, first:], table[:, :first]], axis=1).reshape(math.prod(self.grid), -1)


def _content_dit(config: dict):
    _check(config, DIT_KEYS, tuple(OPTIONAL_KEYS))
    grid = _grid(config, "input_size", "patch_size")
    table = Table("pos_embed", config, "input_size", grid, partial(sincos_table, *grid, config["hidden_size"]))
    return *_dit(config), [table]


def _motion_dit(config: dict):
    _check(config, (*DIT_KEYS, *CONTENT_KEYS), (*OPTIONAL_KEYS, "motion_order"))
    order = choose("config.motion_order", config.get("motion_order", "as_stored"), MOTION_ORDERS)
    grid, content_grid = _grid(config, "input_size", "patch_size"), _grid(config, "content_size", "content_patch_size")
    halves = _halves(grid, content_grid, config) if order == "rows_first" else None
    tables = [
        Table(name, config, size, cells, partial(_square_table, config, name, size, cells), turned)
        for name, size, cells, turned in (
            ("pos_embed", "input_size", grid, halves),
            ("keyframe_pos_embed", "content_size", content_grid, None),
        )
    ]
    width, patch = ("hidden_size", config["hidden_size"]), ("content_patch_size", config["content_patch_size"])
    dims = (width, ("content_channels", config["content_channels"]), patch, patch)
    embed = layer("keyframe_embedder.proj", ("embed_content",), PATCHES, dims)
    module, tensors = _dit(config, content_patch=patch[1])
    return module, [*embed, *tensors], tables


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

    def linear(name, paths, outputs, inputs, layers=0):
        return layer(name, paths, LINEAR, (outputs, inputs), layers=layers)

    def wide(times):
        return "kind", times * width[1]

    block, projections = partial(linear, layers=config["depth"]), tuple(f"blocks/{part}" for part in ATTENTION)
    tensors = [
        *layer("x_embedder.proj", ("embed",), PATCHES, (width, channels, patch, patch)),
        *linear("t_embedder.mlp.0", ("time_in",), width, ("kind", TIMESTEP_FEATURES)),
        *linear("t_embedder.mlp.2", ("time_out",), width, width),
        *block("blocks.{}.attn.qkv", projections, ("hidden_size", 3 * width[1]), width),
        *block("blocks.{}.attn.proj", ("blocks/out",), width, width),
        *block("blocks.{}.mlp.fc1", ("blocks/mlp_in",), wide(4), width),
        *block("blocks.{}.mlp.fc2", ("blocks/mlp_out",), width, wide(4)),
        *block("blocks.{}.adaLN_modulation.1", ("blocks/modulation",), wide(6), width),
        *linear("final_layer.adaLN_modulation.1", ("final_modulation",), wide(2), width),
        *linear("final_layer.linear", ("final",), ("learn_sigma", patch[1] ** 2 * out_channels), width),
    ]
    if classes is not None:
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
            raise UserError("config.num_classes", classes, "not a number of classes", "give a whole number, or None")
        dims = ("num_classes", classes + 1), width
        tensors.append(Tensor("y_embedder.embedding_table.weight", dims, ("label/embedding",), "n d -> n d"))
    module = DiT(
        out_channels=out_channels,
        patch=patch[1],
        width=width[1],
        depth=config["depth"],
        heads=config["heads"],
        classes=classes,
        content_patch=content_patch,
        position="table",
        frequency_shift=config["frequency_shift"],
        mlp_epsilon=config["mlp_epsilon"],
    )
    return module, tensors
