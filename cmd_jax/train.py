"""The one training loop. It knows a stage only through its interface (see stages.py)."""

import hashlib
import json
import logging
import os
import resource
import signal
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cmd_jax import __version__
from cmd_jax.checkpoint import Checkpoints, Trained, digest, export, load_trained, read_json, write_json
from cmd_jax.config import from_json, to_json
from cmd_jax.data.pipeline import BatchPlan, batches, video_reader
from cmd_jax.data.sources import STATISTICS_CLIPS, channel_statistics, encode_clips, latent_reader, open_source
from cmd_jax.errors import UserError
from cmd_jax.interop.weights import read_state_dict
from cmd_jax.models.vgg import lpips_params
from cmd_jax.report.video import atomic_path, image_grid, to_uint8, video_grid, write_gif, write_png
from cmd_jax.sharding import check_batch, make_mesh, partitioning
from cmd_jax.stages import DIFFUSION_STAGES, AutoencoderStage, FrozenAutoencoder, check_patches
from cmd_jax.state import init_state, make_optimizer, train_step

PREVIEW_CLIPS = 8
# What may change between the runs of one stage folder.
RESUMABLE = ("train.steps", "train.log_every", "train.checkpoint_every", "train.keep", "train.preview_every")
RESUMABLE += ("data.threads", "data.prefetch", "data.root", "data.probe_timeout", "mesh.", "rules", "latents.autoencoder")

log = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    return {"cmd_jax": __version__} | {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}


def claim_folder(folder: Path, config):
    """Make the stage folder, or accept it if it holds an earlier part of this very run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ".writable"):
            (folder / f".tmp-{os.getpid()}-.writable").touch()
        (folder / ".writable").unlink()
    except OSError as e:
        raise UserError("workdir", folder, f"cannot be written ({e.strerror})", "give a folder you may write to") from e
    if (folder / "config.json").exists() and any((folder / "checkpoints").glob("*")):
        difference = first_difference(from_json((folder / "config.json").read_text()), config)
        if difference:
            field, old, new = difference
            raise UserError(
                field, new, f"the run in {folder} was started with {old}",
                "resume with that value, or start anew in another --workdir",
            )  # fmt: skip
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(to_json(config) + "\n")


def first_difference(old, new) -> tuple | None:
    """The first key, old value and new value that a resumed run may not change."""
    free = RESUMABLE if new.optimizer.decay == "constant" else RESUMABLE[1:]
    free = (*free, "optimizer.steps") if new.optimizer.decay == "constant" else free

    def flat(config, prefix=""):
        for key, value in json.loads(to_json(config)).items() if not isinstance(config, dict) else config.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    old, new = dict(flat(old)), dict(flat(new))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(free):
            return key, old.get(key), new.get(key)
    return None


def prepare(config, workdir: Path, mesh, console):
    """Everything a stage needs before its first step -> (stage, read, clips, names, facts)."""
    folder = workdir / config.stage
    source = open_source(config.data, cache=workdir / "probe.json")
    facts = {"class_names": list(source.class_names), "fingerprint": source.fingerprint, "clips": len(source)}
    if source.bad:
        write_json(folder / "bad_files.json", source.bad)
    earlier = read_json(folder / "facts.json") if (folder / "facts.json").exists() else None
    if earlier and earlier["fingerprint"] != facts["fingerprint"]:
        raise UserError(
            "data", config.data.root or config.data.source, "the dataset changed since this run was started",
            "restore it, or start anew in another --workdir",
        )  # fmt: skip

    if config.stage == "autoencoder":
        lpips = lpips_params(read_state_dict(config.loss.vgg)) if config.loss.lpips else None
        stage, read, clips = AutoencoderStage(config, lpips), video_reader(source), len(source)
    else:
        trained = load_trained(config.latents.autoencoder or workdir / "autoencoder", "autoencoder")
        autoencoder = FrozenAutoencoder(trained.config, trained.params)
        for side in ("frames", "height", "width"):
            if config.data[side] != trained.config.data[side]:
                raise UserError(
                    f"data.{side}", config.data[side], f"the autoencoder was trained at {trained.config.data[side]}",
                    "use that, or train an autoencoder for this shape",
                )  # fmt: skip
        check_patches(config, autoencoder)
        facts["autoencoder"] = trained.facts["digest"]
        if earlier and earlier["autoencoder"] != facts["autoencoder"]:
            raise UserError(
                "latents.autoencoder", config.latents.autoencoder or workdir / "autoencoder",
                "is not the one this run was started with", "restore it, or start anew in another --workdir",
            )  # fmt: skip
        count = config.latents.cache_clips
        cached = encoded_clips(
            config, workdir, source, autoencoder, facts, count or STATISTICS_CLIPS, mesh, console
        )  # fmt: skip
        facts["statistics"] = earlier["statistics"] if earlier else channel_statistics(cached, config.latents.normalize)
        stage = DIFFUSION_STAGES[config.stage](config, autoencoder, len(source.class_names), facts["statistics"])
        read, clips = (latent_reader(cached), count) if count else (video_reader(source), len(source))
    write_json(folder / "facts.json", facts)
    return stage, read, clips, lambda i: source.name(i % len(source)), facts


def encoded_clips(config, workdir: Path, source, autoencoder, facts, count: int, mesh, console) -> dict:
    """Latents of `count` clips by the frozen autoencoder; both diffusion stages share the file that remembers them."""
    what = [facts["autoencoder"], facts["fingerprint"], count, config.seed]
    path = workdir / f"latents-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.npz"
    if path.exists():
        with np.load(path) as file:
            return dict(file)
    started = time.perf_counter()

    def encode(batch):
        return autoencoder.encode(autoencoder.params, batch)

    with partitioning(mesh, config.rules):
        latents = encode_clips(source, encode, count, config.train.batch_size, mesh, config.seed)
    if jax.process_index() == 0:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **latents)
    console.print(f"encoded {count} clips in {time.perf_counter() - started:.0f} s")
    return latents


class Metrics:
    """metrics.jsonl and TensorBoard events. A failing writer is reported once; training goes on."""

    def __init__(self, folder: Path):
        self.folder, self.broken = folder, False
        self._guard(self._open)

    def _open(self):
        # TensorFlow comes with clu's writers, and only the process that writes should pay for loading it.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from clu import metric_writers

        self.events = metric_writers.SummaryWriter(str(self.folder))
        self.lines = open(self.folder / "metrics.jsonl", "a")

    def _guard(self, action, *arguments):
        if self.broken:
            return
        try:
            action(*arguments)
        except Exception as e:
            self.broken = True
            log.warning("metrics are no longer written: %s: %s", type(e).__name__, e)

    def scalars(self, step: int, values: dict[str, float]):
        self._guard(self._scalars, step, values)

    def _scalars(self, step, values):
        self.lines.write(json.dumps({"step": step, **values}) + "\n")
        self.lines.flush()
        self.events.write_scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray):
        self._guard(lambda: self.events.write_images(step, {name: image[None]}))

    def close(self):
        self._guard(lambda: (self.events.close(), self.lines.close()))


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads; a second one ends the process at once."""

    def __init__(self):
        self.signal = None
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def write_preview(folder: Path, step: int, pictures: dict, metrics: Metrics):
    """Videos as gif, images as png; one file a name, in previews/."""
    for name, x in pictures.items():
        x = to_uint8(x)[:PREVIEW_CLIPS]
        stem = folder / "previews" / f"{step:07d}_{name}"
        if x.ndim == 5:
            write_gif(stem.with_suffix(".gif"), video_grid(x, columns=4))
        else:
            write_png(stem.with_suffix(".png"), image_grid(x, columns=4))
            metrics.image(step, name, image_grid(x, columns=4))


def train(config, workdir: Path) -> dict:
    """Train the config's stage in WORKDIR/STAGE, resuming what is there; returns its summary.

    Errors: UserError for a folder that holds another run, data or weights that do not fit, and a loss that is not finite.
    """
    console, folder = Console(), workdir / config.stage
    mesh = make_mesh(config.mesh)
    check_batch("train.batch_size", config.train.batch_size // config.train.accumulate, mesh)
    claim_folder(folder, config)
    stage, read, clips, name_of, facts = prepare(config, workdir, mesh, console)
    plan = BatchPlan(clips, config.train.batch_size, config.seed)
    optimizer = make_optimizer(config.optimizer)
    with partitioning(mesh, config.rules):
        state = init_state(stage, optimizer, config.seed, mesh, config.rules)
        checkpoints = Checkpoints(folder, config.train.keep)
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
            console.print(f"resuming {config.stage} at step {int(state.step)} of {config.train.steps}")
        metrics, stop = Metrics(folder), StopRequest()
        try:
            state, seconds = run_steps(config, stage, state, optimizer, read, plan, mesh, checkpoints, metrics, stop,
                                       console, name_of)  # fmt: skip
            checkpoints.save(state)
        finally:
            stop.restore()
            checkpoints.close()
            metrics.close()
    return finish(config, folder, state, seconds, facts, console)


def run_steps(config, stage, state, optimizer, read, plan, mesh, checkpoints, metrics, stop, console, name_of):
    """The steps from state.step to train.steps -> (state, {"compile", "run"} seconds)."""
    options, start = config.train, int(state.step)
    step_fn = jax.jit(
        partial(
            train_step,
            loss_fn=stage.loss,
            optimizer=optimizer,
            ema_decay=options.ema_decay,
            accumulate=options.accumulate,
        ),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    preview_fn, key = jax.jit(stage.preview), jax.random.key(config.seed)
    run_key, preview_key = jax.random.split(key)
    data = batches(
        read, plan, mesh, start=start, stop=options.steps, threads=config.data.threads, prefetch=config.data.prefetch
    )
    seconds, begun, last_log, pending = {"compile": 0.0, "run": 0.0}, time.perf_counter(), None, None

    def settle(pending, last_log):
        """Fetch a past step's metrics: stop on a refused update, log when it is time."""
        step, values = pending
        if not bool(values["applied"]):
            names = ", ".join(name_of(int(i)) for i in plan.ids(step)[:8])
            loss, norm = float(values["loss"]), float(values["gradient_norm"])
            raise UserError(
                "loss", loss, f"not finite at step {step} (gradient norm {norm}; clips {names}); nothing was updated",
                "lower optimizer.learning_rate or look at those clips; the last checkpoint is intact",
            )  # fmt: skip
        if (step + 1) % options.log_every and step + 1 != options.steps:
            return last_log
        now = time.perf_counter()
        values = {name: float(value) for name, value in values.items() if name != "applied"}
        if last_log:
            values["steps_per_second"] = (step - last_log[0]) / (now - last_log[1])
            values["clips_per_second"] = values["steps_per_second"] * options.batch_size
        metrics.scalars(step + 1, values)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k not in ("gradient_norm", "motion_saturated"))
        if console.is_terminal:
            progress.update(task, completed=step + 1, shown=shown)
        else:
            left = (options.steps - step - 1) / values.get("steps_per_second", float("inf"))
            console.print(f"{config.stage} {step + 1}/{options.steps}  {shown}  ETA {left / 60:.1f} min", soft_wrap=True)
        return step, now

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns += (TimeRemainingColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(config.stage, total=options.steps, completed=start, shown="compiling")
        for step, batch in zip(range(start, options.steps), data, strict=False):
            if step == start:
                batch = jax.block_until_ready(batch)
                compiling = time.perf_counter()
                compiled = step_fn.lower(state, stage.frozen, batch, jnp.int32(step), run_key).compile()
                seconds["compile"] = time.perf_counter() - compiling
            state, values = compiled(state, stage.frozen, batch, jnp.int32(step), run_key)
            if pending:
                last_log = settle(pending, last_log)
            pending = (step, values)
            done = step + 1
            if done % options.checkpoint_every == 0 or stop.signal:
                last_log, pending = settle(pending, last_log), None
                checkpoints.save(state)
            if options.preview_every and (done % options.preview_every == 0 or done == options.steps):
                pictures = preview_fn(state.ema, stage.frozen, batch, jax.random.fold_in(preview_key, done))
                write_preview(checkpoints.folder.parent, done, jax.tree.map(np.asarray, pictures), metrics)
            if stop.signal:
                checkpoints.close()
                console.print(f"stopped by signal {stop.signal} after step {done}; saved; run the same command to resume")
                raise SystemExit(0)
        if pending:
            settle(pending, last_log)
    seconds["run"] = time.perf_counter() - begun
    return state, seconds


def finish(config, folder: Path, state, seconds, facts, console) -> dict:
    """Write summary.json and the EMA weights; wall time adds up over resumed runs."""
    earlier = read_json(folder / "summary.json")["wall_seconds"] if (folder / "summary.json").exists() else 0.0
    ema = jax.tree.map(np.asarray, state.ema)
    digests = {name: digest(getattr(state, name)) for name in ("params", "opt_state")} | {"ema": digest(ema)}
    summary = {
        "stage": config.stage,
        "step": int(state.step),
        "examples": int(state.step) * config.train.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(ema)),
        "wall_seconds": round(earlier + seconds["run"], 1),
        "compile_seconds": round(seconds["compile"], 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "digests": digests,
        "devices": jax.device_count(),
        "platform": jax.default_backend(),
        "seed": config.seed,
        "versions": versions(),
    }
    write_json(folder / "summary.json", summary)
    export(folder / "ema.safetensors", Trained(config, ema, facts | {"digest": digests["ema"]}))
    console.print(f"{config.stage}: step {summary['step']}, {summary['wall_seconds']} s; wrote {folder}/summary.json")
    return summary
