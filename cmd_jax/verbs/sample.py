"""The verb `sample`: videos of what was asked for, and their gallery."""

import time
from pathlib import Path

import numpy as np

from cmd_jax.defaults import MODES
from cmd_jax.errors import UserError, choose
from cmd_jax.report.console import make_console
from cmd_jax.report.samples import OutputFolder, write_samples, write_summary, writing
from cmd_jax.running.distributed import is_leader
from cmd_jax.sample import Sampler, load_sampler
from cmd_jax.verbs.requests import (
    Clips,
    Request,
    choose_labels,
    given_prompts,
    labels_of,
    of_labels,
    of_prompts,
    read_clips,
    read_image,
)


def sample(config, workdir: Path, end_process=None) -> Path:
    """The `sample` verb: write the samples of `sampling.mode` and their gallery; returns the folder.

    Of several processes the first one writes, and the others return None. end_process: as for `train`.
    """
    console, started = make_console(quiet=not is_leader()), time.perf_counter()
    choose("sampling.mode", config.sampling.mode, MODES)
    output = OutputFolder(workdir, config.sampling.output)
    sampler = load_sampler(config, workdir)
    with writing(output, end_process) as folder:
        out, captions = make_samples(sampler, config, workdir)
        if folder is None:
            return None
        title = config.sampling.title or f"CMD: {config.sampling.mode}"
        note = f"mode {config.sampling.mode}, guidance {config.sampling.guidance}, seed {config.seed}"
        write_samples(folder, out, captions, title, config.sampling, note=note)
        write_summary(folder, config, started, samples=len(captions))
    console.print(f"{len(captions)} videos: {output.final}/index.html")
    return output.final


def make_samples(sampler: Sampler, config, workdir: Path) -> tuple[dict, list[str]]:
    """What `sampling.mode` asks for -> (host arrays, captions)."""
    options = config.sampling
    choose("sampling.mode", options.mode, MODES)
    if options.mode == "reconstruct":
        clips = read_clips(config, workdir, options.num)
        return sampler.reconstruct({"video": clips.videos}), clips.captions
    given = {}
    if options.mode == "animate" and not options.image:
        clips = read_clips(config, workdir, options.num)
        given["content"] = sampler.reconstruct({"video": clips.videos})["content"]
        request = asked_of_clips(sampler, config, clips)
    else:
        request = asked(sampler, config, options.num)
    count = len(request.captions)
    if options.mode == "animate" and options.image:
        image = read_image(options.image, config.data.height, config.data.width)
        given["image"] = np.repeat(image[None], count, axis=0)
    index = np.arange(count, dtype=np.int32)
    batch = {"index": index, "variant": np.zeros_like(index), **request.conditions}
    out = sampler.animate(batch | given) if given else sampler.generate(batch)
    if options.mode != "vary-motion":
        return out, request.captions
    # Each content frame is drawn once: drawn again in another row of a batch, its last bits could differ.
    motions, request = options.motions, request.times(options.motions)
    variant = np.tile(np.arange(motions, dtype=np.int32), count)
    batch = {"index": np.repeat(index, motions), "variant": variant, **request.conditions}
    out = sampler.animate({**batch, "content": np.repeat(out["content"], motions, axis=0)})
    return out, [f"{caption}, motion {v + 1}" for caption, v in zip(request.captions, variant, strict=True)]


def asked(sampler: Sampler, config, count: int) -> Request:
    """`count` classes, or every prompt `count` times."""
    if sampler.tokenizer is None:
        return of_labels(choose_labels(config.sampling.classes, sampler.class_names, count), sampler.class_names)
    if not (prompts := given_prompts(config.sampling, config.seed)):
        raise UserError("sampling.prompt", "", "missing", "say what to draw, --prompt TEXT or --prompts-file FILE")
    return of_prompts(prompts, sampler.tokenizer).times(count)


def asked_of_clips(sampler: Sampler, config, clips: Clips) -> Request:
    """One condition for each of the clips: what the user names, or the clips' own."""
    options, count, where = config.sampling, len(clips.videos), config.data.root or config.data.source
    if sampler.tokenizer is not None:
        prompts = given_prompts(options, config.seed) or clips.texts
        if prompts is None:
            raise UserError("data", where, "its clips have no captions", "give sampling.prompt")
        return of_prompts([prompts[i % len(prompts)] for i in range(count)], sampler.tokenizer)
    if options.classes:
        return of_labels(choose_labels(options.classes, sampler.class_names, count), sampler.class_names)
    return of_labels(labels_of(clips, sampler.class_names, where), sampler.class_names)
