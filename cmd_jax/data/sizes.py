"""The sizes that clips are fitted to: one, or several, of which each clip takes the nearest to its aspect."""

import re
from collections.abc import Callable, Iterable

import numpy as np

from cmd_jax.errors import UserError

Size = tuple[int, int]  # height, width


def sizes_of(data) -> tuple[Size, ...]:
    """The sizes of a config's `data` group: height x width first, then those of `buckets`."""
    return sizes(data.height, data.width, data.buckets)


def sizes(height: int, width: int, buckets: str) -> tuple[Size, ...]:
    """height x width, and those of a text like "512x512,1024x512"."""
    words = [word.strip() for word in buckets.split(",") if word.strip()]
    found = [re.fullmatch(r"(\d{1,5})x(\d{1,5})", word) for word in words]
    if None in found:
        remedy = "write them like 512x512,1024x512"
        raise UserError("data.buckets", buckets, "not sizes separated by commas", remedy)
    all_sizes = ((height, width), *((int(m[1]), int(m[2])) for m in found))
    if len(set(all_sizes)) < len(all_sizes) or not all(map(all, all_sizes)):
        problem = "names a size twice, or data.height x data.width again, or one without pixels"
        raise UserError("data.buckets", buckets, problem, "name each further size once")
    return all_sizes


def as_text(further: Iterable[Size]) -> str:
    """Further sizes as `sizes` reads them."""
    return ",".join(f"{height}x{width}" for height, width in further)


def check_sizes(data, check: Callable[[Size], object]):
    """`check` each of a config's sizes; its UserError names the one of `buckets` where it is about one of those."""
    first, *further = sizes_of(data)
    check(first)
    for size in further:
        try:
            check(size)
        except UserError as error:
            problem = f"{error.field} {error.value} is {error.problem}"
            raise UserError("data.buckets", as_text([size]), problem, "use another size") from error


def nearest_size(widths: np.ndarray, heights: np.ndarray, sizes: tuple[Size, ...]) -> np.ndarray:
    """Which of `sizes` clips shown at these widths and heights [N] take: uint8 [N].

    That of which least is cut off, which is the one nearest in the logarithm of the aspect; of two the first.
    """
    aspects = np.log(np.asarray(widths, np.float64) / np.asarray(heights))
    return np.abs(aspects[:, None] - [np.log(w / h) for h, w in sizes]).argmin(1).astype(np.uint8)
