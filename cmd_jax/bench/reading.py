"""How fast batches are read, and how long a step that takes them waits."""

import time
from itertools import islice
from pathlib import Path

import jax

from cmd_jax.data.pipeline import BatchPlan, Waited, batches
from cmd_jax.performance.timing import Times
from cmd_jax.sharding import make_mesh

PACES = (0.5, 0.9)  # of steps, as parts of the speed of reading
WARMUP = 2  # batches


def reader_of(config, workdir: Path | None):
    """-> (read, how many examples, shelf): of the latents kept in the workdir where all are there, else of clips."""
    # Here: reading needs PyAV and tfds, of which the other benchmarks are free.
    from cmd_jax.data.pipeline import video_reader
    from cmd_jax.data.sources import open_source
    from cmd_jax.data.store import open_store
    from cmd_jax.prepare import store_folder

    kept = config.latents.starts and (config.latents.store or workdir)
    store = open_store(store_folder(config, workdir)) if kept else None
    if store and store.complete:
        return store.read, len(store), store.shelf, "latents"
    source = open_source(config.data, cache=workdir and workdir / "probe.jsonl")
    return video_reader(source), len(source), source.shelf, "clips"


def measure(config, workdir: Path | None, size: int, rounds: int) -> dict:
    """The part of a record that is of reading: clips a second where nothing else is done, and the share of its time
    that a step waits which takes the batches at a part of that speed, by that part."""
    read, count, shelf, kind = reader_of(config, workdir)
    mesh = make_mesh(config.mesh)
    plan = BatchPlan(count, size, config.seed)

    def stream():
        return batches(read, plan, mesh, start=0, stop=WARMUP + rounds, threads=config.data.threads,
                       prefetch=config.data.prefetch, shelf=shelf)  # fmt: skip

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
        "read": kind,
    }
