"""Videos that a notebook shows where they stand."""

import base64
import csv
import html
import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cmd_jax.files import as_path, write_text
from cmd_jax.report.video import to_uint8, write_mp4


class Videos:
    """Videos with a caption each; the last value of a notebook's cell is shown, and they play.

    videos: [N, T, H, W, 3], uint8, or floats in [-1, 1], which are clipped there. captions: N texts, or none.
    """

    def __init__(self, videos, captions: Sequence[str] = (), fps: float = 8):
        videos = np.asarray(videos)
        self.videos = videos if videos.dtype == np.uint8 else to_uint8(videos)
        if self.videos.ndim != 5 or self.videos.shape[-1] != 3:
            raise ValueError(f"expected videos [N, T, H, W, 3], got {list(videos.shape)}")
        self.captions, self.fps = [*captions] or [""] * len(videos), fps
        if len(self.captions) != len(self.videos):
            raise ValueError(f"{len(self.captions)} captions of {len(self.videos)} videos")

    @classmethod
    def of(cls, batches: Iterable, captions: Sequence[str] = (), fps: float = 8) -> "Videos":
        """Of the batches that a Sampler gives, fetched one after the other."""
        return cls(np.concatenate([to_uint8(batch.video) for batch in batches]), captions, fps)

    def save(self, folder) -> Path:
        """Write them as mp4 files with metadata.csv, which names their captions: a folder that training reads."""
        folder = as_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{i:04d}.mp4" for i in range(len(self))]
        for name, video in zip(names, self.videos, strict=True):
            write_mp4(folder / name, video, self.fps, scale=1)
        table = io.StringIO()
        csv.writer(table).writerows([("file_name", "text"), *zip(names, self.captions, strict=True)])
        write_text(folder / "metadata.csv", table.getvalue())
        return folder

    def __len__(self) -> int:
        return len(self.videos)

    def __repr__(self) -> str:
        return f"Videos({', '.join(map(str, self.videos.shape))})"

    def _repr_html_(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return "".join(self._figure(i, Path(folder, f"{i}.mp4")) for i in range(len(self)))

    def _figure(self, index: int, path: Path) -> str:
        write_mp4(path, self.videos[index], self.fps)
        data, caption = base64.b64encode(path.read_bytes()).decode(), html.escape(self.captions[index])
        return (
            f'<figure style="display: inline-block; margin: 4px"><video autoplay loop muted playsinline '
            f'src="data:video/mp4;base64,{data}"></video><figcaption>{caption}</figcaption></figure>'
        )
