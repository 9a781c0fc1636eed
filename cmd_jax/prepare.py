"""Before the first step: open the data and the store of latents, load what is frozen, build the stage."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from cmd_jax import cache
from cmd_jax.builders import check_fits
from cmd_jax.config import from_dict, to_json
from cmd_jax.data.ahead import Shelf
from cmd_jax.data.draws import Draws
from cmd_jax.data.encoding import Encoder, Filler, measure
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.data.pipeline import order_of, video_reader
from cmd_jax.data.sources import Source, open_source
from cmd_jax.data.splits import Split, split_of
from cmd_jax.data.store import KINDS, StoredClips, begin_store, folder_of, open_store
from cmd_jax.defaults import HELD_OUT
from cmd_jax.errors import UserError
from cmd_jax.files import as_path, read_json, versions, write_json
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
from cmd_jax.running.distributed import agree, is_leader, leader_first
from cmd_jax.sharding import abstract
from cmd_jax.stages import AutoencoderStage, DiffusionStage, FrozenAutoencoder, diffusion_stage
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
RESUMABLE += ("train.validate_every", "train.validation_clips", "train.profile")
RESUMABLE += ("data.prefetch", "data.cache_", "data.root", "data.probe_", "mesh.", "processes.", "rules", "attention")
RESUMABLE += ("latents.store_shard", "pretrained.path", "pretrained.architecture")
RESUMABLE += ("diffusion.clip",)  # it matters to sampling only
RESUMABLE += ("latents.autoencoder", "train.accumulate", "model.remat")  # fewer devices may need the last two
RESUMABLE_CONSTANT = ("train.steps", "optimizer.steps")

STATISTICS_CLIPS = 1024  # all over the data, where no store is kept
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
        moved = key.startswith(free) or key == "latents.store" or (key == "init" and old.get(key) and new.get(key))
        if old.get(key) != new.get(key) and not moved:
            before = "it empty" if old.get(key) == "" else old.get(key)
            raise UserError(
                key, new.get(key), f"the run in {folder} was started with {before}",
                "resume with that value, or start anew in another --workdir",
            )  # fmt: skip


class Prepared(NamedTuple):
    """What a stage needs before its first step.

    filler: of the store that `read` reads, if it reads one. It need not be complete.
    """

    stage: AutoencoderStage | DiffusionStage
    read: Callable[[int, np.random.Generator], dict]  # (index of a clip, rng) -> an example of a batch
    clips: int  # how many examples, which may go through the source more than once
    split: Split  # of their indices
    source: Source | StoredClips
    metadata: Metadata  # a resumed run keeps what it began with
    filler: Filler | None = None

    @classmethod
    def of(cls, stage, source, split: Split, metadata: Metadata, read, filler: Filler | None) -> "Prepared":
        """Of a source's clips and their split; with a filler, of the examples in its store. read: of clips."""
        if filler is None:
            return cls(stage, read, len(source), split, source, metadata)
        store = filler.store
        return cls(stage, store.read, len(store), store.split_of(split), source, metadata, filler)

    @property
    def shelf(self) -> Shelf | None:
        """Where `read` finds examples, if that is in a bucket."""
        return self.filler.store.shelf if self.filler else self.source.shelf

    def fill(self, indices: Sequence[int]):
        """Make sure that `read` can read these; every process must call it."""
        if self.filler:
            self.filler.fill(self.filler.store.shards_of(indices))

    def buckets_of(self, indices: np.ndarray) -> np.ndarray | None:
        """Which of several sizes examples have, of which a batch must have one: int [N]. None: all have the same."""
        several = self.filler is None and self.source.buckets.any()  # a store's are of one size
        return self.source.buckets[indices] if several else None

    def name_of(self, index: int) -> str:
        """The name of the clip at an index of an epoch."""
        if isinstance(self.source, StoredClips):
            return self.filler.store.name(index)
        return self.source.name(index % len(self.source))


def prepare(config, workdir: Path, mesh, console, resuming: bool) -> Prepared:
    """Open the data, and the store of latents where the config wants one, build the stage, and keep its metadata in its
    folder."""
    folder = workdir / config.stage
    source = leader_first(lambda: open_clips(config, workdir))
    agree({"data": source.fingerprint}, "let every process see the same files")
    if is_leader() and source.bad:
        write_json(folder / "bad_files.json", source.bad)
    elif is_leader():  # an earlier part of the run may have found bad what is mended now
        (folder / "bad_files.json").unlink(missing_ok=True)
    earlier = read_run_metadata(folder, config) if resuming else Metadata()
    if earlier.data and earlier.data.fingerprint != source.fingerprint:
        where, problem = config.data.root or config.data.source, "the dataset changed since this run was started"
        raise UserError("data", where, problem + ", or clips are read otherwise by another cmd_jax", ELSEWHERE)
    prepared = prepare_stage(config, workdir, source, mesh, console, earlier)
    if is_leader():
        write_metadata(folder, prepared.metadata)
    return prepared


def prepare_stage(config, workdir: Path, source, mesh, console, earlier: Metadata) -> Prepared:
    """What a stage needs, of a source that is open. earlier: what a resumed run began with."""
    split = split_of(config.data, source)
    metadata = Metadata(tuple(source.class_names), DataMetadata(source.fingerprint, len(split.train)))
    prepare_kind = prepare_autoencoder if config.stage == "autoencoder" else prepare_denoiser
    return prepare_kind(config, workdir, source, split, mesh, console, metadata, earlier)


def store_folder(config, workdir: Path) -> Path:
    """Of the latents that a stage is trained on."""
    return folder_of(as_path(config.latents.store or workdir / "latents").absolute(), KINDS[config.stage])


def open_clips(config, workdir: Path) -> Source | StoredClips:
    """The data; where it is not there any more, what a complete store says of it."""
    cache.use(config.data.cache_dir, config.data.cache_gib)
    there = config.data.source == "shapes" or (config.data.root and as_path(config.data.root).exists())
    if config.latents.starts and not there:
        store = open_store(store_folder(config, workdir))
        if store and store.complete:
            return StoredClips(store)
    return open_source(config.data, cache=workdir / "probe.jsonl")


def part_of(folder: str, kind: type[Part], earlier: Part | None) -> Part:
    """The part of a Stable Diffusion folder that a run uses; a resumed one uses the same as before."""
    return check_same(folder, earlier, "this run was started with") if earlier else describe(folder, kind)


def prepare_autoencoder(
    config,
    workdir: Path,
    source: Source | StoredClips,
    split: Split,
    mesh,
    console,
    metadata: Metadata,
    earlier: Metadata,
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

    def encode(params, batch):
        return {"frames": space.encode(params, batch["video"]), "label": batch["label"]}

    filler = None
    if config.latents.starts:
        encoding = Encoding(read, encode, space.params, {"frames": (config.latents.store_dtype, stage.video_shape[1:])},
                            source.shelf)  # fmt: skip
        filler = filler_of(config, workdir, source, split, encoding, metadata, mesh, console)
    return Prepared.of(stage, source, split, metadata, read, filler)


def prepare_denoiser(
    config,
    workdir: Path,
    source: Source | StoredClips,
    split: Split,
    mesh,
    console,
    metadata: Metadata,
    earlier: Metadata,
) -> Prepared:
    """As `prepare_autoencoder`."""
    shardings = partial(abstract, mesh=mesh, rules=config.rules)
    path = as_path(config.latents.autoencoder or workdir / "autoencoder")
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

    read = video_reader(source, tokenizer)
    params = {"autoencoder": autoencoder.params}
    arrays = {
        name: (config.latents.store_dtype, getattr(autoencoder, f"{name}_shape")) for name in ("content", "motion")
    }
    arrays |= {"ids": ("int32", np.shape(conditions.null_ids))} if tokenizer else {}

    def encode(params, batch):
        content, motion = autoencoder.encode(params["autoencoder"], batch)
        ids = {"ids": batch["ids"]} if tokenizer else {}
        return {"content": content, "motion": motion, "label": batch["label"], **ids}

    encoding, filler, statistics = Encoding(read, encode, params, arrays, source.shelf), None, earlier.statistics
    if config.latents.starts:
        filler = filler_of(config, workdir, source, split, encoding, metadata, mesh, console)
    if config.latents.get("normalize", False) and not statistics:
        statistics = filler.statistics() if filler else sampled_statistics(config, split, encoding, mesh)
    stage = diffusion_stage(config, autoencoder, conditions, statistics, image_model)
    metadata = replace(metadata, statistics=stage.statistics)
    return Prepared.of(stage, source, split, metadata, read, filler)


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
    for side in ("frames", "height", "width", "buckets"):
        if config.data[side] != trained.config.data[side]:
            raise UserError(
                f"data.{side}", config.data[side], f"the autoencoder was trained at {trained.config.data[side]}",
                "use that, or train an autoencoder for this shape",
            )  # fmt: skip
    space = open_space(config.pretrained, trained.metadata.vae, shardings)
    return trained, FrozenAutoencoder(trained.config, trained.params, space)


class Encoding(NamedTuple):
    """How latents are made: encode(params, batch) of what `read` gives of (a clip, rng).

    arrays: {name: (dtype, shape)} of what is kept of a clip, beside its label.
    """

    read: Callable[[int, np.random.Generator], dict]
    encode: Callable[[dict, dict], dict]
    params: dict
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    shelf: Shelf | None  # of the clips

    def encoder(self, config, clip_of: Callable[[int], int], mesh) -> Encoder:
        """Of windows by their numbers; each is of clip_of(number), from a start of its own."""

        def window(number: int) -> dict:
            return self.read(clip_of(number), Draws((config.latents.store_seed, 2, number)))

        return Encoder(
            window, self.encode, self.params, mesh, config.rules, config.attention,
            batch_size=config.train.batch_size // config.train.accumulate,
            threads=config.data.threads, prefetch=config.data.prefetch, shelf=self.shelf and self.shelf.by(clip_of),
        )  # fmt: skip


def filler_of(
    config, workdir: Path, source, split: Split, encoding: Encoding, metadata: Metadata, mesh, console
) -> Filler:
    """The store of these latents, which is begun if it is not there, and what fills it. Every process must call it.

    Its order is what is held out, then the first epoch.
    """
    clips, examples = len(source), len(source) * config.latents.starts
    split = split.of_examples(examples)
    plan = {
        "made_of": made_of(config, metadata),
        "made_with": made_with(config, mesh),
        "class_names": list(source.class_names),
        "has_texts": bool(source.has_texts),
        "clips": clips,
        "examples": examples,
        "held_out": len(split.validation),
        "shard": config.latents.store_shard,
        "arrays": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in encoding.arrays.items()},
    }

    def begin():
        def arrays():
            order = split.train[order_of(len(split.train), config.seed, epoch=0)]
            return np.concatenate([split.validation, order]), source.keys()

        return begin_store(store_folder(config, workdir), plan, arrays)

    store = leader_first(begin)
    encoder = encoding.encoder(config, lambda number: number % clips, mesh)
    name_of = None if isinstance(source, StoredClips) else source.name
    return Filler(store, encoder, name_of, source.bad, console.print)


def sampled_statistics(config, split: Split, encoding: Encoding, mesh) -> LatentStatistics:
    """Where no latents are kept: over windows of training clips all over the data."""
    spread = split.train[np.linspace(0, len(split.train), STATISTICS_CLIPS, endpoint=False).astype(int)]
    return measure(encoding.encoder(config, lambda number: int(spread[number]), mesh), STATISTICS_CLIPS)


def made_of(config, metadata: Metadata) -> dict:
    """All that the values of a store depend on, by name, as JSON has it.

    Of the metadata data, autoencoder, VAE and tokenizer count.
    """
    latents, data = config.latents, config.data
    what = {"data": metadata.data.fingerprint} | {f"data.{side}": data[side] for side in ("frames", "height", "width")}
    what |= {f"latents.{name}": latents[name] for name in ("starts", "store_seed", "store_dtype")}
    what |= {f"data.{name}": data[name] if data.validation else 0 for name in HELD_OUT}  # statistics leave those out
    if metadata.vae:
        what |= {f"pretrained.{name}": config.pretrained[name] for name in ("dtype", "vae_frames")}
        what |= metadata.vae.identity()
    if autoencoder := metadata.autoencoder:
        what |= {"autoencoder: parameters": autoencoder.params}
        what |= {f"autoencoder: {name}": value for name, value in autoencoder.config.items()}
    if metadata.text_encoder:
        identity = metadata.text_encoder.identity()
        what |= {name: value for name, value in identity.items() if name.startswith("tokenizer: ")}
    return json.loads(json.dumps(what))


def made_with(config, mesh) -> dict:
    """What the last bits of a store may depend on, and its order; kept to be looked up."""
    what = {
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "mesh": dict(mesh.shape),
        "devices": sorted({device.device_kind for device in mesh.devices.flat}),
        "versions": versions() | {name: version(name) for name in LIBRARIES},
    }
    return json.loads(json.dumps(what))
