"""Before the first step: claim the stage folder, open the data, apply the frozen autoencoder, build the stage."""

import contextlib
import fcntl
import hashlib
import json
import logging
import time
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from cmd_jax.checkpoint import Trained, digest, load_trained, read_json, versions, write_json
from cmd_jax.config import to_json
from cmd_jax.data.pipeline import video_reader
from cmd_jax.data.sources import STATISTICS_CLIPS, channel_statistics, encode_clips, latent_reader, open_source
from cmd_jax.distributed import agree, is_leader, leader_first, of_leader
from cmd_jax.errors import UserError
from cmd_jax.interop.weights import read_state_dict
from cmd_jax.models.vgg import lpips_params
from cmd_jax.report.video import atomic_path
from cmd_jax.sharding import partitioning
from cmd_jax.stages import DIFFUSION_STAGES, AutoencoderStage, FrozenAutoencoder, check_patches
from cmd_jax.state import abstract

# What may change between the runs of one stage folder, and what too where the learning rate does not depend on it.
RESUMABLE = ("train.log_every", "train.checkpoint_every", "train.keep", "train.preview_every", "data.threads")
RESUMABLE += ("data.prefetch", "data.root", "data.probe_timeout", "mesh.", "processes.", "rules", "latents.autoencoder")
RESUMABLE_CONSTANT = ("train.steps", "optimizer.steps")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(folder: Path, config):
    """Make the stage folder, or accept it if it holds an earlier part of this very run -> whether it does.

    Until the end no other run can train in it; the lock, held by process 0, goes with it, however that ends.
    """

    def claim():
        resuming = any(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))
        if not is_leader():
            return None, resuming
        lock = lock_folder(folder)
        try:
            if resuming and (folder / "config.json").exists():
                check_same_run(folder, config)
        except UserError:
            lock.close()
            raise
        return lock, resuming

    lock, resuming = leader_first(claim)
    resuming = of_leader(resuming)
    with lock or contextlib.nullcontext():
        yield resuming


def lock_folder(folder: Path):
    """The open lock file of a stage folder, which is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as e:
        raise UserError("workdir", folder, f"cannot be written ({e.strerror})", "give a folder you may write to") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError("workdir", folder, "another process trains in it", "wait for it, or take another") from None
    except OSError:
        log.warning("%s is on a file system without locks: take care not to train in it twice at a time", folder)
    return lock


def check_same_run(folder: Path, config):
    """UserError for the first key that a resumed run may not change."""
    free = RESUMABLE + (RESUMABLE_CONSTANT if config.optimizer.decay == "constant" else ())
    texts = (folder / "config.json").read_text(), to_json(config)
    old, new = (flatten_dict(json.loads(text), sep=".") for text in texts)
    # train.* first: optimizer.steps follows train.steps, which is what the user knows.
    for key in sorted(old.keys() | new.keys(), key=lambda key: (not key.startswith("train."), key)):
        if old.get(key) != new.get(key) and not key.startswith(free):
            raise UserError(
                key, new.get(key), f"the run in {folder} was started with {old.get(key)}",
                "resume with that value, or start anew in another --workdir",
            )  # fmt: skip


def prepare(config, workdir: Path, mesh, console, resuming: bool):
    """Everything a stage needs before its first step -> (stage, read, clips, name_of, facts).

    facts: what this stage was trained on; a resumed run keeps those it began with.
    """
    folder = workdir / config.stage
    source = leader_first(lambda: open_source(config.data, cache=workdir / "probe.json"))
    agree({"data": source.fingerprint}, "let every process see the same files")
    facts = {"class_names": list(source.class_names), "fingerprint": source.fingerprint, "clips": len(source)}
    if source.bad and is_leader():
        write_json(folder / "bad_files.json", source.bad)
    earlier = read_json(folder / "facts.json") if resuming and (folder / "facts.json").exists() else {}
    if earlier.get("fingerprint", facts["fingerprint"]) != facts["fingerprint"]:
        raise UserError(
            "data", config.data.root or config.data.source, "the dataset changed since this run was started",
            "restore it, or start anew in another --workdir",
        )  # fmt: skip

    if config.stage == "autoencoder":
        lpips = lpips_params(read_state_dict(config.loss.vgg)) if config.loss.vgg else None
        if config.loss.lpips and lpips is None:
            console.print(
                "LPIPS is left out of the loss: loss.vgg is empty; give a file of VGG16-LPIPS weights (the state dict "
                "of the PyPI package lpips), or set loss.lpips=0.0", soft_wrap=True,
            )  # fmt: skip
        stage, read, clips = AutoencoderStage(config, lpips), video_reader(source), len(source)
    else:
        trained, autoencoder = open_autoencoder(config, workdir, mesh, console)
        # `digest` is that of the training, which rounded weights keep too; the latents depend on the very numbers.
        facts |= {"autoencoder": trained.facts["digest"], "autoencoder_params": digest(trained.params)}
        if earlier.get("autoencoder_params", facts["autoencoder_params"]) != facts["autoencoder_params"]:
            raise UserError(
                "latents.autoencoder", config.latents.autoencoder or workdir / "autoencoder",
                "is not the one this run was started with", "restore it, or start anew in another --workdir",
            )  # fmt: skip
        count, normalized = config.latents.cache_clips, config.latents.normalize
        if count and count < len(source):
            raise UserError(
                "latents.cache_clips", count, f"fewer than the {len(source)} clips of the data",
                "use at least that many, or 0 to encode every batch anew",
            )  # fmt: skip
        if count or normalized:
            latents = encoded_clips(config, workdir, source, autoencoder, facts, count, mesh, console)
        else:  # only the numbers of channels are needed
            latents = {"content": np.zeros(autoencoder.content_shape), "motion": np.zeros(autoencoder.motion_shape)}
        facts["statistics"] = earlier.get("statistics") or channel_statistics(latents, normalized)
        stage = DIFFUSION_STAGES[config.stage](config, autoencoder, len(source.class_names), facts["statistics"])
        read, clips = (latent_reader(latents), count) if count else (video_reader(source), len(source))
        if source.texts and not source.class_names:
            console.print("the texts of the manifest are not used: without labels the model is trained unconditionally")
    if is_leader():
        write_json(folder / "facts.json", facts)
    return stage, read, clips, lambda i: source.name(i % len(source)), facts


def open_autoencoder(config, workdir: Path, mesh, console) -> tuple[Trained, FrozenAutoencoder]:
    """The autoencoder that a diffusion stage is trained on, laid out on the mesh; it must fit the config."""
    path, rules = Path(config.latents.autoencoder or workdir / "autoencoder"), config.rules
    trained = load_trained(path, "autoencoder", lambda config, _: abstract(AutoencoderStage(config).init, mesh, rules))
    if path.is_dir() and not (path / "summary.json").exists():
        console.print(f"the autoencoder in {path} is not trained to its end; this stage will belong to it as it is now")
    for side in ("frames", "height", "width"):
        if config.data[side] != trained.config.data[side]:
            raise UserError(
                f"data.{side}", config.data[side], f"the autoencoder was trained at {trained.config.data[side]}",
                "use that, or train an autoencoder for this shape",
            )  # fmt: skip
    autoencoder = FrozenAutoencoder(trained.config, trained.params)
    check_patches(config, autoencoder)
    return trained, autoencoder


def encoded_clips(config, workdir: Path, source, autoencoder, facts, count: int, mesh, console) -> dict:
    """Latents by the frozen autoencoder: of `count` clips to train on, or with 0 of some, all over the data.

    Both diffusion stages share the file that remembers them. It is named after all that its bits depend on.
    """
    spread = np.linspace(0, len(source), STATISTICS_CLIPS, endpoint=False).astype(int)
    indices = np.arange(count) % len(source) if count else spread
    batch_size = config.train.batch_size
    what = [facts["autoencoder_params"], facts["fingerprint"], count, config.seed, batch_size, mesh.size, versions()]
    path = workdir / f"latents-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.npz"
    if of_leader(path.exists()):
        with np.load(path) as file:
            return dict(file)
    started = time.perf_counter()
    with partitioning(mesh, config.rules):
        latents = encode_clips(source, autoencoder, indices, batch_size, mesh, config.seed)
    if is_leader():
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **latents)
    console.print(f"encoded {len(indices)} clips in {time.perf_counter() - started:.0f} s")
    return latents
