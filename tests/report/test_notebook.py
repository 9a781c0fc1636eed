import base64
import io
import re
from types import SimpleNamespace

import av
import numpy as np
import pytest

from cmd_jax.report.notebook import Videos


def test_a_notebook_gets_videos_that_play():
    floats = np.linspace(-1, 1, 2 * 4 * 16 * 24 * 3, dtype=np.float32).reshape(2, 4, 16, 24, 3)
    videos = Videos.of([SimpleNamespace(video=floats[:1]), SimpleNamespace(video=floats[1:])], ["<a>", "b"], fps=5)
    assert (
        videos.videos.dtype == np.uint8
        and videos.videos[0, 0, 0, 0, 0] == 0
        and videos.videos[-1, -1, -1, -1, -1] == 255
    )
    page = videos._repr_html_()
    files = [base64.b64decode(data) for data in re.findall(r'src="data:video/mp4;base64,([^"]*)"', page)]
    assert len(files) == 2 and "&lt;a&gt;" in page and "<a>" not in page
    for file, wanted in zip(files, videos.videos, strict=True):
        with av.open(io.BytesIO(file)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 5
        small = np.stack(frames)[:, 4::8, 4::8]  # enlarged by 8
        assert small.shape == wanted.shape and np.abs(small.astype(int) - wanted).mean() < 8


@pytest.mark.parametrize("shape, captions", [((4, 16, 24, 3), []), ((2, 4, 16, 24, 3), ["one"])])
def test_what_is_no_video(shape, captions):
    with pytest.raises(ValueError, match="expected videos|captions"):
        Videos(np.zeros(shape, np.uint8), captions)
