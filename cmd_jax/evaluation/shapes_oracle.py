"""A classical reader of `shapes` clips: what is seen, in which colour, moving where. Nothing is learnt.

It knows the words (three shapes, four colours, four directions) and what an ideal circle, square or triangle looks
like, not how the clips were drawn, so that it can judge generated video as well as real.
"""

import colorsys
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import UserError

SHAPES = ("circle", "square", "triangle")
HUES = {"red": 0.0, "yellow": 60.0, "green": 120.0, "blue": 240.0}  # degrees
COLORS = tuple(HUES)
DIRECTIONS = ("left", "right", "up", "down")
NONE = "none"

LEAST_CONTRAST = 0.2  # of the RGB cube's side; below it the frame holds no object
LEAST_AREA = 4.0  # pixels; keeps a speck from making the templates' unit vanish
LEAST_TRAVEL = 1.0  # pixels over the clip; below it nothing moves
LEAST_SATURATION = 0.25
WIDEST_HUE = 45.0  # degrees; cyan and magenta are none of the colours

# Templates, in units of the radius of the circle that has the object's area.
REACH, CELLS = 2.2, 33
SCALES = (0.84, 0.92, 1.0, 1.08, 1.16)
SHIFTS = (-0.12, 0.0, 0.12)
BLURS = (0.08, 0.14, 0.22, 0.32, 0.45)


class Reading(NamedTuple):
    """What a clip shows; each is a word of the vocabulary, or "none" where it cannot be told."""

    shape: str
    color: str
    direction: str


def smooth(x: np.ndarray) -> np.ndarray:
    """Mean over 3 x 3 pixels, edges repeated: [T,H,W,C] -> [T,H,W,C]."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :height] + padded[:, 1 : height + 1] + padded[:, 2:]
    return (rows[:, :, :width] + rows[:, :, 1 : width + 1] + rows[:, :, 2:]) / 9.0


def unmix(video: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """uint8 [T,H,W,3] -> (the object's part in each pixel [T,H,W], its RGB colour in [0,1]), or None without an object.

    Each pixel is taken as a mixture of the background (the median of the frame's border) and of one object colour. The
    part is linear in the pixel, so blur spreads it without changing its sum, and noise averages out. It is not clipped.
    """
    x = video.astype(np.float32) / 255.0
    border = np.concatenate([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], axis=1)
    difference = x - np.median(border, axis=1)[:, None, None]
    calm = smooth(difference)
    distance = np.sqrt((calm * calm).sum(-1))
    level = float(np.median(distance.max((1, 2))))
    if level < LEAST_CONTRAST:
        return None
    core = distance >= 0.85 * level
    offset = calm[core].mean(0)
    return difference @ (offset / (offset @ offset)), smooth(x)[core].mean(0)


def centroids(part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[T,H,W] -> (frames that show the object [F], its x [F] and y [F] there, in pixels)."""
    weight = np.clip(part - 0.4, 0.0, 0.6)  # far above noise, and symmetric around an edge
    mass = weight.sum((1, 2))
    frames = np.flatnonzero(mass > max(0.25 * np.median(mass), 1e-6))
    weight, mass = weight[frames], mass[frames]
    x = (weight.sum(1) * np.arange(part.shape[2])).sum(1) / mass
    y = (weight.sum(2) * np.arange(part.shape[1])).sum(1) / mass
    return frames, x, y


def read_color(rgb: np.ndarray) -> str:
    hue, saturation, _ = colorsys.rgb_to_hsv(*np.clip(rgb, 0.0, 1.0).tolist())
    if saturation < LEAST_SATURATION:
        return NONE
    apart = {color: abs((hue * 360.0 - at + 180.0) % 360.0 - 180.0) for color, at in HUES.items()}
    color = min(apart, key=apart.get)
    return color if apart[color] <= WIDEST_HUE else NONE


def read_direction(frames: np.ndarray, x: np.ndarray, y: np.ndarray) -> str:
    """The dominant axis and the sign of the straight line fitted to the centroid's path."""
    if len(frames) < 2:
        return NONE
    time = frames - frames.mean()
    travel_x, travel_y = (float(time @ p / (time @ time)) * np.ptp(frames) for p in (x, y))
    if max(abs(travel_x), abs(travel_y)) < LEAST_TRAVEL:
        return NONE
    if abs(travel_x) > abs(travel_y):
        return "right" if travel_x > 0 else "left"
    return "down" if travel_y > 0 else "up"


def sample(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear: image [H,W] at rows [n] x columns [n] (pixels, fractions allowed), zero outside -> [n,n]."""

    def weights(at, count):  # the hat function of each pixel at each position: [n, count]
        return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(count)))

    return weights(rows, image.shape[0]) @ image @ weights(columns, image.shape[1]).T


def unit(x: np.ndarray) -> np.ndarray:
    """Zero mean and unit length along the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.cache
def templates() -> np.ndarray:
    """The three ideal outlines at every scale, shift and blur: [3, variants, CELLS * CELLS], each `unit`.

    All have the area of the unit circle and their centroid in the middle; the triangle is equilateral, its apex on top.
    """
    at = np.linspace(-REACH, REACH, CELLS)
    cell = at[1] - at[0]
    outlines = []
    for shape in SHAPES:
        variants = []
        for scale in SCALES:
            for shift_x in SHIFTS:
                for shift_y in SHIFTS:
                    x, y = (at[None, :] - shift_x) / scale, (at[:, None] - shift_y) / scale
                    if shape == "circle":
                        distance = np.hypot(x, y) - 1.0
                    elif shape == "square":
                        distance = np.maximum(np.abs(x), np.abs(y)) - np.sqrt(np.pi) / 2
                    else:
                        inner = np.sqrt(np.pi / (3 * np.sqrt(3)))  # from the centroid to each side
                        distance = np.maximum(y, np.abs(x) * np.sqrt(0.75) - y / 2) - inner
                    inside = np.clip(0.5 - distance * scale / cell, 0.0, 1.0)
                    for blur in BLURS:
                        spread = np.exp(-0.5 * ((at[:, None] - at) / blur) ** 2) * (cell / (blur * np.sqrt(2 * np.pi)))
                        variants.append((spread @ inside @ spread).ravel())
        outlines.append(variants)
    return unit(np.asarray(outlines)).astype(np.float32)


def read_shape(part: np.ndarray, frames: np.ndarray, x: np.ndarray, y: np.ndarray) -> str:
    """The outline that correlates best with the object's average over frames, each centred on the object."""
    radius = np.sqrt(max((part[frames] > 0.5).sum() / len(frames), LEAST_AREA) / np.pi)
    at = np.linspace(-REACH, REACH, CELLS) * radius
    aligned = sum(sample(part[t], cy + at, cx + at) for t, cx, cy in zip(frames, x, y, strict=True))
    seen = unit(aligned.ravel()).astype(np.float32)
    return SHAPES[int((templates() @ seen).max(-1).argmax())]


def read_clip(video: np.ndarray) -> Reading:
    """uint8 [T,H,W,3] -> Reading; all "none" where no object stands out from the background."""
    found = unmix(video)
    if found is None:
        return Reading(NONE, NONE, NONE)
    part, rgb = found
    frames, x, y = centroids(part)
    if len(frames) == 0:
        return Reading(NONE, NONE, NONE)
    return Reading(read_shape(part, frames, x, y), read_color(rgb), read_direction(frames, x, y))


def score(videos: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict:
    """Reads each clip and compares with its class, see `tally`: uint8 [N,T,H,W,3], int [N]."""
    return tally([read_clip(video) for video in videos], labels, class_names)


def tally(readings: Sequence[Reading], labels: np.ndarray, class_names: Sequence[str]) -> dict:
    """What was read of N videos against their classes, int [N] -> counts, accuracies and chance levels.

    The entries "shape", "color" and "direction" hold `correct`, `accuracy`, `chance` and counts
    `confusion[truth][read]`; "all" counts the clips with all three right; "count" is N. UserError for no videos, or for
    class names of another vocabulary.
    """
    if len(readings) == 0 or len(readings) != len(labels):
        raise UserError(
            "videos", len(readings), f"cannot be scored with {len(labels)} labels", "give one label a video"
        )
    vocabulary = {"shape": SHAPES, "color": COLORS, "direction": DIRECTIONS}
    truths = [parse(class_names[int(label)]) for label in labels]
    count = len(truths)
    result: dict = {"count": count}
    for field, words in vocabulary.items():
        confusion = {truth: dict.fromkeys((*words, NONE), 0) for truth in words}
        for truth, reading in zip(truths, readings, strict=True):
            confusion[getattr(truth, field)][getattr(reading, field)] += 1
        correct = sum(confusion[word][word] for word in words)
        result[field] = {
            "correct": correct, "accuracy": correct / count, "chance": 1 / len(words), "confusion": confusion
        }  # fmt: skip
    correct = sum(truth == reading for truth, reading in zip(truths, readings, strict=True))
    chance = 1 / (len(SHAPES) * len(COLORS) * len(DIRECTIONS))
    result["all"] = {"correct": correct, "accuracy": correct / count, "chance": chance}
    return result


def parse(name: str) -> Reading:
    """A class name, such as "red circle moving left", as a Reading."""
    words = name.split()
    if (
        len(words) == 4
        and words[0] in COLORS
        and words[1] in SHAPES
        and words[2] == "moving"
        and words[3] in DIRECTIONS
    ):
        return Reading(words[1], words[0], words[3])
    raise UserError(
        "class_names", name, "the shapes oracle cannot read this class", 'use names as "red circle moving left"'
    )
