"""From a video file to pixels: frame-exact decoding and seeking with PyAV, centre crop and antialiased resize."""

import bisect
import contextlib
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import VideoReformatter
from PIL import Image

from cmd_jax.errors import UserError

EXTENSIONS = (
    ".avi", ".divx", ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob",
    ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".mxf", ".dv",
)  # fmt: skip
LONGEST_SIDE = 16384
MOST_BEFORE = 64  # frames decoded on the way to one
WIDEST_PIXEL = 5  # times as wide as high, or as high as wide
# FFmpeg goes by a file's content, and some formats that it knows (play lists, concat scripts) open other files and
# addresses.
FORMATS = "avi,mov,mp4,matroska,webm,mpegts,mpeg,mpegvideo,m4v,flv,asf,ogg,mxf,dv"
SAFE_INPUT = {"protocol_whitelist": "file", "format_whitelist": FORMATS}

av.logging.set_level(av.logging.PANIC)


class VideoError(ValueError):
    """Why a file gives no frames, in plain words."""


@contextlib.contextmanager
def open_video(path: str, pixels: int = 0) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The open container and its main video stream; VideoError where there is none or its frames are too large.

    pixels: most of a frame; 0: any number. To a stream that grows beyond them on the way that is damage: it ends there.
    """
    limit = {"max_pixels": str(pixels)} if pixels else {}
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError) as error:
        raise VideoError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if size == 0:
        raise VideoError("is empty (zero bytes)")
    try:
        container = av.open(os.path.abspath(path), options=SAFE_INPUT | limit, metadata_errors="replace")
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
            impossible = f"one of more than ingest.pixels={pixels}" if pixels else "an impossible one"
            raise VideoError(f"claims no frame size, or {impossible}")
        if max(width, height) > LONGEST_SIDE:
            raise VideoError(f"claims frames of {width}x{height}; more than {LONGEST_SIDE} pixels a side is refused")
        if pixels and width * height > pixels:
            raise VideoError(f"claims frames of {width}x{height}; more than ingest.pixels={pixels} are refused")
        stream.codec_context.options = limit
        # One thread: the same frames come out everywhere, and the loader already runs one decoder per worker.
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        yield container, stream


def decode(
    container: av.container.InputContainer, stream: av.VideoStream, note: Callable[[av.Packet], None] | None = None
) -> Iterator[av.VideoFrame]:
    """All frames in presentation order, up to the first damaged packet: what follows is the decoder's guesswork.

    note: is shown each packet.
    """
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                break
            if note:
                note(packet)
            yield from packet.decode()
        else:
            return
    except av.error.FFmpegError:
        pass
    with contextlib.suppress(av.error.FFmpegError):
        yield from stream.codec_context.decode(None)  # the good frames that the decoder still held back


def steady(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The frames; VideoError where there is none, no way from its pixel format to RGB, or the size changes."""
    shape = None
    for frame in frames:
        if shape is None:
            to_rgb(frame, VideoReformatter())
            shape = frame.width, frame.height
        if (frame.width, frame.height) != shape:
            size = f"{shape[0]}x{shape[1]} to {frame.width}x{frame.height}"
            raise VideoError(f"changes its frame size on the way ({size})")
        yield frame
    if shape is None:
        raise VideoError("holds no frame that decodes")


def shortage(length: int, needed: int, fps: float, frames: int, declared: int) -> str:
    """What is wrong with a clip of `length` frames at `fps`, if more are needed.

    frames, declared: that its file has, and that its header promises, 0 if it doesn't say.
    """
    if length >= needed:
        return ""
    said = f"has only {length} frame{'s' * (length != 1)}" + (f" at data.fps={fps:g}" if fps else "")
    if declared > frames:
        said = f"is truncated: only {frames} of {declared} frames decode"
    return f"{said}; {needed} are needed"


class KeyFrame(NamedTuple):
    """A frame at which decoding may begin: its index and time stamp, and the time stamp to seek to."""

    index: int
    pts: int
    target: int


def decode_from(
    container: av.container.InputContainer, stream: av.VideoStream, key_frame: KeyFrame
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their indices from a key frame on; none if a seek does not lead to it.

    A seek may end at an earlier frame; if it ends at a later one, or too far off, that is no way.
    """
    with contextlib.suppress(av.error.FFmpegError):
        container.seek(key_frame.target, stream=stream)
        frames = decode(container, stream)
        for frame in itertools.islice(frames, MOST_BEFORE):
            if frame.pts == key_frame.pts:
                yield from enumerate(itertools.chain([frame], frames), key_frame.index)
            if frame.pts is None or frame.pts >= key_frame.pts:
                break


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Decoded frame of any pixel format -> uint8 [H,W,3], upright; an alpha channel is dropped.

    reformatter: one for all frames of a file. Without it each frame would make its own, with threads and buffers that
    stay until Python looks for cycles.
    """
    image, (a, b, c, d) = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray(), _turn(frame)
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    image = image[:, ::-1] if a < 0 else image
    image = image[::-1] if d < 0 else image
    return np.ascontiguousarray(image)


def _turn(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix: the pixel (x, y) belongs at (a x + c y, b x + d y) but for a scale."""
    sides = SideDataContainer(frame)  # frame.side_data would tie the frame and its data into a cycle that outlives it
    matrix = next((bytes(side) for side in sides if side.type.name == "DISPLAYMATRIX"), None)
    a, b, _, c, d = struct.unpack("=5i", matrix[:20]) if matrix else (1, 0, 0, 0, 1)
    return a, b, c, d


def shown(stream: av.VideoStream, frame: av.VideoFrame) -> tuple[int, int, Fraction]:
    """(width, height) at which a player shows a frame, and of `to_rgb` a pixel's width as a part of its height.

    The container's word goes before the codec's, as in players; pixels are square where neither says, or what they say
    is out of all reason.
    """
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    if not 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
        aspect = Fraction(1)
    width, height = round(frame.width * aspect), frame.height
    a, b, _, _ = _turn(frame)  # it is stretched before it is turned
    return (height, width, 1 / aspect) if abs(b) > abs(a) else (width, height, aspect)


def read_frames(
    path: str,
    wanted: Sequence[int],
    size: tuple[int, int] | None = None,
    key_frames: Sequence[KeyFrame] = (),
) -> np.ndarray:
    """The frames of a file at the indices `wanted` [T], which may repeat but not fall -> uint8 RGB [T,H,W,3].

    H and W are the `size` that each frame is fitted to, or without one those of the file, be its pixels square or not.
    Frames are counted in presentation order whatever their time stamps. Decoding begins at the last of `key_frames`
    (in order; those to which a seek leads, as `cmd_jax.data.seeking` finds them) that is not beyond the first frame
    asked for, or else at the file's first, and ends at the last one asked for. Raises UserError if they cannot be had.
    """
    wanted = [int(index) for index in wanted]
    nearest = bisect.bisect_right(key_frames, wanted[0], key=lambda key_frame: key_frame.index) - 1
    try:
        images = _read(path, wanted, size, key_frames[nearest]) if nearest >= 0 else []
        images = images if len(images) == len(wanted) else _read(path, wanted, size, None)
        if len(images) < len(wanted):
            frames = ", ".join(map(str, wanted[:2])) + ", ..." * (len(wanted) > 2)
            raise VideoError(f"gives {len(images)} of the {len(wanted)} frames {frames} that it gave before")
        return np.stack(images)
    except VideoError as error:
        raise UserError(
            "data.root", path, f"the file {error}", "it has changed since the run began: restore it, or restart"
        ) from error


def _read(path: str, wanted: list[int], size: tuple[int, int] | None, key_frame: KeyFrame | None) -> list[np.ndarray]:
    """As many of the wanted frames as there are, decoding from a key frame or the first frame."""
    images, sizes, reformatter = [], set(), VideoReformatter()
    with open_video(path) as (container, stream):
        fitter = Fitter(stream, *size) if size else None
        frames = decode_from(container, stream, key_frame) if key_frame else enumerate(decode(container, stream))
        for index, frame in frames:
            if index == wanted[len(images)]:
                image = np.asarray(fitter(frame)) if fitter else to_rgb(frame, reformatter)
                sizes.add(shown(stream, frame)[:2])
                images += [image] * wanted.count(index)
            if len(images) == len(wanted):
                break
    if len(sizes) > 1:
        raise VideoError("changes its frame size")
    return images


def fit(frames: np.ndarray, height: int, width: int, aspect: Fraction = Fraction(1)) -> np.ndarray:
    """Centre crop to width:height as displayed, then antialiased bicubic resize: uint8 [T,H,W,3] -> [T,height,width,3].

    aspect: width of a pixel of the frames as a part of its height. The crop is cut from the pixels as they are, so that
    one resize gives square ones.
    """
    top, left, crop_h, crop_w = _centre(*frames.shape[1:3], height, width, aspect)
    frames = frames[:, top : top + crop_h, left : left + crop_w]
    return np.stack([np.asarray(_resized(Image.fromarray(frame), height, width)) for frame in frames])


def _centre(h: int, w: int, height: int, width: int, aspect: Fraction) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of the crop of h rows and w columns that `fit` makes."""
    crop_h = min(h, max(1, round(w * aspect * height / width)))
    crop_w = min(w, max(1, round(h * width / (height * aspect))))
    return (h - crop_h) // 2, (w - crop_w) // 2, crop_h, crop_w


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


class Fitter:
    """`to_rgb` and `fit` in one, for the frames of one file: as many copies of a frame fewer as its size allows."""

    def __init__(self, stream: av.VideoStream, height: int, width: int):
        self._stream, self._size, self._reformatter = stream, (height, width), VideoReformatter()
        self._crops = {}

    def __call__(self, frame: av.VideoFrame) -> Image.Image:
        """RGB, height x width."""
        turn = _turn(frame)
        if turn[1] or turn[0] < 0 or turn[3] < 0:
            *_, aspect = shown(self._stream, frame)
            return Image.fromarray(fit(to_rgb(frame, self._reformatter)[None], *self._size, aspect)[0])
        key = frame.width, frame.height
        if key not in self._crops:
            *_, aspect = shown(self._stream, frame)
            self._crops[key] = _centre(frame.height, frame.width, *self._size, aspect)
        top, left, rows, columns = self._crops[key]
        (plane,) = self._reformatter.reformat(frame, format="rgb24", threads=1).planes
        image = Image.new("RGB", (columns, rows), None)
        image.frombytes(memoryview(plane)[top * plane.line_size + 3 * left :], "raw", "RGB", plane.line_size, 1)
        return _resized(image, *self._size)
