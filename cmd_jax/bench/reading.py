"""How fast batches are read, and how long a step that takes them waits."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmd_jax.data.ahead import Shelf
from cmd_jax.data.pipeline import BatchPlan, BucketPlan, batches, video_reader
from cmd_jax.data.sources import open_source
from cmd_jax.data.store import open_store
from cmd_jax.performance.timing import Times, once
from cmd_jax.prepare import store_folder
from cmd_jax.sharding import make_mesh

PACES = (0.5, 0.9)  # of steps, as parts of the speed of reading
WARMUP = 2  # batches
SECONDS = 2.0
ENDLESS = 2**31 - 1  # batches


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
    that a step waits which takes the batches at a part of that speed, by that part.

    Of at least `rounds` batches, and as many as are read in SECONDS: the first ones were read ahead.
    """
    reading, mesh = reading_of(config, workdir), make_mesh(config.mesh)
    plan = reading.plan(size)

    def taken(count: int, seconds: float, pause: float) -> tuple[list[float], float]:
        """Take `count` batches, and more until so many seconds are over, each `pause` after the one before -> (seconds
        that each was waited for, the share of waiting)."""
        stream = batches(reading.read, plan, mesh, start=0, stop=ENDLESS, threads=config.data.threads,
                         prefetch=config.data.prefetch, shelf=reading.shelf)  # fmt: skip
        with contextlib.closing(stream):
            for _ in range(WARMUP):
                next(stream)
            waited, begun = [], time.perf_counter()
            while len(waited) < count or time.perf_counter() - begun < seconds:
                waited.append(once(lambda: next(stream)))
                time.sleep(pause)
            return waited, sum(waited) / (time.perf_counter() - begun)

    each, _ = taken(rounds, SECONDS, pause=0.0)
    mean, times = sum(each) / len(each), Times(tuple(each))
    return {
        "rounds": len(each),
        "p50_seconds": times.p50,
        "p95_seconds": times.p95,
        "clips_per_second": size / mean,
        "wait_shares": {f"{pace:g}": taken(len(each), 0.0, mean / pace)[1] for pace in PACES},
        "read": reading.kind,
    }
