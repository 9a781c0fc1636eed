"""Decoding that begins at a key frame gives, to the bit, the frames of a decoding from the first one."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from data.clip_files import write_clip
from data.folders import facts_of

from cmd_jax.data import seeking, video
from cmd_jax.data.folder import FolderSource

FRAMES = 120
X264 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-pyramid=normal"
TIMES = np.cumsum([0] + [40, 13, 200, 20] * (FRAMES // 4))[:FRAMES].tolist()


def moving(count=FRAMES, height=48, width=64):
    """A texture that passes by: no two frames are alike. [T,H,W,3]"""
    blocks = np.random.default_rng(0).integers(0, 255, (height // 8, (width + count) // 8 + 1, 3), np.uint8)
    texture = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return np.stack([texture[:, i : i + width] for i in range(count)])


def without_index(path):
    """An avi as a recorder that was switched off leaves it."""
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"idx1")])


def cut_by_an_edit_list(path):
    """An mp4 whose edit list begins within the first group of pictures."""
    data = path.read_bytes()
    at = data.index(b"elst") + 16  # the first entry's media time
    (time,) = struct.unpack(">i", data[at : at + 4])
    path.write_bytes(data[:at] + struct.pack(">i", time + 5 * 512) + data[at + 4 :])


def packed(path):
    """An avi of DivX' kind: a B-frame lies in one chunk with the frame after it, a chunk that codes nothing follows.

    Only its first chunk says so: after a seek the decoder knows nothing of it.
    """
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        whole = [bytes(packet) for packet in source.demux(stream) if packet.size]
        kinds = [data[data.index(b"\0\0\1\xb6") + 4] >> 6 for data in whole]  # 0: I, 1: P, 2: B
        begin = min(whole[0].index(b"\0\0\1" + mark) for mark in (b"\xb3", b"\xb6") if b"\0\0\1" + mark in whole[0])
        whole[0] = whole[0][:begin] + b"\0\0\1\xb2DivX503b1393p" + whole[0][begin:]
        chunks = []
        for data, kind in zip(whole, kinds, strict=True):
            if kind == 2:
                chunks[-1] = chunks[-1][0] + data, chunks[-1][1]
                chunks.append((b"\0\0\1\xb6\x51\0\0", False))
            else:
                chunks.append((data, kind == 0))
        with av.open(str(path.with_suffix(".divx")), "w", format="avi") as container:
            copy = container.add_stream_from_template(stream)
            for number, (data, is_key) in enumerate(chunks):
                packet = av.Packet(data)
                packet.stream, packet.is_keyframe = copy, is_key
                packet.pts, packet.dts, packet.time_base = number, number, Fraction(1, 25)
                container.mux(packet)
    path.with_suffix(".divx").replace(path)


# name of the file, codec, its options, what else is done to the file; key frames at which decoding may begin.
KINDS = {
    "H.264 with B-frames": ("a.mp4", "libx264", {"x264-params": X264}, {}, None, [48, 96]),
    "open groups in mp4": ("a.mp4", "libx264", {"x264-params": X264 + ":open-gop=1"}, {}, None, [48, 96]),
    "open groups in mkv": ("a.mkv", "libx264", {"x264-params": X264 + ":open-gop=1"}, {}, None, [48, 96]),
    "open groups in ts": ("a.ts", "libx264", {"x264-params": X264 + ":open-gop=1"}, {}, None, [48, 96]),
    "gradual refresh": ("a.mkv", "libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}, {}, None, []),
    "H.264 in avi": ("a.avi", "libx264", {"x264-params": X264}, {}, None, [48, 96]),
    "MPEG-4 with B-frames": ("a.avi", "mpeg4", {"g": "12", "bf": "2"}, {}, None, [48, 96]),
    "packed bitstream": ("a.avi", "mpeg4", {"g": "12", "bf": "1"}, {}, packed, []),  # a seek loses every other frame
    "MPEG-4 in mp4": ("a.mp4", "mpeg4", {"g": "12", "bf": "2"}, {}, None, [48, 96]),
    "avi without index": ("a.avi", "mpeg4", {"g": "12", "bf": "2"}, {}, without_index, None),
    "VP9": ("a.webm", "libvpx-vp9", {"g": "12", "cpu-used": "8", "lag-in-frames": "16"}, {}, None, [48, 96]),
    "variable frame rate": ("a.mp4", "libx264", {"x264-params": X264}, {"times": TIMES}, None, [48, 96]),
    "edit list": ("a.mp4", "libx264", {"x264-params": X264}, {}, cut_by_an_edit_list, [55, 103]),
    "MPEG-2": ("a.mpg", "mpeg2video", {"g": "12", "bf": "2"}, {}, None, None),
    "long groups": ("a.mp4", "libx264", {"x264-params": "keyint=100:scenecut=0"}, {}, None, [100]),
    "wmv": ("a.wmv", "wmv2", {"g": "12"}, {}, None, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_a_full_decode(tmp_path, kind):
    name, codec, options, settings, spoil, expected = KINDS[kind]
    path = write_clip(tmp_path / name, moving(), codec, options=options, **settings)
    if spoil:
        spoil(path)
    facts = facts_of(path)
    count, key_frames = facts["frames"], facts["key_frames"]
    assert count == (FRAMES if kind != "edit list" else FRAMES - 5)
    indices = [key_frame.index for key_frame in key_frames]
    assert expected is None or indices == expected
    whole = video.read_frames(path, range(count))
    for start in (0, 11, 47, 48, 49, 60, 95, 96, 100, 104, count - 10):
        for stride in (1, 3):
            length = min(8, (count - 1 - start) // stride + 1)
            got = video.read_frames(path, range(start, start + length * stride, stride), key_frames=key_frames)
            np.testing.assert_array_equal(got, whole[start::stride][:length], err_msg=f"{kind} {start} {stride}")


def test_few_frames_are_decoded(tmp_path, monkeypatch):
    path, seen, decode = write_clip(tmp_path / "a.mp4", moving(), options={"x264-params": X264}), [], video.decode
    key_frames = facts_of(path)["key_frames"]
    monkeypatch.setattr(video, "decode", lambda *args: (seen.append(1) or frame for frame in decode(*args)))
    video.read_frames(path, range(100, 108), key_frames=key_frames)
    assert len(seen) == 12  # from 96 on


@pytest.mark.parametrize(
    "wrong",
    [
        (96, 10**9, 10**9),  # behind the last frame
        (96, -5, 0),  # before the first
        (96, 48 * 512 + 1, 48 * 512),  # a time that no frame has
        (96, 99 * 512, 0),  # too far from where the seek ends
        (96, 119 * 512, 119 * 512),  # the frames end too soon
        (96, 96 * 512, 2**62),  # no such place
    ],
)
def test_a_seek_that_leads_elsewhere_is_noticed(tmp_path, wrong):
    path = write_clip(tmp_path / "a.mp4", moving(), options={"x264-params": X264})
    got = video.read_frames(path, range(100, 108), key_frames=[video.KeyFrame(*wrong)])
    np.testing.assert_array_equal(got, video.read_frames(path, range(100, 108)))


def test_frames_that_are_alike_prove_no_seek(tmp_path):
    """A still picture would hide a seek that ends a frame too far: the next key frame after it is taken."""
    frames, lossless = moving(), {"x264-params": X264 + ":qp=0"}
    frames[40:70] = frames[40]
    path = write_clip(tmp_path / "a.mp4", frames, options=lossless)
    assert [key_frame.index for key_frame in facts_of(path)["key_frames"]] == [72]
    blinking = frames[np.arange(FRAMES) % 2]
    path = write_clip(tmp_path / "b.mp4", blinking, options=lossless)
    assert facts_of(path)["key_frames"] == []


def test_a_key_frame_from_which_other_frames_come_is_none(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", moving(), options={"x264-params": X264})
    decode_from = video.decode_from

    def one_off(container, stream, key_frame):
        frames = decode_from(container, stream, key_frame)
        return frames if key_frame.index != 48 else ((i - 1, f) for i, f in frames if next(frames))

    monkeypatch.setattr(video, "decode_from", one_off)
    assert [key_frame.index for key_frame in facts_of(path)["key_frames"]] == [96]


def test_a_folder_draws_from_key_frames(tmp_path, monkeypatch):
    write_clip(tmp_path / "a.mp4", moving(), options={"x264-params": X264})
    source = FolderSource(tmp_path, frames=4, height=48, width=64, cache=tmp_path / "probe.jsonl")
    again = FolderSource(tmp_path, frames=4, height=48, width=64, cache=tmp_path / "probe.jsonl", probe_command=["no"])
    sought, seek = [], video.decode_from
    monkeypatch.setattr(video, "decode_from", lambda *args: sought.append(args[2]) or seek(*args))
    for seed in range(12):
        clips = [which.clip(0, np.random.default_rng(seed))[0] for which in (source, again)]
        start = int(np.random.default_rng(seed).integers(0, FRAMES - 3))
        np.testing.assert_array_equal(
            clips[0], video.read_frames(tmp_path / "a.mp4", range(start, start + 4), size=(48, 64))
        )
        np.testing.assert_array_equal(*clips)
    assert {key_frame.index for key_frame in sought} == {48, 96}


def test_progress_is_told_for_every_frame_decoded_or_compared(tmp_path):
    path, told = write_clip(tmp_path / "a.mp4", moving(), options={"x264-params": X264}), []
    facts_of(path, lambda: told.append(1))
    assert len(told) == FRAMES + 2 * seeking.COMPARED
