"""The verb `sample`: videos of what was asked for, and their gallery."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmd_jax.defaults import MODES
from cmd_jax.errors import choose
from cmd_jax.loading import open_sampler
from cmd_jax.report.console import make_console
from cmd_jax.report.samples import OutputFolder, SampleWriter, write_summary, writing
from cmd_jax.running.distributed import is_leader
from cmd_jax.running.runtime import process_seconds
from cmd_jax.sampling.calibration import settings_of
from cmd_jax.sampling.sampler import Sampler, Samples
from cmd_jax.verbs.requests import make_request, open_clips, read_image


def sample(config, workdir: Path, end_process=None) -> Path:
    """The `sample` verb: write the samples of `sampling.mode` and their gallery; returns the folder.

    Each of several processes writes the samples that are computed on its devices. end_process: as for `train`.
    """
    console, started, imports = make_console(quiet=not is_leader()), time.perf_counter(), process_seconds()
    options = config.sampling
    choose("sampling.mode", options.mode, MODES)
    output = OutputFolder(workdir, options.output)
    sampler = open_sampler(config, workdir)
    start = Start(sampler, imports, process_seconds())
    with writing(output, config.processes, end_process):
        captions, stream = make_samples(sampler, config, workdir)
        writer = SampleWriter(output, captions, options.fps, lambda path: console.print(start.first_video(path)))
        for samples in stream:
            start.first_batch()
            writer.write(samples)
        note = f"mode {options.mode}, guidance {options.guidance}, seed {config.seed}"
        writer.finish(options.title or f"CMD: {options.mode}", note)
        write_summary(output, config, started, samples=len(captions), **start.summary())
    console.print(f"{len(captions)} videos: {output.final}/index.html")
    return output.final


class Start:
    """What passes until the first video is there, in seconds since this process was started.

    imports, weights: when they were done.
    """

    def __init__(self, sampler: Sampler, imports: float, weights: float):
        self.sampler, self.imports, self.weights = sampler, imports, weights
        self.batch = self.video = None
        self.programs: dict[str, float] = {}

    def first_batch(self):
        """The first batch of samples is there."""
        if self.batch is None:
            self.batch, self.programs = process_seconds(), self.sampler.seconds

    def first_video(self, path) -> str:
        """Its first video is written -> what the user is told."""
        self.video = process_seconds()
        return f"the first video after {self.video:.1f} s: {path}, until all are there"

    def summary(self) -> dict:
        """For summary.json; of a process that wrote no video nothing."""
        if self.video is None:
            return {}
        compute = self.batch - self.weights - sum(self.programs.values())
        parts = {"imports": self.imports, "weights": self.weights - self.imports, **self.programs}
        parts |= {"compute": compute, "writing": self.video - self.batch}
        start = {name: round(seconds, 2) for name, seconds in parts.items()}
        return {"first_video_seconds": round(self.video, 2), "start": start}


def make_samples(sampler: Sampler, config, workdir: Path) -> tuple[list[str], Iterator[Samples]]:
    """What `sampling.mode` asks for -> (captions, samples batch after batch)."""
    options, settings, clips = config.sampling, settings_of(sampler, config), None
    if options.mode == "reconstruct" or (options.mode == "animate" and not options.image):
        clips = open_clips(config, workdir, options.num)
    if options.mode == "reconstruct":
        return clips.captions, sampler.reconstruct(clips.videos, settings)
    request = make_request(sampler, config, options.num if clips is None else len(clips.videos), clips)
    if options.mode == "vary-motion":
        captions = [f"{caption}, motion {v + 1}" for caption in request.captions for v in range(options.motions)]
        return captions, sampler.vary_motion(request, options.motions, settings)
    if options.mode == "generate":
        return request.captions, sampler.generate(request, settings)
    if clips is None:
        image = read_image(options.image, config.data.height, config.data.width)
        given = {"image": np.broadcast_to(image, (len(request), *image.shape))}
    else:
        given = {"video": clips.videos}
    return request.captions, sampler.animate(request, given, settings)
