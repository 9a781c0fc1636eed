"""Who makes which shards of a store of latents, where several trainings may fill it at a time."""

import contextlib
import fcntl
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import UserError
from cmd_jax.files import is_remote
from cmd_jax.running.lease import Lease

ASK_AGAIN = 15.0  # seconds until who fills a store in a bucket is asked again
LOOKED_AT = 16  # shards, by who waits for others to make them

Finished = Callable[[int], bool]


class FileLocks:
    """Of a store on a disk: a lock file, work/NNNNN.lock, for each shard that is being made."""

    poll = 0.05  # seconds between looks for what others make

    def __init__(self, work: Path):
        self.work = work

    def claim(self, wanted: Iterable[int], count: int, finished: Finished) -> tuple[dict[int, object], list[int]]:
        """As `LatentStore.claim`."""
        held, done = {}, []
        self.work.mkdir(parents=True, exist_ok=True)
        for k in wanted:
            if len(held) == count:
                break
            if (lock := locked(self._path(k), wait=False)) is None:
                continue
            if finished(k):
                self.forget(k)
                lock.close()
                done.append(k)
            else:
                held[k] = lock
        return held, done

    def forget(self, k: int):
        """It is made."""
        self._path(k).unlink(missing_ok=True)

    def release(self):
        """Locks go with the files that are open."""

    def _path(self, k: int) -> Path:
        return self.work / f"{k:05d}.lock"


class OneLease:
    """Of a store in a bucket: as each lock has to be renewed, there is one, FOLDER/.lock. Who has it makes all shards,
    until it releases the lock; the others wait for them."""

    poll = 1.0

    def __init__(self, folder: BucketPath):
        self.folder, self._lease, self._refused = folder, None, -math.inf

    def claim(self, wanted: Iterable[int], count: int, finished: Finished) -> tuple[dict[int, object], list[int]]:
        """As `LatentStore.claim`. Unavailable if the lock was lost."""
        held, done, mine = {}, [], self._has_lease()
        for k in itertools.islice(wanted, None if mine else LOOKED_AT):
            if len(held) == count:
                break
            if finished(k):
                done.append(k)
            elif mine:
                held[k] = contextlib.ExitStack()  # the lease is lock enough
        return held, done

    def _has_lease(self) -> bool:
        if self._lease:
            self._lease.check()
        elif time.monotonic() > self._refused + ASK_AGAIN:
            self._lease = lease_of(self.folder)
            self._refused = time.monotonic()
        return self._lease is not None

    def forget(self, k: int):
        """It is made."""

    def release(self):
        lease, self._lease = self._lease, None
        if lease:
            lease.release()


@contextlib.contextmanager
def alone(folder: Path | BucketPath) -> Iterator[None]:
    """No other process is in this context with this folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_remote(folder):
        with locked(folder / ".lock"):
            yield
        return
    while (lease := lease_of(folder)) is None:
        time.sleep(OneLease.poll)
    try:
        yield
    finally:
        lease.release()


def locked(path: Path, wait: bool = True):
    """An open file that no other process has locked, until it is closed; None if one has and this is not to wait.

    On a file system without locks it is as if nobody had: the worst is that two make the same shard.
    """
    lock = open(path, "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    except OSError:
        pass
    return lock


def lease_of(folder: BucketPath) -> Lease | None:
    """The lock of a store in a bucket, None while another process has it."""
    try:
        return Lease(folder / ".lock", "fills it", "latents.store").__enter__()
    except UserError as error:
        if error.__cause__:  # the bucket's
            raise
        return None
