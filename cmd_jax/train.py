"""The one training loop. It knows a stage only through its interface (see stages.py)."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cmd_jax.config import to_json
from cmd_jax.data.pipeline import BatchPlan, BucketPlan, Waited, batches
from cmd_jax.errors import Stopped, UserError
from cmd_jax.files import as_path, read_json, versions, write_json, write_text
from cmd_jax.initial import given_params
from cmd_jax.keys import derive
from cmd_jax.models.frames import to_uint8
from cmd_jax.prepare import Prepared, check_same_run, prepare
from cmd_jax.report.console import make_console
from cmd_jax.report.training import PREVIEW_CLIPS, Metrics, StepLog
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.distributed import broadcast_from_leader, is_leader, leader_alone
from cmd_jax.running.flight import FlightRecord, explain
from cmd_jax.running.hosts import digest, to_host
from cmd_jax.running.lock import locked_run
from cmd_jax.running.resume import check_continues, position
from cmd_jax.running.runtime import StopRequest, peak_memory_gib
from cmd_jax.running.watch import STOPPED_EARLY, watched
from cmd_jax.sharding import (
    MESH_AXES,
    abstract,
    check_batch,
    few_of_each,
    layout,
    make_mesh,
    partitioning,
    replicated,
    replicated_report,
    rows_of_all,
)
from cmd_jax.state import TrainState, abstract_state, init_state, make_optimizer, make_step
from cmd_jax.trained import Trained, export
from cmd_jax.validation import Validation


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
    workdir, console = as_path(workdir).absolute(), make_console(quiet=not is_leader())
    folder, mesh = workdir / config.stage, make_mesh(config.mesh)
    check_batch("train.batch_size", config.train.batch_size, mesh, config.train.accumulate)
    flight = FlightRecord(folder, jax.process_index())
    # The stop request is outermost, so that a signal never cuts off the end of a save.
    with (
        StopRequest(STOPPED_EARLY, end_process) as stop,
        locked_run(folder) as (resuming, lease),
        watched(folder, config.processes, flight, stop, end_process, lease) as peers,
        partitioning(mesh, config.rules),
        contextlib.ExitStack() as opened,
    ):
        if resuming:
            leader_alone(lambda: check_same_run(folder, config))
        prepared = prepare(config, workdir, mesh, console, resuming)
        plan = make_plan(prepared, config)
        program = Program(prepared.stage, make_optimizer(config.optimizer), config.train, mesh, config.seed)
        for line in replicated_report(layout(program.params, mesh, config.rules), config.mesh.report_above):
            console.print(line)
        where = partial(position, config, fingerprint=prepared.metadata.data.fingerprint)
        checkpoints = Checkpoints(
            folder, config.train.keep, before_commit=lambda: metrics.upload(), check=lease.check if lease else None
        )
        opened.enter_context(contextlib.closing(checkpoints))
        state = first_state(program, config, prepared.metadata, checkpoints, where, console)
        start = int(state.step)
        if start >= config.train.steps and broadcast_from_leader(is_finished(folder, start)):
            console.print(f"{config.stage} is trained already")
            return read_json(folder / "summary.json")
        if is_leader():
            write_text(folder / "config.json", to_json(config) + "\n")
        metrics = opened.enter_context(contextlib.closing(Metrics(folder, start, writes=is_leader())))
        log = StepLog(config.stage, config.train, start, prepared.name_of, metrics, flight, console)
        data = batches(
            prepared.read, plan, mesh, start=start, stop=config.train.steps,
            threads=config.data.threads, prefetch=config.data.prefetch, shelf=prepared.shelf,
        )  # fmt: skip
        if prepared.filler:
            asked = lambda: stop.signal is not None  # noqa: E731
            data = prepared.filler.filled(plan, range(start, config.train.steps), data, asked, peers.busy)
        opened.enter_context(contextlib.closing(data))
        validation = Validation(program, prepared, config) if config.train.validate_every else None
        loop = Loop(program, plan, Saves(checkpoints, where, start), log, stop, peers, validation)
        state = loop.run(state, data)
        if int(state.step) >= config.train.steps:
            with peers.busy():
                trained = replace(prepared.metadata, digest=checkpoints.digest("ema"))
                return finish(config, folder, state, trained, mesh, loop.timings(begun), console)
    who = f"signal {stop.signal}" if stop.signal else "a signal to another process"
    stopped = f"stopped by {who} after step {int(state.step)}; saved; run the same command to resume"
    console.print(stopped)
    raise Stopped(stopped)


def make_plan(prepared: Prepared, config) -> BatchPlan:
    """Which examples make which batch."""
    indices, batch_size, seed = prepared.split.train, config.train.batch_size, config.seed
    buckets = prepared.buckets_of(indices)
    return BatchPlan(indices, batch_size, seed) if buckets is None else BucketPlan(indices, buckets, batch_size, seed)


def first_state(program: "Program", config, metadata, checkpoints: Checkpoints, where, console) -> TrainState:
    """That of the newest checkpoint, which must be of this run; else a fresh one, whose parameters are those of
    config.init, pretrained where the stage says so, or random.

    metadata: of this run. where(step): its position.
    """
    stage, optimizer, mesh, rules = program.stage, program.optimizer, program.mesh, config.rules
    if checkpoints.latest() is None:
        given = given_params(config, stage, metadata, partial(abstract, mesh=mesh, rules=rules), console)
        return init_state(stage, optimizer, config.seed, mesh, rules, given)
    state, earlier = checkpoints.restore(abstract_state(stage, optimizer, mesh, rules))
    check_continues(earlier, where(int(state.step)), console)
    console.print(f"resuming {config.stage} at step {int(state.step)} of {config.train.steps}")
    return state


def preview(params, frozen, batch, key, *, stage, mesh) -> dict:
    """What is shown of a batch: videos and images uint8 [N, ...], N at most PREVIEW_CLIPS, whole on each device.

    Each way of the mesh makes its share of them, at least one clip; only what is shown leaves it.
    """
    pictures = stage.preview(params, frozen, few_of_each(batch, mesh, PREVIEW_CLIPS), key)
    return rows_of_all(jax.tree.map(to_uint8, pictures), mesh, PREVIEW_CLIPS)


class Program:
    """What the devices compute for the loop: steps, previews, and where a refused step was not finite.

    options: the config's `train` group. params: their shapes with logical axes. compile_seconds is known afterwards.
    """

    def __init__(self, stage, optimizer, options, mesh, seed: int):
        self.stage, self.optimizer, self.options, self.mesh = stage, optimizer, options, mesh
        self.key, self.params = jax.random.key(seed), jax.eval_shape(stage.init, jax.random.key(0))
        self.compile_seconds = 0.0
        # Constants of every step, put where they are needed once; the autoencoder was read into its shards.
        whole = replicated(mesh)
        self.frozen = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, whole), stage.frozen)
        self._asked = {value: self._flag(value) for value in (False, True)}
        self._steps, self._preview = {}, jax.jit(partial(preview, stage=stage, mesh=mesh))

    def _flag(self, value: bool):
        """This process's word on whether to stop; the step itself takes all of them together: int32 [devices]."""
        sharding = NamedSharding(self.mesh, PartitionSpec(MESH_AXES))
        return jax.make_array_from_callback(
            (self.mesh.size,), sharding, lambda i: np.full(self.mesh.size, value, np.int32)[i]
        )

    def step(self, state: TrainState, batch, number: int, asked: bool):
        """state, donated -> (state, metrics), as `make_step` has them; it is compiled for each shape of batches."""
        arguments = (state, self.frozen, batch, jnp.int32(number), self.key, self._asked[asked])
        shapes = tuple((name, x.shape) for name, x in batch.items())
        if shapes not in self._steps:
            jax.block_until_ready(batch)
            begun = time.perf_counter()
            step = make_step(self.stage, self.optimizer, self.options, self.mesh, state)
            self._steps[shapes] = step.lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - begun
        return self._steps[shapes](*arguments)

    def preview(self, state: TrainState, batch, done: int) -> dict:
        """Pictures by the EMA parameters after `done` steps, on the host."""
        return jax.tree.map(np.asarray, self._preview(state.ema, self.frozen, batch, derive(self.key, "preview", done)))

    def explain(self, state: TrainState, batch) -> dict:
        """What was not finite in a refused step, and where; the refusal itself must not get lost over it."""
        try:
            accumulate = self.options.accumulate
            return explain(self.stage.loss, state, self.frozen, batch, self.key, self.params, accumulate)
        except Exception as e:
            return {"not_explained": f"{type(e).__name__}: {e}"}


class Saves:
    """Checkpoints of states with their positions; `step` has one. seconds: how long they kept the loop waiting."""

    def __init__(self, checkpoints: Checkpoints, where: Callable[[int], dict], step: int):
        self.checkpoints, self.where, self.step, self.seconds = checkpoints, where, step, 0.0

    def save(self, state: TrainState):
        begun, step = time.perf_counter(), int(state.step)
        if step != self.step:
            self.checkpoints.save(state, self.where(step))
        self.step = step
        self.seconds += time.perf_counter() - begun


class Loop:
    """The steps from a state to train.steps, or to a request to stop."""

    def __init__(self, program: Program, plan: BatchPlan, saves: Saves, log: StepLog, stop, peers, validation=None):
        self.program, self.plan, self.saves, self.log, self.validation = program, plan, saves, log, validation
        self.stop, self.peers, self.first_step = stop, peers, None

    def run(self, state: TrainState, data: Iterator[dict]) -> TrainState:
        """state, donated -> the last one, saved. A step's metrics are looked at when the next one is under way."""
        options, pending, stopping = self.program.options, None, False
        start, self.data = int(state.step), Waited(data)
        self.stop.running = True
        with self.log.progress:
            # What a run that was ended at its step did not come to.
            if self._validates(start) and broadcast_from_leader(start not in self.log.metrics.validated):
                self._validate(state, start)
            for step, batch in zip(range(start, options.steps), self.data, strict=False):
                state, values = self.program.step(state, batch, step, asked=self.stop.signal is not None)
                jax.tree.map(lambda x: x.copy_to_host_async(), values)
                if pending:
                    stopping = self._look(state, *pending)
                pending, done = (step, values, batch), step + 1
                looked = done % options.checkpoint_every == 0 or self._validates(done)
                if looked or stopping or step == start:
                    stopping |= self._look(state, *pending)
                    pending = None
                if done % options.checkpoint_every == 0 and not stopping:
                    self.saves.save(state)
                if self._validates(done) and (not stopping or done == options.steps):
                    self._validate(state, done)
                if options.preview_every and (done % options.preview_every == 0 or done == options.steps):
                    with self.peers.busy():
                        self.log.metrics.preview(done, self.program.preview(state, batch, done))
                if stopping:
                    break
            if pending:
                self._look(state, *pending)
        with self.peers.busy():
            self.saves.save(state)
            self.saves.checkpoints.wait()
        return state

    def _validates(self, done: int) -> bool:
        every, last = self.program.options.validate_every, self.program.options.steps
        return bool(self.validation and done) and (done % every == 0 or done == last)

    def _validate(self, state: TrainState, done: int):
        with self.peers.busy():
            self.log.validated(done, self.validation(state.ema))

    def _look(self, state: TrainState, step: int, values: dict, batch) -> bool:
        """Log a finished step, or raise for a refused one -> whether any process was asked to stop."""
        values = jax.device_get(values) | {"ids": self.plan.ids(step)}
        self.peers.progress(step)
        self.first_step = self.first_step or time.perf_counter()
        try:
            self.log(step, values, self.data.seconds)
        except UserError:
            with self.peers.busy():
                self.log.flight.write("nan", **self.program.explain(state, batch))
            raise
        return bool(values["stop"])

    def timings(self, begun: float) -> dict:
        """What it took; first_step_seconds: from `begun`, the start of train, to the end of the first step."""
        return {
            "wall_seconds": round(self.log.wall_seconds(), 1),
            "steps_per_second": self.log.steps_per_second(),
            "compile_seconds": round(self.program.compile_seconds, 1),
            "first_step_seconds": round(self.first_step - begun, 1) if self.first_step else 0.0,
            "save_seconds": round(self.saves.seconds, 2),  # that the loop waited for
        }


def is_finished(folder: Path, step: int) -> bool:
    """Whether an earlier run came to its end at this very step."""
    path = folder / "summary.json"
    return path.exists() and read_json(path)["step"] == step and (folder / "ema.safetensors").exists()


def finish(config, folder: Path, state: TrainState, metadata, mesh, timings: dict, console) -> dict:
    """Write summary.json, and the EMA weights under the digest that the last checkpoint has."""
    digests = {name: digest(getattr(state, name)) for name in ("params", "ema", "opt_state")}
    ema = to_host(state.ema)
    summary = {
        "stage": config.stage,
        "step": int(state.step),
        "examples": int(state.step) * config.train.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        **timings,
        "peak_memory_gib": peak_memory_gib(),
        "digests": digests,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "platform": jax.default_backend(),
        "seed": config.seed,
        "versions": versions(),
    }
    if is_leader():
        export(folder / "ema.safetensors", Trained(config, ema, metadata))
        write_json(folder / "summary.json", summary)
    console.print(f"{config.stage}: step {summary['step']}, {summary['wall_seconds']} s; wrote {folder}/summary.json")
    return summary
