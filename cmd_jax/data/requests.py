"""What is to be sampled, as arrays for batches: classes or prompts, with a caption for each sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cmd_jax.data.prompts import check_prompt
from cmd_jax.diffusion.schedules import check_count
from cmd_jax.errors import UserError, nearest


@dataclass(frozen=True)
class Request:
    """conditions: {"label": int32 [N]} or {"ids": int32 [N, L]}. captions: N texts. len() is N."""

    conditions: dict[str, np.ndarray]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, which: np.ndarray) -> "Request":
        """Those at `which`, int [M], in that order."""
        conditions = {name: values[which] for name, values in self.conditions.items()}
        return Request(conditions, [self.captions[i] for i in which])


def class_request(classes: Sequence[str | int], class_names: Sequence[str], count: int | None = None) -> Request:
    """A sample of each class, by name or number; or `count`, of these or of all classes in turn."""
    labels = [find_class(word, class_names) for word in classes]
    if count is None:
        count = len(labels) or max(1, len(class_names))
    check_count("sampling.num", count)
    if len(labels) > count:
        problem = f"{len(labels)} classes, but only {count} videos"
        raise UserError("sampling.classes", ",".join(map(str, classes)), problem, f"set sampling.num={len(labels)}")
    return label_request(np.resize(labels or range(max(1, len(class_names))), count), class_names)


def label_request(labels: np.ndarray, class_names: Sequence[str]) -> Request:
    """A sample of each label: int [N], of which len(class_names) stands for no class."""
    names = (*class_names, "unlabelled")
    return Request({"label": np.asarray(labels, np.int32)}, [names[min(int(i), len(class_names))] for i in labels])


def prompt_request(prompts: Sequence[str], tokenizer, count: int | None = None, each: int = 1) -> Request:
    """`each` samples of each prompt in a row; or `count`, of the prompts in turn."""
    if not prompts:
        raise UserError("sampling.prompt", "", "missing", "say what to draw, --prompt TEXT or --prompts-file FILE")
    prompts = [check_prompt(prompt) for prompt in prompts]
    if count is None:
        which = np.repeat(np.arange(len(prompts)), check_count("sampling.num", each))
    else:
        which = np.arange(check_count("sampling.num", count)) % len(prompts)
    return Request({"ids": tokenizer(prompts)}, prompts).take(which)


def find_class(word: str | int, class_names: Sequence[str]) -> int:
    """The label of a class's name, or of its number where no class is named like that."""
    if not class_names:
        raise UserError("sampling.classes", word, "the model was trained without classes", "leave it empty")
    if word in class_names:
        return class_names.index(word)
    numbers = [str(i) for i in range(len(class_names))]
    if str(word) in numbers:
        return numbers.index(str(word))
    near = ", ".join(nearest(str(word), class_names, 3))
    raise UserError("sampling.classes", word, "no such class", f"did you mean one of: {near}")
