"""What the user asks to be drawn: classes or prompts, images, clips; as batches for the sampler."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from cmd_jax.data.pipeline import video_reader
from cmd_jax.data.prompts import check_prompt, read_prompts
from cmd_jax.data.sources import open_source
from cmd_jax.data.video import fit
from cmd_jax.errors import UserError, nearest
from cmd_jax.running.distributed import leader_first


class Request(NamedTuple):
    """conditions: what the batch says of them, {"label" int32 [N]} or {"ids" int32 [N, L]}. captions: N texts."""

    conditions: dict
    captions: list[str]

    def times(self, count: int) -> "Request":
        """Each one `count` times in a row."""
        conditions = {name: np.repeat(values, count, axis=0) for name, values in self.conditions.items()}
        return Request(conditions, [caption for caption in self.captions for _ in range(count)])


class Clips(NamedTuple):
    """videos uint8 [N, T, H, W, 3], labels int [N], texts of each or None, and the names of the classes."""

    videos: np.ndarray
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


def of_labels(labels, class_names: tuple[str, ...]) -> Request:
    names = (*class_names, "unlabelled")
    return Request({"label": np.asarray(labels, np.int32)}, [names[min(i, len(names) - 1)] for i in labels])


def of_prompts(prompts: list[str], tokenizer) -> Request:
    return Request({"ids": tokenizer(prompts)}, prompts)


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


def choose_labels(wanted: str, class_names: tuple[str, ...], count: int) -> np.ndarray:
    """`count` labels from names or numbers separated by commas, or from all classes in turn -> int32 [count]."""
    words = [w.strip() for w in wanted.split(",") if w.strip()]
    if not class_names:
        if words:
            raise UserError("sampling.classes", wanted, "the model was trained without classes", "leave it empty")
        return np.zeros(count, np.int32)
    labels = []
    for word in words:
        if word in class_names:
            labels.append(class_names.index(word))
        elif word in (numbers := [str(i) for i in range(len(class_names))]):
            labels.append(numbers.index(word))
        else:
            near = ", ".join(nearest(word, class_names, 3))
            raise UserError("sampling.classes", word, "no such class", f"did you mean one of: {near}")
    if len(labels) > count:
        problem = f"{len(labels)} classes, but only {count} videos"
        raise UserError("sampling.classes", wanted, problem, f"set sampling.num={len(labels)}")
    return np.resize(np.array(labels or range(len(class_names)), np.int32), count)


def read_image(path: str, height: int, width: int) -> np.ndarray:
    """An image file, centre-cropped and resized -> float32 [H, W, 3] in [-1, 1]."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        remedy = "give a PNG or JPEG file of 8 bits a channel"
        raise UserError("sampling.image", path, f"cannot be read as an image ({e})", remedy) from e
    return fit(array[None], height, width)[0].astype(np.float32) / 127.5 - 1


def read_clips(config, workdir: Path, count: int) -> Clips:
    """`count` clips from all over the data, or all there are."""
    source = leader_first(lambda: open_source(config.data, cache=workdir / "probe.jsonl"))
    read = video_reader(source)
    picks = [int(i) for i in np.linspace(0, len(source), min(count, len(source)), endpoint=False)]
    clips = [read(i, np.random.default_rng((config.seed, i))) for i in picks]
    texts = [source.texts[i] for i in picks] if source.texts else None
    videos, labels = np.stack([c["video"] for c in clips]), np.array([c["label"] for c in clips])
    return Clips(videos, labels, texts, tuple(source.class_names))
