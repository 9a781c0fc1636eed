"""The bytes of a file by their places: on this machine through a memory map, in a bucket by range requests."""

import bisect
import contextlib
import itertools
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from cmd_jax.files import is_remote

Span = tuple[int, int]  # from a byte to before another one

PIECE = 2**23  # bytes of a request, which take longer than its way there and back
GAP = 2**16  # so many bytes that nobody wants are fetched rather than that another request is made
AHEAD = 16  # requests under way at a time


class LocalBytes:
    """size: in bytes."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            # To map nothing is an error.
            self._view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b"")

    def expect(self, spans: Iterable[Span]):
        """As of BucketBytes; the operating system reads ahead by itself."""

    def read(self, start: int, stop: int) -> memoryview:
        """A view of the file: what changes there, changes here."""
        return self._view[start:stop]


class BucketBytes:
    """As LocalBytes; what is expected is fetched ahead of its reading, in large requests, and then forgotten."""

    def __init__(self, path, pool: Executor):
        self.path, self.size, self._pool = path, path.stat().st_size, pool
        self.expect(())

    def expect(self, spans: Iterable[Span]):
        """Tell what is going to be read, each span as often as it is named; best in the order of their places.

        What is read unexpected is requested by itself.
        """
        self._expected = Counter(span for span in spans if span[0] < span[1])
        self._pieces = _pieces(sorted(self._expected))
        self._starts, self._requested = [start for start, _ in self._pieces], 0
        self._wanted = Counter(i for span in self._expected.elements() for i in self._touched(span))
        self._futures: dict[int, Future] = {}

    def read(self, start: int, stop: int) -> bytes | memoryview:
        if not self._expected[start, stop]:
            return self.path.read_range(start, stop)
        self._expected[start, stop] -= 1
        touched, parts = self._touched((start, stop)), []
        while self._requested < min(touched.stop - 1 + AHEAD, len(self._pieces)):
            piece = self._pieces[self._requested]
            self._futures[self._requested] = self._pool.submit(self.path.read_range, *piece)
            self._requested += 1
        for i in touched:
            first, data = self._starts[i], self._futures[i].result()
            parts.append(memoryview(data)[max(start - first, 0) : stop - first])
            self._wanted[i] -= 1
            if not self._wanted[i]:
                del self._futures[i]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _touched(self, span: Span) -> range:
        """The numbers of the pieces that hold it."""
        return range(bisect.bisect_right(self._starts, span[0]) - 1, bisect.bisect_left(self._starts, span[1]))


def _pieces(spans: list[Span]) -> list[Span]:
    """The requests for sorted spans: those that lie close together in one, and none larger than PIECE."""
    runs = []
    for start, stop in spans:
        if runs and start <= runs[-1][1] + GAP:
            runs[-1][1] = max(runs[-1][1], stop)
        else:
            runs.append([start, stop])
    cuts = ([*range(start, stop, PIECE), stop] for start, stop in runs)
    return [piece for cut in cuts for piece in itertools.pairwise(cut)]


@contextlib.contextmanager
def open_bytes(path) -> Iterator[LocalBytes | BucketBytes]:
    """A file of this machine, or of a bucket. OSError if there is none, or while it is read."""
    if not is_remote(path):
        yield LocalBytes(path)
        return
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix=f"read {path.name}")
    try:
        yield BucketBytes(path, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
