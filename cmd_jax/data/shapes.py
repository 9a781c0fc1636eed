"""The `shapes` dataset: one coloured shape moving over a dark plain background; generated, no files needed."""

import hashlib
import json

import numpy as np

from cmd_jax.data.splits import keys_of
from cmd_jax.errors import UserError, choose

SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 90, 240), "yellow": (240, 220, 40)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # steps in (x, y), y grows downwards
CLASS_NAMES = tuple(f"{color} {shape} moving {way}" for shape in SHAPES for color in COLORS for way in DIRECTIONS)
CAPTIONS = tuple(f"a {name}" for name in CLASS_NAMES)

VERSION = 1  # raise it whenever the same parameters draw other pixels
SPLITS = ("train", "test")
SMALLEST_SIDE = 16
DARKEST, BRIGHTEST = 0.0, 60.0  # background, of 255
SIZES = (0.16, 0.26)  # circle radius, as a part of the shorter side
LEAST_TRAVEL = 0.22  # of the axis of motion, from the first to the last frame
MARGIN = 1.0  # pixels between outline and frame: keeps the antialiased edge off the outermost pixels

# Half width and half height of each shape where the circle has radius 1. The areas are about equal (3.1, 3.2, 2.4); the
# triangle is kept a little smaller so that it has room to travel.
EXTENTS = {"circle": (1.0, 1.0), "square": (0.9, 0.9), "triangle": (1.15, 1.05)}


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """The part of each pixel that the shape covers, from the signed distance to its outline.

    dx [T,1,W] and dy [T,H,1] are pixel offsets from the middle of its bounding box -> float32 [T,H,W] in [0,1].
    """
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - half_width
    else:
        distance = np.maximum(np.abs(dx) - half_width, np.abs(dy) - half_height)
    if shape == "triangle":  # apex on top: a slanted side runs from (0, -half_height) to (half_width, half_height)
        length = np.hypot(half_width, 2 * half_height)
        distance = np.maximum(distance, (np.abs(dx) * (2 * half_height) - (dy + half_height) * half_width) / length)
    return np.clip(0.5 - distance, 0.0, 1.0)


class ShapesSource:
    """`clips` generated clips of 48 classes, fixed by (seed, split, index); class label = index % 48.

    frames >= 2, height and width >= 16 (independent). The two splits draw from separate streams. UserError on values
    outside. A clip has one text, "a red circle moving left". labels, lengths (frames): int32 [N]. `bad` (empty) is
    there for folder sources have it.
    """

    shelf = None  # nothing is fetched

    def __init__(
        self, *, clips: int, frames: int = 8, height: int = 32, width: int = 32, seed: int = 0, split: str = "train"
    ):
        for field, value, least in (
            ("clips", clips, 1),
            ("frames", frames, 2),
            ("height", height, SMALLEST_SIDE),
            ("width", width, SMALLEST_SIDE),
            ("seed", seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise UserError(f"data.{field}", value, "no clip has it", f"use a whole number from {least} up")
        choose("data.split", split, SPLITS)
        self.clips, self.frames, self.height, self.width = int(clips), int(frames), int(height), int(width)
        self.seed, self.split = int(seed), split
        self.buckets = np.zeros(self.clips, np.uint8)  # all are of one size
        self.class_names, self.bad = list(CLASS_NAMES), {}
        self.has_texts = True
        self.labels = np.arange(self.clips, dtype=np.int32) % np.int32(len(CLASS_NAMES))
        self.lengths = np.full(self.clips, self.frames, np.int32)
        parameters = [VERSION, self.clips, self.frames, self.height, self.width, self.seed, split]
        self.fingerprint = hashlib.sha256(json.dumps(["shapes", *parameters]).encode()).hexdigest()

    def __len__(self) -> int:
        return self.clips

    def name(self, index: int) -> str:
        return f"shapes-{self.split}-{index:06d}"

    def texts(self, index: int) -> tuple[str]:
        return (CAPTIONS[self.label(index)],)

    def keys(self) -> np.ndarray:
        """By what clips are held out: uint64 [N], see `splits.cut`."""
        return keys_of(map(self.name, range(self.clips)))

    def label(self, index: int) -> int:
        return int(index) % len(CLASS_NAMES)

    def clip(self, index: int, rng=None) -> tuple[np.ndarray, int, str]:
        """Clip `index` -> (uint8 [T,H,W,3], label, text); `rng` is not used: a clip is the same whenever asked for."""
        if not 0 <= index < self.clips:
            raise IndexError(f"clip {index} of {self.clips}")
        label = self.label(index)
        color, shape, _, way = CLASS_NAMES[label].split()
        # The seed comes last, where its length (it may exceed 32 bits) cannot be confused with another entry.
        stream = np.random.default_rng([SPLITS.index(self.split), int(index), self.seed])
        draw_size, draw_travel, draw_along, draw_across, *draw_background = stream.random(7)

        radius = min(self.height, self.width) * (SIZES[0] + (SIZES[1] - SIZES[0]) * draw_size)
        half_width, half_height = radius * EXTENTS[shape][0], radius * EXTENTS[shape][1]
        step_x, step_y = DIRECTIONS[way]
        free_x = self.width - 2 * (half_width + MARGIN)
        free_y = self.height - 2 * (half_height + MARGIN)
        side, free, step = (self.width, free_x, step_x) if step_x else (self.height, free_y, step_y)
        travel = LEAST_TRAVEL * side + (free - LEAST_TRAVEL * side) * draw_travel
        time = np.linspace(0.0, 1.0, self.frames) if step > 0 else np.linspace(1.0, 0.0, self.frames)
        path = MARGIN + draw_along * (free - travel) + travel * time
        still_x, still_y = MARGIN + draw_across * free_x, MARGIN + draw_across * free_y
        x = half_width + (path if step_x else np.full(self.frames, still_x))
        y = half_height + (path if step_y else np.full(self.frames, still_y))

        # Only the box that the object sweeps is drawn, channel by channel: several times quicker than whole frames.
        left, right = int(x.min() - half_width - 0.5), int(x.max() + half_width + 0.5) + 1
        top, bottom = int(y.min() - half_height - 0.5), int(y.max() + half_height + 0.5) + 1
        dx = (np.arange(left, right) + 0.5 - x[:, None])[:, None, :].astype(np.float32)
        dy = (np.arange(top, bottom) + 0.5 - y[:, None])[:, :, None].astype(np.float32)
        mask = coverage(shape, dx, dy, half_width, half_height)
        background = [int(DARKEST + (BRIGHTEST - DARKEST) * draw + 0.5) for draw in draw_background]
        video = np.empty((self.frames, self.height, self.width, 3), np.uint8)
        for channel, (back, front) in enumerate(zip(background, COLORS[color], strict=True)):
            video[..., channel] = back
            video[:, top:bottom, left:right, channel] = mask * np.float32(front - back) + np.float32(back + 0.5)
        return video, label, CAPTIONS[label]
