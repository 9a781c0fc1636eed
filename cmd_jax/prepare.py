"""Before the first step: open the data, apply the frozen autoencoder, build the stage."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from cmd_jax.builders import check_fits
from cmd_jax.config import from_dict, to_json
from cmd_jax.data.latents import LatentStatistics, latents_of
from cmd_jax.data.pipeline import video_reader
from cmd_jax.data.sources import STATISTICS_CLIPS, Source, encode_clips, latent_reader, open_source
from cmd_jax.data.splits import Split, cut
from cmd_jax.defaults import HELD_OUT
from cmd_jax.errors import UserError
from cmd_jax.files import read_json, versions, write_json
from cmd_jax.interop.lpips import load_lpips
from cmd_jax.models.conditions import Classes
from cmd_jax.models.frames import Pixels
from cmd_jax.pretrained import (
    ImageModelMetadata,
    Part,
    TextEncoderMetadata,
    VAEMetadata,
    check_same,
    describe,
    load_space,
    load_texts,
    open_space,
    stated_space,
)
from cmd_jax.running.distributed import agree, broadcast_from_leader, is_leader, leader_first
from cmd_jax.sharding import partitioning
from cmd_jax.stages import AutoencoderStage, DiffusionStage, FrozenAutoencoder, diffusion_stage
from cmd_jax.state import abstract
from cmd_jax.trained import (
    AutoencoderMetadata,
    DataMetadata,
    Metadata,
    Trained,
    load_trained,
    read_run_metadata,
    write_metadata,
)

# What may change between the runs of one stage folder, and what too where the learning rate does not depend on it.
RESUMABLE = ("train.log_every", "train.checkpoint_every", "train.keep", "train.preview_every", "data.threads")
RESUMABLE += ("train.validate_every", "train.validation_clips")
RESUMABLE += ("data.prefetch", "data.root", "data.probe_", "mesh.", "processes.", "rules", "latents.autoencoder")
RESUMABLE += ("pretrained.path", "diffusion.clip")  # the latter matters to sampling only
RESUMABLE += ("train.accumulate", "model.remat")  # fewer devices may need them
RESUMABLE_CONSTANT = ("train.steps", "optimizer.steps")

LIBRARIES = ("numpy", "av", "pillow", "tokenizers")  # that clips and captions pass on their way to the encoder
ELSEWHERE = "restore it, or start anew in another --workdir"


def check_same_run(folder: Path, config):
    """UserError for the first key that a resumed run may not change; folder: of its stage."""
    if not (folder / "config.json").exists():
        return
    free = RESUMABLE + (RESUMABLE_CONSTANT if config.optimizer.decay == "constant" else ())
    path = folder / "config.json"
    texts = to_json(from_dict(read_json(path, "workdir"), "workdir", path)), to_json(config)
    old, new = (flatten_dict(json.loads(text), sep=".") for text in texts)
    # train.* first: optimizer.steps follows train.steps, which is what the user knows.
    for key in sorted(old.keys() | new.keys(), key=lambda key: (not key.startswith("train."), key)):
        moved = key.startswith(free) or (key == "init" and old.get(key) and new.get(key))
        if old.get(key) != new.get(key) and not moved:
            raise UserError(
                key, new.get(key), f"the run in {folder} was started with {old.get(key)}",
                "resume with that value, or start anew in another --workdir",
            )  # fmt: skip


class Prepared(NamedTuple):
    """What a stage needs before its first step."""

    stage: AutoencoderStage | DiffusionStage
    read: Callable[[int, np.random.Generator], dict]  # (index of a clip, rng) -> an example of a batch
    clips: int  # how many examples, which may go through the source more than once
    split: Split  # of their indices
    source: Source
    metadata: Metadata  # a resumed run keeps what it began with

    def name_of(self, index: int) -> str:
        """The name of the clip at an index of an epoch."""
        return self.source.name(index % len(self.source))


def prepare(config, workdir: Path, mesh, console, resuming: bool) -> Prepared:
    """Open the data, encode it where the config says so, build the stage, and keep its metadata in its folder."""
    folder = workdir / config.stage
    source = leader_first(lambda: open_source(config.data, cache=workdir / "probe.jsonl"))
    agree({"data": source.fingerprint}, "let every process see the same files")
    if is_leader() and source.bad:
        write_json(folder / "bad_files.json", source.bad)
    elif is_leader():  # an earlier part of the run may have found bad what is mended now
        (folder / "bad_files.json").unlink(missing_ok=True)
    earlier = read_run_metadata(folder, config) if resuming else Metadata()
    if earlier.data and earlier.data.fingerprint != source.fingerprint:
        where, problem = config.data.root or config.data.source, "the dataset changed since this run was started"
        raise UserError("data", where, problem + ", or clips are read otherwise by another cmd_jax", ELSEWHERE)
    split = Split.whole(len(source))
    if config.data.validation:
        split = cut(source.keys(), config.data.validation, config.data.validation_seed)
    metadata = Metadata(tuple(source.class_names), DataMetadata(source.fingerprint, len(split.train)))
    prepare_stage = prepare_autoencoder if config.stage == "autoencoder" else prepare_denoiser
    prepared = prepare_stage(config, workdir, source, split, mesh, console, metadata, earlier)
    if is_leader():
        write_metadata(folder, prepared.metadata)
    return prepared


def part_of(folder: str, kind: type[Part], earlier: Part | None) -> Part:
    """The part of a Stable Diffusion folder that a run uses; a resumed one uses the same as before."""
    return check_same(folder, earlier, "this run was started with") if earlier else describe(folder, kind)


def prepare_autoencoder(
    config, workdir: Path, source: Source, split: Split, mesh, console, metadata: Metadata, earlier: Metadata
) -> Prepared:
    """metadata: of the data. earlier: what a resumed run began with."""
    lpips, space = load_lpips(config.loss.vgg, config.loss.lpips_heads) if config.loss.vgg else None, Pixels()
    if config.loss.lpips and lpips is None:
        console.print(
            "LPIPS is left out of the loss: loss.vgg is empty; give torchvision's VGG16 there and its heads as "
            "loss.lpips_heads (both in one file will do), or set loss.lpips=0.0"
        )  # fmt: skip
    if config.model.mode == "latent":
        metadata = replace(metadata, vae=part_of(config.pretrained.path, VAEMetadata, earlier.vae))
        space = load_space(config.pretrained, partial(abstract, mesh=mesh, rules=config.rules))
    stage, read = AutoencoderStage(config, lpips, space), video_reader(source)
    if not config.latents.cache_clips:
        return Prepared(stage, read, len(source), split, source, metadata)
    encode = lambda params, batch: {"frames": space.encode(params, batch["video"])}  # noqa: E731
    latents = encoded_clips(config, workdir, source, split, (read, encode, space.params), metadata, mesh, console)
    count = config.latents.cache_clips
    return Prepared(stage, latent_reader(latents), count, split.of_examples(count), source, metadata)


def prepare_denoiser(
    config, workdir: Path, source: Source, split: Split, mesh, console, metadata: Metadata, earlier: Metadata
) -> Prepared:
    """As `prepare_autoencoder`."""
    shardings = partial(abstract, mesh=mesh, rules=config.rules)
    path = Path(config.latents.autoencoder or workdir / "autoencoder")
    trained, autoencoder = open_autoencoder(path, config, shardings, console)
    ours, before = AutoencoderMetadata.of(trained), earlier.autoencoder
    if before and not (before.fits(ours.config) and before.params in (None, ours.params)):
        raise UserError("latents.autoencoder", path, "is not the one this run was started with", ELSEWHERE)
    conditions, tokenizer = Classes(len(source.class_names)), None
    vae, text_encoder, image_model = trained.metadata.vae, None, None
    if config.model.condition == "text":
        if not source.has_texts:
            remedy = "give clips with texts, data.layout metadata or webvid"
            raise UserError("data", config.data.root or config.data.source, "has no captions to train on", remedy)
        text_encoder = part_of(config.pretrained.path, TextEncoderMetadata, earlier.text_encoder)
        conditions, tokenizer = load_texts(config.pretrained, shardings)
    elif config.pretrained.path and vae is None:
        problem = "not used by a stage of pixels and classes"
        raise UserError("pretrained.path", config.pretrained.path, problem, "leave it out")
    elif source.has_texts and not source.class_names:
        console.print("the texts of the manifest are not used: without labels the model is trained unconditionally")
    if config.denoiser == "unet":
        image_model = part_of(config.pretrained.path, ImageModelMetadata, earlier.image_model)
    metadata = replace(metadata, autoencoder=ours, vae=vae, text_encoder=text_encoder, image_model=image_model)
    check_fits(config, autoencoder, image_model)  # before clips are encoded, which takes a while

    count, normalized = config.latents.cache_clips, config.latents.get("normalize", False)
    read, latents = video_reader(source, tokenizer), None
    params = {"autoencoder": autoencoder.params, "conditions": conditions.params}

    def encode(params, batch):
        content, motion = autoencoder.encode(params["autoencoder"], batch)
        out = {"content": content, "motion": motion, "label": batch["label"]}
        if tokenizer and count:
            out |= {"ids": batch["ids"], "states": conditions.states(params["conditions"], batch["ids"])}
        return out

    if count or normalized:
        latents = encoded_clips(config, workdir, source, split, (read, encode, params), metadata, mesh, console)
    if count:
        split = split.of_examples(count)
    statistics = earlier.statistics
    if normalized and not statistics:
        seen = split.train if count else slice(None)
        statistics = LatentStatistics.of({name: latents[name][seen] for name in ("content", "motion")})
    stage = diffusion_stage(config, autoencoder, conditions, statistics, image_model)
    metadata = replace(metadata, statistics=stage.statistics)
    read, clips = (latent_reader(latents), count) if count else (read, len(source))
    return Prepared(stage, read, clips, split, source, metadata)


def open_autoencoder(path: Path, config, shardings, console) -> tuple[Trained, FrozenAutoencoder]:
    """The autoencoder in `path`, laid out by `shardings`, for the training of a denoiser of that config."""

    def of_autoencoder(autoencoder_config, metadata):
        return shardings(AutoencoderStage(autoencoder_config, space=stated_space(metadata.vae)).init)

    trained = load_trained(path, "autoencoder", of_autoencoder)
    if path.is_dir() and not (path / "summary.json").exists():
        console.print(f"the autoencoder in {path} is not trained to its end; this stage will belong to it as it is now")
    held_out = [f"data.{name}={trained.config.data[name]}" for name in HELD_OUT]
    if config.data.validation and any(config.data[name] != trained.config.data[name] for name in HELD_OUT):
        console.print(f"the autoencoder was trained with {', '.join(held_out)}: it may know clips held out here")
    for side in ("frames", "height", "width"):
        if config.data[side] != trained.config.data[side]:
            raise UserError(
                f"data.{side}", config.data[side], f"the autoencoder was trained at {trained.config.data[side]}",
                "use that, or train an autoencoder for this shape",
            )  # fmt: skip
    space = open_space(config.pretrained, trained.metadata.vae, shardings)
    return trained, FrozenAutoencoder(trained.config, trained.params, space)


def encoded_clips(config, workdir, source: Source, split: Split, encoding, metadata: Metadata, mesh, console) -> dict:
    """What `encoding` makes of the first latents.cache_clips clips, or with 0 of some of training, all over the data.

    encoding: (read, encode, params) as of `encode_clips`. Both denoisers share the file that keeps what it makes.
    """
    count = config.latents.cache_clips
    if count and count < len(source):
        raise UserError(
            "latents.cache_clips", count, f"fewer than the {len(source)} clips of the data",
            "use at least that many, or 0 to encode every batch anew",
        )  # fmt: skip
    spread = split.train[np.linspace(0, len(split.train), STATISTICS_CLIPS, endpoint=False).astype(int)]
    indices = np.arange(count) % len(source) if count else spread

    def encode():
        started = time.perf_counter()
        with partitioning(mesh, config.rules):
            latents = encode_clips(*encoding, indices, config.train.batch_size, mesh, config.seed)
        console.print(f"encoded {len(indices)} clips in {time.perf_counter() - started:.0f} s")
        return latents

    return latents_of(workdir, broadcast_from_leader(provenance_of(config, metadata, mesh)), encode)


def provenance_of(config, metadata: Metadata, mesh) -> dict:
    """All that the latents of a run depend on, down to their last bits, as JSON has it.

    Of the metadata data, autoencoder, VAE and text encoder count. mesh: on which clips are encoded.
    """
    models = {part.part: part.identity() for part in (metadata.vae, metadata.text_encoder) if part}
    if autoencoder := metadata.autoencoder:
        models |= {"autoencoder_params": autoencoder.params, "autoencoder_config": autoencoder.config}
    held_out = {f"data.{name}": config.data[name] for name in HELD_OUT}
    what = {
        "data": metadata.data.fingerprint,
        "seed": config.seed,
        "clips": config.latents.cache_clips or f"{STATISTICS_CLIPS} all over the data",
        "batch_size": config.train.batch_size,
        **(held_out if config.data.validation and not config.latents.cache_clips else {}),
        "pretrained": {"dtype": config.pretrained.dtype, "vae_frames": config.pretrained.vae_frames},
        "mesh": dict(mesh.shape),
        "rules": config.rules,
        "devices": sorted({device.device_kind for device in mesh.devices.flat}),
        "versions": versions() | {name: version(name) for name in LIBRARIES},
    }
    return json.loads(json.dumps(what | models))
