"""The one training loop. It knows a stage only through its interface (see stages.py)."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cmd_jax.config import to_json
from cmd_jax.data.pipeline import BatchPlan, batches
from cmd_jax.errors import Stopped, UserError
from cmd_jax.files import COUNT, check_like, read_json, versions, write_json, write_text
from cmd_jax.keys import derive
from cmd_jax.models.frames import to_uint8
from cmd_jax.prepare import check_same_run, prepare
from cmd_jax.report.console import make_console
from cmd_jax.report.training import PREVIEW_CLIPS, Metrics, StepLog
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.distributed import broadcast_from_leader, is_leader, leader_alone
from cmd_jax.running.flight import FlightRecord, explain
from cmd_jax.running.hosts import digest, to_host
from cmd_jax.running.lock import locked_run
from cmd_jax.running.runtime import StopRequest, peak_memory_gib
from cmd_jax.running.watch import STOPPED_EARLY, watched
from cmd_jax.sharding import (
    MESH_AXES,
    check_batch,
    few_of_each,
    layout,
    make_mesh,
    partitioning,
    replicated,
    replicated_report,
    rows_of_all,
)
from cmd_jax.state import abstract, init_state, make_optimizer, train_step
from cmd_jax.trained import Metadata, Trained, export

# What a checkpoint says of its run, for `check_like`: see `position`.
RUN = {
    "step": COUNT, "examples": COUNT, "order": dict, "key": list,
    "devices": COUNT, "processes": COUNT, "versions": dict,
    "config": {"model": {"remat": str, ...: object}, "train": {"accumulate": COUNT, ...: object}, ...: object},
    ...: object,
}  # fmt: skip


def train(config, workdir: Path | str, end_process: Callable | None = None) -> dict:
    """Train the config's stage in WORKDIR/STAGE, resuming what is there; returns its summary.

    Errors: UserError for a folder that holds another run, data or weights that do not fit, a loss that is not finite.
    Stopped after a request to stop (SIGTERM, SIGINT or SIGHUP, where this runs in the main thread): in the loop the
    state is saved, and the same call resumes it.

    end_process(exit code, last_words=""): for a command, which it ends from any thread, whatever the main one is stuck
    in: at a second signal, at one before the loop, for a lost peer and a stall. Without it, as in a library, nothing
    ends the process: see StopRequest and `watched` for what is done instead.
    """
    begun = time.perf_counter()
    workdir = Path(workdir).expanduser().absolute()
    console, folder = make_console(quiet=not is_leader()), workdir / config.stage
    mesh = make_mesh(config.mesh)
    check_batch("train.batch_size", config.train.batch_size, mesh, config.train.accumulate)
    flight = FlightRecord(folder, jax.process_index())
    # The stop request is outermost, so that a signal never cuts off the end of a save.
    with (
        StopRequest(STOPPED_EARLY, end_process) as stop,
        locked_run(folder) as resuming,
        watched(folder, config.processes, flight, stop, end_process) as peers,
        partitioning(mesh, config.rules),
    ):
        if resuming:
            leader_alone(lambda: check_same_run(folder, config))
        prepared = prepare(config, workdir, mesh, console, resuming)
        stage, read, clips, metadata = prepared.stage, prepared.read, prepared.clips, prepared.metadata
        plan = BatchPlan(clips, config.train.batch_size, config.seed)
        optimizer = make_optimizer(config.optimizer)
        boxed = jax.eval_shape(stage.init, jax.random.key(0))
        for line in replicated_report(layout(boxed, mesh, config.rules), config.mesh.report_above):
            console.print(line)
        with contextlib.closing(Checkpoints(folder, config.train.keep)) as checkpoints:
            fresh = checkpoints.latest() is None
            given = stage.pretrained(partial(abstract, mesh=mesh, rules=config.rules)) if fresh else None
            state = init_state(stage, optimizer, config.seed, mesh, config.rules, given)
            del given
            if not fresh:
                state, earlier = checkpoints.restore(state)
                check_continues(earlier, position(config, int(state.step), metadata), console)
                console.print(f"resuming {config.stage} at step {int(state.step)} of {config.train.steps}")
            start = int(state.step)
            if start >= config.train.steps and broadcast_from_leader(is_finished(folder, start)):
                console.print(f"{config.stage} is trained already")
                return read_json(folder / "summary.json")
            if is_leader():
                write_text(folder / "config.json", to_json(config) + "\n")
            data = batches(
                read, plan, mesh, start=start, stop=config.train.steps,
                threads=config.data.threads, prefetch=config.data.prefetch,
            )  # fmt: skip
            with contextlib.closing(Metrics(folder, start, writes=is_leader())) as metrics:
                report = StepLog(config, start, prepared.name_of, metrics, flight, console)
                loop = Loop(
                    config, stage, optimizer, mesh, boxed, plan, metadata, checkpoints, report, peers, stop, begun
                )
                state = loop.run(state, data)
                with peers.busy():
                    loop.save(state)
                    checkpoints.wait()
        if int(state.step) == config.train.steps:
            with peers.busy():
                metadata = replace(metadata, digest=checkpoints.digest("ema"))
                return finish(config, folder, state, report, loop, metadata, console)
    stopped = f"stopped by {loop.stopped_by()} after step {int(state.step)}; saved; run the same command to resume"
    console.print(stopped)
    raise Stopped(stopped)


def position(config, step: int, metadata: Metadata) -> dict:
    """What a checkpoint says of the run beside its arrays: where it is in the data, the key, the config, versions."""
    return {
        "step": step,
        "examples": step * config.train.batch_size,  # position in the global order of clips
        "order": {"seed": config.seed, "batch_size": config.train.batch_size, "data": metadata.data.fingerprint},
        "key": np.asarray(jax.random.key_data(jax.random.key(config.seed))).tolist(),
        "config": config.to_dict(),
        "versions": versions(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def check_continues(earlier: dict, now: dict, console):
    """The checkpoint must be of the same key and order of clips; what else may change bits is told."""
    if problem := check_like(earlier, RUN):
        raise UserError("checkpoint", now["step"], f"its run.json is damaged: {problem}", "bring back a copy of it")
    for name in ("key", "order", "examples"):
        if earlier[name] != now[name]:
            raise UserError(
                f"checkpoint.{name}", earlier[name], f"this run has {now[name]}",
                "resume with the seed, batch size and data it was started with, or start anew in another --workdir",
            )  # fmt: skip
    earlier, now = (
        {name: run[name] for name in ("devices", "processes", "versions")}
        | {"model.remat": run["config"]["model"]["remat"], "train.accumulate": run["config"]["train"]["accumulate"]}
        for run in (earlier, now)
    )
    for name, value in earlier.items():
        if value != now[name]:
            what = "microbatches draw other noise" if name == "train.accumulate" else "the last bits may differ"
            console.print(f"saved with {name} {value}, resumed with {now[name]}: {what} from now on")


def preview(params, frozen, batch, key, *, stage, mesh) -> dict:
    """What is shown of a batch: videos and images uint8 [N, ...], N at most PREVIEW_CLIPS, whole on each device.

    Each way of the mesh makes its share of them, at least one clip; only what is shown leaves it.
    """
    pictures = stage.preview(params, frozen, few_of_each(batch, mesh, PREVIEW_CLIPS), key)
    return rows_of_all(jax.tree.map(to_uint8, pictures), mesh, PREVIEW_CLIPS)


class Loop:
    """The steps from a state to train.steps, or to a request to stop.

    compile_seconds, first_step_seconds (from the start of train to the end of the first step) and save_seconds (time
    that saves kept the loop waiting) are known afterwards.
    """

    def __init__(self, config, stage, optimizer, mesh, boxed, plan, metadata, checkpoints, report, peers, stop, begun):
        self.config, self.stage, self.mesh, self.boxed = config, stage, mesh, boxed
        self.plan, self.metadata = plan, metadata
        self.checkpoints, self.report, self.peers, self.stop, self.begun = checkpoints, report, peers, stop, begun
        self.compile_seconds, self.first_step_seconds, self.save_seconds, self.saved = 0.0, None, 0.0, None
        self.key = jax.random.key(config.seed)
        # Constants of every step, put where they are needed once; the autoencoder was read into its shards.
        whole = replicated(mesh)
        self.frozen = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, whole), stage.frozen)
        step = partial(
            train_step, loss_fn=stage.loss, optimizer=optimizer,
            ema_decay=config.train.ema_decay, accumulate=config.train.accumulate,
        )  # fmt: skip

        def update(state, frozen, batch, index, key, asked):
            state, metrics = step(state, frozen, batch, index, key)
            return state, metrics | {"stop": jnp.max(asked)}

        self._update = update
        self._preview = jax.jit(partial(preview, stage=stage, mesh=mesh))

    def _flag(self, value: bool):
        """This process's word on whether to stop; the step itself takes all of them together: int32 [devices]."""
        sharding = NamedSharding(self.mesh, PartitionSpec(MESH_AXES))
        return jax.make_array_from_callback(
            (self.mesh.size,), sharding, lambda i: np.full(self.mesh.size, value, np.int32)[i]
        )

    def _compile(self, *arguments):
        begun = time.perf_counter()
        shardings = jax.tree.map(lambda x: x.sharding, arguments[0])
        compiled = jax.jit(self._update, donate_argnums=0, out_shardings=(shardings, replicated(self.mesh)))
        compiled = compiled.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - begun
        return compiled

    def run(self, state, data):
        """state, donated -> the last one. The metrics of a step are looked at when the next one is under way."""
        options, start, pending, update = self.config.train, int(state.step), None, None
        quiet, asked, stopping = self._flag(False), self._flag(True), False
        self.saved = start  # it was restored, or can be made again from the seed
        self.stop.running = True
        with self.report.progress:
            for step, batch in zip(range(start, options.steps), data, strict=False):
                flag = asked if self.stop.signal else quiet
                arguments = (self.frozen, batch, jnp.int32(step), self.key, flag)
                if update is None:
                    batch = jax.block_until_ready(batch)
                    update = self._compile(state, *arguments)
                state, values = update(state, *arguments)
                jax.tree.map(lambda x: x.copy_to_host_async(), values)
                if pending:
                    stopping = self._look(state, *pending)
                pending, done = (step, values, batch), step + 1
                if done % options.checkpoint_every == 0 or stopping or step == start:
                    stopping |= self._look(state, *pending)
                    pending = None
                if done % options.checkpoint_every == 0 and not stopping:
                    self.save(state)
                if options.preview_every and (done % options.preview_every == 0 or done == options.steps):
                    with self.peers.busy():
                        key = derive(self.key, "preview", done)
                        pictures = self._preview(state.ema, self.frozen, batch, key)
                        self.report.metrics.preview(done, jax.tree.map(np.asarray, pictures))
                if stopping:
                    break
            if pending:
                self._look(state, *pending)
        return state

    def _look(self, state, step: int, values: dict, batch) -> bool:
        """Log a finished step, or raise for a refused one -> whether any process was asked to stop."""
        values = jax.device_get(values) | {"ids": self._ids(step, batch)}
        self.peers.progress(step)
        if self.first_step_seconds is None:
            self.first_step_seconds = time.perf_counter() - self.begun
        try:
            self.report(step, values)
        except UserError:
            with self.peers.busy():
                self.report.flight.write("nan", **self._explain(state, batch))
            raise
        return bool(values["stop"])

    def _ids(self, step: int, batch) -> np.ndarray:
        """The clips [B] of a step, once it is sure that the rows of this process are those of the plan."""
        ids = self.plan.ids(step)
        for shard in batch["id"].addressable_shards:
            if not np.array_equal(shard.data, ids[shard.index]):
                raise RuntimeError(f"step {step} was fed clips {shard.data}, not {ids[shard.index]}")
        return ids

    def _explain(self, state, batch) -> dict:
        """What was not finite in a refused step, and where; the refusal itself must not get lost over it."""
        try:
            accumulate = self.config.train.accumulate
            return explain(self.stage.loss, state, self.frozen, batch, self.key, self.boxed, accumulate)
        except Exception as e:
            return {"not_explained": f"{type(e).__name__}: {e}"}

    def save(self, state):
        begun, step = time.perf_counter(), int(state.step)
        if step != self.saved:
            self.checkpoints.save(state, position(self.config, step, self.metadata))
        self.saved = step
        self.save_seconds += time.perf_counter() - begun

    def stopped_by(self) -> str:
        return f"signal {self.stop.signal}" if self.stop.signal else "a signal to another process"


def is_finished(folder: Path, step: int) -> bool:
    """Whether an earlier run came to its end at this very step."""
    path = folder / "summary.json"
    return path.exists() and read_json(path)["step"] == step and (folder / "ema.safetensors").exists()


def finish(config, folder: Path, state, report: StepLog, loop: Loop, metadata, console) -> dict:
    """Write summary.json, and the EMA weights under the digest that the last checkpoint has."""
    digests = {name: digest(getattr(state, name)) for name in ("params", "ema", "opt_state")}
    ema = to_host(state.ema)
    summary = {
        "stage": config.stage,
        "step": int(state.step),
        "examples": int(state.step) * config.train.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "wall_seconds": round(report.wall_seconds(), 1),
        "steps_per_second": report.steps_per_second(),
        "compile_seconds": round(loop.compile_seconds, 1),
        "first_step_seconds": round(loop.first_step_seconds or 0.0, 1),
        "save_seconds": round(loop.save_seconds, 2),
        "peak_memory_gib": peak_memory_gib(),
        "digests": digests,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": dict(loop.mesh.shape),
        "platform": jax.default_backend(),
        "seed": config.seed,
        "versions": versions(),
    }
    if is_leader():
        export(folder / "ema.safetensors", Trained(config, ema, metadata))
        write_json(folder / "summary.json", summary)
    console.print(f"{config.stage}: step {summary['step']}, {summary['wall_seconds']} s; wrote {folder}/summary.json")
    return summary
