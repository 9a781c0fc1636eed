"""What a folder of clips holds, and what its clips are called: UCF-101 lists, class folders, manifests, WebVid."""

import collections
import os
import re
from pathlib import Path

from cmd_jax.data import video, webvid
from cmd_jax.data.roots import Entry, Listing, check_root, inside
from cmd_jax.data.tables import csv_columns, csv_rows, json_rows, lines
from cmd_jax.errors import UserError, choose, nearest

LISTS = "ucfTrainTestlist"
MANIFESTS = ("metadata.csv", "metadata.jsonl")
MANIFEST_HEADER = "file_name,text[,label]"


def list_clips(root: str, layout: str, fold: int, split: str) -> Listing:
    """The clips of a folder; the layout "auto" goes by what it shows. No video is opened."""
    root = check_root(root)
    choose("data.layout", layout, ("auto", *LAYOUTS))
    choose("data.split", split, ("train", "test", "all"))
    return LAYOUTS[detect(root) if layout == "auto" else layout](root, fold, split)


def _lists_of(root: str) -> str | None:
    return next(
        (p for p in (os.path.join(root, LISTS), os.path.join(os.path.dirname(root), LISTS)) if os.path.isdir(p)), None
    )


def detect(root: str) -> str:
    """The layout that the folder shows."""
    shown = {
        "metadata": [name for name in MANIFESTS if os.path.exists(os.path.join(root, name))],
        "ucf101": [LISTS] if os.path.isdir(os.path.join(root, LISTS)) else [],
        "webvid": webvid.lists_in(root),
    }
    shown = {layout: names[0] for layout, names in shown.items() if names}
    if len(shown) > 1:
        problem = f"{root} holds both {' and '.join(shown.values())}"
        raise UserError("data.layout", "auto", problem, f"set data.layout to {' or '.join(shown)}")
    if shown:
        return next(iter(shown))
    lists = _lists_of(root)
    if lists is None:
        return "classes"
    # Lists beside the root may belong to another data set: they count if they name a folder that is here.
    paths = Path(lists).glob("*list*.txt")
    named = {line.partition("/")[0] for path in paths for _, line in lines(str(path), "data.root")}
    return "ucf101" if any(os.path.isdir(os.path.join(root, name)) for name in named) else "classes"


def _read_classes(root: str, fold: int, split: str) -> Listing:
    _refuse_test(split, "a plain folder of videos")
    names, bad = [], {}
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
    return Listing(entries, tuple(sorted({entry.label for entry in entries} - {None})), bad)


def _read_ucf101(root: str, fold: int, split: str) -> Listing:
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
        for line, content in lines(path, "data.root"):
            name = inside(root, re.sub(r"\s+\d+$", "", content), f"{path} line {line}")
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
        return Listing(entries, tuple(sorted({entry.label for rows in parts.values() for entry in rows})), {})
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
    return Listing(entries, class_names, {})


def _read_metadata(root: str, fold: int, split: str) -> Listing:
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
    for line, name, text, label in (_csv_manifest if path.endswith(".csv") else _json_manifest)(path):
        entries.append(Entry(inside(root, name, f"{path} line {line}"), label, text))
    if not entries:
        raise UserError("data.root", path, "it has no rows", "write one row a video: file_name, text and perhaps label")
    _refuse_duplicates(path, entries)
    labels = {entry.label for entry in entries} - {None}
    numbers = all(re.fullmatch(r"\d{1,18}", label) for label in labels)
    return Listing(entries, tuple(sorted(labels, key=int if numbers else None)), {})


def _csv_manifest(path: str):
    """(line number, file name, text, label or None) of each row."""
    labelled = "label" in csv_columns(path, "data.root", MANIFEST_HEADER)
    columns = ("file_name", "text", "label") if labelled else ("file_name", "text")
    for line, (name, text, *label) in csv_rows(path, "data.root", columns, MANIFEST_HEADER):
        yield line, name, text, "".join(label).strip() or None


def _json_manifest(path: str):
    """As `_csv_manifest`."""
    for line, row in json_rows(path, "data.root"):
        where = f"{path} line {line}"
        for column in ("file_name", "text"):
            if not isinstance(row.get(column), str):
                problem = f"no {column}" if row.get(column) is None else f"{column} is no string"
                raise UserError("data.root", where, problem, "complete the row")
        label = row.get("label")
        if not (label is None or isinstance(label, str) or type(label) is int):
            raise UserError("data.root", where, f"label {label!r} is neither a string nor an integer", "mend the row")
        yield line, row["file_name"], row["text"], None if label is None else str(label).strip() or None


LAYOUTS = {"ucf101": _read_ucf101, "classes": _read_classes, "metadata": _read_metadata, "webvid": webvid.read}


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
