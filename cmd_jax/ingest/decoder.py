"""One pass from a video file to the frames of a record: decoded, converted, fitted and encoded, frame by frame.

`Decoder` is the parent's side. `python -m cmd_jax.ingest.decoder` is the child (see `cmd_jax.data.supervised`), which
is given a "path" and a "cut", and perhaps a "seed", which draws a window of the frames that are needed.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.data import timing, video
from cmd_jax.data.codecs import decoded, encoded
from cmd_jax.data.draws import draw_start
from cmd_jax.data.sizes import Size, nearest_size, sizes
from cmd_jax.data.supervised import LARGEST_PAYLOAD, Supervised, serve

COMMAND = (sys.executable, "-m", "cmd_jax.ingest.decoder")


class Cut(NamedTuple):
    """What becomes of every clip.

    height, width: that frames are fitted to, or the one of these and the further sizes `buckets`, like "512x512", that
    is nearest to the clip's aspect. fps: frames a second, by their time stamps; 0: all there are. codec: raw,
    jpeg or png; quality: of jpeg, 1 to 100. frames: most of a record, the middle ones of a longer clip; 0: any number.
    needed: a clip with fewer is not used. pixels: larger frames are refused before anything is allocated for them.
    """

    height: int
    width: int
    buckets: str
    fps: float
    codec: str
    quality: int
    frames: int
    needed: int
    pixels: int

    @property
    def sizes(self) -> tuple[Size, ...]:
        return sizes(self.height, self.width, self.buckets)


class Clip(NamedTuple):
    """What a record holds of a clip.

    parts: its frames as files of the codec; of raw, one part, uint8 [T,H,W,3]. fps: frames a second, 0 if not known.
    whole: frames that the clip had, of which `frames` were kept. bucket: which of the cut's sizes they have. cpu:
    seconds that it took.
    """

    frames: int
    parts: Sequence[bytes | memoryview]
    fps: float
    whole: int
    bucket: int
    cpu: float

    def pixels(self, cut: Cut) -> np.ndarray:
        """uint8 [T,H,W,3]."""
        return decoded(self.parts, cut.codec, self.frames, cut.sizes[self.bucket], range(self.frames))


class BadClip(Exception):
    """Why a clip is left out, in plain words."""


class Decoder:
    """Clips of files, decoded by a child; for one thread.

    timeout: seconds without a further frame after which a file hangs. cap: seconds that a file may take.
    """

    def __init__(self, cut: Cut, timeout: float, cap: float):
        self.cut = cut
        self.child = Supervised(COMMAND, timeout, cap, self._is_clip)

    def read(self, path: str, seed: Sequence[int] | None = None) -> Clip:
        """The clip, or with a seed its window: cut.needed frames. Raises BadClip."""
        drawn = {} if seed is None else {"seed": [*seed]}
        answer, payload = self.child.ask({"path": path, "cut": self.cut, **drawn})
        if "error" in answer:
            raise BadClip(answer["error"])
        edges = itertools.accumulate(answer["sizes"], initial=0)
        parts = [memoryview(payload)[a:b] for a, b in itertools.pairwise(edges)]
        return Clip(answer["frames"], parts, answer["fps"], answer["whole"], answer["bucket"], answer["cpu"])

    def _is_clip(self, answer: dict) -> bool:
        frames, whole, bucket, lengths = (answer.get(key) for key in ("frames", "whole", "bucket", "sizes"))
        numbers = [frames, whole, bucket, *lengths] if isinstance(lengths, list) else [None]
        if any(type(n) is not int or n < 0 for n in numbers) or bucket >= len(self.cut.sizes):
            return False
        raw = 3 * math.prod((frames, *self.cut.sizes[bucket]))
        fits = lengths == [raw] if self.cut.codec == "raw" else len(lengths) == frames
        measured = {type(answer.get("fps")), type(answer.get("cpu"))} == {float}
        return measured and fits and sum(lengths) == answer.get("payload", 0)

    def stop(self):
        """From another thread."""
        self.child.stop()

    def close(self):
        self.child.close()


# The child's side.


def middle(count: int, most: int) -> range:
    """The places of the middle `most` of `count` frames; all of them if most is 0."""
    first = max(0, (count - most) // 2) if most else 0
    return range(first, min(count, first + most) if most else count)


def window(count: int, needed: int, rng: np.random.Generator) -> range:
    """The places of a window of `needed` frames; from the first on where there are only `count` < `needed`."""
    start = draw_start(max(count, needed), needed, rng)
    return range(start, start + needed)


def handle(request: dict, progress: Callable[[], None]) -> tuple[dict, list[bytes]]:
    """Which frames are wanted is known at the end: it is guessed first, and where that fails, known then."""
    begun, path, cut = time.process_time(), request["path"], Cut(*request["cut"])
    wanted = None

    def choose(count: int) -> range:
        if "seed" in request:
            return window(count, cut.needed, np.random.default_rng(request["seed"]))
        return middle(count, cut.frames)

    for _ in range(2):
        count, kept, wanted, fps, bucket = _pass(path, cut, wanted, choose, progress)
        if wanted == (right := choose(count)):
            break
        wanted = right
    else:
        raise video.VideoError("gives other frames when it is decoded again")
    lengths = [len(frame) for frame in kept]
    answer = {"frames": len(kept), "whole": count, "bucket": bucket, "fps": fps}
    answer["sizes"] = [sum(lengths)] if cut.codec == "raw" else lengths
    return answer | {"cpu": time.process_time() - begun}, kept


def _pass(
    path: str, cut: Cut, wanted: range | None, choose: Callable[[int], range], progress: Callable[[], None]
):  # fmt: skip
    """-> (frames of the clip, those that are wanted, encoded, the places of these, frames a second, their bucket).

    wanted: None where it is to be guessed: choose(frames of the clip).
    """
    kept, count, held, last, image = [], 0, 0, None, b""
    decoded_frames, fitter, bucket = 0, None, 0

    def told(frames):
        nonlocal decoded_frames
        for frame in frames:
            progress()
            decoded_frames += 1
            yield frame

    with video.open_video(path, cut.pixels) as (container, stream):
        if wanted is None:
            promised = _promised(stream, cut.fps) if cut.frames else 0
            wanted = promised and choose(promised) or range(cut.frames or sys.maxsize)
        frames = told(video.steady(video.decode(container, stream)))
        for index, frame in timing.at_rate(frames, stream, cut.fps) if cut.fps else enumerate(frames):
            if count in wanted:
                if index != last:
                    if fitter is None:
                        shown = np.array(video.shown(stream, frame)[:2])[:, None]
                        bucket = int(nearest_size(*shown, cut.sizes)[0])
                        fitter = video.Fitter(stream, *cut.sizes[bucket])
                    image, last = encoded(fitter(frame), cut.codec, cut.quality), index
                kept.append(image)
                held += len(kept[-1])
                if held > LARGEST_PAYLOAD:
                    size = f"{LARGEST_PAYLOAD >> 30} GiB"
                    raise video.VideoError(f"is too long for a record of at most {size}: lower ingest.frames")
            count += 1
        if shortage := video.shortage(count, cut.needed, cut.fps, decoded_frames, stream.frames):
            raise video.VideoError(shortage)
        fps = cut.fps or float(stream.average_rate or 0)
    wanted = range(wanted.start, min(wanted.stop, count))
    return count, kept, wanted, fps, bucket


def _promised(stream, fps: float) -> int:
    """How many frames the header says that there are, 0 if it doesn't."""
    rate = float(stream.average_rate or 0)
    return timing.length_at((stream.frames - 1) / rate, fps) if fps and rate and stream.frames else stream.frames


if __name__ == "__main__":
    serve(handle)
