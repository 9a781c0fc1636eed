"""Configs: `FILE[:ARG]` -> a locked ConfigDict, command-line overrides, and the checks that hold for all of them."""

import importlib.util
import json
import math
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ml_collections import ConfigDict

from cmd_jax import defaults
from cmd_jax.builders import build_process
from cmd_jax.data.sizes import check_sizes, sizes_of
from cmd_jax.declare import check_values, span_of, walk
from cmd_jax.errors import UserError, choose, divisible, nearest
from cmd_jax.files import check_like
from cmd_jax.interop.diffusers import SOURCE

STAGES = ("autoencoder", "content", "motion")
RETIRED = ("latents.cache_clips",)  # keys that files of earlier versions have, and on which nothing depends now


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


def load(
    specification: str, overrides: Mapping[str, object] = MappingProxyType({}), shapes_only: bool = False
) -> ConfigDict:
    """The checked config of `FILE[:ARG]` with some values replaced: {"train.steps": 100}, or texts like "100".

    UserError for unknown keys and for what a key cannot have.

    FILE: a Python file, or the bare name of one that comes with cmd_jax, like quickstart:sample. shapes_only: no
    pretrained weights will be read, so that pretrained.architecture does in place of a folder.
    """
    file, _, argument = specification.partition(":")
    config = _run(find(file), argument)
    if "sampling" in config:
        _apply_preset(config, str(overrides.get("sampling.preset", config.sampling.preset)))
    for key, text in overrides.items():
        override(config, key, str(text))
    return check(config.copy_and_resolve_references(), shapes_only)


def sibling(specification: str, stage: str) -> str:
    """The specification of another stage: of the same file, with the same values."""
    file, _, argument = specification.partition(":")
    return f"{file}:{','.join([stage, *(word for word in argument.split(',') if '=' in word)])}"


def load_sibling(specification: str, stage: str, overrides: Mapping[str, object]) -> ConfigDict:
    """The config of another stage of the same file, for its shapes. Overrides of what these depend on hold for it."""
    shared = {key: value for key, value in overrides.items() if key.startswith(("data.", "pretrained."))}
    return load(sibling(specification, stage), shared, shapes_only=True)


def _apply_preset(config: ConfigDict, name: str):
    """Set the keys that a preset of the config file names."""
    presets = {defaults.QUALITY: (), **dict(config.sampling.presets)}
    for key, value in presets[choose("sampling.preset", name, presets)]:
        override(config, f"sampling.{key}", str(value))


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
        different = keys(config) ^ {name for name, _ in walk(defaults.of(config))}
    except UserError:
        raise
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        place = f" in line {lines[-1]}" if lines else ""
        raise UserError("config", path, f"{type(e).__name__}{place}: {e}", "mend the file; --debug shows more") from e
    if different:
        stage = ", ".join(repr(config[name]) for name in ("stage", "denoiser") if name in config)
        problem = f"its keys are not those of cmd_jax.defaults.stage({stage}): {', '.join(sorted(different))}"
        raise UserError("config", path, problem, "start from it")
    return config


def keys(config: ConfigDict, prefix: str = "") -> set[str]:
    """The dotted names of all values."""
    names = set()
    for key, value in config.items():
        names |= keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {prefix + key}
    return names


def override(config: ConfigDict, dotted: str, text: str):
    """Set the declared key `a.b` from the command line's text."""
    field, known = f"config.{dotted}", dict(walk(defaults.of(config)))
    if below := sorted(k for k in known if k.startswith(f"{dotted}.")):
        raise UserError(field, text, "is a group of keys", f"set one of {', '.join(below)}")
    if dotted not in known:
        raise UserError(field, text, "no such key", f"did you mean config.{nearest(dotted, known)[0]}")
    if dotted in ("stage", "denoiser"):
        remedy = "use --config=FILE:" + (text if dotted == "stage" else "STAGE of another file")
        raise UserError(field, text, "the config file sets it", remedy)
    if leader := known[dotted].follows:
        raise UserError(field, text, f"follows {leader}", f"set config.{leader}")
    if isinstance(known[dotted].default, tuple):
        raise UserError(field, text, "is a table", "set it in the config file")
    *path, last = dotted.split(".")
    node = config
    for part in path:
        node = node[part]
    node[last] = coerce(field, text, known[dotted].default)


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_dict(values: dict, field: str, place) -> ConfigDict:
    """The config that `to_json` wrote as these values; keys that are newer than it have their defaults.

    UserError (field=place) for keys that no config has, and for values that none can have.
    """

    def like(x):
        if isinstance(x, dict):
            return {f"{name}?": like(inner) for name, inner in x.items()}
        return [[str, [str]]] if isinstance(x.default, tuple) else type(x.default)

    def filled(values: dict, default: dict) -> dict:
        return default | {k: filled(v, default[k]) if isinstance(v, dict) else v for k, v in values.items()}

    values = without(values, RETIRED)
    stage, denoiser = values.get("stage"), values.get("denoiser")
    if stage == "content" and denoiser is None:  # of a config that is older than this key
        denoiser = "dit" if "diffusion" in values else "unet"
    try:
        problem = "" if stage in STAGES else f"there is no stage {stage}"
        problem = problem or check_like(values, like(defaults.declared(stage, denoiser)))
        if not problem:
            config = ConfigDict(filled(values, defaults.stage(stage, denoiser).to_dict()))
            check_trained(config)
    except UserError as e:
        problem = f"{e.field}={e.value}: {e.problem}"
    if problem:
        raise UserError(field, place, f"its config is damaged: {problem}", "give the stage as training wrote it")
    return config


def without(values: dict, retired, prefix: str = "") -> dict:
    """Values without those keys."""
    kept = {name: x for name, x in values.items() if prefix + name not in retired}
    return {name: without(x, retired, f"{prefix}{name}.") if isinstance(x, dict) else x for name, x in kept.items()}


LARGEST_CLIP = 2**34  # pixels


def check(config: ConfigDict, shapes_only: bool = False) -> ConfigDict:
    """The checks that need no data: of each value, of sizes that patches must divide, and of what goes together.

    shapes_only: as of `load`.
    """
    check_trained(config)
    stable_diffusion = config.pretrained.path or (shapes_only and config.pretrained.architecture)
    _check_pretrained(config, stable_diffusion)
    if "train" in config and config.train.validate_every and not config.data.validation:
        problem, remedy = "no clips are held out for it", "set data.validation=0.02, or this to 0"
        raise UserError("train.validate_every", config.train.validate_every, problem, remedy)
    if config.get("init_skip") and not config.init:
        raise UserError("init_skip", config.init_skip, "there is nothing to leave it out of", "give init=PATH")
    if config.stage == "autoencoder":
        _check_inputs(config, stable_diffusion)
    return config


def check_trained(config: ConfigDict):
    """The checks that hold for a trained stage too, wherever its inputs lie now."""
    check_values(config, defaults.of(config))
    if math.prod(config.data[side] for side in ("frames", "height", "width")) > LARGEST_CLIP:
        raise UserError("data.frames", config.data.frames, "its clips are larger than any", "use smaller ones")
    if len(sizes_of(config.data)) > 1:
        _check_buckets(config)
    if "train" in config:
        divisible("train.batch_size", config.train.batch_size, "train.accumulate", config.train.accumulate)
        warmup, steps, profile = config.optimizer.warmup_steps, config.train.steps, config.train.profile
        if profile and span_of("train.profile", profile).start >= steps:
            raise UserError("train.profile", profile, f"not below train.steps={steps}", f"start at most at {steps - 1}")
        if warmup >= steps:
            raise UserError(
                "optimizer.warmup_steps", warmup, f"not below train.steps={steps}", f"use at most {steps - 1}"
            )
    if config.stage == "autoencoder":
        _check_autoencoder(config)
    if "diffusion" in config:
        build_process(config.diffusion)
        divisible("model.width", config.model.width, "model.heads", config.model.heads)
        divisible("model.width", config.model.width, "what sin-cos tables need", 4)
        if config.latents.normalize and config.diffusion.clip > 0:
            problem = "clips pixels, but latents.normalize=True diffuses in other units"
            raise UserError("diffusion.clip", config.diffusion.clip, problem, "set one of the two off")


def _check_buckets(config: ConfigDict):
    """Clips of several sizes are read as they are encoded, by models without tables of one size."""
    field, value = "data.buckets", config.data.buckets
    if config.data.source == "shapes":
        raise UserError(field, value, "shapes are drawn in one size", "leave it empty, or use clips of your own")
    if config.get("latents", {}).get("starts"):
        problem, remedy = (
            "the records of a store are of one size",
            "use 0 with data.buckets: every batch is encoded anew",
        )
        raise UserError("latents.starts", config.latents.starts, problem, remedy)
    if config.get("latents", {}).get("normalize"):
        problem = "statistics are taken of clips of one size"
        raise UserError("latents.normalize", True, problem, "set it to False with data.buckets")
    if "denoiser" in config and config.model.get("position") == "table":
        problem = "the stored table of positions (model.position=table) is of one size"
        raise UserError(field, value, problem, "use model.position=sincos")


def _check_pretrained(config: ConfigDict, stable_diffusion: str):
    if stable_diffusion:
        divisible("data.frames", config.data.frames, "pretrained.vae_frames", config.pretrained.vae_frames)
    if "denoiser" in config and config.model.condition == "text" and not stable_diffusion:
        raise UserError("pretrained.path", "", "missing: this stage reads texts", SOURCE)


def _check_autoencoder(config: ConfigDict):
    model = config.model
    needed = 4 if model.position == "rotary" else 1
    divisible("model.head_dim", model.head_dim, "what axial rotary positions need", needed)
    if model.mode == "pixel":
        check_sizes(config.data, lambda size: _check_patch(size, model.patch))
        if model.channels != 3:
            raise UserError("model.channels", model.channels, "clips have 3 channels", "use 3, or model.mode=latent")


def _check_patch(size: tuple[int, int], patch: int):
    for side, pixels in zip(("height", "width"), size, strict=True):
        divisible(f"data.{side}", pixels, "model.patch", patch)


def _check_inputs(config: ConfigDict, stable_diffusion: str):
    """What an autoencoder is given must fit its mode and its loss."""
    model, loss = config.model, config.loss
    if loss.lpips_heads and not loss.vgg:
        raise UserError("loss.vgg", "", "missing, loss.lpips_heads belongs to it", "set loss.vgg to the file of VGG16")
    if loss.vgg and not loss.lpips:
        raise UserError("loss.lpips", 0.0, "loss.vgg is given but would not be used", "set loss.lpips=4.0")
    if model.mode == "pixel":
        if config.latents.starts:
            problem = "pixels have no VAE latents to keep"
            raise UserError("latents.starts", config.latents.starts, problem, "use 0, or model.mode=latent")
        if config.pretrained.path:
            problem, remedy = "not used by an autoencoder of pixels", "leave it out, or set model.mode=latent"
            raise UserError("pretrained.path", config.pretrained.path, problem, remedy)
    else:
        if not stable_diffusion:
            raise UserError("pretrained.path", "", "missing: model.mode=latent needs its VAE", SOURCE)
        if loss.lpips:
            raise UserError("loss.lpips", loss.lpips, "compares pixels, not latents", "set loss.lpips=0.0")
