"""The files of a gallery, as the samples come."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cmd_jax.errors import UserError
from cmd_jax.report import samples as reporting
from cmd_jax.report.samples import OutputFolder, SampleWriter
from cmd_jax.report.video import film_strip, image_grid, video_grid, write_gif


@pytest.fixture(scope="module")
def videos():
    return np.random.default_rng(0).integers(0, 256, (5, 3, 16, 24, 3), np.uint8)


def batch_of(videos, index):
    video = videos[index].astype(np.float32) / 127.5 - 1
    return SimpleNamespace(index=np.array(index), video=video, image=video[:, 0], original=None)


def write(folder, videos, batches, captions):
    output = SimpleNamespace(path=folder, writes=contextlib.nullcontext())
    writer = SampleWriter(output, captions, fps=8)
    for index in batches:
        writer.write(batch_of(videos, index))
    writer.finish("title")


def test_overviews_are_of_all_samples_whatever_batches_they_come_in(tmp_path, videos):
    write(tmp_path, videos, ([3, 4], [], [0, 1, 2]), list("abcde"))
    with Image.open(tmp_path / "grid.png") as picture:
        np.testing.assert_array_equal(picture, image_grid(np.stack([film_strip(v) for v in videos]), columns=1))
    with Image.open(tmp_path / "content_grid.png") as picture:
        np.testing.assert_array_equal(picture, image_grid(videos[:, 0], columns=2))
    write_gif(tmp_path / "wanted.gif", video_grid(videos, columns=2))
    assert (tmp_path / "grid.gif").read_bytes() == (tmp_path / "wanted.gif").read_bytes()
    assert len(list(tmp_path.iterdir())) == 5 * 3 + 3 + 2 + 1


def test_samples_without_a_caption_are_not_written_and_overviews_are_of_the_first(tmp_path, videos, monkeypatch):
    monkeypatch.setattr(reporting, "GRID_BYTES", 2 * videos[0].nbytes)
    write(tmp_path, videos, ([0, 1, 2, 3], [4]), list("abc"))
    assert sorted(path.stem for path in tmp_path.glob("*.mp4")) == ["0000", "0001", "0002"]
    with Image.open(tmp_path / "content_grid.png") as picture:
        np.testing.assert_array_equal(picture, image_grid(videos[:2, 0], columns=1))


def test_a_folder_that_a_process_does_not_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "gather", lambda text: [text, ""])
    with pytest.raises(UserError, match="^workdir=.*: process 1 does not see what process 0 writes there; give a"):
        OutputFolder(tmp_path, "samples").__enter__()
    assert list(tmp_path.iterdir()) == []
