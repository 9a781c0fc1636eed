"""Encoding clips by all processes over the mesh; filling a store of latents with that, ahead or while it is used."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from cmd_jax.data.ahead import Shelf
from cmd_jax.data.latents import LatentStatistics, Sums
from cmd_jax.data.pipeline import batches, local_rows
from cmd_jax.data.store import LatentStore
from cmd_jax.errors import UserError
from cmd_jax.running.distributed import gather, gather_items, leader_alone
from cmd_jax.sharding import batch_sharding, partitioning

REPORT_EVERY = 10.0  # seconds


class Encoder:
    """encode(params, batch) of examples: each group of processes that hold the same rows of a batch has its own.

    read(number) -> an example of a batch. groups: how many there are; group: that of this process; writes: whether this
    process is its group's first. All processes must make it, and call it alike. shelf: as of `batches`.
    """

    def __init__(
        self, read: Callable[[int], dict], encode, params, mesh, rules, attention="auto", *,
        batch_size: int, threads: int, prefetch: int, shelf: Shelf | None = None,
    ):  # fmt: skip
        self.read, self.params, self.batch_size = read, params, batch_size
        self.mesh, self.rules, self.attention = mesh, rules, attention
        self.options = {"threads": threads, "prefetch": prefetch, "shelf": shelf}
        self._encode = jax.jit(encode, out_shardings=batch_sharding(mesh))
        rows = [tuple(json.loads(text)) for text in gather(json.dumps(local_rows(batch_size, mesh)))]
        self._rows = list(dict.fromkeys(rows))
        if sum(map(len, self._rows)) != batch_size:
            problem = "some processes share a part of their rows of a batch"
            raise UserError("mesh.tensor", mesh.shape["tensor"], problem, "use a divisor of the devices of a process")
        self.groups, self.group = len(self._rows), self._rows.index(rows[jax.process_index()])
        self.writes = rows.index(rows[jax.process_index()]) == jax.process_index()

    def __call__(self, parts: Sequence[Sequence[int]]) -> Iterator[dict[str, np.ndarray]]:
        """Encode parts[g] by group g; groups beyond them encode the first one's for company.

        -> {name: [n, ...]} of this process's part in its order, some examples at a time, to be taken to their end.
        """
        parts = [parts[g] if g < len(parts) else parts[0] for g in range(self.groups)]
        ours, mine, waiting = parts[self.group], len(self._rows[self.group]), None
        calls = max(-(-len(part) // len(rows)) for part, rows in zip(parts, self._rows, strict=True))
        plan = PartPlan(dict(zip(self._rows[self.group], range(mine), strict=True)), ours, self.batch_size)
        read = lambda number, _: self.read(number)  # noqa: E731
        data = batches(read, plan, self.mesh, start=0, stop=calls, **self.options)
        with contextlib.closing(data):
            for call, batch in enumerate(data):
                with partitioning(self.mesh, self.rules, self.attention):
                    out = self._encode(self.params, {name: x for name, x in batch.items() if name != "id"})
                if waiting:  # its rows are fetched while the devices work on the next ones
                    yield own(*waiting)
                waiting = out, len(ours) - call * mine
            yield own(*waiting)


class PartPlan(NamedTuple):
    """As a BatchPlan: which example stands in which row, those of other processes left out."""

    rows: dict[int, int]  # global row -> its place among this process's
    examples: Sequence[int]
    batch_size: int

    def id(self, step: int, row: int) -> int:
        place = step * len(self.rows) + self.rows[row]
        return int(self.examples[min(place, len(self.examples) - 1)])

    def rng(self, step: int, row: int) -> None:
        """Examples draw by their numbers."""


def own(arrays: dict[str, jax.Array], count: int) -> dict[str, np.ndarray]:
    """The rows of a batch that lie on this process's devices, at most `count`, on the host."""

    def rows(x):
        parts = {shard.index[0].indices(len(x))[0]: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(data) for _, data in sorted(parts.items())])[: max(count, 0)]

    return {name: rows(x) for name, x in arrays.items()}


class Filler:
    """Fills a store by all processes in step, each group of them a shard at a time.

    name_of(clip): to be kept beside its latents. reasons: as of `LatentStore.write`. report(line): how far it is.
    """

    def __init__(
        self, store: LatentStore, encoder: Encoder, name_of, reasons: dict[str, str], report: Callable[[str], None]
    ):
        self.store, self.encoder, self.name_of, self.reasons, self.report = store, encoder, name_of, reasons, report
        self.missing: set[int] = set(leader_alone(store.missing))
        self._begun, self._told, self._made = time.monotonic(), 0.0, 0

    def fill(self, shards: Iterable[int] | None = None, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Until these shards, by default all, are finished -> True, or any process is asked to stop -> False.

        Whoever else fills the store spares us what it makes.
        """
        needed = self.missing.copy() if shards is None else self.missing.intersection(map(int, shards))
        while needed:
            if any(json.loads(text) for text in gather(json.dumps(stopped()))):
                return False
            with contextlib.ExitStack() as held:
                make, done = self._claimed(needed, held)
                if make:
                    self._make(make)
            self.missing -= {*make, *done}
            needed &= self.missing
            self._tell()
        if not self.missing:
            leader_alone(self.store.finish)
        return True

    def _claimed(self, needed: set[int], held: contextlib.ExitStack) -> tuple[list[int], list[int]]:
        """(the shards that are made now, a group one; those that somebody else has finished)."""

        def claim():
            wanted = [*sorted(needed), *sorted(self.missing - needed)]
            claimed, done = self.store.claim(wanted, self.encoder.groups)
            for lock in claimed.values():
                held.enter_context(lock)
            if not claimed and not done:
                time.sleep(self.store.poll)  # others are making all of them
            return sorted(claimed), done

        return leader_alone(claim)

    def _make(self, shards: list[int]):
        rows = self.encoder([self.store.examples_of(k) for k in shards])
        if self.encoder.writes and self.encoder.group < len(shards):
            self.store.write(shards[self.encoder.group], rows, self.name_of, self.reasons)
        for _ in rows:  # to its end, as the others
            pass
        gather("")  # all are written
        self._made += sum(len(self.store.examples_of(k)) for k in shards)

    def _tell(self):
        now, count = time.monotonic(), self.store.shards.count
        if not self._made or (self.missing and now < self._told + REPORT_EVERY):
            return
        self._told, rate = now, self._made / (now - self._begun)
        left = sum(len(self.store.examples_of(k)) for k in self.missing) / rate / 60
        eta = f", ETA {left:.1f} min" if self.missing else f"; they lie in {self.store.shards.folder}"
        self.report(f"encoded {self._made} clips at {rate:.1f}/s, {count - len(self.missing)} of {count} shards{eta}")

    def statistics(self) -> LatentStatistics:
        """Of the store; the shards over which they go are made first."""
        self.fill(self.store.measured())
        return self.store.statistics()

    def filled(self, plan, steps: range, data: Iterator[dict], stopped: Callable[[], bool], busy) -> Iterator[dict]:
        """The batches of these steps as `data` has them, which reads `prefetch` of them ahead and waits for what is
        filled here before.

        Ends early where a process is asked to stop before the shards of a step are there. busy(): a context of long
        pauses.
        """
        try:
            for step in steps:
                if self.missing:
                    near = steps[step - steps.start :][: 1 + self.encoder.options["prefetch"]]
                    with busy():
                        if not self.fill(self.store.shards_of([plan.ids(s) for s in near]), stopped):
                            return
                yield next(data)
        finally:
            self.store.abandon()


def measure(encoder: Encoder, count: int) -> LatentStatistics:
    """Of examples 0..count-1, which are not kept; every process must call it."""
    parts = np.array_split(np.arange(count), min(encoder.groups, count))
    sums = {"content": Sums(), "motion": Sums()}
    for rows in encoder(parts):
        for name, part in sums.items():
            for values in rows[name] if encoder.writes and encoder.group < len(parts) else ():
                part.add(values)
    mine = {encoder.group: {name: part.as_json() for name, part in sums.items()}} if encoder.writes else {}
    return LatentStatistics.of(part for part in gather_items(mine) if part["content"]["count"])
