"""Video and picture files: H.264, GIF, PNG, grids, film strips. Arrays are uint8 RGB; a file appears whole or never."""

from fractions import Fraction

import numpy as np
from PIL import Image

from cmd_jax.files import atomic_path

# Pixels; smaller videos are enlarged by a whole factor, since browsers smear them and 4:2:0 halves their colour.
SHORT_SIDE = 128
PAPER = 255  # grey level between the tiles of a grid


def to_uint8(x) -> np.ndarray:
    """[-1,1] (values outside are clipped) -> uint8 0..255, any shape."""
    return np.clip(np.round((np.asarray(x, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def enlarge(x: np.ndarray, scale: int | None) -> np.ndarray:
    """[...,H,W,3] -> [...,scale*H,scale*W,3], nearest; scale None: the least for a short side of SHORT_SIDE."""
    if scale is None:
        scale = -(-SHORT_SIDE // min(x.shape[-3:-1]))
    return x.repeat(scale, axis=-3).repeat(scale, axis=-2)


def check(x: np.ndarray, rank: int) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype != np.uint8 or x.ndim != rank or x.shape[-1] != 3 or x.size == 0:
        raise ValueError(f"expected uint8 RGB of rank {rank} and at least one pixel, got {x.dtype} {list(x.shape)}")
    return x


def write_mp4(path, video: np.ndarray, fps: float = 8, scale: int | None = None) -> None:
    """uint8 [T,H,W,3] -> H.264 in mp4 that browsers play (yuv420p, BT.709, index in front).

    scale: whole factor of enlargement (`enlarge`). An odd height or width, which 4:2:0 cannot hold, gets its last row
    or column twice.
    """
    import av  # when there is a video: who draws one need not wait for FFmpeg's libraries before
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    video = enlarge(check(video, 4), scale)
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "preset": "medium"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Written down, since players guess otherwise: the colours of small videos would shift.
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = ColorRange.MPEG
        colours = dict(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1)
        reformatter = VideoReformatter()  # one for all: each has buffers, which stay for a while
        for picture in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(reformatter.reformat(frame, **colours)))
        container.mux(stream.encode(None))


def write_gif(path, video: np.ndarray, fps: float = 8, scale: int | None = None) -> None:
    """uint8 [T,H,W,3] -> GIF that loops, up to 256 colours a frame, time in steps of 10 ms; scale as in `write_mp4`."""
    first, *others = (
        Image.fromarray(x).quantize(256, dither=Image.Dither.NONE) for x in enlarge(check(video, 4), scale)
    )
    with atomic_path(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def write_png(path, image: np.ndarray) -> None:
    """uint8 [H,W,3] -> PNG, pixel for pixel."""
    image = Image.fromarray(check(image, 3))
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def grid(tiles: np.ndarray, columns: int, pad: int) -> np.ndarray:
    """[N,...,H,W,3] -> [...,H',W',3]: row by row, `pad` pixels of PAPER between tiles and in the places left over."""
    if columns < 1:
        raise ValueError(f"a grid of {columns} columns")
    count, height, width = len(tiles), *tiles.shape[-3:-1]
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + pad) - pad, columns * (width + pad) - pad, 3)
    sheet = np.full((*tiles.shape[1:-3], *shape), PAPER, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + pad), i % columns * (width + pad)
        sheet[..., top : top + height, left : left + width, :] = tile
    return sheet


def image_grid(images: np.ndarray, columns: int, pad: int = 2) -> np.ndarray:
    """uint8 [N,H,W,3] -> [H',W',3], row by row."""
    return grid(check(images, 4), columns, pad)


def video_grid(videos: np.ndarray, columns: int, pad: int = 2) -> np.ndarray:
    """uint8 [N,T,H,W,3] -> [T,H',W',3], row by row; all play at once."""
    return grid(check(videos, 5), columns, pad)


def film_strip(video: np.ndarray) -> np.ndarray:
    """uint8 [T,H,W,3] -> [H,T*W,3]: the frames from left to right."""
    return np.concatenate(list(check(video, 4)), axis=1)
