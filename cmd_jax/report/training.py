"""What a training writes while it runs: metrics.jsonl, TensorBoard events, the progress line, previews."""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import UserError
from cmd_jax.files import is_remote, parse_json, write_text
from cmd_jax.performance.goodput import earlier_seconds
from cmd_jax.report.mirror import Mirror
from cmd_jax.report.video import image_grid, video_grid, write_gif, write_png

PREVIEW_CLIPS = 8  # shown at most, each time
LINE = {"step": int, "wall_seconds?": float, "validation_loss?": float, ...: object}  # of metrics.jsonl
TIME = ({"start": int}, {"step": int, "seconds": {...: float}})  # lines of goodput.jsonl

log = logging.getLogger(__name__)


class Metrics:
    """metrics.jsonl, ledger.jsonl, goodput.jsonl, TensorBoard events and previews after `step`.

    A failing writer is reported once, and left out. writes=False: nothing is written; for all processes but one.
    wall_seconds: what the steps up to `step` took. validated: {step: loss} of the validations up to it. earlier: how
    many runs there were, and where all of their time went, as of `earlier_seconds`.
    For a bucket all is written to a folder of this machine, which is uploaded every 15 seconds, by `upload`, and at the
    end. TensorFlow, which could write events to gs:// by itself, would keep the loop waiting.
    """

    GROWING = ("metrics.jsonl", "ledger.jsonl", "goodput.jsonl")
    WRITERS = (*GROWING, "TensorBoard", "previews")

    def __init__(self, folder: Path | BucketPath, step: int, writes: bool = True):
        self.folder, self.broken, self.wall_seconds = folder, set() if writes else set(self.WRITERS), 0.0
        self.validated: dict[int, float] = {}
        self.earlier: tuple[int, dict[str, float]] = (0, {})
        self.mirror = Mirror(folder, self.GROWING, self._flush) if writes and is_remote(folder) else None
        if self.mirror:
            self.folder = self.mirror.folder
        self._guard("metrics.jsonl", self._open_lines, step)
        self._guard("ledger.jsonl", self._open_ledger, step)
        self._guard("goodput.jsonl", self._open_times, step)
        self._guard("TensorBoard", self._open_events)

    def _open_lines(self, step):
        """Keep the lines up to `step`: what a killed run did after its last checkpoint is done again."""
        path, kept = self.folder / "metrics.jsonl", []
        for line, record in whole_lines(path, LINE):
            if record["step"] <= step:
                kept.append(line.decode("utf-8-sig") + "\n")
                self.wall_seconds = record.get("wall_seconds", 0.0)
                if "validation_loss" in record:
                    self.validated[record["step"]] = record["validation_loss"]
        write_text(path, "".join(kept))
        self.lines = open(path, "a")  # noqa: SIM115

    def _open_ledger(self, step):
        """What was trained on in which order, steps done again after a kill included: this file only grows."""
        start = {"start": step, "devices": jax.device_count(), "processes": jax.process_count()}
        self.ledger = self._open_growing("ledger.jsonl", start)

    def _open_times(self, step):
        """Where the time of each run went; this file too only grows."""
        self.earlier = earlier_seconds((record for _, record in whole_lines(self.folder / "goodput.jsonl", TIME)), step)
        self.times = self._open_growing("goodput.jsonl", {"start": step})

    def _open_growing(self, name, start: dict):
        path = self.folder / name
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        file = open(path, "a")  # noqa: SIM115
        file.write("\n" * bool(torn) + json.dumps(start) + "\n")
        file.flush()
        return file

    def _open_events(self):
        # TensorFlow comes with clu's writers, and only the process that writes should pay for loading it.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        from clu import metric_writers

        self.events = metric_writers.SummaryWriter(str(self.folder))

    def _flush(self):
        if hasattr(self, "events"):
            self._guard("TensorBoard", lambda: self.events.flush())

    def upload(self):
        """Have a bucket hold what was written until now. OSError if it cannot."""
        if self.mirror:
            self.mirror.upload()

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

    def _write_ledger(self, step, ids, loss):
        digest = hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()[:16]
        self.ledger.write(json.dumps({"step": step, "ids": digest, "loss": float(loss).hex()}) + "\n")
        self.ledger.flush()

    def account(self, step: int, ids: np.ndarray, loss: float):
        """One line of the ledger: the clips [B] of the step, and its loss to the bit."""
        self._guard("ledger.jsonl", self._write_ledger, step, ids, loss)

    def spent(self, step: int, seconds: dict[str, float]):
        """Where the time of this run went until `step` steps were done, since a kill leaves nothing else of it."""
        self._guard("goodput.jsonl", self._write_times, step, seconds)

    def _write_times(self, step, seconds):
        self.times.write(json.dumps({"step": step, "seconds": {k: round(s, 3) for k, s in seconds.items()}}) + "\n")
        self.times.flush()

    def scalars(self, step: int, values: dict[str, float]):
        self._guard("metrics.jsonl", self._write_line, step, values)
        self._guard("TensorBoard", lambda: self.events.write_scalars(step, values))

    def preview(self, step: int, pictures: dict[str, np.ndarray]):
        """Videos uint8 [N, T, H, W, 3] as gif, images [N, H, W, 3] as png; one file a name, in previews/."""
        for name, x in pictures.items():
            self._guard("previews", self._write_preview, step, name, x)

    def _write_preview(self, step, name, x):
        stem = self.folder / "previews" / f"{step:07d}_{name}"
        if x.ndim == 5:
            write_gif(stem.with_suffix(".gif"), video_grid(x, columns=4))
            return
        grid = image_grid(x, columns=4)
        write_png(stem.with_suffix(".png"), grid)
        self._guard("TensorBoard", lambda: self.events.write_images(step, {name: grid[None]}))

    def close(self):
        self._guard("metrics.jsonl", lambda: self.lines.close())
        self._guard("ledger.jsonl", lambda: self.ledger.close())
        self._guard("goodput.jsonl", lambda: self.times.close())
        self._guard("TensorBoard", lambda: self.events.close())
        if self.mirror:
            self.mirror.close()


def whole_lines(path: Path, like) -> Iterator[tuple[bytes, dict]]:
    """(line, its record) of a file that grew, if it is there, but for lines that were torn when a process died."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(UserError):
            yield line, parse_json(line, "metrics", path, like=like)


class StepLog:
    """Takes the metrics of each step, one step late: stops on a refused update, logs when it is time.

    stage: its name. options: the config's `train` group. clock: of the run. rates(operations, seconds): what it means
    that the steps of some seconds were so many operations, as `Program.rates`.
    """

    QUIET = ("gradient_norm", "motion_saturated", "wall_seconds")  # not shown on the console
    SHORT = {
        "steps_per_second": "{:.4g} steps/s", "clips_per_second": "{:.4g} clips/s", "data_wait": "data {:.0%}",
        "tflops_per_device": "{:.3g} TFLOP/s", "mfu": "MFU {:.1%}",
        "device_memory_gib": "{:.3g} GiB", "process_memory_gib": "{:.3g} GiB",
    }  # fmt: skip

    def __init__(self, stage: str, options, start: int, name_of, metrics: Metrics, flight, console, clock, rates):
        self.stage, self.options, self.name_of, self.clock, self.rates = stage, options, name_of, clock, rates
        self.metrics, self.flight, self.console = metrics, flight, console
        self.begun, self.note = time.perf_counter(), ""  # the note: of the last validation
        self.first = self.last = None  # (step, time, seconds waited, operations) of the first and last line of this run
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        columns += (TimeRemainingColumn(), TextColumn("{task.fields[shown]}", markup=False))
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(self.stage, total=self.options.steps, completed=start, shown="compiling")

    def wall_seconds(self) -> float:
        """Time spent on this stage, earlier runs included."""
        return self.metrics.wall_seconds + time.perf_counter() - self.begun

    def steps_per_second(self) -> float | None:
        """Over this run without its first lines' compilation, but with previews and checkpoints; None if too short."""
        if self.first == self.last:
            return None
        return round((self.last[0] - self.first[0]) / (self.last[1] - self.first[1]), 3)

    def __call__(self, step: int, values: dict, operations: int):
        """values: host arrays; scalars, and the "ids" [B] of the clips. operations: in this run, up to this step."""
        ids = [int(i) for i in values["ids"]]
        applied = bool(values["applied"])
        values = {name: float(value) for name, value in values.items() if name not in ("applied", "ids", "stop")}
        self.flight.note(step, values, ids)
        if not applied:
            loss, norm = values["loss"], values["gradient_norm"]
            names = ", ".join(self.name_of(i) for i in ids[:8])
            raise UserError(
                "loss", loss, f"not finite at step {step} (gradient norm {norm}; clips {names}); nothing was updated",
                "lower optimizer.learning_rate or look at those clips; the last checkpoint is intact",
            )  # fmt: skip
        self.metrics.account(step, ids, values["loss"])
        done = step + 1
        if done % self.options.log_every and done != self.options.steps:
            return
        now, spent = time.perf_counter(), self.clock.seconds()
        waited = spent.get("data_wait", 0.0)
        if self.last:
            steps, seconds = done - self.last[0], now - self.last[1]
            values["steps_per_second"] = steps / seconds
            values["clips_per_second"] = values["steps_per_second"] * self.options.batch_size
            values["data_wait"] = (waited - self.last[2]) / seconds
            values |= self.rates(operations - self.last[3], seconds)
        self.last = done, now, waited, operations
        self.first = self.first or self.last
        self.metrics.scalars(done, values | {"wall_seconds": round(self.wall_seconds(), 1)})
        self.metrics.spent(done, spent)
        self._show(done, values)

    def validated(self, done: int, values: dict[str, float]):
        """values: the loss and its metrics on the clips held out, after `done` steps."""
        values = {f"validation_{name}": value for name, value in values.items()}
        self.metrics.scalars(done, values | {"wall_seconds": round(self.wall_seconds(), 1)})
        losses = self.metrics.validated
        losses[done] = values["validation_loss"]
        best = min(losses, key=losses.get)
        self.note = "".join(
            f"  {k} {v:.4g}" for k, v in values.items() if k.removeprefix("validation_") not in self.QUIET
        )
        if best != done:
            self.note += f" (at {best} it was {losses[best]:.4g})"
        if not self.console.is_terminal:
            self.console.print(f"{self.stage} {done}/{self.options.steps}{self.note}")

    def _show(self, done, values):
        shown = "  ".join(self.SHORT.get(k, k + " {:.4g}").format(v) for k, v in values.items() if k not in self.QUIET)
        if self.console.is_terminal:
            self.progress.update(self.task, completed=done, shown=shown + self.note)
            return
        if "steps_per_second" in values:
            left = (self.options.steps - done) / values["steps_per_second"]
            shown += f"  ETA {left / 60:.1f} min"
        self.console.print(f"{self.stage} {done}/{self.options.steps}  {shown}")
