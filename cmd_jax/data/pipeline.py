"""From a source of clips to global batches on the mesh. What is in the batch at step n depends on seed and n alone."""

from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.sharding import batch_sharding


def video_reader(source, tokenizer=None) -> Callable[[int, np.random.Generator], dict]:
    """Examples of a video source: index -> {"video": uint8 [T, H, W, 3], "label": int32 []}.

    With a tokenizer they have "ids" too, int32 [L], of the clip's text, of several one that the generator draws.
    """

    def read(index, rng):
        video, label = source.clip(index, rng)
        ids = {} if tokenizer is None else {"ids": tokenizer([source.text(index, rng)])[0]}
        return {"video": video, "label": np.int32(label), **ids}

    return read


class BatchPlan:
    """Which clips make the batch of which step: epoch after epoch, each in an order drawn from (seed, epoch)."""

    def __init__(self, clips: int, batch_size: int, seed: int):
        if clips < batch_size:
            raise UserError(
                "train.batch_size", batch_size, f"more than the {clips} usable clips: no batch per epoch",
                f"use at most {clips}, or add clips",
            )  # fmt: skip
        self.clips, self.batch_size, self.seed = clips, batch_size, seed
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.clips)
            # Threads at other steps may replace the table meanwhile: what is returned must not be read from it again.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return order

    def ids(self, step: int) -> np.ndarray:
        """Clip indices of the batch at `step`: int [B]."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([self._order(p // self.clips)[p % self.clips] for p in positions])

    def rng(self, step: int, row: int) -> np.random.Generator:
        """The generator for everything random about one example (its start frame)."""
        return np.random.default_rng((self.seed, 1, step, row))


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


def batches(read, plan: BatchPlan, mesh, *, start: int, stop: int, threads: int, prefetch: int) -> Iterator[dict]:
    """Global batches of steps start..stop-1, read ahead by threads while the device computes.

    Each process reads the rows of its own devices. "id" int32 [B] says which clips they are.
    """
    wanted = local_rows(plan.batch_size, mesh)

    def load(step):
        ids = plan.ids(step)
        return {row: {"id": np.int32(ids[row]), **read(int(ids[row]), plan.rng(step, row))} for row in wanted}

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    for rows in grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options):
        yield to_global(rows, plan.batch_size, mesh)
