"""One training at a time in a stage folder."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import UserError
from cmd_jax.files import is_remote
from cmd_jax.running.array_store import check_name
from cmd_jax.running.distributed import leader_alone
from cmd_jax.running.lease import Lease
from cmd_jax.running.steps import steps_in

log = logging.getLogger(__name__)


class Locked(NamedTuple):
    resuming: bool  # whether the folder holds checkpoints of an earlier part of a run
    lease: Lease | None  # the lock of a bucket, which can be lost; in process 0


@contextlib.contextmanager
def locked_run(folder: Path | BucketPath) -> Iterator[Locked]:
    """Make the stage folder and lock it.

    Until the end no other run can train in it; the lock, held by process 0, goes with it, however that ends.
    """
    with contextlib.ExitStack() as held:
        leases = [None]

        def lock_and_look():
            lock = held.enter_context(lock_folder(folder))
            leases[0] = lock if is_remote(folder) else None
            return bool(steps_in(folder).numbers())

        yield Locked(leader_alone(lock_and_look), *leases)


def lock_folder(folder: Path | BucketPath):
    """The lock of a stage folder, which is made, to be held as a context: an open file, or a Lease.

    UserError where another process has it, or for its name; of a Lease when it is entered.
    """
    check_name(folder)
    if is_remote(folder):
        return Lease(folder / ".lock", "trains in it", "workdir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as e:
        raise UserError("workdir", folder, f"cannot be written ({e.strerror})", "give a folder you may write to") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError("workdir", folder, "another process trains in it", "wait for it, or take another") from None
    except OSError:
        log.warning("%s is on a file system without locks: take care not to train in it twice at a time", folder)
    return lock
