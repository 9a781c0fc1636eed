"""What sampling writes: a folder of videos with their gallery, there only when all of it is written."""

import contextlib
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np

from cmd_jax.config import STAGES, to_json
from cmd_jax.errors import UserError
from cmd_jax.files import versions, write_json, write_text
from cmd_jax.report.gallery import Item, Section, write_gallery
from cmd_jax.report.video import film_strip, image_grid, to_uint8, video_grid, write_gif, write_mp4, write_png
from cmd_jax.running.distributed import is_leader
from cmd_jax.running.runtime import StopRequest, peak_memory_gib


class OutputFolder:
    """A folder that appears under its name only when everything in it is written; a taken name gets a number.

    final: that folder, known when all is written.
    """

    def __init__(self, workdir: Path, name: str):
        if not name or Path(name).name != name or name in (".", "..", *STAGES):
            remedy = f"use for example samples, and none of {', '.join(STAGES)}"
            raise UserError("sampling.output", name, "not the name of a new folder in the workdir", remedy)
        self.workdir, self.name, self.final = workdir, name, None
        self.path = workdir / f".tmp-{os.getpid()}-{name}"

    def remove(self):
        """What is written so far."""
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Path:
        try:
            self.remove()
            self.path.mkdir(parents=True)
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", e)
            raise UserError("workdir", self.workdir, f"cannot be written ({reason})", "give another folder") from e
        return self.path

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.remove()
            return
        number, self.final = 2, self.workdir / self.name
        while self.final.exists():
            number, self.final = number + 1, self.workdir / f"{self.name}-{number}"
        self.path.rename(self.final)


def write_samples(folder: Path, out: dict, captions: list[str], title: str, options, table=None, note: str = ""):
    """mp4, gif and content frame of every sample, overview grids, samples.json and index.html."""
    items, records = [], []
    for i, caption in enumerate(captions):
        video, content = to_uint8(out["video"][i]), to_uint8(out["image"][i])
        if "original" in out:
            video = np.concatenate([to_uint8(out["original"][i]), video], axis=2)
        write_mp4(folder / f"{i:04d}.mp4", video, fps=options.fps)
        write_gif(folder / f"{i:04d}.gif", video, fps=options.fps)
        write_png(folder / f"{i:04d}_content.png", content)
        items.append(Item(caption, video=f"{i:04d}.mp4", image=f"{i:04d}_content.png"))
        records.append({"index": i, "caption": caption, "video": f"{i:04d}.mp4", "content": f"{i:04d}_content.png"})
    columns = max(1, round(len(captions) ** 0.5))
    videos = to_uint8(out["video"])
    write_gif(folder / "grid.gif", video_grid(videos, columns), fps=options.fps)
    write_png(folder / "content_grid.png", image_grid(to_uint8(out["image"]), columns))
    write_png(folder / "grid.png", image_grid(np.stack([film_strip(v) for v in videos]), columns=1))
    section = {"title": title, "note": note, "table": table, "items": records}
    write_json(folder / "samples.json", section)
    write_gallery(folder / "index.html", title, [Section(title, items, note=note, table=table)])


@contextlib.contextmanager
def writing(output: OutputFolder, end_process=None):
    """The output's folder on the process that writes it, None on the others; a signal to stop removes it."""
    with StopRequest("stopped by a signal; nothing was written", end_process) as stop:
        if not is_leader():
            yield None
            return
        stop.first(output.remove)
        with output as folder:
            yield folder


def write_summary(folder: Path, config, started: float, **values):
    write_text(folder / "config.json", to_json(config) + "\n")
    write_json(
        folder / "summary.json",
        {
            "wall_seconds": round(time.perf_counter() - started, 1),
            "peak_memory_gib": peak_memory_gib(),
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "platform": jax.default_backend(),
            "seed": config.seed,
            "versions": versions(),
            **values,
        },
    )
