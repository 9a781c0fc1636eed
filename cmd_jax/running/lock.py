"""One training at a time in a stage folder."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from cmd_jax.errors import UserError
from cmd_jax.running.array_store import check_name
from cmd_jax.running.distributed import leader_alone

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked_run(folder: Path) -> Iterator[bool]:
    """Make the stage folder and lock it -> whether it holds checkpoints of an earlier part of a run.

    Until the end no other run can train in it; the lock, held by process 0, goes with it, however that ends.
    """
    with contextlib.ExitStack() as held:

        def lock_and_look():
            held.enter_context(lock_folder(folder))
            return any(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))

        yield leader_alone(lock_and_look)


def lock_folder(folder: Path):
    """The open lock file of a stage folder, which is made. UserError where another process has it, or for its name."""
    check_name(folder)
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
