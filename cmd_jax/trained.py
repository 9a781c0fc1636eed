"""A trained stage as those that build on it see it: its config, its parameters and what it was trained on."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from cmd_jax import defaults
from cmd_jax.builders import reads_text
from cmd_jax.config import from_dict
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.errors import UserError
from cmd_jax.files import COUNT, as_json, check_like, from_json, like_of, parse_json, read_json, write_json
from cmd_jax.interop.weights import flatten, read_metadata, read_state_dict, unflatten, write_safetensors
from cmd_jax.pretrained import ImageModelMetadata, TextEncoderMetadata, VAEMetadata
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.hosts import check_tree, digest

WRITTEN = "give the stage as training wrote it"
FILE = "facts"  # what the first versions called metadata: facts.json of a stage's folder, a text of a weights file


@dataclass(frozen=True)
class DataMetadata:
    """The clips that a stage was trained on. fingerprint: digest of how they are read; clips: their number."""

    fingerprint: str
    clips: Annotated[int, COUNT]


@dataclass(frozen=True)
class AutoencoderMetadata:
    """The autoencoder that a denoiser belongs to.

    digest: of its training, which rounded weights keep too. params: digest of the very numbers that made the latents.
    config: all else that latents depend on, see `latent_config`. The first versions kept the first only.
    """

    digest: str
    params: str | None = None
    config: dict[str, str | int | float | bool] | None = None

    @classmethod
    def of(cls, autoencoder: "Trained") -> "AutoencoderMetadata":
        return cls(autoencoder.metadata.digest, digest(autoencoder.params), latent_config(autoencoder.config))

    def fits(self, config: dict) -> bool:
        """Whether an autoencoder of that `latent_config` has all that was kept of this one's."""
        return (self.config or {}).items() <= config.items()


def latent_config(config: ConfigDict) -> dict[str, str | int | float | bool]:
    """The values of an autoencoder's config on which its latents depend, beside the parameters."""
    model = {f"model.{key}": value for key, value in config.model.items() if key != "remat"}
    return model | {f"data.{side}": config.data[side] for side in ("frames", "height", "width")}


@dataclass(frozen=True)
class ConvertedMetadata:
    """What a stage was converted from: by which version of cmd_jax, and the config of the CMD release's model."""

    cmd_jax: str
    config: dict
    tables: tuple[str, ...] | None = None  # the first versions kept it


@dataclass(frozen=True)
class Metadata:
    """What a trained stage tells of itself beside its config; None is what a stage of its kind has not.

    digest: of the parameters as they were trained, which weights rounded from them keep; the folder of a run has it
    with each checkpoint instead. vae: of an autoencoder in latents, and of all denoisers on it.
    """

    class_names: tuple[str, ...] | None = None
    data: DataMetadata | None = None
    digest: str | None = None
    autoencoder: AutoencoderMetadata | None = None
    statistics: LatentStatistics | None = None
    vae: VAEMetadata | None = None
    text_encoder: TextEncoderMetadata | None = None
    image_model: ImageModelMetadata | None = None
    converted: ConvertedMetadata | None = None


class Trained(NamedTuple):
    """A trained stage: its resolved config, the EMA parameters, and what it tells of its training."""

    config: ConfigDict
    params: dict
    metadata: Metadata


def load_trained(
    path: Path | str, stage: str, shardings: Callable[[ConfigDict, Metadata], dict] | None = None
) -> Trained:
    """The EMA parameters of a stage, from its workdir folder or from a weights file written by `export`.

    shardings: (config, metadata) -> ShapeDtypeStructs with shardings; the parameters are compared with these and read
    straight into their shards, one at a time. Without it they are numpy arrays.
    """
    path = Path(path)
    config, metadata = read_stage(path, stage)
    like = shardings and shardings(config, metadata)
    if path.suffix == ".safetensors":
        if like:
            return Trained(config, _read_placed(path, like), metadata)
        params = {name: array.astype(np.float32) for name, array in read_state_dict(path).items()}
        return Trained(config, unflatten(params), metadata)
    with contextlib.closing(Checkpoints(path, read_only=True, items=("ema",))) as checkpoints:
        metadata = replace(metadata, digest=checkpoints.digest("ema"))
        return Trained(config, checkpoints.restore_item("ema", like), metadata)


def belongs(metadata: Metadata, autoencoder: Trained) -> bool:
    """Whether a denoiser was trained on this autoencoder, or on one of the same bits.

    The latter is that of an autoencoder which lost its last checkpoint and was trained to its end again, and of
    metadata that are older than digests of checkpoints.
    """
    wanted = metadata.autoencoder
    if not wanted.fits(latent_config(autoencoder.config)):
        return False
    return autoencoder.metadata.digest == wanted.digest or digest(autoencoder.params) in (wanted.digest, wanted.params)


def read_stage(path: Path, stage: str) -> tuple[ConfigDict, Metadata]:
    """Config and metadata of a stage's workdir folder or weights file.

    UserError if there is none, if it is another stage's, or if they are not what training could have written.
    """
    if path.suffix == ".safetensors":
        field, texts = "weights", read_metadata(path)
        if not {"config", FILE} <= texts.keys():
            raise UserError("weights", path, "holds no config of cmd_jax", "give a file that training exported")
        values, facts = (parse_json(texts[name], field, path) for name in ("config", FILE))
    else:
        field = "workdir"
        if not all((path / name).is_file() for name in ("config.json", f"{FILE}.json")):
            raise UserError("workdir", path, f"holds no trained {stage} stage", f"train the {stage} stage there first")
        values, facts = (read_json(path / f"{name}.json", field, remedy=WRITTEN) for name in ("config", FILE))
    config = from_dict(values, field, path)
    if config.stage != stage:
        raise UserError("weights", path, f"is a {config.stage} stage", f"give one of the {stage} stage")
    needed = ("digest",) if field == "weights" else ()
    return config, check_metadata(facts, config, field, path, needed)


def check_metadata(values: dict, config: ConfigDict, field: str, path, needed: tuple[str, ...] = ()) -> Metadata:
    """The metadata that JSON tells. UserError (field=path) if no stage of that config can have it.

    needed: the fields that must be there, whatever the stage.
    """
    if config.stage != "autoencoder":
        needed += ("class_names", "autoencoder", "statistics")
        needed += ("text_encoder",) if reads_text(config) else ()
        needed += ("image_model",) if defaults.fine_tunes(config) else ()
    elif config.model.mode == "latent":
        needed += ("vae",)
    values = _grouped(values)
    like = {name.rstrip("?") if name[:-1] in needed else name: like for name, like in like_of(Metadata).items()}
    if problem := check_like(values, like):
        raise UserError(field, path, f"its metadata is damaged: {problem}", WRITTEN)
    metadata = from_json(Metadata, values)
    for name in ("content", "motion") if metadata.statistics else ():
        channels = getattr(metadata.statistics, name)
        if len(channels.mean) != len(channels.std) or min(channels.std, default=0) <= 0:
            problem = f"statistics.{name} is not a mean and a positive std of each channel"
            raise UserError(field, path, f"its metadata is damaged: {problem}", WRITTEN)
    return metadata


def _grouped(values: dict) -> dict:
    """Metadata with what it tells of the data and of the autoencoder in groups, which the first versions did not do."""
    groups = {"data": {"fingerprint": "fingerprint", "clips": "clips"}}
    if not isinstance(values.get("autoencoder"), dict):
        groups["autoencoder"] = {
            "autoencoder": "digest",
            "autoencoder_params": "params",
            "autoencoder_config": "config",
        }
    values = dict(values)
    for group, names in groups.items():
        if found := {new: values.pop(old) for old, new in names.items() if old in values}:
            values[group] = found
    return values


def _read_placed(path: Path, like: dict) -> dict:
    """Tensors of a safetensors file as float32 arrays laid out as `like`; only the parts for devices here are read."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: jax.ShapeDtypeStruct(s.get_shape(), np.float32) for name, s in slices.items()}
            check_tree(f"weights {path.name}", unflatten(found), like, "give the weights that belong to their config")

            def read(name: str, wanted):
                def part(index):
                    return np.asarray(slices[name][index] if index else file.get_tensor(name)).astype(np.float32)

                return jax.make_array_from_callback(wanted.shape, wanted.sharding, part)

            return unflatten({name: read(name, wanted) for name, wanted in flatten(like).items()})
    except (SafetensorError, OSError) as e:
        raise UserError("weights", path, f"damaged or incomplete ({e})", "fetch or write the file again") from e


def read_run_metadata(folder: Path, config: ConfigDict) -> Metadata:
    """What the run of a stage folder was started with; nothing where it did not come that far."""
    path = folder / f"{FILE}.json"
    return check_metadata(read_json(path, "workdir"), config, "workdir", path) if path.exists() else Metadata()


def write_metadata(folder: Path, metadata: Metadata):
    """Into the folder of a stage."""
    write_json(folder / f"{FILE}.json", as_json(metadata))


def export(path: Path, trained: Trained, dtype=np.float32):
    """Write a stage as one safetensors file. The digest is that of the original also where `dtype` is narrower."""
    tensors = {k: np.asarray(v).astype(dtype) for k, v in flatten(trained.params).items()}
    texts = {"config": trained.config.to_dict(), FILE: as_json(trained.metadata)}
    write_safetensors(path, tensors, {name: json.dumps(value, sort_keys=True) for name, value in texts.items()})
