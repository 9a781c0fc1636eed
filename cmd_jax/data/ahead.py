"""Shards of a bucket, fetched before the steps that read them: which these are is known by the plan of the batches."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from cmd_jax.cache import GIB, Copy, current
from cmd_jax.errors import UserError

FETCHES = 4  # shards at a time

log = logging.getLogger(__name__)


class Shelf(NamedTuple):
    """Where examples lie that are fetched before they are read.

    sizes(): the bytes of each shard. shard_of(index of an example). fetch(shard): into the cache.
    """

    sizes: Callable[[], Sequence[int]]
    shard_of: Callable[[int], int]
    fetch: Callable[[int], Copy]

    def by(self, example_of: Callable[[int], int]) -> "Shelf":
        """Of examples that are named otherwise."""
        return self._replace(shard_of=lambda number: self.shard_of(example_of(number)))


class Ahead:
    """Threads that fetch the shards of examples in the order of their first use; to be closed.

    All shards, if the cache holds them together; else only as many as half of it holds, again and again behind whoever
    reads: `taken` is how many of the examples have been read. What fails is left to the reader, who will meet it too.
    """

    def __init__(self, shelf: Shelf, indices: Iterable[int]):
        self.taken, self._closed = 0, threading.Event()
        self._shelf, self._turn = shelf, threading.Lock()
        self._shards = self._needed(indices)
        for _ in range(FETCHES):  # daemons: a process that ends does not wait for what it does not need any more
            threading.Thread(target=self._work, daemon=True, name="fetch").start()

    def close(self):
        self._closed.set()

    def _work(self):
        try:
            while True:
                with self._turn:
                    shard = next(self._shards, None)
                if shard is None:
                    return
                self._shelf.fetch(shard).close()
        except (UserError, OSError):
            self.close()

    def _needed(self, indices: Iterable[int]) -> Iterator[int]:
        sizes, limit = self._shelf.sizes(), current().limit
        fits = not limit or sum(sizes) <= limit
        if not fits:
            said = "data.cache_gib=%g holds %.0f %% of the data: shards are fetched again and again"
            log.warning(said, limit / GIB, 100 * limit / sum(sizes))
        most, seen, size, first = sum(sizes) if fits else limit // 2, set(), 0, 0
        for place, index in enumerate(indices):
            if self._closed.is_set() or fits and len(seen) == len(sizes):
                return
            if (shard := self._shelf.shard_of(index)) in seen:
                continue
            if size + sizes[shard] > most:
                while self.taken < first and not self._closed.wait(0.01):
                    pass
                seen, size, first = set(), 0, place
            seen.add(shard)
            size += sizes[shard]
            yield shard
