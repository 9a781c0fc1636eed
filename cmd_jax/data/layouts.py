"""What a folder of clips holds, and what its clips are called: UCF-101 lists, class folders, manifests."""

import collections
import csv
import json
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cmd_jax.data import video
from cmd_jax.errors import UserError, nearest

LISTS = "ucfTrainTestlist"
MANIFESTS = ("metadata.csv", "metadata.jsonl")


class Entry(NamedTuple):
    """One clip as its layout lists it; `name` is relative to the root."""

    name: str
    label: str | None = None
    text: str | None = None


def check_root(root) -> str:
    if not root:
        raise UserError("data.root", root, "missing", "give the folder that holds your videos")
    path = os.path.realpath(os.path.expanduser(root))
    if not os.path.isdir(path):
        missing = "is not a folder" if os.path.exists(path) else "no such folder"
        raise UserError("data.root", root, missing, "give the folder that holds your videos")
    return path


def _lists_of(root: str) -> str | None:
    return next(
        (p for p in (os.path.join(root, LISTS), os.path.join(os.path.dirname(root), LISTS)) if os.path.isdir(p)), None
    )


def detect(root: str) -> str:
    """The layout that the folder shows."""
    manifests = [name for name in MANIFESTS if os.path.exists(os.path.join(root, name))]
    if manifests and os.path.isdir(os.path.join(root, LISTS)):
        raise UserError(
            "data.layout",
            "auto",
            f"{root} holds both {manifests[0]} and {LISTS}",
            "set data.layout to metadata or ucf101",
        )
    if manifests:
        return "metadata"
    lists = _lists_of(root)
    if lists is None:
        return "classes"
    # Lists beside the root may belong to another data set: they count if they name a folder that is here.
    named = {line.partition("/")[0] for path in Path(lists).glob("*list*.txt") for _, line in _lines(str(path))}
    return (
        "ucf101"
        if os.path.dirname(lists) == root or any(os.path.isdir(os.path.join(root, c)) for c in named)
        else "classes"
    )


def _read_classes(root: str, fold: int, split: str, bad: dict[str, str]) -> tuple[list[Entry], tuple[str, ...]]:
    _refuse_test(split, "a plain folder of videos")
    names = []
    for folder, folders, files in os.walk(
        root, onerror=lambda e: bad.update({os.path.relpath(e.filename, root): "cannot be listed"})
    ):
        relative = os.path.relpath(folder, root)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != LISTS)
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                bad[os.path.normpath(os.path.join(relative, name))] = (
                    "is a symbolic link to a folder, which is not followed"
                )
        videos = (f for f in files if not f.startswith(".") and f.lower().endswith(video.EXTENSIONS))
        names += [os.path.normpath(os.path.join(relative, name)) for name in videos]
    if not names and not bad:
        raise UserError(
            "data.root",
            root,
            f"holds no videos ({', '.join(video.EXTENSIONS)})",
            "give the folder that holds your videos",
        )
    entries = [Entry(name, name.split("/")[0] if "/" in name else None) for name in sorted(names)]
    return entries, tuple(sorted({entry.label for entry in entries} - {None}))


def _read_ucf101(root: str, fold: int, split: str, bad: dict[str, str]) -> tuple[list[Entry], tuple[str, ...]]:
    lists = _lists_of(root)
    if lists is None:
        raise UserError(
            "data.layout",
            "ucf101",
            f"no folder {LISTS} in {root} or beside it",
            "put it there, or set data.layout=classes",
        )
    parts: dict[str, list[Entry]] = {}
    for part in ("train", "test"):
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
        for line, content in _lines(path):
            name = _inside(root, re.sub(r"\s+\d+$", "", content), f"{path} line {line}")
            if "/" not in name:
                raise UserError(
                    "data.root", f"{path} line {line}", f"{name!r} names no class folder", "write Class/video.avi"
                )
            parts[part].append(Entry(name, name.split("/")[0]))
    entries = [entry for part, rows in parts.items() if split in (part, "all") for entry in rows]
    if not entries:
        raise UserError(
            "data.split",
            split,
            f"the lists of fold {fold} in {lists} name no clips",
            "use another data.split or data.fold",
        )
    _refuse_duplicates(lists, entries)

    index = os.path.join(lists, "classInd.txt")
    if not os.path.exists(index):
        return entries, tuple(sorted({entry.label for rows in parts.values() for entry in rows}))
    numbered = [re.fullmatch(r"(\d+)\s+(.+)", content) for _, content in _lines(index)]
    if None in numbered or sorted(int(m[1]) for m in numbered) != list(range(1, len(numbered) + 1)):
        raise UserError(
            "data.root", index, "its lines are not '1 FirstClass', '2 SecondClass', ...", "restore the file"
        )
    class_names = tuple(m[2] for m in sorted(numbered, key=lambda m: int(m[1])))
    for entry in entries:
        if entry.label not in class_names:
            known = f"use for example {nearest(entry.label, class_names)[0]}" if class_names else "restore the file"
            raise UserError("data.root", index, f"it lacks the class {entry.label} of {entry.name}", known)
    return entries, class_names


def _read_metadata(root: str, fold: int, split: str, bad: dict[str, str]) -> tuple[list[Entry], tuple[str, ...]]:
    _refuse_test(split, "a folder with a manifest")
    paths = [path for path in (os.path.join(root, name) for name in MANIFESTS) if os.path.exists(path)]
    if not paths:
        raise UserError(
            "data.layout", "metadata", f"no {' or '.join(MANIFESTS)} in {root}", "write one, or use another data.layout"
        )
    if len(paths) > 1:
        raise UserError("data.root", root, f"holds both {' and '.join(MANIFESTS)}", "keep one of them")
    path = paths[0]
    entries = []
    for line, row in (_csv_rows if path.endswith(".csv") else _json_rows)(path):
        where = f"{path} line {line}"
        for column in ("file_name", "text"):
            if not isinstance(row.get(column), str):
                raise UserError(
                    "data.root",
                    where,
                    f"no {column}" if row.get(column) is None else f"{column} is no string",
                    "complete the row",
                )
        label = row.get("label")
        if not (label is None or isinstance(label, str) or type(label) is int):
            raise UserError("data.root", where, f"label {label!r} is neither a string nor an integer", "mend the row")
        label = None if label is None else str(label).strip() or None
        entries.append(Entry(_inside(root, row["file_name"], where), label, row["text"]))
    if not entries:
        raise UserError("data.root", path, "it has no rows", "write one row a video: file_name, text and perhaps label")
    _refuse_duplicates(path, entries)
    labels = {entry.label for entry in entries} - {None}
    return entries, tuple(
        sorted(labels, key=int if all(re.fullmatch(r"\d{1,18}", label) for label in labels) else None)
    )


LAYOUTS = {"ucf101": _read_ucf101, "classes": _read_classes, "metadata": _read_metadata}


def _csv_rows(path: str):
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = [(name or "").strip() for name in reader.fieldnames or ()]
            if not columns:
                raise UserError(
                    "data.root", path, "it is empty", "write a header file_name,text[,label] and one row a video"
                )
            for column in ("file_name", "text"):
                if columns.count(column) != 1:
                    problem = f"its columns are {', '.join(columns)}, where {column} is needed once"
                    raise UserError("data.root", path, problem, "name the columns file_name,text[,label]")
            reader.fieldnames = columns
            for row in reader:
                if None in row or None in row.values():
                    problem = f"more or fewer fields than the {len(columns)} columns"
                    raise UserError(
                        "data.root", f"{path} line {reader.line_num}", problem, "put texts with commas in double quotes"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError("data.root", f"{path} after line {reader.line_num}", str(error), "mend the row") from error
        except UnicodeDecodeError as error:
            raise UserError("data.root", path, f"not UTF-8 text ({error})", "save the file as UTF-8") from error


def _json_rows(path: str):
    for line, content in _lines(path):
        try:
            row = json.loads(content)
        except ValueError as error:
            raise UserError(
                "data.root", f"{path} line {line}", f"not JSON ({error})", "write one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise UserError("data.root", f"{path} line {line}", "not a JSON object", "write one JSON object a line")
        yield line, row


def _lines(path: str) -> list[tuple[int, str]]:
    """(line number, stripped line) of a text file's lines that are not blank."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError("data.root", path, f"not UTF-8 text ({error})", "save the file as UTF-8") from error


def _refuse_test(split: str, what: str):
    if split == "test":
        raise UserError(
            "data.split",
            split,
            f"{what} has no test part",
            f"use train or all, or add {LISTS} with lists and data.layout=ucf101",
        )


def _refuse_duplicates(path: str, entries: list[Entry]):
    twice = [name for name, count in collections.Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        shown = ", ".join(twice[:3]) + (f" and {len(twice) - 3} more" if len(twice) > 3 else "")
        raise UserError("data.root", path, f"names files more than once: {shown}", "keep one row a file")


def _inside(root: str, name: str, where: str) -> str:
    """The normal form of a name that a list or manifest gives; refused if it could reach outside the root."""
    parts = PurePosixPath(name.strip()).parts
    if not parts or "\0" in name:
        raise UserError("data.root", where, f"{name!r} is no file name", "mend the row")
    if ".." in parts or parts[0].startswith("/"):
        raise UserError(
            "data.root", where, f"{name!r} leaves the data root", "use names relative to the root, without .."
        )
    if not _is_inside(root, os.path.join(root, *parts)):
        raise UserError(
            "data.root", where, f"{name!r} is a symbolic link that leaves the data root", "copy the file into the root"
        )
    return "/".join(parts)


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
