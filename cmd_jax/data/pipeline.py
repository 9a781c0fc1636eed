"""From a source of clips to global batches on the mesh. What is in the batch at step n depends on seed and n alone."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from cmd_jax.data.ahead import Ahead, Shelf
from cmd_jax.data.draws import Draws
from cmd_jax.errors import UserError
from cmd_jax.sharding import batch_sharding

TURN = 0.004  # seconds of a thread's turn; to hand over what it has read takes a hundredth of that


def video_reader(source, tokenizer=None) -> Callable[[int, np.random.Generator], dict]:
    """Examples of a video source: index -> {"video": uint8 [T, H, W, 3], "label": int32 []}.

    With a tokenizer they have "ids" too, int32 [L], of the clip's text, of several one that the generator draws.
    """

    def read(index, rng):
        video, label, text = source.clip(index, rng)
        ids = {} if tokenizer is None else {"ids": tokenizer([text])[0]}
        return {"video": video, "label": np.int32(label), **ids}

    return read


class BatchPlan:
    """Which clips make the batch of which step: epoch after epoch, each in an order drawn from (seed, epoch).

    clips: how many there are, or the indices of those to take, int [N].
    """

    def __init__(self, clips: int | np.ndarray, batch_size: int, seed: int):
        self.indices, self.clips = (None, clips) if isinstance(clips, int) else (clips, len(clips))
        if self.clips < batch_size:
            raise UserError(
                "train.batch_size", batch_size, f"more than the {self.clips} usable clips: no batch per epoch",
                f"use at most {self.clips}, or add clips",
            )  # fmt: skip
        self.batch_size, self.seed = batch_size, seed
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = self._draw(epoch)
            # Threads at other steps may replace the table meanwhile: what is returned must not be read from it again.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return order

    def _draw(self, epoch: int) -> np.ndarray:
        """The clips of an epoch in their order."""
        return order_of(self.clips, self.seed, epoch)

    def id(self, step: int, row: int) -> int:
        """Index of the clip in a row of the batch at `step`."""
        epoch, place = divmod(step * self.batch_size + row, self.clips)
        place = self._order(epoch)[place]
        return int(place if self.indices is None else self.indices[place])

    def ids(self, step: int) -> np.ndarray:
        """Clip indices of the batch at `step`: int [B]."""
        return np.array([self.id(step, row) for row in range(self.batch_size)])

    def rng(self, step: int, row: int) -> np.random.Generator:
        """The generator for everything random about one example (its start frame)."""
        return Draws((self.seed, 1, step, row))


class BucketPlan(BatchPlan):
    """A BatchPlan whose batches hold clips of one bucket each.

    buckets: int [N], the bucket of each of `indices`. In an epoch each bucket's clips are drawn into whole batches, of
    which the order is drawn too; the few that are left over, others in each epoch, are passed over.
    """

    def __init__(self, indices: np.ndarray, buckets: np.ndarray, batch_size: int, seed: int):
        self.of_bucket = by_bucket(np.arange(len(indices)), buckets)
        if small := [len(places) for places in self.of_bucket if len(places) < batch_size]:
            raise UserError(
                "train.batch_size", batch_size, f"more than the {min(small)} clips of a size of data.buckets",
                "use at most that, fewer sizes, or add clips",
            )  # fmt: skip
        super().__init__(indices, batch_size, seed)
        self.batches = sum(len(places) // batch_size for places in self.of_bucket)
        self.clips = self.batches * batch_size  # of an epoch

    def _draw(self, epoch: int) -> np.ndarray:
        rng, batches = np.random.default_rng((self.seed, 0, epoch)), []
        for places in self.of_bucket:
            whole = rng.permutation(places)[: len(places) // self.batch_size * self.batch_size]
            batches.append(whole.reshape(-1, self.batch_size))
        return rng.permutation(np.concatenate(batches)).ravel()


def by_bucket(indices: np.ndarray, buckets: np.ndarray | None) -> list[np.ndarray]:
    """The indices, int [N], of each bucket there is; buckets: int [N], or None, where all are in one."""
    return [indices] if buckets is None else [indices[buckets == bucket] for bucket in np.unique(buckets)]


class FixedPlan:
    """The same batches whenever they are asked for: of indices, int [N], in their order, the last one filled up from
    the first on. Every window is drawn once and for all, and is none that training draws.

    buckets: int [N], the bucket of each, where a batch must be of one; each bucket has its own last batch.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int, buckets: np.ndarray | None = None):
        parts = by_bucket(indices, buckets)
        self._indices = np.concatenate([np.resize(x, -(-len(x) // batch_size) * batch_size) for x in parts])
        self.batch_size, self.seed, self.batches = batch_size, seed, len(self._indices) // batch_size

    def id(self, step: int, row: int) -> int:
        return int(self._indices[step * self.batch_size + row])

    def rng(self, step: int, row: int) -> np.random.Generator:
        return Draws((self.seed, 3, step, row))


def order_of(clips: int, seed: int, epoch: int) -> np.ndarray:
    """The indices of all clips in the order of an epoch, int [clips]."""
    return np.random.default_rng((seed, 0, epoch)).permutation(clips)


def to_global(rows: dict[int, dict], batch_size: int, mesh) -> dict[str, jax.Array]:
    """Examples by global row (at least this process's) -> arrays [B, ...] split over the mesh."""
    sharding = batch_sharding(mesh)

    def one(name, sample):
        def shard(index):
            return np.stack([rows[r][name] for r in range(*index[0].indices(batch_size))])

        return jax.make_array_from_callback((batch_size, *np.shape(sample)), sharding, shard)

    return {name: one(name, sample) for name, sample in next(iter(rows.values())).items()}


def local_rows(batch_size: int, mesh) -> list[int]:
    """The global batch rows that live on this process's devices."""
    shards = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (index,) in shards for row in range(*index.indices(batch_size))})


def batches(
    read, plan: BatchPlan | FixedPlan, mesh, *, start: int, stop: int, threads: int, prefetch: int,
    shelf: Shelf | None = None,
) -> Iterator[dict]:  # fmt: skip
    """Global batches of steps start..stop-1, read ahead while the device computes.

    Each process reads the rows of its own devices, by so many threads; `prefetch` batches of them are read or in
    reading. "id" int32 [B] says which clips they are. A thread reads some rows in turn where one takes less than what
    handing it over takes. shelf: where examples lie that are fetched from a bucket; `read` waits for what is not there.
    """
    wanted = local_rows(plan.batch_size, mesh)
    total, ahead, turn = (stop - start) * len(wanted), max(threads, prefetch * len(wanted)), 1

    def load(positions: range) -> tuple[list[dict], float]:
        """-> (examples, seconds of each)."""
        begun, examples = time.perf_counter(), []
        for position in positions:
            step, place = divmod(position, len(wanted))
            index = plan.id(start + step, wanted[place])
            examples.append({"id": np.int32(index), **read(index, plan.rng(start + step, wanted[place]))})
        return examples, (time.perf_counter() - begun) / len(positions)

    places = ((step, row) for step in range(start, stop) for row in wanted)
    fetching = shelf and Ahead(shelf, (plan.id(step, row) for step, row in places))
    pool, reading, rows, given, taken = ThreadPoolExecutor(threads), deque(), [], 0, 0
    try:
        while taken < total:
            while given < total and (given + turn <= taken + ahead or not reading):
                positions = range(given, min(given + turn, total))
                reading.append(pool.submit(load, positions))
                given = positions.stop
            examples, seconds = reading.popleft().result()
            turn = max(1, min(int(TURN / max(seconds, 1e-9)), ahead // (2 * threads)))
            rows += examples
            taken += len(examples)
            if fetching:
                fetching.taken = taken
            while len(rows) >= len(wanted):
                batch, rows = rows[: len(wanted)], rows[len(wanted) :]
                yield to_global(dict(zip(wanted, batch, strict=True)), plan.batch_size, mesh)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if fetching:
            fetching.close()
