"""What the user asks to be drawn: classes or prompts, images, clips; as batches for the sampler.

What reads files of clips and images is imported where it is asked for: most samples are drawn without.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmd_jax.data.pipeline import video_reader
from cmd_jax.data.prompts import check_prompt, read_prompts
from cmd_jax.data.requests import Request, class_request, label_request, prompt_request
from cmd_jax.errors import UserError
from cmd_jax.files import as_path
from cmd_jax.running.distributed import leader_first
from cmd_jax.sampling.sampler import Sampler


class Videos(Sequence):
    """Clips of a source, uint8 [T, H, W, 3] each, read when they are asked for."""

    def __init__(self, source, picks: Sequence[int], seed: int):
        self.read, self.picks, self.seed = video_reader(source), picks, seed

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read(self.picks[i], np.random.default_rng((self.seed, self.picks[i])))["video"]


class Clips(NamedTuple):
    """videos of uint8 [T, H, W, 3], labels int [N], texts of each or None, and the names of the classes."""

    videos: Sequence[np.ndarray]
    labels: np.ndarray
    texts: list[str] | None
    class_names: tuple[str, ...]

    @property
    def captions(self) -> list[str]:
        """The class of each clip, or without classes its text."""
        if self.texts and not self.class_names:
            return self.texts
        names = (*self.class_names, "unlabelled")
        return [names[min(label, len(names) - 1)] for label in self.labels]


def make_request(sampler: Sampler, config, count: int, clips: Clips | None = None) -> Request:
    """`count` samples of classes, or `count` of each prompt; for clips, `count` samples of what the user names, or else
    of the clips' own classes or texts, in turn."""
    options, where = config.sampling, config.data.root or config.data.source
    sampler.check_wordless(prompt=options.prompt, prompts_file=options.prompts_file)
    if sampler.tokenizer is None:
        if clips is None or options.classes:
            words = [word.strip() for word in options.classes.split(",") if word.strip()]
            return class_request(words, sampler.class_names, count)
        return label_request(labels_of(clips, sampler.class_names, where), sampler.class_names)
    if options.classes:
        problem = "the model was trained on texts"
        raise UserError("sampling.classes", options.classes, problem, "give sampling.prompt instead")
    prompts = given_prompts(options, config.seed)
    if clips is None:
        return prompt_request(prompts, sampler.tokenizer, each=count)
    if not prompts and clips.texts is None:
        problem = "missing, and the clips have no captions"
        raise UserError("sampling.prompt", "", problem, "give it, or sampling.prompts_file")
    return prompt_request(prompts or clips.texts, sampler.tokenizer, count)


def given_prompts(options, seed: int) -> list[str]:
    """The prompts of a `sampling` group: of its file, or its one; [] where it has none."""
    if options.prompt and options.prompts_file:
        problem = "sampling.prompts_file is given too"
        raise UserError("sampling.prompt", options.prompt, problem, "give one of the two")
    if options.prompts_file:
        return [prompt.text for prompt in read_prompts(options.prompts_file, seed)]
    return [check_prompt(options.prompt)] if options.prompt else []


def labels_of(clips: Clips, class_names: tuple[str, ...], where: str) -> np.ndarray:
    """The clips' classes as labels of a model with `class_names`, matched by name: int32 [N].

    The data may lack classes that the model knows. UserError, with `where` the data is, for what it does not know.
    """
    names = [clips.class_names[label] if label < len(clips.class_names) else None for label in clips.labels]
    unknown = sorted({*names} - {None, *class_names})
    if class_names and (unknown or not clips.class_names):
        problem = f"its classes are not the model's: {', '.join(unknown) or 'it has none'}"
        raise UserError("data", where, problem, "name sampling.classes")
    number = {name: label for label, name in enumerate(class_names)}
    return np.array([number.get(name, len(class_names)) for name in names], np.int32)


def read_image(path: str, height: int, width: int) -> np.ndarray:
    """An image file, centre-cropped and resized -> float32 [H, W, 3] in [-1, 1]."""
    from PIL import Image, ImageOps

    from cmd_jax.data.video import fit

    try:
        with as_path(path).open("rb") as file, Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        remedy = "give a PNG or JPEG file of 8 bits a channel"
        raise UserError("sampling.image", path, f"cannot be read as an image ({e})", remedy) from e
    return fit(array[None], height, width)[0].astype(np.float32) / 127.5 - 1


def open_clips(config, workdir: Path, count: int) -> Clips:
    """`count` clips from all over the data, or all there are."""
    from cmd_jax.data.sources import open_source

    source = leader_first(lambda: open_source(config.data, cache=workdir / "probe.jsonl"))
    picks = [int(i) for i in np.linspace(0, len(source), min(count, len(source)), endpoint=False)]
    texts = [source.texts(i)[0] for i in picks] if source.has_texts else None
    labels = np.array([source.label(i) for i in picks])
    return Clips(Videos(source, picks, config.seed), labels, texts, tuple(source.class_names))
