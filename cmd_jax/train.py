"""The one training loop. It knows a stage only through its interface (see stages.py)."""

import contextlib
import fcntl
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
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cmd_jax import __version__
from cmd_jax.checkpoint import Checkpoints, Trained, digest, export, load_trained, read_json, write_json
from cmd_jax.config import to_json
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
# What may change between the runs of one stage folder, and what too where the learning rate does not depend on it.
RESUMABLE = ("train.log_every", "train.checkpoint_every", "train.keep", "train.preview_every", "data.threads")
RESUMABLE += ("data.prefetch", "data.root", "data.probe_timeout", "mesh.", "rules", "latents.autoencoder")
RESUMABLE_CONSTANT = ("train.steps", "optimizer.steps")

log = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"cmd_jax": __version__} | {name: version(name) for name in names}


@contextlib.contextmanager
def claimed(folder: Path, config):
    """Make the stage folder, or accept it if it holds an earlier part of this very run -> whether it does.

    Until the end no other process can train in it; the lock goes with the process, however that ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as e:
        raise UserError("workdir", folder, f"cannot be written ({e.strerror})", "give a folder you may write to") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("workdir", folder, "another process trains in it", "wait for it, or take another") from None
        except OSError:
            log.warning("%s is on a file system without locks: take care not to train in it twice at a time", folder)
        resuming = any(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))
        if resuming and (folder / "config.json").exists():
            check_same_run(folder, config)
        yield resuming


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
    source = open_source(config.data, cache=workdir / "probe.json")
    facts = {"class_names": list(source.class_names), "fingerprint": source.fingerprint, "clips": len(source)}
    if source.bad:
        write_json(folder / "bad_files.json", source.bad)
    earlier = read_json(folder / "facts.json") if resuming and (folder / "facts.json").exists() else {}
    if earlier.get("fingerprint", facts["fingerprint"]) != facts["fingerprint"]:
        raise UserError(
            "data", config.data.root or config.data.source, "the dataset changed since this run was started",
            "restore it, or start anew in another --workdir",
        )  # fmt: skip

    if config.stage == "autoencoder":
        lpips = lpips_params(read_state_dict(config.loss.vgg)) if config.loss.lpips else None
        stage, read, clips = AutoencoderStage(config, lpips), video_reader(source), len(source)
    else:
        autoencoder, facts["autoencoder"] = open_autoencoder(config, workdir)
        if earlier.get("autoencoder", facts["autoencoder"]) != facts["autoencoder"]:
            raise UserError(
                "latents.autoencoder", config.latents.autoencoder or workdir / "autoencoder",
                "is not the one this run was started with", "restore it, or start anew in another --workdir",
            )  # fmt: skip
        count, normalized = config.latents.cache_clips, config.latents.normalize
        if count or normalized:
            encode = partial(encoded_clips, config, workdir, source, autoencoder, facts, mesh=mesh, console=console)
            latents = encode(count or STATISTICS_CLIPS)
        else:  # only the numbers of channels are needed
            latents = {"content": np.zeros(autoencoder.content_shape), "motion": np.zeros(autoencoder.motion_shape)}
        facts["statistics"] = earlier.get("statistics") or channel_statistics(latents, normalized)
        stage = DIFFUSION_STAGES[config.stage](config, autoencoder, len(source.class_names), facts["statistics"])
        read, clips = (latent_reader(latents), count) if count else (video_reader(source), len(source))
    write_json(folder / "facts.json", facts)
    return stage, read, clips, lambda i: source.name(i % len(source)), facts


def open_autoencoder(config, workdir: Path) -> tuple[FrozenAutoencoder, str]:
    """The autoencoder that a diffusion stage is trained on, and its digest; it must fit the config."""
    trained = load_trained(config.latents.autoencoder or workdir / "autoencoder", "autoencoder")
    for side in ("frames", "height", "width"):
        if config.data[side] != trained.config.data[side]:
            raise UserError(
                f"data.{side}", config.data[side], f"the autoencoder was trained at {trained.config.data[side]}",
                "use that, or train an autoencoder for this shape",
            )  # fmt: skip
    autoencoder = FrozenAutoencoder(trained.config, trained.params)
    check_patches(config, autoencoder)
    return autoencoder, trained.facts["digest"]


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
    """metrics.jsonl and TensorBoard events of the steps after `step`. A failing writer is reported once, and left out.

    wall_seconds: what the steps up to `step` took.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self.broken, self.wall_seconds = folder, set(), 0.0
        self._guard("metrics.jsonl", self._open_lines, step)
        self._guard("TensorBoard", self._open_events)

    def _open_lines(self, step):
        """Keep the lines up to `step`: what a killed run did after its last checkpoint is done again."""
        path, kept = self.folder / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # the last line may be torn
                record = json.loads(line)
                if record["step"] <= step:
                    kept.append(line + "\n")
                    self.wall_seconds = record.get("wall_seconds", 0.0)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept))
        self.lines = open(path, "a")  # noqa: SIM115

    def _open_events(self):
        # TensorFlow comes with clu's writers, and only the process that writes should pay for loading it.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from clu import metric_writers

        self.events = metric_writers.SummaryWriter(str(self.folder))

    def _guard(self, name, action, *arguments):
        if name in self.broken:
            return
        try:
            action(*arguments)
        except Exception as e:
            self.broken.add(name)
            log.warning("%s is no longer written: %s: %s", name, type(e).__name__, e)

    def _write_line(self, step, values):
        self.lines.write(json.dumps({"step": step, **values}) + "\n")
        self.lines.flush()

    def scalars(self, step: int, values: dict[str, float]):
        self._guard("metrics.jsonl", self._write_line, step, values)
        self._guard("TensorBoard", lambda: self.events.write_scalars(step, values))

    def image(self, step: int, name: str, image: np.ndarray):
        self._guard("TensorBoard", lambda: self.events.write_images(step, {name: image[None]}))

    def close(self):
        self._guard("metrics.jsonl", lambda: self.lines.close())
        self._guard("TensorBoard", lambda: self.events.close())


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads; a second one ends the process at once."""

    def __enter__(self):
        self.signal = None
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _receive(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class StepLog:
    """Takes the metrics of each step, one step late: stops on a refused update, logs when it is time."""

    QUIET = ("gradient_norm", "motion_saturated", "wall_seconds")  # not shown on the console

    def __init__(self, config, start: int, clip_names, metrics: Metrics, console):
        self.stage, self.options, self.clip_names = config.stage, config.train, clip_names
        self.metrics, self.console = metrics, console
        self.begun, self.last = time.perf_counter(), None  # last: (step, time) of the last line
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        columns += (TimeRemainingColumn(), TextColumn("{task.fields[shown]}"))
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(self.stage, total=self.options.steps, completed=start, shown="compiling")

    def wall_seconds(self) -> float:
        """Time spent on this stage, earlier runs included."""
        return self.metrics.wall_seconds + time.perf_counter() - self.begun

    def __call__(self, step: int, values: dict):
        if not bool(values["applied"]):
            loss, norm = float(values["loss"]), float(values["gradient_norm"])
            names = ", ".join(self.clip_names(step)[:8])
            raise UserError(
                "loss", loss, f"not finite at step {step} (gradient norm {norm}; clips {names}); nothing was updated",
                "lower optimizer.learning_rate or look at those clips; the last checkpoint is intact",
            )  # fmt: skip
        done, now = step + 1, time.perf_counter()
        if done % self.options.log_every and done != self.options.steps:
            return
        values = {name: float(value) for name, value in values.items() if name != "applied"}
        if self.last:
            values["steps_per_second"] = (done - self.last[0]) / (now - self.last[1])
            values["clips_per_second"] = values["steps_per_second"] * self.options.batch_size
        self.last = done, now
        self.metrics.scalars(done, values | {"wall_seconds": round(self.wall_seconds(), 1)})
        self._show(done, values)

    def _show(self, done, values):
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k not in self.QUIET)
        if self.console.is_terminal:
            self.progress.update(self.task, completed=done, shown=shown)
            return
        if "steps_per_second" in values:
            left = (self.options.steps - done) / values["steps_per_second"]
            shown += f"  ETA {left / 60:.1f} min"
        self.console.print(f"{self.stage} {done}/{self.options.steps}  {shown}", soft_wrap=True)


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

    Errors: UserError for a folder that holds another run, data or weights that do not fit, a loss that is not finite.
    SystemExit(0) after SIGTERM or SIGINT, when the state is saved.
    """
    console, folder = Console(), workdir / config.stage
    mesh = make_mesh(config.mesh)
    check_batch("train.batch_size", config.train.batch_size // config.train.accumulate, mesh)
    with claimed(folder, config) as resuming:
        stage, read, clips, name_of, facts = prepare(config, workdir, mesh, console, resuming)
        plan = BatchPlan(clips, config.train.batch_size, config.seed)
        optimizer = make_optimizer(config.optimizer)
        # The stop request is outermost, so that a signal never cuts off the end of a save.
        with (
            StopRequest() as stop,
            partitioning(mesh, config.rules),
            contextlib.closing(Checkpoints(folder, config.train.keep)) as checkpoints,
        ):
            state = init_state(stage, optimizer, config.seed, mesh, config.rules)
            if checkpoints.latest() is not None:
                state = checkpoints.restore(state)
                console.print(f"resuming {config.stage} at step {int(state.step)} of {config.train.steps}")
            start = int(state.step)
            if start >= config.train.steps and is_finished(folder, start):
                console.print(f"{config.stage} is trained already")
                return read_json(folder / "summary.json")
            with atomic_path(folder / "config.json") as temporary:
                temporary.write_text(to_json(config) + "\n")
            data = batches(
                read, plan, mesh, start=start, stop=config.train.steps,
                threads=config.data.threads, prefetch=config.data.prefetch,
            )  # fmt: skip
            with contextlib.closing(Metrics(folder, start)) as metrics:
                report = StepLog(
                    config, start, lambda step: [name_of(int(i)) for i in plan.ids(step)], metrics, console
                )
                state, compile_seconds = run_steps(config, stage, optimizer, state, data, checkpoints, report, stop)
                checkpoints.save(state)
        if stop.signal and int(state.step) < config.train.steps:
            console.print(f"stopped by signal {stop.signal} after step {int(state.step)}; saved; "
                          "run the same command to resume")  # fmt: skip
            raise SystemExit(0)
        return finish(config, folder, state, report.wall_seconds(), compile_seconds, facts, console)


def run_steps(config, stage, optimizer, state, data, checkpoints: Checkpoints, report: StepLog, stop: StopRequest):
    """The steps from state.step to train.steps, or to a request to stop -> (state, seconds of compilation)."""
    options, start, compile_seconds, pending = config.train, int(state.step), 0.0, None
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
    preview_fn = jax.jit(stage.preview)
    run_key, preview_key = jax.random.split(jax.random.key(config.seed))
    with report.progress:
        for step, batch in zip(range(start, options.steps), data, strict=False):
            if step == start:
                batch = jax.block_until_ready(batch)
                begun = time.perf_counter()
                step_fn = step_fn.lower(state, stage.frozen, batch, jnp.int32(step), run_key).compile()
                compile_seconds = time.perf_counter() - begun
            state, values = step_fn(state, stage.frozen, batch, jnp.int32(step), run_key)
            if pending:
                report(*pending)
            pending, done = (step, values), step + 1
            # One look at the flag a step: a signal between two looks must not stop the run without a checkpoint.
            stopping = bool(stop.signal)
            if done % options.checkpoint_every == 0 or stopping:
                report(*pending)
                pending = None
                checkpoints.save(state)
            if options.preview_every and (done % options.preview_every == 0 or done == options.steps):
                pictures = preview_fn(state.ema, stage.frozen, batch, jax.random.fold_in(preview_key, done))
                write_preview(checkpoints.folder.parent, done, jax.tree.map(np.asarray, pictures), report.metrics)
            if stopping:
                break
        if pending:
            report(*pending)
    return state, compile_seconds


def is_finished(folder: Path, step: int) -> bool:
    """Whether an earlier run came to its end at this very step."""
    path = folder / "summary.json"
    return path.exists() and read_json(path)["step"] == step and (folder / "ema.safetensors").exists()


def finish(config, folder: Path, state, wall_seconds: float, compile_seconds: float, facts, console) -> dict:
    """Write summary.json and the EMA weights."""
    ema = jax.tree.map(np.asarray, state.ema)
    digests = {name: digest(getattr(state, name)) for name in ("params", "opt_state")} | {"ema": digest(ema)}
    summary = {
        "stage": config.stage,
        "step": int(state.step),
        "examples": int(state.step) * config.train.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(ema)),
        "wall_seconds": round(wall_seconds, 1),
        "compile_seconds": round(compile_seconds, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "digests": digests,
        "devices": jax.device_count(),
        "platform": jax.default_backend(),
        "seed": config.seed,
        "versions": versions(),
    }
    export(folder / "ema.safetensors", Trained(config, ema, facts | {"digest": digests["ema"]}))
    write_json(folder / "summary.json", summary)
    console.print(f"{config.stage}: step {summary['step']}, {summary['wall_seconds']} s; wrote {folder}/summary.json")
    return summary
