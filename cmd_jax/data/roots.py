"""A folder of clips as the place that no name in its lists may leave, and what its layouts find there."""

import os
import stat
from pathlib import PurePosixPath
from typing import NamedTuple

from cmd_jax.errors import UserError

NAMED_IN_ERROR = 10


class Entry(NamedTuple):
    """One clip as its layout lists it; `name` is relative to the root."""

    name: str
    label: str | None = None
    text: str | None = None


class Listing(NamedTuple):
    """What a folder lists: the clips, and their classes in the order of the labels.

    bad: name -> why what bears it cannot be used. absent: rows of WebVid's lists whose files are not there.
    """

    entries: list[Entry]
    class_names: tuple[str, ...]
    bad: dict[str, str]
    absent: int = 0


def check_root(root) -> str:
    """The folder's real path."""
    if not root:
        raise UserError("data.root", root, "missing", "give the folder that holds your videos")
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


def some(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - NAMED_IN_ERROR
    return ", ".join(names[:NAMED_IN_ERROR]) + (f" and {more} more" if more > 0 else "") or "none"


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
        raise UserError("data.root", where, problem, "copy there what it leads to, or give a root that holds both")
    return name


def _is_inside(root: str, path: str) -> bool:
    return os.path.commonpath([root, os.path.realpath(path)]) == root


def stat_inside(root: str, name: str) -> os.stat_result:
    """Raises ValueError with the reason where the name is no file of this root."""
    path = os.path.join(root, name)
    if not _is_inside(root, path):
        raise ValueError("is a symbolic link that leaves the data root")
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"is missing ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    return status
