"""Clips a second that training reads on one core, from video files, datasets and stores of latents.

    python launch/bench_reading.py [--seconds 5] [--only WORD]

Makes what it reads in a temporary folder (300 MB, a minute or two), from where the page cache gives it back: the time
that a disk takes comes on top. Each line is read by `batches()` as training reads it, by one thread, in rounds that
take turns with those of the others; the middle one counts, and "times the files" is the middle of their ratios. Seconds
are those that this process had a core, so that other work on the machine changes little. Run it
with training's memory allocation (`launch/env.sh`): large records are read faster.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import jax
import numpy as np
from PIL import Image

from cmd_jax import defaults
from cmd_jax.data.pipeline import BatchPlan, batches, video_reader
from cmd_jax.data.sources import open_source
from cmd_jax.data.store import begin_store, folder_of
from cmd_jax.sharding import make_mesh

CONFIG = Path(__file__).parents[1] / "configs/ucf101.py"
ROUNDS = 3
CMD = {"content": (64, 64, 3), "motion": (16, 128, 16)}  # of 16 frames of 64x64 pixels
SD = {"frames": (16, 64, 128, 4)}  # of 16 frames of 512x1024


class Line(NamedTuple):
    """What is read. read, clips, batch_size: of `batches()`. size: bytes of a record, or of a file."""

    name: str
    read: object
    clips: int
    batch_size: int
    size: float
    files: str = ""  # the line to compare it with


def write_videos(folder: Path, count: int, frames: int, height: int, width: int, codec: str, rate: int):
    """Files of a textured picture that moves over another one, in `rate` kilobits a second."""
    rng, pad = np.random.default_rng(0), 64

    def texture() -> np.ndarray:
        shape, out = (height + pad, width + pad), 128
        for cell, contrast in ((4, 2), (16, 12), (64, 30)):
            grey = [rng.normal(0, contrast, [-(-n // cell) for n in shape]).astype(np.float32) for _ in range(3)]
            smooth = [Image.fromarray(g).resize(shape[::-1], Image.Resampling.BICUBIC) for g in grey]
            out = out + np.stack([np.asarray(g) for g in smooth], -1)
        return out

    for number in range(count):
        layers = texture(), texture()
        inner = np.s_[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        folder.mkdir(parents=True, exist_ok=True)
        with av.open(str(folder / f"{number}.{'avi' if codec == 'mpeg4' else 'mp4'}"), "w") as file:
            stream = file.add_stream(codec, rate=25)
            stream.width, stream.height, stream.bit_rate, stream.pix_fmt = width, height, rate * 1000, "yuv420p"
            for t in range(frames):
                x, y = t % pad, (t * 2) % pad
                picture = layers[0][y : y + height, :width].copy()
                picture[inner] = layers[1][:height, x : x + width][inner]
                frame = np.clip(picture + rng.normal(0, 1.2, picture.shape), 0, 255).astype(np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode(None))


def source_of(source: str, root: Path, side: int):
    config = defaults.stage("autoencoder").data
    config.update(source=source, root=str(root), height=side, width=side)
    return open_source(config, root.parent / "probe.jsonl")


def of_videos(folder: Path, side: int, batch_size: int, keep: str, videos: dict) -> Iterator[Line]:
    """Windows of 16 frames from files, and from the dataset that ingest makes of them."""
    write_videos(folder / "files", **videos)
    command = [sys.executable, "-m", "cmd_jax.main", "ingest", f"--config={CONFIG}:autoencoder"]
    settings = {"data.layout": "classes", "data.height": side, "data.width": side, "ingest.codec": keep}
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    subprocess.run([*command, f"--source={folder}/files", f"--out={folder}/dataset"], check=True, capture_output=True)
    for name, kind, root in (("files", "folder", "files"), (keep, "dataset", "dataset/clips")):
        sizes = [path.stat().st_size for path in (folder / root).rglob("*") if path.stat().st_size > 10_000]
        source, repeat = source_of(kind, folder / root.split("/")[0], side), -(-batch_size // videos["count"])
        read = video_reader(source)
        reading = lambda index, rng, read=read, source=source: read(index % len(source), rng)  # noqa: E731
        prefix = f"{side}x{side}, "
        yield Line(
            prefix + name, reading, len(source) * repeat, batch_size, sum(sizes) / len(source),
            prefix + "files" if kind == "dataset" else "",
        )  # fmt: skip


def of_latents(folder: Path, name: str, arrays: dict, count: int, batch_size: int) -> Iterator[Line]:
    """From a store of random values, in four shards."""
    rng, shard = np.random.default_rng(0), count // 4
    plan = {
        "made_of": {}, "made_with": {}, "class_names": [], "has_texts": False, "clips": count, "examples": count,
        "held_out": 0, "shard": shard, "arrays": {n: {"dtype": "float16", "shape": [*x]} for n, x in arrays.items()},
    }  # fmt: skip
    order = lambda: (np.arange(count), np.arange(count, dtype=np.uint64))  # noqa: E731
    store = begin_store(folder_of(folder, "cmd"), plan, order)
    for k in range(4):
        values = {n: rng.normal(size=(shard, *shape)) for n, shape in arrays.items()}
        store.write(k, [values | {"label": np.arange(shard)}], str)
    yield Line(f"{name}, float16", store.read, count, batch_size, sum(2 * np.prod(shape) for shape in arrays.values()))


def rate(line: Line, mesh, seconds: float) -> float:
    """Clips a second: of some batches, after the first ones, by which time readers are warm."""
    plan, threads = BatchPlan(line.clips, line.batch_size, seed=0), threading.active_count()
    with contextlib.closing(batches(line.read, plan, mesh, start=0, stop=10**9, threads=1, prefetch=2)) as data:
        for _ in range(3):
            jax.block_until_ready(next(data))
        begun, done = time.process_time(), 0
        while (spent := time.process_time() - begun) < seconds:
            jax.block_until_ready(next(data))
            done += line.batch_size
    while threading.active_count() > threads:  # what is read ahead must not count for the next line
        time.sleep(0.01)
    return done / spent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round")
    parser.add_argument("--only", default="", help="lines with this word in their names")
    flags = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    mesh = make_mesh(defaults.stage("content").mesh)
    with tempfile.TemporaryDirectory() as folder:
        small = {"count": 24, "frames": 171, "height": 240, "width": 320, "codec": "mpeg4", "rate": 400}
        large = {"count": 8, "frames": 64, "height": 512, "width": 512, "codec": "libx264", "rate": 3000}
        makers = {
            "64x64": lambda path: of_videos(path, 64, 64, "raw", small),
            "512x512": lambda path: of_videos(path, 512, 8, "jpeg", large),
            "CMD latents": lambda path: of_latents(path, "CMD latents", CMD, 1024, 256),
            "SD latents": lambda path: of_latents(path, "SD latents", SD, 128, 32),
        }
        lines = [
            line
            for k, (name, maker) in enumerate(makers.items())
            if flags.only in name
            for line in maker(Path(folder) / str(k))
        ]
        rates: dict[str, list[float]] = {line.name: [] for line in lines}
        for _, line in itertools.product(range(ROUNDS), lines):
            rates[line.name].append(rate(line, mesh, flags.seconds))
        print(f"{'what is read':24} {'KB a clip':>10} {'clips/s':>10} {'times the files':>16}")
        for line in lines:
            paired = [a / b for a, b in zip(rates[line.name], rates.get(line.files, []), strict=False)]
            ratio = f"{statistics.median(paired):16.1f}" if paired else ""
            print(f"{line.name:24} {line.size / 1000:10,.0f} {statistics.median(rates[line.name]):10,.1f} {ratio}")


if __name__ == "__main__":
    main()
