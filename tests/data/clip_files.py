"""Small video files made on the fly for the tests of folder data."""

import struct
from fractions import Fraction

import av
import numpy as np

STEP = 12  # grey levels from one frame to the next: no codec's error reaches half of it
CODECS = {
    "avi": "mpeg4", "divx": "mpeg4", "mp4": "libx264", "m4v": "mpeg4", "mov": "libx264", "qt": "libx264",
    "mkv": "libx264", "webm": "libvpx-vp9", "mpg": "mpeg1video", "mpeg": "mpeg2video", "mpe": "mpeg1video",
    "m1v": "mpeg1video", "m2v": "mpeg2video", "vob": "mpeg2video", "ts": "libx264", "mts": "libx264",
    "m2ts": "mpeg2video", "wmv": "wmv2", "asf": "wmv1", "flv": "flv", "f4v": "libx264", "3gp": "libx264",
    "3g2": "mpeg4", "ogv": "libvpx", "mxf": "mpeg2video", "dv": "dvvideo",
}  # fmt: skip
FORMATS = {"divx": "avi", "qt": "mov", "mpe": "mpeg", "mts": "mpegts"}  # where the muxer is not known by the ending
LOSSLESS = {
    "libx264": {"qp": "0", "bf": "2"},
    "libvpx-vp9": {"lossless": "1", "cpu-used": "8"},
    **dict.fromkeys(("mpeg4", "mpeg1video", "mpeg2video", "wmv1", "wmv2", "flv"), {"qmin": "1", "qmax": "1"}),
}


def numbered(count=20, height=48, width=64):
    """[T,H,W,3]: frame t is grey of level STEP * t."""
    levels = np.arange(count, dtype=np.uint8) * STEP
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def quarters(count=6, height=48, width=64):
    """[T,H,W,3]: red, green / blue, light grey quarters."""
    frames = np.full((count, height, width, 3), 220, np.uint8)
    frames[:, : height // 2, : width // 2] = 200, 40, 40
    frames[:, : height // 2, width // 2 :] = 40, 200, 40
    frames[:, height // 2 :, : width // 2] = 40, 40, 200
    return frames


def numbers(video):
    """The frame numbers that a video cut from `numbered` shows: [T,H,W,3] -> [T]."""
    return [round(float(frame.mean()) / STEP) for frame in video]


def write_clip(
    path, frames=None, codec=None, pix_fmt="yuv420p", rotation=0, vflip=False, times=None, aspect=0, options=None
):
    """Frames -> a video file; `times` are presentation times in ms for a variable frame rate. Returns the path.

    aspect: width of a pixel as a part of its height; 0 is not to say. options: the encoder's; lossless by default.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = numbered() if frames is None else frames
    codec = codec or CODECS[path.suffix[1:]]
    with av.open(str(path), "w", format=FORMATS.get(path.suffix[1:])) as container:
        stream = container.add_stream(codec, rate=25, options=options or LOSSLESS.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if rotation or vflip:
            stream.set_display_rotation(rotation, vflip=vflip)
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)
            if times:
                picture.pts, picture.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_sound(path):
    """A file with an audio stream alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        for _ in range(8):
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path


def write_huge_header(path, width, height):
    """An avi whose header claims frames of this size."""
    data = write_clip(path, codec="ffv1").read_bytes()
    path.write_bytes(data.replace(struct.pack("<II", 64, 48), struct.pack("<II", width, height)))
    return path
