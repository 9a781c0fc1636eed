"""Configs: `FILE[:ARG]` -> a locked ConfigDict, command-line overrides, and the checks that hold for all of them."""

import ast
import importlib.util
import json
from pathlib import Path

from ml_collections import ConfigDict, config_dict

from cmd_jax.errors import UserError, choose, nearest

STAGES = ("autoencoder", "content", "motion")


def parse_argument(argument: str, **defaults) -> tuple[str, dict]:
    """`stage,key=value,...`, as it follows the colon of --config, -> (stage, values); only keys of `defaults` are known."""
    values, words = dict(defaults), [w.strip() for w in argument.split(",") if w.strip()]
    stage = words.pop(0) if words and "=" not in words[0] else "autoencoder"
    choose("config", stage, (*STAGES, "sample"))
    for word in words:
        key, _, value = word.partition("=")
        if key not in values:
            known = ", ".join(f"{k}={v}" for k, v in defaults.items()) or "no keys"
            raise UserError("config", word, "no such key", f"this file takes {known}")
        values[key] = coerce(f"config:{key}", value, values[key])
    return stage, values


def coerce(field: str, text: str, like):
    """The command line's text as a value of the type of `like`."""
    if isinstance(like, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if like is not None and (type(value) is not type(like)):
        raise UserError(field, text, f"not a {type(like).__name__}", f"write it like {like!r}")
    return value


def load(specification: str, overrides: dict[str, str]) -> ConfigDict:
    """Run get_config of `FILE[:ARG]` and apply `key=value` overrides; unknown keys and wrong types are UserErrors."""
    file, _, argument = specification.partition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError("config", file, "no such file", "give a file of configs/, like configs/quickstart.py:content")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument)
    for key, text in overrides.items():
        override(config, key, text)
    return check(config.copy_and_resolve_references())


def override(config: ConfigDict, dotted: str, text: str):
    """Set the declared key `a.b` from the command line's text."""
    *path, last = dotted.split(".")
    node = config
    for i, part in enumerate(path):
        _known(node, ".".join(path[:i]), part, dotted)
        node = node[part]
        if not isinstance(node, ConfigDict):
            raise UserError(f"config.{dotted}", text, f"{part} has no keys below it", f"set config.{'.'.join(path)}")
    _known(node, ".".join(path), last, dotted)
    current = node.get_oneway_ref(last).get() if isinstance(node.get_ref(last), config_dict.FieldReference) else node[last]
    if isinstance(current, ConfigDict):
        raise UserError(f"config.{dotted}", text, "is a group of keys", f"set one of {', '.join(sorted(current))}")
    if last == "rules":
        raise UserError(f"config.{dotted}", text, "is a table", "set it in the config file")
    node[last] = coerce(f"config.{dotted}", text, current)


def _known(node: ConfigDict, prefix: str, key: str, dotted: str):
    if key not in node:
        near = ".".join(p for p in (prefix, nearest(key, node)[0]) if p)
        raise UserError(f"config.{dotted}", "?", "no such key", f"did you mean config.{near}")


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    return ConfigDict(json.loads(text))


# Numbers that must be positive, wherever they appear; and those that may be zero.
POSITIVE = {
    "frames", "height", "width", "stride", "steps", "batch_size", "patch", "depth", "heads", "head_dim", "channels",
    "motion_channels", "learning_rate", "accumulate", "log_every", "checkpoint_every", "keep", "threads", "prefetch",
    "content_steps", "motion_steps", "num", "motions", "clips", "rotary_base", "fps", "probe_timeout", "videos", "shown",
}  # fmt: skip
NOT_NEGATIVE = {
    "seed", "warmup_steps", "clip_norm", "l1", "l2", "lpips", "adversarial", "feature_matching", "label_dropout",
    "preview_every", "cache_clips", "max_bad_fraction", "content_patch",
}  # fmt: skip


def check(config: ConfigDict) -> ConfigDict:
    """The checks that need no data: signs, ranges, choices, and sizes that patches must divide."""
    _check_signs(config, "")
    for field in ("train.ema_decay", "guidance.label_dropout", "data.max_bad_fraction"):
        group, key = field.split(".")
        if group in config and key in config[group] and not 0 <= config[group][key] <= 1:
            raise UserError(field, config[group][key], "outside 0 to 1", "give a fraction")
    if "model" in config:
        choose("model.dtype", config.model.dtype, ("float32", "bfloat16"))
        choose("model.remat", config.model.remat, ("none", "full", "dots"))
    if "train" in config and config.train.batch_size % config.train.accumulate:
        raise UserError(
            "train.batch_size", config.train.batch_size, f"not a multiple of train.accumulate={config.train.accumulate}",
            f"use {config.train.accumulate * -(-config.train.batch_size // config.train.accumulate)}",
        )  # fmt: skip
    if "optimizer" in config and config.optimizer.warmup_steps >= config.train.steps:
        raise UserError(
            "optimizer.warmup_steps", config.optimizer.warmup_steps, f"not below train.steps={config.train.steps}",
            f"use at most {config.train.steps - 1}",
        )  # fmt: skip
    if config.get("stage") == "autoencoder":
        for side in ("height", "width"):
            divisible(f"data.{side}", config.data[side], "model.patch", config.model.patch)
        needed = 4 if config.model.position == "rotary" else 1
        divisible("model.head_dim", config.model.head_dim, "what axial rotary positions need", needed)
    if config.get("stage") in ("content", "motion"):
        divisible("model.width", config.model.width, "model.heads", config.model.heads)
        divisible("model.width", config.model.width, "what sin-cos tables need", 4)
        if config.latents.normalize and config.diffusion.clip:
            raise UserError(
                "diffusion.clip", config.diffusion.clip, "clips pixels, but latents.normalize=True diffuses in other units",
                "set one of the two off",
            )  # fmt: skip
    return config


def divisible(field: str, size: int, by_field: str, by: int):
    """`size` must be a multiple of `by`; both fields are named otherwise."""
    if size % by:
        raise UserError(field, size, f"not a multiple of {by_field}={by}", f"use {max(by, round(size / by) * by)}")


def _check_signs(config: ConfigDict, prefix: str):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _check_signs(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if value != value or (key in POSITIVE and value <= 0 and prefix != "mesh."):
                raise UserError(f"{prefix}{key}", value, "must be positive", "give a number above zero")
            if key in NOT_NEGATIVE and value < 0:
                raise UserError(f"{prefix}{key}", value, "must not be negative", "give zero or more")
