"""A folder of clips as the place that no name in its lists may leave, and what its layouts find there."""

import os
import stat
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple

from cmd_jax.buckets import scheme_of
from cmd_jax.errors import UserError

IN_BUCKET = "files of a bucket are not decoded one by one"
FROM_DISK = "run cmd-jax ingest where they are on a disk or a mount; its --out, and data.root then, may be in a bucket"
COPY = "copy what it leads to in its place, or give a root that holds both"


class Entry(NamedTuple):
    """One clip as its layout lists it; `name` is relative to the root. texts: its captions, in the list's order."""

    name: str
    label: str | None = None
    texts: tuple[str, ...] = ()


def check_root(root) -> str:
    """The folder's real path."""
    if not root:
        raise UserError("data.root", root, "missing", "give the folder that holds your videos")
    if scheme_of(str(root)):
        raise UserError("data.root", root, IN_BUCKET, FROM_DISK)
    path = os.path.realpath(os.path.expanduser(root))
    if not os.path.isdir(path):
        missing = "is not a folder" if os.path.exists(path) else "no such folder"
        raise UserError("data.root", root, missing, "give the folder that holds your videos")
    return path


def names_in(folder: str) -> list[str]:
    """Sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        problem = f"cannot be listed ({error.strerror})"
        raise UserError("data.root", folder, problem, "give a folder that you may read") from error


def folder_with(root: str, holds: Callable[[str], bool]) -> str | None:
    """The path of the first folder of the root that holds what is looked for."""
    paths = (os.path.join(root, name) for name in names_in(root))
    return next((path for path in paths if os.path.isdir(path) and os.access(path, os.R_OK) and holds(path)), None)


def normal(name: str, where: str) -> str:
    """The normal form of a name that a list or manifest gives; refused if it is none or leaves the root."""
    parts = PurePosixPath(name.strip()).parts
    if not parts or "\0" in name:
        raise UserError("data.root", where, f"{name!r} is no file name", "mend the row")
    if ".." in parts or parts[0].startswith("/"):
        remedy = "use names relative to the root, without .."
        raise UserError("data.root", where, f"{name!r} leaves the data root", remedy)
    return "/".join(parts)


def inside(root: str, name: str, where: str) -> str:
    """The normal form of a name; refused if it could reach outside the root, by a link too."""
    name = normal(name, where)
    if not _is_inside(root, os.path.join(root, name)):
        problem = f"{name!r} is a symbolic link that leaves the data root"
        raise UserError("data.root", where, problem, COPY)
    return name


def _is_inside(root: str, path: str) -> bool:
    """Whether it is, links followed, or is a blob of the cache of Hugging Face's hub whose snapshot the root is."""
    path = os.path.realpath(path)
    return os.path.commonpath([root, path]) == root or os.path.dirname(path) == _blobs(root)


def _blobs(root: str) -> str | None:
    """CACHE/blobs for a root in CACHE/snapshots/REVISION, where the hub's cache keeps what the links there lead to."""
    cache, mark, below = root.rpartition("/snapshots/")
    return f"{cache}/blobs" if mark and below else None


def check_bad(root, bad: int, total: int, most: float, why: str, remedy: str = "mend or remove them"):
    """UserError where more than a part `most`, of the config's data.max_bad_fraction, of all clips are bad, or all.

    why: goes on from there, of the bad ones.
    """
    if bad <= most * total and bad < total:
        return
    problem = f"{bad} of {total} clips cannot be used"
    if bad < total:
        problem, remedy = f"{problem}, more than data.max_bad_fraction={most:g}", f"{remedy}, or raise that"
    raise UserError("data.root", root, problem + why, remedy)


def stat_inside(root: str, name: str) -> os.stat_result:
    """Raises ValueError with the reason where the name is no file of this root."""
    path = os.path.join(root, name)
    if not _is_inside(root, path):
        raise ValueError(f"is a symbolic link that leaves the data root: {COPY}")
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"is missing ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    return status
