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
from cmd_jax.data.pipeline import BatchPlan, BucketPlan, batches
from cmd_jax.declare import span_of
from cmd_jax.errors import Stopped, UserError
from cmd_jax.files import as_path, read_json, versions, write_json, write_text
from cmd_jax.initial import given_params
from cmd_jax.keys import derive
from cmd_jax.models.frames import to_uint8
from cmd_jax.performance.flops import operations
from cmd_jax.performance.goodput import Clock, Devices, fed, goodput, in_words
from cmd_jax.performance.memory import device_memory, process_peak
from cmd_jax.performance.peak import device_peak
from cmd_jax.prepare import Prepared, check_same_run, prepare
from cmd_jax.report.console import make_console
from cmd_jax.report.profile import Profile
from cmd_jax.report.training import PREVIEW_CLIPS, Metrics, StepLog
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.distributed import broadcast_from_leader, is_leader, leader_alone
from cmd_jax.running.flight import FlightRecord, explain
from cmd_jax.running.hosts import digest, to_host
from cmd_jax.running.lock import locked_run
from cmd_jax.running.resume import check_continues, position
from cmd_jax.running.runtime import StopRequest
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

WORTH_A_PEAK = 1e12  # operations of a run; one of fewer is over before the peak of its device is measured


def train(config, workdir: Path | str, end_process: Callable | None = None) -> dict:
    """Train the config's stage in WORKDIR/STAGE, resuming what is there; returns its summary.

    Errors: UserError for a folder that holds another run, data or weights that do not fit, a loss that is not finite.
    Stopped after a request to stop (SIGTERM, SIGINT or SIGHUP, where this runs in the main thread): in the loop the
    state is saved, and the same call resumes it.

    end_process(exit code, last_words=""): for a command, which it ends from any thread, whatever the main one is stuck
    in: at a second signal, at one before the loop, for a lost peer and a stall. Without it, as in a library, nothing
    ends the process: see StopRequest and `watched` for what is done instead.
    """
    clock = Clock()
    workdir, console = as_path(workdir).absolute(), make_console(quiet=not is_leader())
    folder, mesh = workdir / config.stage, make_mesh(config.mesh)
    check_batch("train.batch_size", config.train.batch_size, mesh, config.train.accumulate)
    flight = FlightRecord(folder, jax.process_index())
    # The stop request is outermost, so that a signal never cuts off the end of a save.
    with (
        StopRequest(STOPPED_EARLY, end_process) as stop,
        locked_run(folder) as (resuming, lease),
        watched(folder, config.processes, flight, stop, end_process, lease) as peers,
        partitioning(mesh, config.rules, config.attention),
        contextlib.ExitStack() as opened,
    ):
        if resuming:
            leader_alone(lambda: check_same_run(folder, config))
        prepared = prepare(config, workdir, mesh, console, resuming)
        plan = make_plan(prepared, config)
        program = Program(prepared.stage, make_optimizer(config.optimizer), config, mesh, clock)
        for line in replicated_report(layout(program.params, mesh, config.rules), config.mesh.report_above):
            console.print(line)
        where = partial(position, config, fingerprint=prepared.metadata.data.fingerprint)
        checkpoints = Checkpoints(
            folder, config.train.keep, before_commit=lambda: metrics.upload(), check=lease.check if lease else None
        )
        opened.enter_context(contextlib.closing(checkpoints))
        state = first_state(program, config, prepared.metadata, checkpoints, where, console, clock)
        start = int(state.step)
        if start >= config.train.steps and broadcast_from_leader(is_finished(folder, start)):
            console.print(f"{config.stage} is trained already")
            return read_json(folder / "summary.json")
        if is_leader():
            write_text(folder / "config.json", to_json(config) + "\n")
        metrics = opened.enter_context(contextlib.closing(Metrics(folder, start, writes=is_leader())))
        log = StepLog(
            config.stage, config.train, start, prepared.name_of, metrics, flight, console, clock, program.rates
        )
        # Whatever ends it: what a step took that came to nothing is told of as that step's.
        opened.callback(lambda: metrics.spent(max(start, program.started), clock.seconds()))
        data = batches(
            prepared.read, plan, mesh, start=start, stop=config.train.steps,
            threads=config.data.threads, prefetch=config.data.prefetch, shelf=prepared.shelf,
        )  # fmt: skip
        if prepared.filler:
            asked = lambda: stop.signal is not None  # noqa: E731
            data = prepared.filler.filled(plan, range(start, config.train.steps), data, asked, peers.busy)
        opened.enter_context(contextlib.closing(data))
        validation = Validation(program, prepared, config) if config.train.validate_every else None
        profile = Profile(folder, span_of("train.profile", config.train.profile) if is_leader() else None, console)
        opened.callback(profile.close)
        devices = opened.enter_context(contextlib.closing(Devices()))
        saves = Saves(checkpoints, where, start, clock)
        loop = Loop(program, plan, saves, log, stop, peers, devices, profile, validation)
        state = loop.run(state, data)
        if int(state.step) >= config.train.steps:
            with peers.busy():
                trained = replace(prepared.metadata, digest=checkpoints.digest("ema"))
                return finish(config, folder, state, trained, mesh, loop.timings, console)
    who = f"signal {stop.signal}" if stop.signal else "a signal to another process"
    stopped = f"stopped by {who} after step {int(state.step)}; saved; run the same command to resume"
    console.print(stopped)
    raise Stopped(stopped)


def make_plan(prepared: Prepared, config) -> BatchPlan:
    """Which examples make which batch."""
    indices, batch_size, seed = prepared.split.train, config.train.batch_size, config.seed
    buckets = prepared.buckets_of(indices)
    return BatchPlan(indices, batch_size, seed) if buckets is None else BucketPlan(indices, buckets, batch_size, seed)


def first_state(program: "Program", config, metadata, checkpoints: Checkpoints, where, console, clock) -> TrainState:
    """That of the newest checkpoint, which must be of this run; else a fresh one, whose parameters are those of
    config.init, pretrained where the stage says so, or random.

    metadata: of this run. where(step): its position.
    """
    stage, optimizer, mesh, rules = program.stage, program.optimizer, program.mesh, config.rules
    if checkpoints.latest() is None:
        given = given_params(config, stage, metadata, partial(abstract, mesh=mesh, rules=rules), console)
        return init_state(stage, optimizer, config.seed, mesh, rules, given)
    with clock.spent("restore"):
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

    clock: of the run. params: their shapes with logical axes. peak: of a device, operations a second; None where none
    is measured. started: steps of the run up to the one that was started last. operations:
    of all devices, in those that were started here.
    """

    def __init__(self, stage, optimizer, config, mesh, clock: Clock):
        self.stage, self.optimizer, self.options, self.mesh = stage, optimizer, config.train, mesh
        self.key, self.params = jax.random.key(config.seed), jax.eval_shape(stage.init, jax.random.key(0))
        self.clock, self.dtype, self.peak = clock, config.model.dtype, None
        self.started = self.operations = 0
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
        """state, donated -> (state, metrics), as `make_step` has them; compiled for batches of this shape."""
        compiled, operations = self.compile(state, batch)
        self.started, self.operations = number + 1, self.operations + operations
        return compiled(*self._arguments(state, batch, number, asked))

    def _arguments(self, state, batch, number=0, asked=False):
        return state, self.frozen, batch, jnp.int32(number), self.key, self._asked[asked]

    def compile(self, state: TrainState, batch) -> tuple[Callable, int]:
        """-> (the step for batches of this shape, its operations)."""
        shapes = tuple((name, x.shape) for name, x in batch.items())
        if shapes not in self._steps:
            jax.block_until_ready((state, batch))
            with self.clock.spent("compile"):
                step = make_step(self.stage, self.optimizer, self.options, self.mesh, state)
                traced = step.trace(*self._arguments(state, batch))
                cost = operations(traced.jaxpr)
                self._steps[shapes] = traced.lower().compile(), cost
            if not self.peak and is_leader() and cost * self.options.steps >= WORTH_A_PEAK:
                with self.clock.spent("start_up"):
                    self.peak = device_peak(self.dtype)
        return self._steps[shapes]

    def rates(self, operations: int, seconds: float) -> dict[str, float]:
        """What it means that the devices did so many operations, those that `remat` repeats included, in some time:
        {"tflops_per_device", "mfu", and the most memory there was in use until now, in GiB}."""
        each, memory = operations / seconds / self.mesh.size, device_memory()
        share = {"mfu": each / self.peak} if self.peak else {}
        name = {"devices": "device_memory_gib", "process": "process_memory_gib"}[memory["of"]]
        return {"tflops_per_device": each / 1e12, **share, name: memory["peak_bytes"] / 2**30}

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
    """Checkpoints of states with their positions; `step` has one."""

    def __init__(self, checkpoints: Checkpoints, where: Callable[[int], dict], step: int, clock: Clock):
        self.checkpoints, self.where, self.step, self.clock = checkpoints, where, step, clock

    def save(self, state: TrainState, wait: bool = False):
        """wait: until it is all there, and those before."""
        with self.clock.spent("save_wait"):
            step = int(state.step)
            if step != self.step:
                self.checkpoints.save(state, self.where(step))
            self.step = step
            if wait:
                self.checkpoints.wait()


class Loop:
    """The steps from a state to train.steps, or to a request to stop."""

    def __init__(
        self, program: Program, plan: BatchPlan, saves: Saves, log: StepLog, stop, peers, devices: Devices,
        profile: Profile, validation: Validation | None = None,
    ):  # fmt: skip
        self.program, self.plan, self.saves, self.log, self.validation = program, plan, saves, log, validation
        self.stop, self.peers, self.devices, self.profile = stop, peers, devices, profile
        self.clock, self.first_step = program.clock, 0.0

    def run(self, state: TrainState, data: Iterator[dict]) -> TrainState:
        """state, donated -> the last one, saved. A step's metrics are looked at when the next one is under way."""
        options, pending, stopping = self.program.options, None, False
        start = int(state.step)
        self.stop.running = True
        self.clock.turn("steps")
        with self.log.progress:
            # What a run that was ended at its step did not come to.
            if self._validates(start) and broadcast_from_leader(start not in self.log.metrics.validated):
                self._validate(state, start)
            for step, batch in zip(range(start, options.steps), fed(data, self.clock, self.devices), strict=False):
                self.program.compile(state, batch)
                if self.profile.begins(step):
                    with self.peers.busy(), self.clock.spent("profile"):
                        self.profile.start(step, state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, values = self.program.step(state, batch, step, asked=self.stop.signal is not None)
                self.devices.given(values["loss"])
                jax.tree.map(lambda x: x.copy_to_host_async(), values)
                if pending:
                    stopping = self._look(state, *pending)
                pending, done = (step, values, batch, self.program.operations), step + 1
                saved, validated = done % options.checkpoint_every == 0, self._validates(done)
                shown = options.preview_every and (done % options.preview_every == 0 or done == options.steps)
                if saved or validated or shown or stopping or step == start:
                    stopping |= self._look(state, *pending)
                    pending = None
                if self.profile.ends(step):
                    with self.peers.busy(), self.clock.spent("profile"):
                        self.profile.stop(state)
                if saved and not stopping:
                    self.saves.save(state)
                    self.log.metrics.spent(done, self.clock.seconds())
                if validated and (not stopping or done == options.steps):
                    self._validate(state, done)
                if shown:
                    with self.peers.busy(), self.clock.spent("previews"):
                        self.log.metrics.preview(done, self.program.preview(state, batch, done))
                if stopping:
                    break
            if pending:
                self._look(state, *pending)
        with self.peers.busy():
            self.saves.save(state, wait=True)
        self.clock.turn("finish")
        return state

    def _validates(self, done: int) -> bool:
        every, last = self.program.options.validate_every, self.program.options.steps
        return bool(self.validation and done) and (done % every == 0 or done == last)

    def _validate(self, state: TrainState, done: int):
        with self.peers.busy(), self.clock.spent("validation"):
            self.log.validated(done, self.validation(state.ema))

    def _look(self, state: TrainState, step: int, values: dict, batch, operations: int) -> bool:
        """Log a finished step, or raise for a refused one -> whether any process was asked to stop."""
        values = jax.device_get(values) | {"ids": self.plan.ids(step)}
        self.peers.progress(step)
        self.first_step = self.first_step or time.perf_counter()
        try:
            self.log(step, values, operations)
        except UserError:
            with self.peers.busy():
                self.log.flight.write("nan", **self.program.explain(state, batch))
            raise
        return bool(values["stop"])

    def timings(self) -> dict:
        """What it took; first_step_seconds: from the start of train to the end of the first step."""
        seconds, (runs, earlier) = self.clock.seconds(), self.log.metrics.earlier
        all_seconds = {name: seconds.get(name, 0.0) + earlier.get(name, 0.0) for name in seconds | earlier}
        return {
            "wall_seconds": round(self.log.wall_seconds(), 1),
            "steps_per_second": self.log.steps_per_second(),
            "compile_seconds": round(seconds.get("compile", 0.0), 1),
            "first_step_seconds": round(max(0.0, self.first_step - self.clock.begun), 1),
            "save_seconds": round(seconds.get("save_wait", 0.0), 2),  # that the loop waited for
            "peak_tflops": self.program.peak and round(self.program.peak / 1e12, 4),  # measured, of a device
            "goodput": goodput(seconds),
            "goodput_of_all_runs": goodput(all_seconds) | {"runs": runs + 1},
        }


def is_finished(folder: Path, step: int) -> bool:
    """Whether an earlier run came to its end at this very step."""
    path = folder / "summary.json"
    return path.exists() and read_json(path)["step"] == step and (folder / "ema.safetensors").exists()


def finish(config, folder: Path, state: TrainState, metadata, mesh, timings: Callable, console) -> dict:
    """Write summary.json, and the EMA weights under the digest that the last checkpoint has."""
    digests = {name: digest(getattr(state, name)) for name in ("params", "ema", "opt_state")}
    ema = to_host(state.ema)
    summary = {
        "stage": config.stage,
        "step": int(state.step),
        "examples": int(state.step) * config.train.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "peak_memory_gib": round(process_peak() / 2**30, 2),
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
    summary |= timings()
    if is_leader():
        write_json(folder / "summary.json", summary)
    console.print(f"{config.stage}: step {summary['step']}, {summary['wall_seconds']} s; wrote {folder}/summary.json")
    console.print(f"goodput {in_words(summary['goodput'])}")
    if (runs := summary["goodput_of_all_runs"])["runs"] > 1:
        console.print(f"goodput of all {runs['runs']} runs {in_words(runs)}")
    return summary
