"""CLIP in the transformers layout: folders in, our modules, parameters and tokenizer out, and weights back."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cmd_jax.errors import UserError, choose
from cmd_jax.files import as_path, read_json
from cmd_jax.interop.clip_tokenizer import VOCABULARIES, Tokenizer, check_tokenizer
from cmd_jax.interop.folders import TRANSFORMERS, check_folder, find_weights, is_size, note_unknown
from cmd_jax.interop.kept import load_params
from cmd_jax.interop.tensors import LAYOUTS, Mismatch, Tensor, state_dict_of, tensor
from cmd_jax.models.clip import ACTIVATIONS, CLIP, CLIPText, CLIPVision

# What a config.json means that leaves a field out.
TOWER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
TEXT = TOWER | {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as preprocessor_config.json has it
VISION = TOWER | {
    "model_type": "clip_vision_model",
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}
# Fields of a tower -> those of our modules.
FIELDS = {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads",
          "intermediate_size": "mlp_width", "hidden_act": "activation", "layer_norm_eps": "epsilon"}  # fmt: skip
TEXT_FIELDS = FIELDS | {"vocab_size": "vocabulary", "max_position_embeddings": "length"}
# Fields that don't change what a trained tower computes: how it was made, or what a text generator would do with it.
INERT = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dropout",
    "dtype", "id2label", "initializer_factor", "initializer_range", "label2id", "length_penalty", "max_length",
    "num_beam_groups", "num_beams", "num_return_sequences", "pad_token_id", "projection_dim", "repetition_penalty",
    "return_dict", "temperature", "tie_word_embeddings", "top_k", "top_p", "torch_dtype", "transformers_version",
    "typical_p", "use_cache",
}  # fmt: skip
UNSUPPORTED = ("quantization_config",)
LEGACY_END = 2  # an eos_token_id that old files have by mistake; their towers pool at the highest id

# Our names -> torch's. In `blocks` the layers are stacked; torch numbers them.
LAYERS = {
    "attention_norm": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
PARTS = {
    "text": "text_model",
    "vision": "vision_model",
    "text_projection": "text_projection",
    "image_projection": "visual_projection",
    "logit_scale": "logit_scale",
    "tokens": "embeddings.token_embedding",
    "positions": "embeddings.position_embedding.weight",
    "class_token": "embeddings.class_embedding",
    "embed": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
    "final_norm": "final_layer_norm",
    "blocks": "encoder.layers.{}",
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
} | LAYERS
BUFFERS = re.compile(r"(.*\.)?embeddings\.position_ids")  # written by old versions, and always 0, 1, 2, ...
PREFIX = "text_model."

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images
STD = (0.26862954, 0.26130258, 0.27577711)


def load(path: str | Path, dtype="float32", shardings: Callable | None = None):
    """A whole CLIP from its folder (config.json, weights) -> (CLIP, params, Tokenizer or None without its files).

    dtype: of the parameters and of the matrix products; `module.clone` changes the latter.
    shardings: as of `load_params`; without it parameters are numpy arrays.
    Raises UserError for files that are missing or damaged, for fields of the config that would change the function and
    are not supported, and for tensors that are missing, left over or of another shape, by name.
    """
    path = as_path(path)
    config = _read_config(path)
    if config.get("model_type", "clip") != "clip":
        problem = "not a whole CLIP with a text and a vision tower"
        raise UserError(f"{path}/config.json: model_type", config["model_type"], problem, "give the folder of one")
    dtype, where = jnp.dtype(dtype), f"{path}/config.json: "
    features = _positive(f"{where}projection_dim", config.get("projection_dim", 512))
    towers = {}
    for tower in ("text", "vision"):
        given = config.get(f"{tower}_config_dict")  # where old files have one, it is the one that counts
        name = f"{tower}_config" if given is None else f"{tower}_config_dict"
        towers[tower] = config.get(name) or {}
        if not isinstance(towers[tower], dict):
            raise UserError(where + name, towers[tower], "not a group of fields", "fetch the file again")
        towers[tower] = f"{where}{name}.", towers[tower]
    _check_preprocessor(path)
    module = CLIP(_text(*towers["text"], dtype), _vision(*towers["vision"], dtype), features)
    size = module.vision.image_size
    inputs = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, size, size, 3))
    params = _read_params(path, module, inputs, dtype, shardings, config)
    tokenizer = None
    if any((path / name).is_file() for name in VOCABULARIES):
        tokenizer = Tokenizer(path)
        check_tokenizer(tokenizer, module.text)
    return module, params, tokenizer


def load_text_encoder(folder: str | Path, dtype="float32", shardings: Callable | None = None):
    """The text tower of a `text_encoder` folder (config.json, weights) -> (CLIPText, params).

    dtype, shardings and errors as of `load`. The weights' names may or may not begin with `text_model.`.
    """
    folder, dtype = as_path(folder), jnp.dtype(dtype)
    config = _read_config(folder)
    module = _text(f"{folder}/config.json: ", config, dtype)
    return module, _read_params(folder, module, (jnp.zeros((1, 1), jnp.int32),), dtype, shardings, config)


def text_from_config(config: dict, dtype="float32") -> CLIPText:
    """What a text_encoder/config.json describes."""
    return _text("text_encoder/config.json: ", config, jnp.dtype(dtype))


def text_fields(config: dict) -> dict:
    """The fields of a text_encoder/config.json that its function depends on, with defaults."""
    return {key: config.get(key, value) for key, value in TEXT.items() if key != "model_type"}


def text_rename(name: str) -> str | None:
    """The name of a text tower's tensor, with PREFIX; None for a buffer."""
    return None if BUFFERS.fullmatch(name) else PREFIX + name.removeprefix(PREFIX)


def text_encoder_state(params: dict) -> dict[str, np.ndarray]:
    """The parameters of a CLIPText -> {torch name: array}, with the prefix `text_model.` that all versions read."""
    return state_dict_of(params, partial(_tensor, prefix=PREFIX))


def text_encoder_config(module: CLIPText) -> dict:
    """The config.json of a `text_encoder` folder, as transformers wants it."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "projection_dim": module.width,
        "eos_token_id": LEGACY_END if module.end_token is None else module.end_token,
        **{field: getattr(module, ours) for field, ours in TEXT_FIELDS.items()},
    }


def preprocess(frames: np.ndarray, size: int = 224) -> np.ndarray:
    """Frames as CLIP was trained on: uint8 [N,H,W,3] -> float32 [N,size,size,3], normalised.

    The short side is resized to `size` with Pillow's antialiased bicubic filter, which rounds to uint8, and the centre
    is cropped.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
        raise UserError("frames", f"{frames.dtype} {frames.shape}", "not uint8 [N,H,W,3]", "convert them")
    height, width = frames.shape[1:3]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    top, left = round((height - size) / 2), round((width - size) / 2)
    from PIL import Image  # here: the text tower alone needs none

    crops = np.empty((len(frames), size, size, 3), np.float32)
    for crop, frame in zip(crops, frames, strict=True):
        resized = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        crop[:] = resized[top : top + size, left : left + size]
    return (crops / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)


# config.json -> modules.


def _read_config(folder: Path) -> dict:
    check_folder("path", folder, "give a folder with config.json and weights", "config.json")
    return read_json(folder / "config.json")


def _positive(field: str, value) -> int:
    if not is_size(value):
        raise UserError(field, value, "not a positive whole number", "set it as the weights were trained")
    return value


def _tower(where: str, config: dict, defaults: dict) -> tuple[dict, dict]:
    """All fields of a tower, checked, and the fields that both kinds of module share."""
    # Old files list every field of every model, empty where it has no meaning.
    stated = {key: value for key, value in config.items() if value}
    note_unknown(where.rstrip(" :."), stated, (*defaults, *INERT, *UNSUPPORTED), "transformers")
    for key in stated.keys() & set(UNSUPPORTED):
        raise UserError(where + key, stated[key], "not supported", "give the weights in full precision")
    config = defaults | config
    choose(f"{where}model_type", config["model_type"], (defaults["model_type"],))
    sizes = [key for key, value in defaults.items() if type(value) is int and key != "eos_token_id"]
    sizes = {key: _positive(where + key, config[key]) for key in sizes}
    if config["hidden_size"] % config["num_attention_heads"]:
        problem = f"does not divide hidden_size={config['hidden_size']}"
        raise UserError(f"{where}num_attention_heads", config["num_attention_heads"], problem, "correct one of them")
    epsilon = config["layer_norm_eps"]
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        raise UserError(f"{where}layer_norm_eps", epsilon, "not a small positive number", "1e-05 is CLIP's")
    activation = choose(f"{where}hidden_act", config["hidden_act"], ACTIVATIONS)
    values = sizes | {"hidden_act": activation, "layer_norm_eps": float(epsilon)}
    return sizes, {ours: values[field] for field, ours in FIELDS.items()}


def _text(where: str, config: dict, dtype) -> CLIPText:
    sizes, fields = _tower(where, config, TEXT)
    end = config.get("eos_token_id", TEXT["eos_token_id"])
    if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < sizes["vocab_size"]:
        problem = f"not one of the {sizes['vocab_size']} ids of vocab_size"
        raise UserError(f"{where}eos_token_id", end, problem, "set it to the id of the end of text")
    return CLIPText(
        vocabulary=sizes["vocab_size"],
        length=sizes["max_position_embeddings"],
        end_token=None if end == LEGACY_END else end,
        dtype=dtype,
        **fields,
    )


def _vision(where: str, config: dict, dtype) -> CLIPVision:
    sizes, fields = _tower(where, config, VISION)
    choose(f"{where}num_channels", sizes["num_channels"], (3,))
    if sizes["patch_size"] > sizes["image_size"]:
        problem = f"larger than image_size={sizes['image_size']}"
        raise UserError(f"{where}patch_size", sizes["patch_size"], problem, "correct one of them")
    return CLIPVision(image_size=sizes["image_size"], patch=sizes["patch_size"], dtype=dtype, **fields)


def _check_preprocessor(folder: Path):
    """`preprocess` must be what the folder wants."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    for key, only in (("image_mean", MEAN), ("image_std", STD), ("resample", BICUBIC)):
        if key in config and not np.array_equal(config[key], only):
            raise UserError(
                f"{path}: {key}", config[key], f"only CLIP's own, {only}, is known here", "give such a CLIP"
            )


# Weights.


def _tensor(path: str, shape: tuple[int, ...], prefix: str = "") -> Tensor:
    """blocks/query/kernel -> encoder.layers.{}.self_attn.q_proj.weight"""
    parts = path.split("/")
    layered = "blocks" in parts
    ndim = len(shape) - layered
    pattern = LAYOUTS[ndim] if parts[-1] == "kernel" else ("->", "a -> a", "a b -> a b")[ndim]
    return tensor(path, shape, prefix + ".".join(PARTS[part] for part in parts), pattern, layered=layered)


def _read_params(folder: Path, module, inputs: tuple, dtype, shardings, config: dict) -> dict:
    """Parameters of a CLIP, or of a text tower, whose weights may have names with or without PREFIX."""
    whole = isinstance(module, CLIP)

    def rename(name):
        return (None if BUFFERS.fullmatch(name) else name) if whole else text_rename(name)

    def init(key):
        return module.init(key, *inputs)["params"]

    blame, tensor_of = partial(_suspect, config), partial(_tensor, prefix="" if whole else PREFIX)
    files = find_weights(folder, TRANSFORMERS)
    return load_params(files, init, tensor_of, dtype, shardings, rename=rename, blame=blame)


def _suspect(config: dict, mismatch: Mismatch) -> str | None:
    """The field of config.json that tensors which do not fit tell of."""
    if odd := (*mismatch.missing, *mismatch.extra):
        return "num_hidden_layers" if all(".layers." in name for name in odd) else None
    for name, (has, right) in mismatch.misshapen.items():
        wrong = {b for a, b in zip(has, right, strict=False) if a != b}
        likely = [f"{key}={value}" for key, value in _sizes_of(name, config).items() if value in wrong]
        if likely:
            return ", ".join(likely)
    return None


def _sizes_of(name: str, config: dict) -> dict[str, int]:
    """Whole numbers of the config that may give the shape of a tensor: those of its tower, if the config has groups."""
    own = config.get(f"{name.partition('_')[0]}_config") or {}
    return {key: value for key, value in (config | own).items() if type(value) is int}
