"""`cmd-jax convert`: files of weights from PyTorch's names and layouts to ours, and back.

What the CMD release holds becomes stages, one file each in a folder that `cmd-jax sample --config.weights=FOLDER`
takes. Other models become safetensors with the names "a/b/c" of the parameter tree, channels last; their metadata say
KIND, the architecture, and which of the tensors that lpips repeats were in the source. Either goes back without being
told anything again.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from cmd_jax import __version__
from cmd_jax.errors import UserError, choose
from cmd_jax.files import parse_json, read_json
from cmd_jax.interop import cmd_release, diffusers_dit, i3d, lpips
from cmd_jax.interop.diffusers import load_pipeline, save_pipeline
from cmd_jax.interop.weights import (
    TORCH_SUFFIXES,
    flatten,
    read_metadata,
    read_state_dict,
    unflatten,
    write_safetensors,
)
from cmd_jax.models.vgg import LPIPS
from cmd_jax.pretrained import VAEMetadata, check_same, describe
from cmd_jax.running.hosts import check_tree
from cmd_jax.trained import Trained, export, is_stage, load_trained
from cmd_jax.verbs.convert_stages import autoencoder_stage, denoiser_stage, release_weights

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("cmd-jax", "torch")
STABLE_DIFFUSION = "stable-diffusion"
STAGES = {"cmd-autoencoder": "autoencoder", "cmd-content": "content", "cmd-motion": "motion"}
KIND, ARCHITECTURE, OPTIONAL, VERSION = (f"cmd_jax.{what}" for what in ("kind", "architecture", "optional", "version"))
OURS = "give the weights that belong to their architecture"
AS_FACEBOOK = "frequency_shift=0,mlp_epsilon=1e-6"


class Model(NamedTuple):
    """A model that becomes a file of its parameters.

    load: (architecture, state dict) -> (module, parameters). store: (architecture, parameters, names of the `optional`
    tensors to write) -> state dict. describe: architecture -> (module, tree of the parameters' shapes). architecture:
    (what is given, state dict) -> all of it. optional: tensors that hold nothing of their own, so that state dicts may
    lack them.
    """

    load: Callable
    store: Callable
    describe: Callable
    architecture: Callable[[dict, dict], dict]
    optional: tuple[str, ...] = ()


def _numbers(defaults: dict) -> Callable[[dict, dict], dict]:
    """The `architecture` of a model with these fields, all of them positive numbers."""

    def architecture(given: dict, _) -> dict:
        for key, value in given.items():
            if key not in defaults:
                raise UserError("config", key, "not a field of this model", f"use {', '.join(defaults)}")
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise UserError(f"config.{key}", value, "not a positive number", f"write it like {defaults[key]}")
        return defaults | given

    return architecture


MODELS = {
    "dit": Model(
        load=lambda sizes, state: cmd_release.load("content_dit", sizes, state),
        store=lambda sizes, params, _: cmd_release.state_dict("content_dit", sizes, params),
        describe=lambda sizes: cmd_release.model("content_dit", sizes),
        architecture=lambda given, state: cmd_release.complete("content_dit", given, state),
    ),
    "i3d": Model(
        load=lambda sizes, state: i3d.load(state, **sizes),
        store=lambda _, params, __: i3d.state_dict(params),
        describe=lambda sizes: i3d.model(**sizes),
        architecture=_numbers({"epsilon": 1e-5}),
    ),
    "lpips": Model(
        load=lambda _, state: (LPIPS(), lpips.lpips_params(state)),
        store=lambda _, params, repeated: lpips.lpips_state(params, repeated),
        describe=lambda _: (LPIPS(), lpips.shapes()),
        architecture=_numbers({}),
        optional=lpips.REPEATED,
    ),
}
KINDS = {
    "cmd-autoencoder": "the CMD release's autoencoder",
    "cmd-content": "its content DiT",
    "cmd-motion": "its motion DiT",
    "dit": "facebook's DiT, or diffusers' folder of it",
    "i3d": "I3D-400, for FVD",
    "lpips": "LPIPS on VGG16, of the lpips package or torchvision",
    STABLE_DIFFUSION: "a diffusers folder, to another one",
}
# Tensors that tell of a model; a motion DiT has that of the other DiTs too.
MARKERS = {
    "keyframe_embedder.proj.weight": ("cmd-motion",),
    "x_embedder.proj.weight": ("cmd-content", "dit"),
    diffusers_dit.MARKER: ("dit",),
    "to_patch_embedding_xy.weight": ("cmd-autoencoder",),
    "Conv3d_1a_7x7.conv3d.weight": ("i3d",),
    "lin0.model.1.weight": ("lpips",),
    "features.0.weight": ("lpips",),  # torchvision's VGG16
    "net.slice1.0.weight": ("lpips",),
    "down_blocks.0.resnets.0.conv1.weight": (STABLE_DIFFUSION,),
    "encoder.down_blocks.0.resnets.0.conv1.weight": (STABLE_DIFFUSION,),
    "text_model.embeddings.token_embedding.weight": (STABLE_DIFFUSION,),
}


def add_flags(parser):
    """The command line of the verb, on an argparse parser."""
    kinds = "; ".join(f"{name}: {what}" for name, what in KINDS.items())
    parser.add_argument("kind", metavar="KIND", help=kinds)
    parser.add_argument(
        "input", metavar="INPUT", help=f"file of PyTorch weights, .safetensors, {', '.join(TORCH_SUFFIXES)}; with"
        " --to=torch a file of ours, or for cmd-* a stage's folder of a workdir; stable-diffusion: a folder, dit: that"
        " of diffusers too",
    )  # fmt: skip
    parser.add_argument(
        "output", metavar="OUTPUT", help="a new .safetensors file; stable-diffusion: a new folder. cmd-content wants"
        " its autoencoder.safetensors in the same folder, cmd-motion also its content.safetensors",
    )  # fmt: skip
    parser.add_argument("--to", metavar="|".join(DIRECTIONS), help="whose names and layout to write (default cmd-jax)")
    parser.add_argument(
        "--architecture", metavar="FILE.json|KEY=VALUE,...", help="what the tensors don't tell: cmd-autoencoder: heads,"
        " mode, frames, image_size; other cmd-* and dit: heads of unusual sizes; i3d: epsilon",
    )  # fmt: skip
    parser.add_argument("--classes", metavar="FILE", help="cmd-content: names of the classes, one a line, in order")
    parser.add_argument(
        "--pretrained", metavar="DIR", help="cmd-autoencoder of mode latent: diffusers folder of its VAE"
    )
    parser.add_argument("--heads", metavar="FILE", help="lpips: its heads, where INPUT is torchvision's VGG16")
    parser.add_argument("--dtype", metavar="|".join(DTYPES), default=DTYPES[0], help="of OUTPUT (default float32)")
    parser.add_argument("--key", metavar="ENTRY", help="of a torch file that holds several (default ema)")
    parser.add_argument(
        "--unet", metavar="STAGE", help=f"{STABLE_DIFFUSION}: workdir/content or its weights, in place of INPUT's UNet"
    )


def convert(flags) -> int:
    """Do what the command line says -> exit code 0. Raises UserError with the flags' names."""
    choose("KIND", flags.kind, KINDS)
    choose("--dtype", flags.dtype, DTYPES)
    target = choose("--to", flags.to or DIRECTIONS[0], DIRECTIONS)
    source, output = Path(flags.input).expanduser(), Path(flags.output).expanduser()
    _check_output(output, folder=flags.kind == STABLE_DIFFUSION)
    _refuse_idle(flags, target)
    try:
        if flags.kind == STABLE_DIFFUSION:
            _convert_pipeline(source, output, flags.dtype, flags.unet)
        elif target == "torch":
            written = _cast(_torch_weights(flags.kind, source), flags.dtype)
            write_safetensors(output, written, {"format": "pt"})
            _tell(output, written)
        else:
            _to_ours(flags, source, output)
    except UserError as error:
        raise _on_the_command_line(error, flags) from error
    return 0


def load_converted(path: Path | str, kind: str):
    """A file of `convert` -> (module, float32 params) of a "dit", "i3d" or "lpips"; UserError if it is none."""
    architecture, params, _ = _read_ours(Path(path), kind)
    return MODELS[kind].describe(architecture)[0], params


def _check_output(output: Path, folder: bool):
    if output.exists() or output.is_symlink():
        raise UserError("OUTPUT", output, "exists already", "give the path of a new one")
    if not output.parent.is_dir():
        raise UserError("OUTPUT", output, f"there is no folder {output.parent}", "make it first")
    if not folder and output.suffix != ".safetensors":
        raise UserError("OUTPUT", output, "not the name of a safetensors file", "let it end in .safetensors")
    if folder and output.suffix in (".safetensors", *TORCH_SUFFIXES):
        raise UserError("OUTPUT", output, "the name of a file, but it becomes a folder", "leave its ending out")


def _refuse_idle(flags, target: str):
    """Flags that would change nothing."""
    kind, pipeline, back = flags.kind, flags.kind == STABLE_DIFFUSION, target == "torch"
    for flag, value, idle, problem in (
        ("--to", flags.to, pipeline, f"{STABLE_DIFFUSION} goes from one diffusers folder to another"),
        ("--unet", flags.unet, not pipeline, f"only for {STABLE_DIFFUSION}"),
        ("--key", flags.key, pipeline or back, "only for torch files as INPUT"),
        ("--classes", flags.classes, kind != "cmd-content", "only for cmd-content"),
        ("--pretrained", flags.pretrained, kind != "cmd-autoencoder", "only for cmd-autoencoder"),
        ("--heads", flags.heads, kind != "lpips", "only for lpips"),
        ("--architecture", flags.architecture, kind in ("lpips", STABLE_DIFFUSION), f"{kind} needs none"),
        *((flag, getattr(flags, flag[2:]), back, "INPUT says it already")
          for flag in ("--architecture", "--classes", "--pretrained", "--heads")),
    ):  # fmt: skip
        if value is not None and idle:
            raise UserError(flag, value, problem, "leave it out")


def _on_the_command_line(error: UserError, flags) -> UserError:
    """The error with the names that the user gave: library code speaks of paths, keys and configs."""
    field, value = error.field, error.value
    flagged = {f"--{name}": getattr(flags, name) for name in ("unet", "pretrained", "heads")}
    places = {"OUTPUT": flags.output, **flagged, "INPUT": flags.input}
    inside = [flag for flag, path in places.items() if path and str(value).startswith(str(Path(path).expanduser()))]
    names = {"key": "--key", "config": "--architecture", "classes": "--classes", "i3d": "INPUT", "lpips": "INPUT"}
    if field in ("path", "weights", "pipeline", "workdir", "pretrained.path") and inside:
        field = inside[0]
    elif field == "weights":
        field, value = "INPUT", flags.input
    elif field.startswith("weights/"):
        field = field.replace("weights", "INPUT", 1)
    elif field == "autoencoder":  # whose place is settled by that of the other files
        value = Path(flags.input if flags.to == "torch" else flags.output).with_name("autoencoder.safetensors")
    elif field == "kind":
        field, value = "KIND", flags.kind
    elif field.startswith("config."):
        field = field.replace("config.", "--architecture: ", 1)
    return UserError(names.get(field, field), value, error.problem, error.remedy)


# To ours.


def _to_ours(flags, source: Path, output: Path):
    kind, given = flags.kind, _given(flags.architecture)
    if kind == "dit" and source.is_dir():
        told, state = diffusers_dit.read_dit_folder(source)
    else:
        told, state = {}, read_state_dict(source, flags.key)
        _check_kind(kind, source, state)
        if diffusers_dit.MARKER in state:
            told, state = diffusers_dit.COMPUTES, diffusers_dit.in_facebooks_names(state)
    if kind == "lpips":
        state = lpips.with_heads(state, read_state_dict(Path(flags.heads).expanduser()) if flags.heads else {})
    given = told | given
    if kind == "dit" and told:
        log.info("computed as diffusers does; as facebook's code does with --architecture=%s", AS_FACEBOOK)
    if kind in STAGES:
        stage = _stage(flags, given, state, output.parent)
        _cast(flatten(stage.params), flags.dtype)
        export(output, stage, jnp.dtype(flags.dtype))
        _tell(output, flatten(stage.params))
        return
    model = MODELS[kind]
    architecture = model.architecture(given, state)
    params = _cast(flatten(model.load(architecture, state)[1]), flags.dtype)
    optional = [name for name in model.optional if name in state]
    texts = {KIND: kind, ARCHITECTURE: json.dumps(architecture), OPTIONAL: json.dumps(optional), VERSION: __version__}
    write_safetensors(output, params, texts)
    _tell(output, params)


def _stage(flags, given: dict, state: dict, folder: Path) -> Trained:
    """A model of the CMD release as a stage; those that it belongs to lie in the folder."""
    if flags.kind == "cmd-autoencoder":
        vae = None
        if flags.pretrained is not None:
            vae = describe(Path(flags.pretrained).expanduser(), VAEMetadata)
        return autoencoder_stage(given, state, vae)
    autoencoder = _neighbour(folder, "autoencoder")
    if flags.kind == "cmd-content":
        names = _class_names(Path(flags.classes).expanduser()) if flags.classes is not None else None
        return denoiser_stage("content", given, state, autoencoder, names)
    content = _neighbour(folder, "content")
    if content.metadata.text_encoder:
        problem, remedy = "reads texts, which the release's motion model does not know", "use one of classes"
        raise UserError("content", folder / "content.safetensors", problem, remedy)
    return denoiser_stage("motion", given, state, autoencoder, content.metadata.class_names)


def _neighbour(folder: Path, name: str) -> Trained:
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        remedy = f"convert cmd-{name} to that file first"
        raise UserError(name, path, "no such file, and this model belongs to one", remedy)
    return load_trained(path, name)


def _class_names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "not UTF-8"
        raise UserError("classes", path, f"cannot be read ({reason})", "give a text file, one name a line") from e
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError("classes", path, f"has {twice[0]} twice", "give each class its own name")
    return names


def _check_kind(kind: str, source: Path, state: dict):
    """What is plainly another model is called by its name, before its tensors are."""
    texts = read_metadata(source) if source.suffix == ".safetensors" else {}
    if KIND in texts or is_stage(texts):
        what = texts.get(KIND, "trained stage")
        raise UserError("INPUT", source, f"a {what} of cmd-jax already", "add --to=torch to convert it back")
    looks = next((kinds for marker, kinds in MARKERS.items() if marker in state), (kind,))
    if kind not in looks:
        remedy = "give its whole folder" if looks == (STABLE_DIFFUSION,) else f"give {' or '.join(looks)}"
        raise UserError("KIND", kind, f"{source.name} looks like {' or '.join(looks)}", remedy)
    markers = [marker for marker, kinds in MARKERS.items() if kind in kinds]
    if not any(marker in state for marker in markers):  # or its sizes would be asked for, one after the other
        problem = f"holds no {markers[0]}, but {next(iter(state), 'nothing')}"
        raise UserError("INPUT", source, problem, f"give the weights of {KINDS[kind]}")


def _given(text: str | None) -> dict:
    """What --architecture says: a file, or key=value separated by commas."""
    if text is None:
        return {}
    path, remedy = Path(text).expanduser(), "write it like heads=8,mode=pixel, or give a file with a JSON object"
    if "=" in text and not path.exists():
        pairs = [pair.partition("=") for pair in text.split(",")]
        if any(not key.strip() or not value.strip() for key, _, value in pairs):
            raise UserError("--architecture", text, "not key=value separated by commas", remedy)
        return {key.strip(): _value(value.strip()) for key, _, value in pairs}
    return read_json(path, "--architecture", missing=remedy, remedy=remedy)


def _value(text: str):
    """A number, true, false, null, sides like 64x96, or the text itself."""
    sides = text.split("x")
    if len(sides) == 2 and all(side.isdecimal() for side in sides):
        return [int(side) for side in sides]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# Back.


def _torch_weights(kind: str, source: Path) -> dict:
    if kind in STAGES:
        name = STAGES[kind]
        trained = load_trained(_file_of_ours(source, folders=True), name)
        beside = source.parent / ("autoencoder" if source.is_dir() else "autoencoder.safetensors")
        autoencoder = load_trained(beside, "autoencoder") if name != "autoencoder" and beside.exists() else None
        return release_weights(trained, autoencoder)
    architecture, params, optional = _read_ours(source, kind)
    return MODELS[kind].store(architecture, params, optional)


def _file_of_ours(source: Path, folders: bool) -> Path:
    if source.suffix != ".safetensors" and not (folders and source.is_dir()):
        if not source.exists():
            raise UserError("INPUT", source, "no such file", "give one that this command or training wrote")
        raise UserError("INPUT", source, "not weights of cmd-jax", "if it has torch's names, leave --to out")
    return source


def _read_ours(source: Path, kind: str) -> tuple[dict, dict, tuple[str, ...]]:
    """-> (architecture, float32 parameters, names of the optional tensors that torch's file had)."""
    choose("kind", kind, MODELS)
    texts = read_metadata(_file_of_ours(source, folders=False))
    if is_stage(texts):
        raise UserError("weights", source, "is a stage of CMD", f"use one of {', '.join(STAGES)}")
    if not {KIND, ARCHITECTURE, OPTIONAL} <= texts.keys():
        remedy = "if it has torch's names, convert it first, without --to=torch"
        raise UserError("weights", source, f"states no {KIND}, so `cmd-jax convert` did not write it", remedy)
    if texts[KIND] != kind:
        raise UserError("kind", kind, f"{source.name} holds a {texts[KIND]}", f"use {texts[KIND]}")
    try:
        architecture = MODELS[kind].architecture(parse_json(texts[ARCHITECTURE], "architecture", source), {})
        optional = parse_json(texts[OPTIONAL], "optional", source, like=[str])
        for name in optional:
            choose("optional", name, MODELS[kind].optional)
        wanted = MODELS[kind].describe(architecture)[1]
    except UserError as e:
        problem = f"its metadata are damaged: {e.field}={e.value}: {e.problem}"
        raise UserError("weights", source, problem, "convert the original again") from e
    params = unflatten({name: array.astype(np.float32) for name, array in read_state_dict(source).items()})
    check_tree("weights", params, wanted, OURS)
    return architecture, params, tuple(optional)


# Stable Diffusion.


def _convert_pipeline(source: Path, output: Path, dtype: str, stage: str | None):
    """A diffusers folder in another dtype, its UNet replaced by that of a trained content stage if there is one."""
    params = None if stage is None else _trained_unet(Path(stage).expanduser(), source)
    pipeline = load_pipeline(source, dtype)
    if params is not None:
        params = unflatten(_cast(flatten(params), dtype))
        check_tree("--unet", params, pipeline.unet[1], "give the stage as training wrote it")
        pipeline = pipeline._replace(unet=(pipeline.unet[0], params))
    for part in ("unet", "vae", "text_encoder"):
        for name, array in flatten(getattr(pipeline, part)[1]).items():
            _check_finite(f"{part}/{name}", array, dtype)
    save_pipeline(output, pipeline)
    log.info("%s: a diffusers folder, %s%s", output, dtype, f", its UNet from {stage}" if stage else "")


def _trained_unet(path: Path, folder: Path) -> dict:
    """The EMA parameters of a content stage that was fine-tuned from the pipeline in `folder`."""
    trained = load_trained(path, "content")
    metadata = trained.metadata
    if metadata.image_model is None:
        raise UserError("--unet", path, "a DiT that was trained from scratch", "give a stage that fine-tuned a UNet")
    for part in filter(None, (metadata.image_model, metadata.vae, metadata.text_encoder)):
        check_same(folder, part, "the stage of --unet was trained with")
    return trained.params


# What is written.


def _cast(tensors: dict, dtype: str) -> dict:
    """Arrays of another dtype; a finite number that it can't hold is an error, not an infinity."""
    cast = {}
    for name, array in tensors.items():
        with np.errstate(over="ignore"):
            cast[name] = np.asarray(array).astype(jnp.dtype(dtype))
        _check_finite(name, cast[name], dtype)
    return cast


def _check_finite(name: str, array: np.ndarray, dtype: str):
    if not np.isfinite(array.astype(np.float32)).all():
        problem = f"{name} then holds numbers that are not finite"
        raise UserError(
            "--dtype", dtype, problem, "use float32 or bfloat16; if it is that, the input holds them already"
        )


def _tell(output: Path, tensors: dict):
    numbers = sum(array.size for array in tensors.values())
    log.info("%s: %d tensors, %.1f million numbers", output, len(tensors), numbers / 1e6)
