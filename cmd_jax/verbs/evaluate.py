"""The verb `evaluate`: scores of reconstructed and of generated videos."""

import time
from pathlib import Path

import numpy as np
from rich.table import Table

from cmd_jax.errors import UserError
from cmd_jax.evaluation import shapes_oracle
from cmd_jax.evaluation.reconstruction import psnr
from cmd_jax.report.console import make_console
from cmd_jax.report.samples import OutputFolder, write_samples, write_summary, writing
from cmd_jax.report.video import to_uint8
from cmd_jax.running.distributed import is_leader
from cmd_jax.sample import Sampler, load_sampler
from cmd_jax.verbs.requests import (
    Clips,
    Request,
    given_prompts,
    of_prompts,
    read_clips,
)
from cmd_jax.verbs.sample import asked


def evaluate(config, workdir: Path, end_process=None) -> dict:
    """The `evaluate` verb: PSNR of reconstructed clips of data.split, and attributes of generated videos of shapes.

    Prints them with counts and chance levels; writes them to summary.json beside the videos it shows.
    end_process: as for `train`.
    """
    console, started = make_console(quiet=not is_leader()), time.perf_counter()
    options = config.sampling
    if options.mode != "generate":
        raise UserError("sampling.mode", options.mode, "evaluate scores generated videos", "use sampling.mode=generate")
    output = OutputFolder(workdir, options.output)
    sampler = load_sampler(config, workdir)
    with writing(output, end_process) as folder:
        clips = read_clips(config, workdir, config.evaluation.clips)
        decoded = sampler.reconstruct({"video": clips.videos})
        decibels = psnr(decoded["video"], decoded["original"])
        reconstruction = {"mean": float(decibels.mean()), "clips": len(decibels), "split": config.data.split}
        scores = {"reconstruction_psnr": reconstruction}
        which = "held-out" if config.data.split == "test" else config.data.split
        console.print(f"{which} reconstruction: {decibels.mean():.2f} dB PSNR over {len(decibels)} clips")

        request = scored(sampler, config, clips)
        index = np.arange(len(request.captions), dtype=np.int32)
        timed = time.perf_counter()
        out = sampler.generate({"index": index, "variant": np.zeros_like(index), **request.conditions})
        seconds = time.perf_counter() - timed
        table = [["score", "value", "chance"], ["reconstruction PSNR", f"{decibels.mean():.2f} dB", ""]]
        if config.data.source == "shapes" and "label" in request.conditions:
            labels = request.conditions["label"]
            read = shapes_oracle.score(to_uint8(out["video"]), labels, list(sampler.class_names))
            scores["attributes"] = read
            for name in ("color", "direction", "shape", "all"):
                share = f"{read[name]['correct']}/{read['count']} = {read[name]['accuracy']:.1%}"
                table.append([name, share, f"{read[name]['chance']:.1%}"])
        _print_table(console, table)
        shown = config.evaluation.shown
        captions = request.captions[:shown]
        title = options.title or f"CMD, {Path(config.weights).name or 'trained here'}"
        note = f"guidance {options.guidance}, seed {config.seed}, {len(index)} videos in {seconds:.0f} s, compiled"
        if folder is None:
            return scores
        write_samples(folder, {k: v[:shown] for k, v in out.items()}, captions, title, options, table, note)
        write_summary(folder, config, started, samples=len(index), sampling_seconds=round(seconds, 1), scores=scores)
    console.print(f"scores: {output.final}/summary.json\nvideos: {output.final}/index.html")
    return scores


def scored(sampler: Sampler, config, clips: Clips) -> Request:
    """What `evaluate` draws, evaluation.videos of them: classes, or the prompts given or else the clips' captions."""
    count = config.evaluation.videos
    if sampler.tokenizer is None:
        return asked(sampler, config, count)
    prompts = given_prompts(config.sampling, config.seed) or clips.texts
    if prompts is None:
        raise UserError("sampling.prompt", "", "missing, and the clips have no captions", "give sampling.prompts_file")
    return of_prompts([prompts[i % len(prompts)] for i in range(count)], sampler.tokenizer)


def _print_table(console, rows: list[list[str]]):
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
