"""UCF-101's layout: class folders, or all files in one, and lists of the parts of three folds."""

import collections
import os
import re

from cmd_jax.data.packed import Listing
from cmd_jax.data.roots import Entry, folder_with, inside, names_in
from cmd_jax.data.tables import lines
from cmd_jax.errors import UserError, choose, nearest

LISTS = "ucfTrainTestlist"
PARTS = ("train", "test")


def lists_of(root: str) -> str | None:
    """The folder of the lists, in the root or beside it."""
    return next(
        (p for p in (os.path.join(root, LISTS), os.path.join(os.path.dirname(root), LISTS)) if os.path.isdir(p)), None
    )


def named(line: str) -> str:
    """The name in a line of a list, which may have the class's number after it."""
    return re.sub(r"\s+\d+$", "", line)


def read(root: str, split: str, fold: int) -> Listing:
    """The clips of the fold's lists, and the classes in the order of classInd.txt, or sorted without it."""
    choose("data.split", split, (*PARTS, "all"))
    lists = lists_of(root)
    if lists is None:
        problem, folder = f"no folder {LISTS} in {root} or beside it", folder_with(root, lists_of)
        remedy = f"give data.root={folder}" if folder else "put it there"
        raise UserError("data.layout", "ucf101", problem, f"{remedy}, or set data.layout=classes")
    parts: dict[str, list[Entry]] = {}
    for part in PARTS:
        path = os.path.join(lists, f"{part}list{fold:02d}.txt")
        if not os.path.exists(path):
            if split not in (part, "all"):
                continue
            folds = sorted(
                int(m[1]) for m in (re.fullmatch(part + r"list(\d+)\.txt", f) for f in os.listdir(lists)) if m
            )
            if folds and fold not in folds:
                raise UserError("data.fold", fold, f"no file {path}", f"use one of {', '.join(map(str, folds))}")
            raise UserError("data.split", split, f"no file {path}", "put the file there, or use another data.split")
        parts[part] = []
        for line, content in lines(path, "data.root"):
            name = inside(root, named(content), f"{path} line {line}")
            if "/" not in name:
                raise UserError(
                    "data.root", f"{path} line {line}", f"{name!r} names no class folder", "write Class/video.avi"
                )
            parts[part].append(Entry(name, name.partition("/")[0]))
    entries = [entry for part, rows in parts.items() if split in (part, "all") for entry in rows]
    if not entries:
        problem = f"the lists of fold {fold} in {lists} name no clips"
        raise UserError("data.split", split, problem, "use another data.split or data.fold")
    _refuse_duplicates(lists, entries)
    entries = _as_they_lie(root, entries)

    index = os.path.join(lists, "classInd.txt")
    if not os.path.exists(index):
        return Listing.of(entries, tuple(sorted({entry.label for rows in parts.values() for entry in rows})), {})
    numbered = [re.fullmatch(r"(\d+)\s+(.+)", content) for _, content in lines(index, "data.root")]
    if None in numbered or sorted(int(m[1]) for m in numbered) != list(range(1, len(numbered) + 1)):
        raise UserError(
            "data.root", index, "its lines are not '1 FirstClass', '2 SecondClass', ...", "restore the file"
        )
    class_names = tuple(m[2] for m in sorted(numbered, key=lambda m: int(m[1])))
    for entry in entries:
        if entry.label not in class_names:
            known = f"use for example {nearest(entry.label, class_names)[0]}" if class_names else "restore the file"
            raise UserError("data.root", index, f"it lacks the class {entry.label} of {entry.name}", known)
    return Listing.of(entries, class_names, {})


def _as_they_lie(root: str, entries: list[Entry]) -> list[Entry]:
    """The entries by the names that their files have here: `unrar e` drops the class folders.

    UserError if neither class folders nor files are here, but in a folder of the root.
    """
    listed = {name for entry in entries for name in (entry.label, os.path.basename(entry.name))}
    held = set(names_in(root))
    if not listed & held and (folder := folder_with(root, lambda path: bool(listed & {*os.listdir(path)}))):
        problem = f"the listed clips are in its folder {os.path.basename(folder)}"
        raise UserError("data.root", root, problem, f"give data.root={folder}")
    flat = [entry._replace(name=os.path.basename(entry.name)) for entry in entries]
    return [b if a.label not in held and b.name in held else a for a, b in zip(entries, flat, strict=True)]


def _refuse_duplicates(path: str, entries: list[Entry]):
    twice = [name for name, count in collections.Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        shown = ", ".join(twice[:3]) + (f" and {len(twice) - 3} more" if len(twice) > 3 else "")
        raise UserError("data.root", path, f"names files more than once: {shown}", "keep one row a file")
