"""How the records of a dataset keep frames: raw, as they are, or each as a jpeg or png file."""

import io
from collections.abc import Sequence

import numpy as np

from cmd_jax.data.sizes import Size

CODECS = ("raw", "jpeg", "png")


def video_name(codec: str, buckets: str) -> str:
    """Of a record's frames: TFDS keeps bytes whose shape varies in more than one dimension beside a shape."""
    return "video/value" if codec == "raw" and buckets else "video"


def encoded(frame, codec: str, quality: int) -> bytes:
    """A fitted frame, a PIL.Image.Image; quality: of jpeg, 1 to 100."""
    if codec == "raw":
        return frame.tobytes()
    file = io.BytesIO()
    options = {"jpeg": dict(quality=quality, subsampling=0), "png": dict(compress_level=1)}
    frame.save(file, codec, **options[codec])
    return file.getvalue()


def decoded(video: Sequence, codec: str, length: int, size: Size, wanted: Sequence[int]) -> np.ndarray:
    """Of a record's `length` frames those wanted, by their places: uint8 [T,H,W,3], in memory of their own.

    video: the frames' files; of raw, one part, uint8 [length,H,W,3]. Raises ValueError, OSError or SyntaxError where
    it is something else.
    """
    if codec == "raw":
        return np.take(np.frombuffer(video[0], np.uint8).reshape(length, *size, 3), wanted, axis=0)
    if len(video) != length:
        raise ValueError(f"{len(video)} images where {length} should be")
    from PIL import Image  # here: what decodes no records, like sampling, needs no Pillow

    out = np.empty((len(wanted), *size, 3), np.uint8)
    for frame, place in zip(out, wanted, strict=True):
        with Image.open(io.BytesIO(video[place]), formats=(codec,)) as picture:
            frame[:] = np.asarray(picture)
    return out
