"""Which frames of a file make a sequence at a given frame rate, by the time stamps of the frames.

At `fps` the sequence's element j is the frame that is shown j/fps seconds after the first: files of a higher rate lose
frames, those of a lower rate repeat some. The last element is the last that is due when the last frame appears.

Frames are counted as the decoder gives them, and time goes on by the steps between their stamps. A step that is not
known, goes not forwards, or is longer than LONGEST counts as the good one before it; at the beginning as the header's
rate has it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import av
import numpy as np

LONGEST = 10  # seconds; a clock that jumps further was set anew
TOLERANCE = 0.0015  # seconds; many containers round stamps to milliseconds, at both ends of a duration
RATES = (1, 240)  # what a header may say, frames a second
USUAL_RATE = 25


class Clock:
    """Time stamps in ticks of `tick` seconds, one after the other -> the steps between them. rate: the header's."""

    def __init__(self, tick: Fraction, rate: Fraction | None):
        rate = rate if rate and RATES[0] <= rate <= RATES[1] else Fraction(USUAL_RATE)
        self._longest, self._step = LONGEST / tick, max(1, round(1 / (rate * tick)))
        self._last: int | None = None
        self._first = True

    @classmethod
    def of(cls, stream: av.VideoStream) -> "Clock":
        return cls(stream.time_base, stream.average_rate)

    def step(self, stamp: int | None) -> int:
        """Ticks since the frame before; 0 for the first."""
        step = None if stamp is None or self._last is None else stamp - self._last
        self._last = stamp
        if self._first:
            self._first = False
            return 0
        if step is not None and 0 < step <= self._longest:
            self._step = step
        return self._step


class Steps:
    """The steps of a file, as they come, kept as [ticks, how often in turn] each."""

    def __init__(self):
        self.runs: list[list[int]] = []

    def add(self, step: int):
        if self.runs and self.runs[-1][0] == step:
            self.runs[-1][1] += 1
        else:
            self.runs.append([step, 1])


def seconds(runs: Sequence[Sequence[int]], tick: float) -> np.ndarray:
    """When each frame appears, float64 [N], from `Steps.runs`, of which the first frame's step of 0 is one."""
    ticks, times = np.asarray(runs, np.int64).reshape(-1, 2).T
    return np.cumsum(np.repeat(ticks, times)) * tick


def length_at(last: float, fps: float) -> int:
    """Elements of the sequence at `fps` of a file whose last frame appears at `last` seconds."""
    return math.floor((last + TOLERANCE) * fps) + 1


def frames_at(times: np.ndarray, fps: float, wanted: Sequence[int]) -> np.ndarray:
    """The indices of the frames that are elements `wanted` [M] of the sequence at `fps`: int64 [M].

    times: as of `seconds`.
    """
    return np.searchsorted(times - TOLERANCE, np.asarray(wanted) / fps, "right") - 1


def at_rate(frames: Iterable[av.VideoFrame], stream: av.VideoStream, fps: float) -> Iterator[tuple[int, av.VideoFrame]]:
    """The sequence at `fps` of a stream's frames as they are decoded: (index, frame) of each element.

    A frame that is shown for more than one element comes again, the same object; one that is shown for none does not
    come.
    """
    clock, tick = Clock.of(stream), float(stream.time_base)
    ticks = element = 0
    shown = None
    for index, frame in enumerate(frames):
        ticks += clock.step(frame.pts)
        while shown and element / fps < ticks * tick - TOLERANCE:
            yield shown
            element += 1
        shown = index, frame
    while shown and element < length_at(ticks * tick, fps):
        yield shown
        element += 1
