"""From a video file to pixels: frame-exact decoding with PyAV, centre crop and antialiased resize."""

import contextlib
import os
import struct
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from cmd_jax.errors import UserError

EXTENSIONS = (
    ".avi", ".divx", ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob",
    ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".dv",
)  # fmt: skip
LONGEST_SIDE = 16384
# FFmpeg goes by a file's content, and some formats that it knows (play lists, concat scripts) open other files and
# addresses.
FORMATS = "avi,mov,mp4,matroska,webm,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,mxf,dv"
SAFE_INPUT = {"protocol_whitelist": "file", "format_whitelist": FORMATS}

av.logging.set_level(av.logging.PANIC)


class VideoError(ValueError):
    """Why a file gives no frames, in plain words."""


@contextlib.contextmanager
def open_video(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The open container and its main video stream; VideoError where there is none or its frames are too large."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError) as error:
        raise VideoError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if size == 0:
        raise VideoError("is empty (zero bytes)")
    try:
        container = av.open(os.path.abspath(path), options=SAFE_INPUT, metadata_errors="replace")
    except av.error.PermissionError as error:
        raise VideoError("cannot be read (permission denied)") from error
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError("is not a video, or its header is damaged") from error
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise VideoError("has no video stream" + (" (audio only)" if container.streams.audio else ""))
        width, height = stream.codec_context.width, stream.codec_context.height
        if not width or not height:
            raise VideoError("claims no frame size, or an impossible one")
        if max(width, height) > LONGEST_SIDE:
            raise VideoError(f"claims frames of {width}x{height}; more than {LONGEST_SIDE} pixels a side is refused")
        # One thread: the same frames come out everywhere, and the loader already runs one decoder per worker.
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        yield container, stream


def decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """All frames in presentation order, up to the first damaged packet: what follows is the decoder's guesswork."""
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                break
            yield from packet.decode()
        else:
            return
    except av.error.FFmpegError:
        pass
    with contextlib.suppress(av.error.FFmpegError):
        yield from stream.codec_context.decode(None)  # the good frames that the decoder still held back


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """Decoded frame of any pixel format -> uint8 [H,W,3], upright; an alpha channel is dropped."""
    image = frame.to_ndarray(format="rgb24")
    matrix = next((bytes(side) for side in frame.side_data if side.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return image
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])  # pixel (x, y) belongs at (a x + c y, b x + d y)
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    image = image[:, ::-1] if a < 0 else image
    image = image[::-1] if d < 0 else image
    return np.ascontiguousarray(image)


def read_frames(path: str, start: int, count: int, stride: int = 1) -> np.ndarray:
    """Frames start, start+stride, ... of a file -> uint8 RGB [T,H,W,3] with T = count, H and W the file's own.

    Frames are counted in presentation order whatever their time stamps. Decoding begins at the file's first frame,
    since seeking is not frame-exact in every container, and ends at the last frame asked for. Raises UserError if they
    cannot be had.
    """
    images, wanted = [], range(start, start + count * stride, stride)
    try:
        with open_video(path) as (container, stream), contextlib.closing(decode(container, stream)) as frames:
            for index, frame in enumerate(frames):
                if index in wanted:
                    images.append(to_rgb(frame))
                if len(images) == count:
                    break
        if len(images) < count:
            raise VideoError(
                f"gives {len(images)} of the {count} frames {start}, {start + stride}, ... that it gave before"
            )
        return np.stack(images)
    except (VideoError, ValueError) as error:  # ValueError: frames of unequal size
        raise UserError(
            "data.root", path, f"the file {error}", "it has changed since the run began: restore it, or restart"
        ) from error


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre crop to width:height, then antialiased bicubic resize: uint8 [T,H,W,3] -> [T,height,width,3]."""
    _, h, w, _ = frames.shape
    crop_h, crop_w = min(h, max(1, round(w * height / width))), min(w, max(1, round(h * width / height)))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    frames = frames[:, top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) == (height, width):
        return np.ascontiguousarray(frames)
    resize = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), resize)) for frame in frames])
