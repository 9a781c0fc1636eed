"""Configs: `FILE[:ARG]` -> a locked ConfigDict, command-line overrides, and the checks that hold for all of them."""

import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ml_collections import ConfigDict

from cmd_jax import defaults
from cmd_jax.builders import build_autoencoder, build_denoiser, build_process, reads_text
from cmd_jax.errors import UserError, choose, divisible, nearest
from cmd_jax.files import check_like, check_path
from cmd_jax.interop.diffusers import SOURCE

STAGES = ("autoencoder", "content", "motion")


def parse_argument(argument: str, **defaults) -> tuple[str, dict]:
    """`stage,key=value,...`, as it follows the colon of --config, -> (stage, values); `defaults` are the known keys."""
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
    """The command line's text as a value of the type of `like`: a str, bool, int or float."""
    try:
        return {"true": True, "false": False}[text.lower()] if isinstance(like, bool) else type(like)(text)
    except (KeyError, ValueError) as e:
        raise UserError(field, text, f"not of type {type(like).__name__}", f"write it like {like!r}") from e


def load(specification: str, overrides: Mapping[str, object] = MappingProxyType({})) -> ConfigDict:
    """The checked config of `FILE[:ARG]` with some values replaced: {"train.steps": 100}, or texts like "100".

    UserError for unknown keys and for what a key cannot have.

    FILE: a Python file, or the bare name of one that comes with cmd_jax, like quickstart:sample.
    """
    file, _, argument = specification.partition(":")
    config = _run(find(file), argument)
    for key, text in overrides.items():
        override(config, key, str(text))
    return check(config.copy_and_resolve_references())


def shipped() -> Path:
    """The folder of the configs, weights and prompts that come with cmd_jax: inside the package, or of its checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def find(file: str) -> Path:
    """The config file of a path, or of the name of a shipped one."""
    path, names = Path(file), sorted(path.stem for path in shipped().glob("*.py"))
    if file in names:
        return shipped() / f"{file}.py"
    if not path.is_file() or path.suffix != ".py":
        problem = "not a Python file" if path.is_file() else "no such file"
        raise UserError("config", file, problem, f"give a Python file, or the name of one here: {', '.join(names)}")
    return path


def _run(path: Path, argument: str) -> ConfigDict:
    """What get_config of a config file returns. What goes wrong in the file becomes one line that names the place."""
    try:
        spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(argument)
        different = keys(config) ^ keys(defaults.like(config))
    except UserError:
        raise
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        place = f" in line {lines[-1]}" if lines else ""
        raise UserError("config", path, f"{type(e).__name__}{place}: {e}", "mend the file; --debug shows more") from e
    if different:
        stage, names = f"cmd_jax.defaults.stage({config.stage!r})", ", ".join(sorted(different))
        raise UserError("config", path, f"its keys are not those of {stage}: {names}", "start from it")
    return config


def keys(config: ConfigDict, prefix: str = "") -> set[str]:
    """The dotted names of all values."""
    names = set()
    for key, value in config.items():
        names |= keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key}
    return names


def override(config: ConfigDict, dotted: str, text: str):
    """Set the declared key `a.b` from the command line's text."""
    field, known = f"config.{dotted}", keys(config)
    if below := sorted(k for k in known if k.startswith(f"{dotted}.")):
        raise UserError(field, text, "is a group of keys", f"set one of {', '.join(below)}")
    if dotted not in known:
        raise UserError(field, text, "no such key", f"did you mean config.{nearest(dotted, known)[0]}")
    if dotted == "stage":
        raise UserError(field, text, "the config file sets it", f"use --config=FILE:{text}")
    if dotted == "optimizer.steps":
        raise UserError(field, text, "follows train.steps", "set config.train.steps")
    *path, last = dotted.split(".")
    node = config
    for part in path:
        node = node[part]
    if isinstance(node[last], tuple):
        raise UserError(field, text, "is a table", "set it in the config file")
    node[last] = coerce(field, text, node[last])


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_dict(values: dict, field: str, place) -> ConfigDict:
    """The config that `to_json` wrote as these values; keys that are newer than it have their defaults.

    UserError (field=place) for keys that no config has, and for values that none can have.
    """

    def like(default):
        if isinstance(default, dict):
            return {f"{key}?": like(value) for key, value in default.items()}
        return [[str, [str]]] if isinstance(default, tuple) else type(default)

    def filled(values: dict, default: dict) -> dict:
        return default | {k: filled(v, default[k]) if isinstance(v, dict) else v for k, v in values.items()}

    def refuse(problem: str) -> UserError:
        return UserError(field, place, f"its config is damaged: {problem}", "give the stage as training wrote it")

    stage = values.get("stage")
    if stage not in STAGES:
        raise refuse(f"there is no stage {stage}")
    default = defaults.stage("fine_tuned_content" if stage == "content" and "diffusion" not in values else stage)
    if problem := check_like(values, like(default.to_dict())):
        raise refuse(problem)
    config = ConfigDict(filled(values, default.to_dict()))
    try:
        check_trained(config)
    except UserError as e:
        raise refuse(f"{e.field}={e.value}: {e.problem}") from e
    return config


# What no model or clip has more of; numbers beyond it are slips, and arrays of them would fill the memory.
LARGEST = {
    "frames": 2**14, "height": 2**14, "width": 2**14, "channels": 2**14, "motion_channels": 2**14, "patch": 2**12,
    "content_patch": 2**12, "depth": 2**10, "heads": 2**10, "head_dim": 2**12, "timesteps": 10**6,
    "discriminator_channels": 2**12, "discriminator_layers": 16, "rotary_base": 1e12,
}  # fmt: skip
LARGEST_CLIP = 2**34  # pixels
# Numbers that must be positive, wherever they appear; those that may be zero; and those from zero to one.
POSITIVE = {
    "frames", "height", "width", "stride", "steps", "batch_size", "patch", "depth", "heads", "head_dim", "channels",
    "motion_channels", "learning_rate", "accumulate", "log_every", "checkpoint_every", "keep", "threads", "prefetch",
    "content_steps", "motion_steps", "num", "motions", "clips", "rotary_base", "fps", "probe_timeout", "videos",
    "shown", "content_patch", "eps", "timesteps", "time_std", "discriminator_channels", "discriminator_layers",
    "slices", "start_timeout", "peer_timeout", "vae_frames", "label_init",
}  # fmt: skip
NOT_NEGATIVE = {
    "seed", "warmup_steps", "clip_norm", "l1", "l2", "lpips", "adversarial", "feature_matching", "preview_every",
    "cache_clips", "guidance", "report_above", "expected", "stall_timeout", "probe_cap",
}  # fmt: skip
FRACTIONS = {"ema_decay", "label_dropout", "max_bad_fraction", "b1", "b2", "eta"}
# Texts that are paths.
PATHS = {"root", "path", "vgg", "lpips_heads", "autoencoder", "weights", "image", "prompts_file"}
DTYPES = ("float32", "bfloat16")
SEEDS = 2**32  # jax.random.key takes a seed modulo this


def check(config: ConfigDict) -> ConfigDict:
    """The checks that need no data: of each value, of sizes that patches must divide, and of what goes together."""
    check_trained(config)
    _check_pretrained(config)
    if config.stage == "autoencoder":
        _check_inputs(config)
    return config


def check_trained(config: ConfigDict):
    """The checks that hold for a trained stage too, wherever its inputs lie now."""
    _check_values(config, "")
    if math.prod(config.data[side] for side in ("frames", "height", "width")) > LARGEST_CLIP:
        raise UserError("data.frames", config.data.frames, "its clips are larger than any", "use smaller ones")
    if config.seed >= SEEDS:
        raise UserError("seed", config.seed, "too large", f"use at most {SEEDS - 1}")
    if "model" in config:
        choose("model.dtype", config.model.dtype, DTYPES)
        choose("model.remat", config.model.remat, ("none", "full", "dots"))
    if "train" in config:
        divisible("train.batch_size", config.train.batch_size, "train.accumulate", config.train.accumulate)
        choose("optimizer.decay", config.optimizer.decay, ("constant", "cosine"))
        for moment in ("b1", "b2"):
            if config.optimizer[moment] == 1:
                raise UserError(f"optimizer.{moment}", 1.0, "Adam would never forget", "use less than 1")
        warmup, steps = config.optimizer.warmup_steps, config.train.steps
        if warmup >= steps:
            raise UserError(
                "optimizer.warmup_steps", warmup, f"not below train.steps={steps}", f"use at most {steps - 1}"
            )
    choose("pretrained.dtype", config.pretrained.dtype, DTYPES)
    # Building a module refuses unknown choices; doing it here spares the user the opening of the data before that.
    if config.stage == "autoencoder":
        _check_autoencoder(config)
    if config.stage in ("content", "motion") and not defaults.fine_tunes(config):
        build_denoiser(config.model, channels=1, classes=1, process=build_process(config.diffusion))
        divisible("model.width", config.model.width, "model.heads", config.model.heads)
        divisible("model.width", config.model.width, "what sin-cos tables need", 4)
        clip = config.diffusion.clip
        if clip < 0 and clip != defaults.CLIP_BY_SPACE:
            remedy = f"give a bound, 0.0 for none, or {defaults.CLIP_BY_SPACE}, by what is diffused"
            raise UserError("diffusion.clip", clip, "must not be negative", remedy)
        if config.latents.normalize and clip > 0:
            problem = "clips pixels, but latents.normalize=True diffuses in other units"
            raise UserError("diffusion.clip", clip, problem, "set one of the two off")


def _check_pretrained(config: ConfigDict):
    if config.pretrained.path:
        divisible("data.frames", config.data.frames, "pretrained.vae_frames", config.pretrained.vae_frames)
    if config.stage in ("content", "motion") and reads_text(config) and not config.pretrained.path:
        raise UserError("pretrained.path", "", "missing: this stage reads texts", SOURCE)


def _check_autoencoder(config: ConfigDict):
    model = config.model
    build_autoencoder(model)
    needed = 4 if model.position == "rotary" else 1
    divisible("model.head_dim", model.head_dim, "what axial rotary positions need", needed)
    if model.mode == "pixel":
        for side in ("height", "width"):
            divisible(f"data.{side}", config.data[side], "model.patch", model.patch)
        if model.channels != 3:
            raise UserError("model.channels", model.channels, "clips have 3 channels", "use 3, or model.mode=latent")


def _check_inputs(config: ConfigDict):
    """What an autoencoder is given must fit its mode and its loss."""
    model, loss = config.model, config.loss
    if loss.lpips_heads and not loss.vgg:
        raise UserError("loss.vgg", "", "missing, loss.lpips_heads belongs to it", "set loss.vgg to the file of VGG16")
    if loss.vgg and not loss.lpips:
        raise UserError("loss.lpips", 0.0, "loss.vgg is given but would not be used", "set loss.lpips=4.0")
    if model.mode == "pixel":
        if config.latents.cache_clips:
            problem = "pixels have no VAE latents to keep"
            raise UserError("latents.cache_clips", config.latents.cache_clips, problem, "use 0, or model.mode=latent")
        if config.pretrained.path:
            problem, remedy = "not used by an autoencoder of pixels", "leave it out, or set model.mode=latent"
            raise UserError("pretrained.path", config.pretrained.path, problem, remedy)
    else:
        if not config.pretrained.path:
            raise UserError("pretrained.path", "", "missing: model.mode=latent needs its VAE", SOURCE)
        if loss.lpips:
            raise UserError("loss.lpips", loss.lpips, "compares pixels, not latents", "set loss.lpips=0.0")


def _check_values(config: ConfigDict, prefix: str):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _check_values(value, f"{prefix}{key}.")
        elif isinstance(value, str) and key in PATHS:
            check_path(prefix + key, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:  # true of integers that no float holds, and of nan
                raise UserError(f"{prefix}{key}", value, "not a finite number", "give one")
            # optimizer.steps only mirrors train.steps, which is what the user sets.
            if key in POSITIVE and value <= 0 and prefix + key != "optimizer.steps":
                raise UserError(f"{prefix}{key}", value, "must be positive", "give a number above zero")
            if value > LARGEST.get(key, value):
                raise UserError(f"{prefix}{key}", value, "larger than any", f"use at most {LARGEST[key]}")
            if key in NOT_NEGATIVE and value < 0:
                raise UserError(f"{prefix}{key}", value, "must not be negative", "give zero or more")
            if key in FRACTIONS and not 0 <= value <= 1:
                raise UserError(f"{prefix}{key}", value, "outside 0 to 1", "give a fraction")
