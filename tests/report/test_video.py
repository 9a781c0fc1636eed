import errno

import av
import numpy as np
import pytest
from PIL import Image

from cmd_jax.data.shapes import ShapesSource
from cmd_jax.report import video as files


def a_clip(frames=8, height=32, width=32, index=13):
    return ShapesSource(clips=48, frames=frames, height=height, width=width).clip(index, None)[0]


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = (
            stream.codec_context.name,
            stream.pix_fmt,
            float(stream.average_rate),
            int(stream.codec_context.colorspace),
        )
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]), facts


def test_to_uint8():
    x = np.array([-2.0, -1.0, 0.0, 1.0, 1.5, -1 + 2 / 255])
    assert files.to_uint8(x).tolist() == [0, 0, 128, 255, 255, 1] and files.to_uint8(x).dtype == np.uint8
    back = files.to_uint8(np.arange(256) / 127.5 - 1)
    assert back.tolist() == list(range(256))


def test_mp4_plays_in_browsers_and_keeps_the_pixels(tmp_path):
    video = a_clip()
    files.write_mp4(tmp_path / "new" / "a.mp4", video, fps=12)
    decoded, facts = decode(tmp_path / "new" / "a.mp4")
    assert facts == ("h264", "yuv420p", 12.0, 1) and decoded.shape == (8, 128, 128, 3)
    small = decoded.reshape(8, 32, 4, 32, 4, 3)[:, :, 1:3, :, 1:3].mean((2, 4))
    assert np.abs(small - video).mean() < 3 and np.abs(small - video).max() < 30
    assert np.abs(small[:, 0, 0] - video[:, 0, 0]).max() <= 4  # the right colour matrix
    content = (tmp_path / "new" / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")  # faststart
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    "height,width,scale,shape", [(33, 47, 1, (34, 48)), (16, 21, 3, (48, 64)), (24, 40, None, (144, 240))]
)
def test_mp4_of_odd_sizes(tmp_path, height, width, scale, shape):
    video = a_clip(5, height, width)
    files.write_mp4(tmp_path / "a.mp4", video, scale=scale)
    decoded, _ = decode(tmp_path / "a.mp4")
    assert decoded.shape == (5, *shape, 3)
    big = files.enlarge(video, scale)
    assert np.abs(decoded[:, : big.shape[1], : big.shape[2]].astype(int) - big).mean() < 4


def test_large_videos_are_not_enlarged():
    assert files.enlarge(np.zeros((1, 128, 256, 3), np.uint8), None).shape == (1, 128, 256, 3)
    x = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert (files.enlarge(x, 3)[3:, :3] == x[1, 0]).all() and files.enlarge(x, 3).shape == (6, 6, 3)


def test_gif_has_all_frames_and_loops(tmp_path):
    video = a_clip()
    files.write_gif(tmp_path / "a.gif", video, fps=10, scale=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"], gif.info["duration"]) == (8, (64, 64), 0, 100)
        for t in range(8):
            gif.seek(t)
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - files.enlarge(video, 2)[t]).max() <= 2


def test_png_is_exact(tmp_path):
    image = a_clip(height=17, width=40)[0]
    files.write_png(tmp_path / "a.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)


def test_image_grid_places_row_by_row():
    images = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    sheet = files.image_grid(images, 3, pad=2)
    assert sheet.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    for i in range(5):
        top, left = i // 3 * 6, i % 3 * 8
        assert (sheet[top : top + 4, left : left + 6] == i + 1).all()
    assert (
        (sheet[4:6] == files.PAPER).all()
        and (sheet[:, 6:8] == files.PAPER).all()
        and (sheet[6:, 16:] == files.PAPER).all()
    )
    assert files.image_grid(images, 99, pad=0).shape == (4, 30, 3)


def test_video_grid_is_the_grid_of_each_frame():
    videos = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6, 3), dtype=np.uint8)
    sheet = files.video_grid(videos, 2)
    assert sheet.shape == (3, 3 * 4 + 4, 2 * 6 + 2, 3)
    for t in range(3):
        assert np.array_equal(sheet[t], files.image_grid(videos[:, t], 2))


def test_film_strip():
    video = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    strip = files.film_strip(video)
    assert strip.shape == (4, 30, 3)
    assert all(np.array_equal(strip[:, t * 6 : t * 6 + 6], video[t]) for t in range(5))


@pytest.mark.parametrize("name,write", [("a.mp4", files.write_mp4), ("a.gif", files.write_gif)])
def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, name, write):
    write(tmp_path / name, a_clip())
    before = (tmp_path / name).read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / name, a_clip(index=20))
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == before


def test_failure_halfway_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_path(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == tmp_path and not (tmp_path / "a.png").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_wrong_arrays_are_refused_before_a_file_appears(tmp_path):
    for bad in (
        np.zeros((8, 32, 32, 3)),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
    ):
        with pytest.raises(ValueError, match="expected uint8 RGB"):
            files.write_mp4(tmp_path / "a.mp4", bad)
    with pytest.raises(ValueError, match="columns"):
        files.image_grid(np.zeros((2, 8, 8, 3), np.uint8), 0)
    assert list(tmp_path.iterdir()) == []
