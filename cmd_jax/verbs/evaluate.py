"""The verb `evaluate`: scores of reconstructed and of generated videos."""

import time
from pathlib import Path

import numpy as np
from rich.table import Table

from cmd_jax.errors import UserError
from cmd_jax.evaluation import shapes_oracle
from cmd_jax.evaluation.reconstruction import psnr
from cmd_jax.loading import open_sampler
from cmd_jax.report.console import make_console
from cmd_jax.report.samples import OutputFolder, SampleWriter, write_summary, writing
from cmd_jax.report.video import to_uint8
from cmd_jax.running.distributed import gather_items, is_leader
from cmd_jax.sampling.calibration import settings_of
from cmd_jax.verbs.requests import make_request, open_clips


def evaluate(config, workdir: Path, end_process=None) -> dict:
    """The `evaluate` verb: PSNR of reconstructed clips of data.split, and attributes of generated videos of shapes.

    Prints them with counts and chance levels; writes them to summary.json beside the videos it shows. Of several
    processes each scores the videos of its own devices, of which it keeps the scores alone. end_process: as for
    `train`.
    """
    console, started = make_console(quiet=not is_leader()), time.perf_counter()
    options = config.sampling
    if options.mode != "generate":
        raise UserError("sampling.mode", options.mode, "evaluate scores generated videos", "use sampling.mode=generate")
    output = OutputFolder(workdir, options.output)
    sampler = open_sampler(config, workdir)
    settings = settings_of(sampler, config)
    with writing(output, config.processes, end_process):
        clips = open_clips(config, workdir, config.evaluation.clips)
        videos = config.evaluation.videos
        request = make_request(sampler, config, videos, clips if sampler.tokenizer else None)
        decibels = {}
        for samples in sampler.reconstruct(clips.videos, settings):
            decibels |= zip(samples.index.tolist(), psnr(samples.video, samples.original).tolist(), strict=True)
        decibels = np.array(gather_items(decibels))
        scores = {"reconstruction_psnr": {"mean": float(decibels.mean()), "clips": len(decibels)}}
        scores["reconstruction_psnr"]["split"] = config.data.split
        which = "held-out" if config.data.split == "test" else config.data.split
        console.print(f"{which} reconstruction: {decibels.mean():.2f} dB PSNR over {len(decibels)} clips")

        timed, readings = time.perf_counter(), {}
        writer = SampleWriter(output, request.captions[: config.evaluation.shown], options.fps)
        readable = config.data.source == "shapes" and "label" in request.conditions
        for samples in sampler.generate(request, settings):
            writer.write(samples)
            if readable:
                for i, video in zip(samples.index.tolist(), samples.video, strict=True):
                    readings[i] = shapes_oracle.read_clip(to_uint8(video))
        seconds = time.perf_counter() - timed
        table = [["score", "value", "chance"], ["reconstruction PSNR", f"{decibels.mean():.2f} dB", ""]]
        if readable:
            readings = [shapes_oracle.Reading(*words) for words in gather_items(readings)]
            read = shapes_oracle.tally(readings, request.conditions["label"], sampler.class_names)
            scores["attributes"] = read
            for name in ("color", "direction", "shape", "all"):
                share = f"{read[name]['correct']}/{read['count']} = {read[name]['accuracy']:.1%}"
                table.append([name, share, f"{read[name]['chance']:.1%}"])
        _print_table(console, table)
        note = f"guidance {options.guidance}, seed {config.seed}, {len(request)} videos in {seconds:.0f} s, compiled"
        writer.finish(options.title or f"CMD, {Path(config.weights).name or 'trained here'}", note, table)
        write_summary(output, config, started, samples=len(request), sampling_seconds=round(seconds, 1), scores=scores)
    console.print(f"scores: {output.final}/summary.json\nvideos: {output.final}/index.html")
    return scores


def _print_table(console, rows: list[list[str]]):
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
