"""A trained stage: its config, EMA parameters and metadata; read from a workdir or a weights file, and exported."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cmd_jax.config import from_dict
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.errors import UserError
from cmd_jax.files import COUNT, as_json, as_path, check_like, from_json, like_of, parse_json, read_json, write_json
from cmd_jax.interop import kept
from cmd_jax.interop.folders import WeightFiles
from cmd_jax.interop.tensors import same, to_params
from cmd_jax.interop.weights import (
    flatten,
    open_weights,
    read_metadata,
    read_state_dict,
    unflatten,
    write_safetensors,
)
from cmd_jax.pretrained import ImageModelMetadata, TextEncoderMetadata, VAEMetadata
from cmd_jax.running.hosts import check_tree, digest

WRITTEN = "give the stage as training wrote it"
FILE = "facts"  # the metadata's name on disk: facts.json in a stage's folder, a text in the header of a weights file


@dataclass(frozen=True)
class DataMetadata:
    """The clips that a stage was trained on."""

    fingerprint: str  # digest of the files and of how frames are taken from them
    clips: Annotated[int, COUNT]  # in the training split


@dataclass(frozen=True)
class AutoencoderMetadata:
    """The autoencoder whose latents a denoiser was trained on. The first versions kept the digest only."""

    digest: str  # its `Metadata.digest`
    params: str | None = None  # digest of the parameters that encoded, which may be rounded ones
    config: dict[str, str | int | float | bool] | None = None  # its `latent_config`

    @classmethod
    def of(cls, autoencoder: "Trained") -> "AutoencoderMetadata":
        return cls(autoencoder.metadata.digest, digest(autoencoder.params), latent_config(autoencoder.config))

    def fits(self, config: dict) -> bool:
        """Whether another autoencoder's `latent_config` agrees with this one's, as far as that was kept."""
        return (self.config or {}).items() <= config.items()


def latent_config(config: ConfigDict) -> dict[str, str | int | float | bool]:
    """The values of an autoencoder's config on which its latents depend, beside the parameters."""
    model = {f"model.{key}": value for key, value in config.model.items() if key != "remat"}
    return model | {f"data.{side}": config.data[side] for side in ("frames", "height", "width")}


@dataclass(frozen=True)
class ConvertedMetadata:
    """The model of the CMD release that a stage was converted from."""

    cmd_jax: str  # the version that converted it
    config: dict  # of the release's model, as of `interop.cmd_release.load`
    tables: tuple[str, ...] | None = None  # kept by the first versions, and not read


@dataclass(frozen=True)
class Metadata:
    """What a stage was trained on and with, beside its config; None for what it does not have."""

    class_names: tuple[str, ...] | None = None  # the name of each label, () without labels
    data: DataMetadata | None = None
    # Of the parameters as they were trained, kept where they are rounded; in the folder of a run checkpoints have it.
    digest: str | None = None
    autoencoder: AutoencoderMetadata | None = None  # of a denoiser
    statistics: LatentStatistics | None = None  # of a denoiser: what it normalises latents by
    vae: VAEMetadata | None = None  # of an autoencoder of VAE latents, and of denoisers on it
    text_encoder: TextEncoderMetadata | None = None  # of a denoiser conditioned on texts
    image_model: ImageModelMetadata | None = None  # of a fine-tuned content stage
    converted: ConvertedMetadata | None = None


class Trained(NamedTuple):
    """A trained stage."""

    config: ConfigDict  # resolved
    params: dict  # the EMA
    metadata: Metadata


def load_trained(
    path: Path | str, stage: str, shardings: Callable[[ConfigDict, Metadata], dict] | None = None, dtype: str = ""
) -> Trained:
    """The EMA parameters of a stage, from its workdir folder or from a weights file written by `export`.

    shardings: (config, metadata) -> ShapeDtypeStructs with shardings; the parameters are compared with these and read
    straight into their shards, one at a time. Without it they are numpy arrays. dtype: that of their matrices, as of
    `rounded`; "": float32. What is cast is kept on this machine for the next time.
    """
    path = as_path(path)
    config, metadata = read_stage(path, stage)
    like = shardings and shardings(config, metadata)
    if dtype not in ("", "float32"):
        metadata, params = _rounded(path, like, dtype, metadata)
    elif path.suffix != ".safetensors":
        with _checkpoints(path) as checkpoints:
            metadata = replace(metadata, digest=checkpoints.digest("ema"))
            params = checkpoints.restore_item("ema", like)
    elif like:
        with open_params(path) as (shapes, read):
            check_tree(f"weights {path.name}", shapes, like, "give the weights that belong to their config")
            params = read(like)
    else:
        params = unflatten({name: array.astype(np.float32) for name, array in read_state_dict(path).items()})
    return Trained(config, params, metadata)


def _rounded(path: Path, like: dict, dtype: str, metadata: Metadata) -> tuple[Metadata, dict]:
    """-> (metadata with the digest, EMA parameters in the dtypes of `rounded`), those that were kept where they are."""
    wanted, is_file = rounded(like, dtype), path.suffix == ".safetensors"
    if is_file:
        identity = ["file", *kept.identity_of(WeightFiles(path, (path,)))]
    else:
        from cmd_jax.running.checkpoint import newest_digest

        identity = ["checkpoint", newest_digest(path, "ema")]
    if (params := kept.find(identity, wanted)) is not None:
        return (metadata if is_file else replace(metadata, digest=identity[1])), params
    if is_file:
        with open_params(path) as (shapes, read):
            check_tree(f"weights {path.name}", shapes, like, "give the weights that belong to their config")
            params = read(wanted)
    else:
        with _checkpoints(path) as checkpoints:
            metadata = replace(metadata, digest=checkpoints.digest("ema"))
            params = checkpoints.restore_item("ema", like, cast=wanted)
        identity[1] = metadata.digest
    kept.keep(identity, params)
    return metadata, params


def rounded(like: dict, dtype: str) -> dict:
    """ShapeDtypeStructs whose matrices are of `dtype`: kernels and tables. Biases and scales, a thousandth of all
    bytes, stay float32."""

    def one(path, x):
        vector = path[-1].key in ("bias", "scale")
        return x if vector else jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(one, like)


def _checkpoints(folder: Path):
    """Those of a stage's folder, to read the EMA of."""
    from cmd_jax.running.checkpoint import Checkpoints  # with Orbax, which files of weights need not wait for

    return contextlib.closing(Checkpoints(folder, read_only=True, items=("ema",)))


def belongs(metadata: Metadata, autoencoder: Trained, whole: Callable[[], dict] | None = None) -> bool:
    """Whether a denoiser was trained on this autoencoder, or on one of equal parameters.

    The latter where it lost its last checkpoint and was trained to its end again, and where the metadata are older than
    digests of checkpoints.

    whole() -> the autoencoder's parameters, where those at hand are rounded.
    """
    wanted = metadata.autoencoder
    if not wanted.fits(latent_config(autoencoder.config)):
        return False
    if autoencoder.metadata.digest == wanted.digest:
        return True
    return digest(whole() if whole else autoencoder.params) in (wanted.digest, wanted.params)


def read_stage(path: Path, stage: str) -> tuple[ConfigDict, Metadata]:
    """Config and metadata of a stage's workdir folder or weights file.

    UserError if there is none, if it is another stage's, or if they are not what training could have written.
    """
    if path.suffix == ".safetensors":
        field, texts = "weights", read_metadata(path)
        if not is_stage(texts):
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


def is_stage(texts: dict[str, str]) -> bool:
    """Whether the texts in the header of a weights file are those of a stage."""
    return {"config", FILE} <= texts.keys()


def check_metadata(values: dict, config: ConfigDict, field: str, path, needed: tuple[str, ...] = ()) -> Metadata:
    """JSON as the metadata of a stage of that config; UserError (field=path) if it cannot be that.

    needed: fields that must be there, beside those that the stage needs.
    """
    if config.stage != "autoencoder":
        needed += ("class_names", "autoencoder", "statistics")
        needed += ("text_encoder",) if config.model.condition == "text" else ()
        needed += ("image_model",) if config.denoiser == "unet" else ()
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
    """Metadata of any version in today's groups; the first versions wrote those of data and autoencoder flat."""
    groups = {"data": {"fingerprint": "fingerprint", "clips": "clips"}}
    if not isinstance(values.get("autoencoder"), dict):
        names = {"autoencoder": "digest", "autoencoder_params": "params", "autoencoder_config": "config"}
        groups["autoencoder"] = names
    values = dict(values)
    for group, names in groups.items():
        if found := {new: values.pop(old) for old, new in names.items() if old in values}:
            values[group] = found
    return values


@contextlib.contextmanager
def open_params(path: Path) -> Iterator[tuple[dict, Callable[[dict], dict]]]:
    """The EMA parameters in a stage's folder or weights file, none of them read yet -> (their shapes, read).

    shapes: a tree of ShapeDtypeStructs. read(like): a part of that tree as arrays laid out as `like`,
    ShapeDtypeStructs with shardings, of a file also in their dtypes; only what the devices here need is read.
    """
    if path.suffix != ".safetensors":
        with _checkpoints(path) as checkpoints:
            yield checkpoints.shapes("ema"), partial(checkpoints.restore_item, "ema", part=True)
        return
    with open_weights(WeightFiles(path, (path,))) as weights:

        def read(like):
            like = flatten(like)
            return to_params([same(name, leaf.shape) for name, leaf in like.items()], weights, None, like)

        yield unflatten({n: jax.ShapeDtypeStruct(shape, np.float32) for n, shape in weights.shapes.items()}), read


def read_run_metadata(folder: Path, config: ConfigDict) -> Metadata:
    """The metadata that the run of a stage folder was started with, or empty ones before it wrote any."""
    path = folder / f"{FILE}.json"
    return check_metadata(read_json(path, "workdir"), config, "workdir", path) if path.exists() else Metadata()


def write_metadata(folder: Path, metadata: Metadata):
    """Write it into a stage folder."""
    write_json(folder / f"{FILE}.json", as_json(metadata))


def export(path: Path, trained: Trained, dtype=np.float32):
    """Write a stage as one safetensors file. The digest is that of the original also where `dtype` is narrower."""
    tensors = {k: np.asarray(v).astype(dtype) for k, v in flatten(trained.params).items()}
    texts = {"config": trained.config.to_dict(), FILE: as_json(trained.metadata)}
    write_safetensors(path, tensors, {name: json.dumps(value, sort_keys=True) for name, value in texts.items()})
