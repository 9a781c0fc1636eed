"""What sampling writes: a folder of videos with their gallery, there only when all of it is written.

In a bucket, which has no rename, it is written under its name, and is no output while it holds UNFINISHED.
"""

import contextlib
import itertools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from cmd_jax.buckets import BucketPath, write_if
from cmd_jax.config import STAGES, to_json
from cmd_jax.errors import UserError, of_file
from cmd_jax.files import AT_A_TIME, as_path, each, is_remote, remove_tree, versions, write_json, write_text
from cmd_jax.performance.memory import process_peak
from cmd_jax.report.gallery import Item, Section, write_gallery
from cmd_jax.report.video import film_strip, image_grid, to_uint8, video_grid, write_gif, write_mp4, write_png
from cmd_jax.running.distributed import gather, is_leader, leader_alone, linger, several
from cmd_jax.running.runtime import StopRequest
from cmd_jax.running.watch import watched

UNFINISHED = ".unfinished"
PATIENCE = 5.0  # seconds that writes under way may take to their end
GRID, GRID_BYTES = 64, 2**28  # the most samples in the overview pictures, and the most bytes of videos


class OutputFolder:
    """A folder that is an output only when everything in it is written; a taken name gets a number.

    All processes of a job enter it, write into it and leave it together. final: that folder, known when all is written.
    beats: where they tell each other that they live. writes: a context of each write, for which its removal waits.
    """

    def __init__(self, workdir: Path | BucketPath, name: str):
        if not name or Path(name).name != name or name in (".", "..", *STAGES):
            remedy = f"use for example samples, and none of {', '.join(STAGES)}"
            raise UserError("sampling.output", name, "not the name of a new folder in the workdir", remedy)
        self.workdir, self.name, self.final = workdir, name, None
        self.path = workdir / f".tmp-{os.getpid()}-{name}"
        self.writes, self._done, self._closed = threading.Semaphore(AT_A_TIME), False, False

    @property
    def beats(self) -> Path | BucketPath:
        return self.path.with_name(f".tmp-{self.path.name.removeprefix('.tmp-')}-processes")

    def remove(self):
        """What is written so far. Writes under way come to their end, and no other one begins: in a bucket it would
        still be there."""
        end, closed, self._closed = time.monotonic() + PATIENCE, self._closed, True
        for _ in range(0 if closed else AT_A_TIME):
            self.writes.acquire(timeout=max(0.0, end - time.monotonic()))
        if not (self._done and is_remote(self.path)):
            remove_tree(self.path)

    def abandon(self):
        """The same, when all others have heard why."""
        self.remove()
        if is_leader():
            remove_tree(self.beats)

    def __enter__(self) -> Path | BucketPath:
        self.path = as_path(leader_alone(self._make))
        seen = gather("yes" if self.path.is_dir() else "")
        if "" in seen:
            self.remove()
            problem = f"process {seen.index('')} does not see what process 0 writes there"
            raise UserError("workdir", self.workdir, problem, "give a folder of a file system that all share")
        return self.path

    def _make(self) -> str:
        try:
            if is_remote(self.workdir):
                self.path = next(filter(_claim, self._names()))
            else:
                remove_tree(self.path)
                self.path.mkdir(parents=True)
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", e)
            raise UserError("workdir", self.workdir, f"cannot be written ({reason})", "give another folder") from e
        return str(self.path)

    def __exit__(self, kind, error, trace):
        if kind is None:
            gather("all that is written is written")
            self._done = True
            self.final = as_path(leader_alone(self._name))
            return
        self.remove()
        if several():
            linger()
            self.abandon()

    def _names(self) -> Iterator[Path | BucketPath]:
        """Those of this output that are not taken."""
        for number in itertools.count(1):
            path = self.workdir / (self.name if number == 1 else f"{self.name}-{number}")
            if not path.exists():
                yield path

    def _name(self) -> str:
        if is_remote(self.path):
            (self.path / UNFINISHED).unlink()
            remove_tree(self.beats)
            return str(self.path)
        final = next(self._names())
        self.path.rename(final)
        self.abandon()
        return str(final)


def _claim(path: BucketPath) -> bool:
    """Make it this job's alone, unless another one was quicker."""
    return write_if(path / UNFINISHED, f"{os.uname().nodename} {secrets.token_hex(8)}\n".encode(), None) is not None


@contextlib.contextmanager
def writing(output: OutputFolder, options, end_process=None):
    """Within, the output's folder is there to write to. The end of one process is that of all, and removes it.

    options: the config's `processes` group. end_process: as for `train`.
    """

    def end(code: int):
        output.abandon()
        end_process(code)

    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopRequest("stopped by a signal; nothing was written", end_process))
        stop.first(output.remove)
        held.enter_context(output)
        if several():
            held.enter_context(watched(output.beats, options, None, stop, end_process and end))
            stop.first(linger)
            stop.first(output.abandon)
        try:
            yield
        except OSError as e:  # as a line, for the others too
            raise of_file(e) from e


class SampleWriter:
    """The files of a gallery: mp4, gif and content frame of each sample as it comes, then overviews and the page.

    output: the OutputFolder for them. captions: one a sample; samples beyond them are not written. Each process writes
    those it is given. first(path): called when the first video is there, of which the folder has its last name later.
    """

    def __init__(
        self, output: OutputFolder, captions: list[str], fps: float, first: Callable[[Path], None] | None = None
    ):
        self.folder, self.writes, self.captions = output.path, output.writes, captions
        self.fps, self._first = fps, first

    def write(self, samples):
        """Of a sampling.sampler.Samples. Reconstructions stand beside their originals."""
        wanted = [(at, i) for at, i in enumerate(samples.index.tolist()) if i < len(self.captions)]

        def write(place: tuple[int, int]):
            with self.writes:
                self._write(samples, *place)

        each(self.folder, write, wanted)

    def _write(self, samples, at: int, i: int):
        video = to_uint8(samples.video[at])
        if i < min(GRID, max(1, GRID_BYTES // video.nbytes)):
            write_png(self._strip(i), film_strip(video))
        if samples.original is not None:
            video = np.concatenate([to_uint8(samples.original[at]), video], axis=2)
        write_mp4(self.folder / f"{i:04d}.mp4", video, fps=self.fps)
        first, self._first = self._first, None
        if first:
            first(self.folder / f"{i:04d}.mp4")
        write_gif(self.folder / f"{i:04d}.gif", video, fps=self.fps)
        write_png(self.folder / f"{i:04d}_content.png", to_uint8(samples.image[at]))

    def finish(self, title: str, note: str = "", table=None):
        """By process 0, when all have written theirs: overviews of the first samples, samples.json and index.html."""
        gather("written")
        leader_alone(lambda: self._finish(title, note, table))

    def _finish(self, title, note, table):
        with self.writes:
            self._write_overview(title, note, table)

    def _write_overview(self, title, note, table):
        names = [f"{i:04d}" for i in range(len(self.captions))]
        rows = list(zip(self.captions, names, strict=True))
        items = [Item(caption, video=f"{i}.mp4", image=f"{i}_content.png") for caption, i in rows]
        records = [{"index": int(i), "caption": caption, "video": f"{i}.mp4", "content": f"{i}_content.png"}
                   for caption, i in rows]  # fmt: skip
        self._write_grids()
        section = {"title": title, "note": note, "table": table, "items": records}
        write_json(self.folder / "samples.json", section)
        write_gallery(self.folder / "index.html", title, [Section(title, items, note=note, table=table)])

    def _write_grids(self):
        """Of the strips, which then go."""
        strips = [self._strip(i) for i in range(min(GRID, len(self.captions))) if self._strip(i).exists()]
        pictures = np.stack(each(self.folder, _read, strips))
        contents = [self.folder / f"{i:04d}_content.png" for i in range(len(strips))]
        images = np.stack(each(self.folder, _read, contents))
        count, height, width = images.shape[:3]
        videos = pictures.reshape(count, height, -1, width, 3).swapaxes(1, 2)
        columns = max(1, round(count**0.5))
        write_gif(self.folder / "grid.gif", video_grid(videos, columns), fps=self.fps)
        write_png(self.folder / "content_grid.png", image_grid(images, columns))
        write_png(self.folder / "grid.png", image_grid(pictures, columns=1))
        each(self.folder, lambda path: path.unlink(), strips)

    def _strip(self, i: int) -> Path:
        return self.folder / f".strip-{i:04d}.png"


def _read(path: Path | BucketPath) -> np.ndarray:
    with path.open("rb") as file, Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def write_summary(output: OutputFolder, config, started: float, **values):
    """By process 0: config.json and summary.json."""
    if not is_leader():
        return
    with output.writes:
        write_text(output.path / "config.json", to_json(config) + "\n")
        summary = {
            "wall_seconds": round(time.perf_counter() - started, 1),
            "peak_memory_gib": round(process_peak() / 2**30, 2),
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "platform": jax.default_backend(),
            "seed": config.seed,
            "versions": versions(),
            **values,
        }
        write_json(output.path / "summary.json", summary)
