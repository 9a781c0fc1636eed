"""What a training writes while it runs: metrics.jsonl, TensorBoard events, the progress line, previews."""

import contextlib
import hashlib
import json
import logging
import os
import time
from pathlib import Path

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import UserError
from cmd_jax.files import is_remote, parse_json, write_text
from cmd_jax.report.mirror import Mirror
from cmd_jax.report.video import image_grid, video_grid, write_gif, write_png

PREVIEW_CLIPS = 8  # shown at most, each time
LINE = {"step": int, "wall_seconds?": float, "validation_loss?": float, ...: object}  # of metrics.jsonl

log = logging.getLogger(__name__)


class Metrics:
    """metrics.jsonl, ledger.jsonl, TensorBoard events and previews after `step`.

    A failing writer is reported once, and left out. writes=False: nothing is written; for all processes but one.
    wall_seconds: what the steps up to `step` took. validated: {step: loss} of the validations up to it.
    For a bucket all is written to a folder of this machine, which is uploaded every 15 seconds, by `upload`, and at the
    end. TensorFlow, which could write events to gs:// by itself, would keep the loop waiting.
    """

    WRITERS = ("metrics.jsonl", "ledger.jsonl", "TensorBoard", "previews")

    def __init__(self, folder: Path | BucketPath, step: int, writes: bool = True):
        self.folder, self.broken, self.wall_seconds = folder, set() if writes else set(self.WRITERS), 0.0
        self.validated: dict[int, float] = {}
        self.mirror = Mirror(folder, self.WRITERS[:2], self._flush) if writes and is_remote(folder) else None
        if self.mirror:
            self.folder = self.mirror.folder
        self._guard("metrics.jsonl", self._open_lines, step)
        self._guard("ledger.jsonl", self._open_ledger, step)
        self._guard("TensorBoard", self._open_events)

    def _open_lines(self, step):
        """Keep the lines up to `step`: what a killed run did after its last checkpoint is done again."""
        path, kept = self.folder / "metrics.jsonl", []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(UserError):  # the last line may be torn
                record = parse_json(line, "metrics", path, like=LINE)
                if record["step"] <= step:
                    kept.append(line.decode("utf-8-sig") + "\n")
                    self.wall_seconds = record.get("wall_seconds", 0.0)
                    if "validation_loss" in record:
                        self.validated[record["step"]] = record["validation_loss"]
        write_text(path, "".join(kept))
        self.lines = open(path, "a")  # noqa: SIM115

    def _open_ledger(self, step):
        """What was trained on in which order, steps done again after a kill included: this file only grows."""
        path = self.folder / "ledger.jsonl"
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self.ledger = open(path, "a")  # noqa: SIM115
        start = {"start": step, "devices": jax.device_count(), "processes": jax.process_count()}
        self.ledger.write("\n" * bool(torn) + json.dumps(start) + "\n")
        self.ledger.flush()

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
        self._guard("TensorBoard", lambda: self.events.close())
        if self.mirror:
            self.mirror.close()


class StepLog:
    """Takes the metrics of each step, one step late: stops on a refused update, logs when it is time.

    stage: its name. options: the config's `train` group.
    """

    QUIET = ("gradient_norm", "motion_saturated", "wall_seconds")  # not shown on the console

    def __init__(self, stage: str, options, start: int, name_of, metrics: Metrics, flight, console):
        self.stage, self.options, self.name_of = stage, options, name_of
        self.metrics, self.flight, self.console = metrics, flight, console
        self.begun, self.note = time.perf_counter(), ""  # the note: of the last validation
        self.first = self.last = None  # (step, time, seconds waited) of the first and last line of this run
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

    def __call__(self, step: int, values: dict, waited: float):
        """values: host arrays; scalars, and the "ids" [B] of the clips. waited: seconds for batches, in this run."""
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
        done, now = step + 1, time.perf_counter()
        if done % self.options.log_every and done != self.options.steps:
            return
        if self.last:
            values["steps_per_second"] = (done - self.last[0]) / (now - self.last[1])
            values["clips_per_second"] = values["steps_per_second"] * self.options.batch_size
            values["data_wait"] = (waited - self.last[2]) / (now - self.last[1])
        self.last = done, now, waited
        self.first = self.first or self.last
        self.metrics.scalars(done, values | {"wall_seconds": round(self.wall_seconds(), 1)})
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
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k not in self.QUIET)
        if self.console.is_terminal:
            self.progress.update(self.task, completed=done, shown=shown + self.note)
            return
        if "steps_per_second" in values:
            left = (self.options.steps - done) / values["steps_per_second"]
            shown += f"  ETA {left / 60:.1f} min"
        self.console.print(f"{self.stage} {done}/{self.options.steps}  {shown}")
