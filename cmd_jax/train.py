"""The one training loop. It knows a stage only through its interface (see stages.py)."""

import contextlib
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from cmd_jax.checkpoint import Checkpoints, Trained, digest, export, read_json, versions, write_json
from cmd_jax.config import to_json
from cmd_jax.data.pipeline import BatchPlan, batches
from cmd_jax.prepare import claimed, prepare
from cmd_jax.report.training import PREVIEW_CLIPS, Metrics, StepLog
from cmd_jax.report.video import atomic_path
from cmd_jax.sharding import batch_ways, check_batch, make_mesh, partitioning, replicated
from cmd_jax.state import init_state, make_optimizer, train_step


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


def train(config, workdir: Path) -> dict:
    """Train the config's stage in WORKDIR/STAGE, resuming what is there; returns its summary.

    Errors: UserError for a folder that holds another run, data or weights that do not fit, a loss that is not finite.
    SystemExit(0) after SIGTERM or SIGINT, when the state is saved.
    """
    console, folder = Console(), workdir / config.stage
    mesh = make_mesh(config.mesh)
    check_batch("train.batch_size", config.train.batch_size, mesh, config.train.accumulate)
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
                state, compile_seconds = run_steps(
                    config, stage, optimizer, mesh, state, data, checkpoints, report, stop
                )
                checkpoints.save(state)
        if stop.signal and int(state.step) < config.train.steps:
            console.print(f"stopped by signal {stop.signal} after step {int(state.step)}; saved; "
                          "run the same command to resume")  # fmt: skip
            raise SystemExit(0)
        return finish(config, folder, state, report, compile_seconds, facts, console)


def run_steps(
    config, stage, optimizer, mesh, state, data, checkpoints: Checkpoints, report: StepLog, stop: StopRequest
):
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
    # A constant of every step, put where it is needed once.
    frozen = jax.device_put(stage.frozen, replicated(mesh))

    @jax.jit
    def preview_fn(params, frozen, batch, key):
        clips = -(-PREVIEW_CLIPS // batch_ways(mesh)) * batch_ways(mesh)
        return stage.preview(params, frozen, jax.tree.map(lambda x: x[:clips], batch), key)

    run_key, preview_key = jax.random.split(jax.random.key(config.seed))
    with report.progress:
        for step, batch in zip(range(start, options.steps), data, strict=False):
            if step == start:
                batch = jax.block_until_ready(batch)
                begun = time.perf_counter()
                step_fn = step_fn.lower(state, frozen, batch, jnp.int32(step), run_key).compile()
                compile_seconds = time.perf_counter() - begun
            state, values = step_fn(state, frozen, batch, jnp.int32(step), run_key)
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
                pictures = preview_fn(state.ema, frozen, batch, jax.random.fold_in(preview_key, done))
                report.metrics.preview(done, jax.tree.map(np.asarray, pictures))
            if stopping:
                break
        if pending:
            report(*pending)
    return state, compile_seconds


def is_finished(folder: Path, step: int) -> bool:
    """Whether an earlier run came to its end at this very step."""
    path = folder / "summary.json"
    return path.exists() and read_json(path)["step"] == step and (folder / "ema.safetensors").exists()


def finish(config, folder: Path, state, report: StepLog, compile_seconds: float, facts, console) -> dict:
    """Write summary.json and the EMA weights."""
    ema = jax.tree.map(np.asarray, state.ema)
    digests = {name: digest(getattr(state, name)) for name in ("params", "opt_state")} | {"ema": digest(ema)}
    summary = {
        "stage": config.stage,
        "step": int(state.step),
        "examples": int(state.step) * config.train.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(ema)),
        "wall_seconds": round(report.wall_seconds(), 1),
        "steps_per_second": report.steps_per_second(),
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
