"""How fast batches are read, and how long a step that takes them waits."""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cmd_jax.data.ahead import Shelf
from cmd_jax.data.pipeline import BatchPlan, BucketPlan, Waited, batches, video_reader
from cmd_jax.data.sources import open_source
from cmd_jax.data.store import open_store
from cmd_jax.performance.timing import Times
from cmd_jax.prepare import store_folder
from cmd_jax.sharding import make_mesh

PACES = (0.5, 0.9)  # of steps, as parts of the speed of reading
WARMUP = 2  # batches


class Reading(NamedTuple):
    """What batches are read of: kind, "latents" or "clips"; plan(batch size) -> which of them make which batch."""

    kind: str
    read: Callable
    shelf: Shelf | None
    plan: Callable[[int], BatchPlan]


def reading_of(config, workdir: Path | None) -> Reading:
    """Of the latents kept in the workdir, where all are there, else of the clips."""
    kept, seed = config.latents.starts and (config.latents.store or workdir), config.seed
    store = open_store(store_folder(config, workdir)) if kept else None
    if store and store.complete:
        return Reading("latents", store.read, store.shelf, lambda size: BatchPlan(len(store), size, seed))
    source = open_source(config.data, cache=workdir and workdir / "probe.jsonl")

    def plan(size: int) -> BatchPlan:
        if source.buckets.any():  # a batch is of one size
            return BucketPlan(np.arange(len(source)), source.buckets, size, seed)
        return BatchPlan(len(source), size, seed)

    return Reading("clips", video_reader(source), source.shelf, plan)


def measure(config, workdir: Path | None, size: int, rounds: int) -> dict:
    """The part of a record that is of reading: clips a second where nothing else is done, and the share of its time
    that a step waits which takes the batches at a part of that speed, by that part."""
    reading, mesh = reading_of(config, workdir), make_mesh(config.mesh)
    plan = reading.plan(size)

    def stream():
        return batches(reading.read, plan, mesh, start=0, stop=WARMUP + rounds, threads=config.data.threads,
                       prefetch=config.data.prefetch, shelf=reading.shelf)  # fmt: skip

    def taken(pause: float) -> tuple[float, list[float]]:
        """Take all batches, each `pause` seconds after the last -> (share of waiting, seconds of each)."""
        waited, seconds = Waited(stream()), []
        for _ in islice(waited, WARMUP):
            pass
        waited.seconds, begun = 0.0, time.perf_counter()
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(next(waited))
            seconds.append(time.perf_counter() - start)
            time.sleep(pause)
        share = waited.seconds / (time.perf_counter() - begun)
        waited.items.close()
        return share, seconds

    _, seconds = taken(0.0)
    mean = sum(seconds) / rounds
    shares = {f"{pace:g}": taken(mean / pace)[0] for pace in PACES}
    times = Times(tuple(seconds))
    return {
        "rounds": rounds,
        "p50_seconds": times.p50,
        "p95_seconds": times.p95,
        "clips_per_second": size / mean,
        "wait_shares": shares,
        "read": reading.kind,
    }
