import gc
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from data.clip_files import CODECS, numbered, numbers, quarters, write_clip, write_huge_header, write_sound
from data.folders import facts_of

from cmd_jax.data import video
from cmd_jax.errors import UserError


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_are_exact_in_every_container(tmp_path, suffix):
    assert f".{suffix}" in video.EXTENSIONS
    path = write_clip(tmp_path / f"a.{suffix}", numbered(height=576, width=720) if suffix == "dv" else None)
    assert facts_of(path)["frames"] == 20
    assert numbers(video.read_frames(path, range(20))) == list(range(20))
    assert numbers(video.read_frames(path, range(3, 8))) == [3, 4, 5, 6, 7]
    assert numbers(video.read_frames(path, range(2, 22, 4))) == [2, 6, 10, 14, 18]


def test_decoding_ends_at_the_last_frame_asked_for(tmp_path, monkeypatch):
    path, seen = write_clip(tmp_path / "a.avi"), []
    decode = video.decode

    def counting(*args):
        for frame in decode(*args):
            seen.append(frame)
            yield frame

    monkeypatch.setattr(video, "decode", counting)
    video.read_frames(path, range(2, 5))
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.avi", "mpeg4", "yuv420p"),
        ("ten_bit.mp4", "libx264", "yuv420p10le"),
        ("full_range.mp4", "libx264", "yuvj420p"),
        ("full_colour.mp4", "libx264", "yuv444p"),
        ("alpha.mov", "qtrle", "argb"),
        ("alpha.webm", "libvpx-vp9", "yuva420p"),
        ("sixteen_bit.mkv", "ffv1", "yuv444p16le"),
    ],
)
def test_pixel_formats_give_right_rgb(tmp_path, name, codec, pix_fmt):
    frame = video.read_frames(write_clip(tmp_path / name, quarters(), codec, pix_fmt), [3])[0]
    assert frame.shape == (48, 64, 3)
    assert frame.dtype == np.uint8
    for y, x in ((12, 16), (12, 48), (36, 16), (36, 48)):
        np.testing.assert_allclose(frame[y, x].astype(int), quarters()[0, y, x], atol=5)


def test_grey_video_becomes_grey_rgb(tmp_path):
    got = video.read_frames(write_clip(tmp_path / "grey.mkv", numbered(), "ffv1", "gray"), range(20))
    np.testing.assert_allclose(got.astype(int), numbered(), atol=1)


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("vflip", [False, True])
def test_rotated_and_mirrored_video_is_turned_upright(tmp_path, rotation, vflip):
    path = write_clip(tmp_path / "a.mp4", quarters(), rotation=rotation, vflip=vflip)
    frame = video.read_frames(path, [0])[0]
    upright = np.rot90(quarters()[0], rotation // 90)  # counter-clockwise, as the container counts
    upright = upright[::-1] if vflip else upright
    assert frame.shape == upright.shape
    h, w, _ = frame.shape
    for y, x in ((h // 4, w // 4), (h // 4, 3 * w // 4), (3 * h // 4, w // 4), (3 * h // 4, 3 * w // 4)):
        np.testing.assert_allclose(frame[y, x].astype(int), upright[y, x], atol=5)


def disc(height, width, aspect):
    """A white disc in the middle of a black frame, round as it is shown, of half its height: [T,H,W,3]."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((x - width / 2) * float(aspect)) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2
    return np.broadcast_to(255 * inside.astype(np.uint8)[None, :, :, None], (4, height, width, 3)).copy()


def extent(frame):
    """(height, width) of what is bright."""
    bright = frame[..., 0] > 127
    return int(bright.any(1).sum()), int(bright.any(0).sum())


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv", "mov", "mpeg", "ts", "wmv"])
def test_a_disc_stays_round_where_pixels_are_not_square(tmp_path, suffix):
    path = write_clip(tmp_path / f"a.{suffix}", disc(96, 96, Fraction(4, 3)), aspect=Fraction(4, 3))
    facts = facts_of(path)
    assert (facts["width"], facts["height"]) == (128, 96)
    (frame,) = video.read_frames(path, [1], size=(64, 64))
    assert extent(frame) == (pytest.approx(32, abs=1), pytest.approx(32, abs=1))


@pytest.mark.parametrize("rotation", [90, 180])
def test_pixels_are_stretched_before_a_frame_is_turned(tmp_path, rotation):
    path = write_clip(tmp_path / "a.mp4", disc(96, 72, 2), aspect=Fraction(2), rotation=rotation)
    facts = facts_of(path)
    assert (facts["width"], facts["height"]) == ((96, 144) if rotation == 90 else (144, 96))
    for size in ((48, 48), (48, 72), (72, 48)):
        high, wide = extent(video.read_frames(path, [0], size=size)[0])
        assert high == pytest.approx(wide, abs=2) and high >= 22


def test_the_container_s_pixel_aspect_goes_before_the_codec_s(tmp_path):
    """And what neither can mean is none."""
    path = write_clip(tmp_path / "a.mp4", quarters(), aspect=Fraction(3, 2))
    data = path.read_bytes()
    assert facts_of(path)["width"] == 96
    at = data.index(b"pasp") + 4
    for horizontal, vertical, width in ((2, 1, 128), (1, 2, 32), (0, 0, 96), (1, 0, 96), (1000, 1, 64), (1, 1000, 64)):
        path.write_bytes(data[:at] + struct.pack(">II", horizontal, vertical) + data[at + 8 :])
        assert facts_of(path)["width"] == width


def test_the_crop_is_cut_from_what_is_shown():
    """48x48 pixels twice as wide as high are shown as 96x48, whose middle square is 24 of the columns."""
    frames = np.zeros((1, 48, 48, 3), np.uint8)
    frames[:, :, 12:36] = 200
    frames[:, :, [11, 36]] = 255  # just outside: must not bleed in
    assert (video.fit(frames, 24, 24, Fraction(2)) == 200).all()
    assert (video.fit(frames.swapaxes(1, 2), 24, 24, Fraction(1, 2)) == 200).all()
    assert (video.fit(frames[:, :, 12:36], 24, 24, Fraction(2)) == 200).all()


def test_variable_frame_rate_keeps_every_frame_once(tmp_path):
    times = np.cumsum([0] + [40, 200, 20, 400] * 5)[:20].tolist()
    path = write_clip(tmp_path / "a.mp4", times=times)
    assert numbers(video.read_frames(path, range(20))) == list(range(20))


def test_fit_crops_the_centre_to_the_target_aspect():
    wide = np.zeros((2, 48, 100, 3), np.uint8)
    wide[:, :, 26:74] = 200  # the centre square
    assert (video.fit(wide, 24, 24) == 200).all()
    assert (video.fit(wide, 48, 48) == 200).all()
    tall = np.zeros((2, 100, 60, 3), np.uint8)
    tall[:, 35:65] = 90  # the centre 2:1 rectangle
    assert video.fit(tall, 16, 32).shape == (2, 16, 32, 3)
    assert (video.fit(tall, 16, 32) == 90).all()
    tall[:, 34] = tall[:, 65] = 255  # just outside: must not bleed in
    assert (video.fit(tall, 30, 60) == 90).all()


def test_fit_is_antialiased():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    small = video.fit(stripes, 16, 16)
    assert abs(float(small.mean()) - 127.5) < 2
    assert small[:, :, 2:-2].std() < 2  # sampling without a filter gives columns of 0 or 255


def test_fit_enlarges_too():
    assert video.fit(quarters(1), 96, 128).shape == (1, 96, 128, 3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b""), "zero bytes"),
        (lambda path: path.write_text("no video at all\n" * 99), "not a video"),
        (lambda path: write_sound(path.with_suffix(".mp4")).rename(path), "audio only"),
        (lambda path: write_huge_header(path, 100_000, 100_000), "impossible"),
        (lambda path: write_huge_header(path, 20_000, 64), "20000x64"),
        (lambda path: path.mkdir(), "not a video"),
        (lambda path: None, "cannot be read"),
        # What FFmpeg would open other files for, whatever the name of the file that asks.
        (lambda path: path.write_text("ffconcat version 1.0\nfile other.avi\n"), "not a video"),
        (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nother.avi\n#EXT-X-ENDLIST\n"), "not a video"),
    ],
)
def test_reasons_why_a_file_gives_no_frames(tmp_path, make, reason):
    write_clip(tmp_path / "other.avi")
    make(tmp_path / "a.avi")
    assert reason in facts_of(tmp_path / "a.avi")["error"]


@pytest.mark.parametrize("suffix", ["avi", "webm"])
def test_a_truncated_file_gives_the_frames_before_the_cut(tmp_path, suffix):
    path = write_clip(tmp_path / f"a.{suffix}")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 50, (20, 48, 64, 3), np.uint8)  # so that each frame takes room in the file
    write_clip(path, numbered() + noise // 8)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.7)])
    facts = facts_of(path)
    assert 8 <= facts["frames"] < 20
    count = facts["frames"]
    assert numbers(video.read_frames(path, range(count))) == list(range(count))
    with pytest.raises(UserError, match=r"a\.\w+: the file gives"):
        video.read_frames(path, range(count + 1))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="threads are counted as Linux does")
def test_decoding_leaves_no_frames_and_threads_behind(tmp_path):
    """Frames by the dozen, or a scaler with threads for each, would stay until Python looks for cycles."""
    path = write_clip(tmp_path / "a.mp4", rotation=90)

    def threads():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Threads:"))

    before = threads()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            video.read_frames(path, range(20))
        facts_of(path)
        assert threads() <= before + 1
        assert [held for held in gc.get_objects() if isinstance(held, av.VideoFrame)] == []
    finally:
        gc.enable()


def test_a_file_gone_since_the_probe_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"data\.root=.*gone\.avi: the file cannot be read"):
        video.read_frames(str(tmp_path / "gone.avi"), range(4))


@pytest.mark.parametrize("aspect", [0, 2, Fraction(5, 8)])
@pytest.mark.parametrize("rotation", [0, 90])
def test_frames_are_fitted_at_once_as_step_by_step(tmp_path, aspect, rotation):
    noise = np.random.default_rng(0).integers(0, 256, (3, 50, 66, 3), np.uint8)
    path = write_clip(tmp_path / "a.mov", noise, codec="mpeg4", aspect=aspect, rotation=rotation)
    for size in ((24, 32), (50, 66), (31, 17), (80, 40)):
        with video.open_video(str(path)) as (container, stream):
            fitter, reformatter = video.Fitter(stream, *size), VideoReformatter()
            for frame in video.decode(container, stream):
                image = video.to_rgb(frame, reformatter)[None]
                wanted = video.fit(image, *size, video.shown(stream, frame)[2])[0]
                assert np.array_equal(np.asarray(fitter(frame)), wanted)
