"""What is drawn of a clip, a window and a caption: the same over files, datasets and while latents are made."""

import functools
from collections.abc import Sequence

import numpy as np


class Draws:
    """The numpy generator of a seed, made when something is drawn: to make it takes longer than to read latents."""

    def __init__(self, seed: tuple[int, ...]):
        self.seed = seed

    @functools.cached_property
    def _generator(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def __getattr__(self, name: str):
        return getattr(self._generator, name)


def frames_needed(frames: int, stride: int) -> int:
    """Of a clip, for a window of `frames`, each `stride` behind the one before."""
    return (frames - 1) * stride + 1


def draw_start(length: int, needed: int, rng: np.random.Generator) -> int:
    """The first frame of a window of `needed` of a clip's `length` frames; each is as likely."""
    return int(rng.integers(0, length - needed + 1))


def draw_text(texts: Sequence[str], rng: np.random.Generator) -> str | None:
    """The one text, one of several that `rng` draws, or None where there is none."""
    return texts[rng.integers(len(texts))] if len(texts) > 1 else texts[0] if texts else None
