"""What `cmd-jax convert` does: reads weights in torch's names or ours, and writes them in the other."""

import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.files import as_path
from cmd_jax.interop import diffusers_dit, lpips
from cmd_jax.interop.converted import KIND, MODELS, read_converted, write_converted
from cmd_jax.interop.diffusers import load_pipeline, save_pipeline
from cmd_jax.interop.weights import flatten, read_metadata, read_state_dict, unflatten, write_safetensors
from cmd_jax.pretrained import VAEMetadata, check_same, describe
from cmd_jax.running.hosts import check_tree
from cmd_jax.trained import Trained, export, is_stage, load_trained
from cmd_jax.verbs.convert_kinds import KINDS, MARKERS, STABLE_DIFFUSION, STAGES
from cmd_jax.verbs.convert_stages import autoencoder_stage, denoiser_stage, release_weights

log = logging.getLogger(__name__)

AS_FACEBOOK = "frequency_shift=0,mlp_epsilon=1e-6"
# To ours.


def to_ours(flags, given: dict, source: Path, output: Path):
    """flags: of the command line. given: what it says of the architecture. A stage belongs to those beside `output`."""
    kind = flags.kind
    if kind == "dit" and source.is_dir():
        told, state = diffusers_dit.read_dit_folder(source)
    else:
        told, state = {}, read_state_dict(source, flags.key)
        _check_kind(kind, source, state)
        if diffusers_dit.MARKER in state:
            told, state = diffusers_dit.COMPUTES, diffusers_dit.in_facebooks_names(state)
    if kind == "lpips":
        state = lpips.with_heads(state, read_state_dict(as_path(flags.heads)) if flags.heads else {})
    if kind == "dit" and told:
        log.info("computed as diffusers does; as facebook's code does with --architecture=%s", AS_FACEBOOK)
    given = told | given
    if kind in STAGES:
        stage = _stage(flags, given, state, output.parent)
        params = _cast(flatten(stage.params), flags.dtype)
        export(output, stage, jnp.dtype(flags.dtype))
    else:
        model = MODELS[kind]
        architecture = model.architecture(given, state)
        params = _cast(flatten(model.load(architecture, state)[1]), flags.dtype)
        write_converted(output, kind, architecture, params, [name for name in model.optional if name in state])
    _tell(output, params)


def _stage(flags, given: dict, state: dict, folder: Path) -> Trained:
    """A model of the CMD release as a stage; those that it belongs to lie in the folder."""
    if flags.kind == "cmd-autoencoder":
        vae = None
        if flags.pretrained is not None:
            vae = describe(as_path(flags.pretrained), VAEMetadata)
        return autoencoder_stage(given, state, vae)
    autoencoder = _neighbour(folder, "autoencoder")
    if flags.kind == "cmd-content":
        names = _class_names(as_path(flags.classes)) if flags.classes is not None else None
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


# Back.


def to_torch(kind: str, source: Path, output: Path, dtype: str):
    """A file of ours, or for cmd-* a stage's folder of a workdir, to a file of torch's names."""
    if source.suffix != ".safetensors" and not (kind in STAGES and source.is_dir()):
        if not source.exists():
            raise UserError("INPUT", source, "no such file", "give one that this command or training wrote")
        raise UserError("INPUT", source, "not weights of cmd-jax", "if it has torch's names, leave --to out")
    if kind in STAGES:
        trained = load_trained(source, STAGES[kind])
        beside = source.parent / ("autoencoder" if source.is_dir() else "autoencoder.safetensors")
        alone = STAGES[kind] == "autoencoder" or not beside.exists()
        state = release_weights(trained, None if alone else load_trained(beside, "autoencoder"))
    else:
        state = MODELS[kind].store(*read_converted(source, kind))
    state = _cast(state, dtype)
    write_safetensors(output, state, {"format": "pt"})
    _tell(output, state)


# Stable Diffusion.


def convert_pipeline(source: Path, output: Path, dtype: str, stage: str | None):
    """A diffusers folder in another dtype, its UNet replaced by that of a trained content stage if there is one."""
    params = None if stage is None else _trained_unet(as_path(stage), source)
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
