"""What a folder of clips holds, and what its clips are called: class folders and manifests; UCF-101, WebVid."""

import collections
import itertools
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmd_jax.data import ucf101, video, webvid
from cmd_jax.data.grouped import Conflict, Rows
from cmd_jax.data.packed import Entries, Listing
from cmd_jax.data.roots import COPY, Entry, check_root, inside, names_in, normal
from cmd_jax.data.tables import csv_columns, csv_rows, json_rows, lines
from cmd_jax.errors import UserError, choose, some

MOST_KINDS = 12  # of files that are no videos, that a line tells
MANIFESTS = ("metadata.csv", "metadata.jsonl")
COLUMNS = ("file_name", "text", "label")
HEADER = "file_name,text[,label]"
LAYOUTS = ("ucf101", "classes", "metadata", "webvid")
FLAT = re.compile(r"v_(.+)_g\d+_c\d+\.\w+")  # UCF-101's names, which hold the class
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}

log = logging.getLogger(__name__)


def list_clips(root: str, layout: str, fold: int, split: str) -> Listing:
    """The clips of a folder; the layout "auto" goes by what it shows. No video is opened."""
    root = check_root(root)
    choose("data.layout", layout, ("auto", *LAYOUTS))
    choose("data.split", split, (*SPLITS, "all"))
    kind = detect(root) if layout == "auto" else layout
    if kind == "ucf101":
        return ucf101.read(root, split, fold)
    if kind == "webvid":
        return webvid.read(root, split)
    return _read_metadata(root, split) if kind == "metadata" else _read_classes(root, split, guess=layout == "auto")


def detect(root: str) -> str:
    """The layout that the folder shows."""
    shown = {
        "metadata": [name for name in MANIFESTS if os.path.exists(os.path.join(root, name))],
        "ucf101": [ucf101.LISTS] if os.path.isdir(os.path.join(root, ucf101.LISTS)) else [],
        "webvid": webvid.lists_in(root),
    }
    shown = {layout: names[0] for layout, names in shown.items() if names}
    if len(shown) > 1:
        problem = f"{root} holds both {' and '.join(shown.values())}"
        raise UserError("data.layout", "auto", problem, f"set data.layout to {' or '.join(shown)}")
    if shown:
        return next(iter(shown))
    lists = ucf101.lists_of(root)
    if lists is None:
        return "classes"
    # Lists beside the root may belong to another data set: they count if they name a folder or a file that is here.
    paths, held = Path(lists).glob("*list*.txt"), set(names_in(root))
    listed = (ucf101.named(line) for path in paths for _, line in lines(str(path), "data.root"))
    return "ucf101" if any(held & {*name.split("/")} for name in listed) else "classes"


# Class folders and manifests, below folders of splits or not.


class Tree(NamedTuple):
    """What lies below a folder, in names relative to it. lists: manifests, CSV files and UCF-101's lists."""

    videos: list[str]
    lists: list[str]
    folders: list[str]
    bad: dict[str, str]


def _walk(root: str) -> Tree:
    tree, passed = Tree([], [], [], {}), collections.Counter()

    def unlisted(error: OSError):
        tree.bad[os.path.relpath(error.filename, root)] = f"cannot be listed ({error.strerror})"

    for folder, folders, files in os.walk(root, onerror=unlisted):
        below = f"{os.path.relpath(folder, root)}/".removeprefix("./")
        tree.lists.extend(below + name for name in folders if name == ucf101.LISTS)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != ucf101.LISTS)
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                tree.bad[below + name] = f"is a symbolic link to a folder, which is not followed: {COPY}"
            else:
                tree.folders.append(below + name)
        for name in files:
            ending = "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or "without an ending"
            if name in MANIFESTS or ending == ".csv":
                tree.lists.append(below + name)
            elif ending in video.EXTENSIONS:
                tree.videos.append(below + name)
            else:
                passed[ending] += 1
    kinds = ", ".join(f"{count} {ending}" for ending, count in passed.most_common(MOST_KINDS))
    if (more := len(passed) - MOST_KINDS) > 0:  # numbers of shards are endings too, by thousands
        kinds += f" and {more} more kinds"
    if kinds:
        log.info("%s: passed over: %s", root, kinds)
    if not (tree.videos or tree.bad or _manifests(tree.lists)):
        problem = f"holds no videos ({', '.join(video.EXTENSIONS)})" + f", but files: {kinds}" * bool(kinds)
        raise UserError("data.root", root, problem, "give the folder that holds your videos")
    tree.videos.sort()
    return tree


def _top(name: str) -> str:
    return name.partition("/")[0]


def _manifests(names: list[str]) -> list[str]:
    return [name for name in names if os.path.basename(name) in MANIFESTS]


def _in_order(labels: set[str | None]) -> tuple[str, ...]:
    """Numbers by their size."""
    labels = labels - {None}
    numbers = all(re.fullmatch(r"\d{1,18}", label) for label in labels)
    return tuple(sorted(labels, key=int if numbers else None))


def _read_classes(root: str, split: str, guess: bool) -> Listing:
    """The top folder, or what follows a folder of a split, is the class.

    guess: manifests below folders of splits are read, and a root that is likely the wrong one is refused.
    """
    tree = _walk(root)
    parts = _parts(root, {_top(name) for name in [*tree.videos, *_manifests(tree.lists), *tree.bad]}, split)
    found, classes = [], set()
    for base in [f"{part}/" for part in parts] or [""]:
        inner = Tree(*([name for name in names if name.startswith(base)] for names in tree[:3]), {})
        manifests = [name for name in _manifests(inner.lists) if guess and os.path.dirname(name) == base.rstrip("/")]
        if guess:
            _refuse_parent(root, base.rstrip("/"), inner, manifests)
        if manifests:
            found.append(_manifest_entries(root, base))
            classes |= {*found[-1].labels}
            continue
        names = [name.removeprefix(base) for name in inner.videos]
        labels = [_top(name) if "/" in name else None for name in names]
        if not any(labels) and all(flat := [FLAT.fullmatch(name) for name in names]):
            labels = [match[1] for match in flat]
        found.append([Entry(base + name, label) for name, label in zip(names, labels, strict=True)])
        classes |= {*labels} | {_top(name.removeprefix(base)) for name in inner.folders}
    bad = {name: why for name, why in tree.bad.items() if not parts or _top(name) in parts}
    return Listing.of(itertools.chain(*found), _in_order(classes), bad)


def _parts(root: str, tops: set[str], split: str) -> list[str]:
    """Of the folders that hold all there is, those of the split; [] if they are not all folders of splits."""
    splits = {top: SPLIT_OF[top.lower()] for top in sorted(tops) if top.lower() in SPLIT_OF}
    if splits and len(splits) == len(tops):
        parts = [top for top, of in splits.items() if split in (of, "all")]
        if not parts:
            remedy = f"use {' or '.join(sorted({*splits.values()}))}"
            raise UserError("data.split", split, f"the folders of {root} are the splits {', '.join(splits)}", remedy)
        log.info("%s: its folders are the splits %s; read: %s", root, ", ".join(splits), ", ".join(parts))
        return parts
    if splits:
        beside = some(sorted(tops - splits.keys()))
        log.warning("%s: not taken for splits, since %s is there too: %s", root, beside, ", ".join(splits))
    if split not in ("train", "all"):
        remedy = f"use train or all, or make folders train/ and {split}/ (for UCF-101: {ucf101.LISTS}/)"
        raise UserError("data.split", split, f"{root} has no {split} part", remedy)
    return []


def _refuse_parent(root: str, base: str, tree: Tree, manifests: list[str]):
    """UserError where a folder below root/base is likelier to be meant: it has lists, or all of the class folders."""
    lists = [name for name in tree.lists if name not in manifests and os.path.dirname(name) != base]
    known = _manifests(lists) + [name for name in lists if os.path.basename(name) == ucf101.LISTS]
    known += [name for name in lists if webvid.is_list(os.path.join(root, name))]
    common = os.path.commonpath(map(os.path.dirname, tree.videos)) if tree.videos else base
    if {"blobs", "snapshots"} <= {*tree.folders}:
        snapshots = [name for name in tree.folders if os.path.dirname(name) == "snapshots"]
        folder = max(snapshots, key=lambda name: os.stat(os.path.join(root, name)).st_mtime, default="snapshots")
        problem = "is a data set in the cache of Hugging Face's hub, which keeps the files in snapshots"
    elif known:
        folder, problem = os.path.dirname(known[0]), f"{known[0]} is not read from here"
    elif common != base and not manifests and common not in map(os.path.dirname, tree.videos):
        inner = sorted({_top(name.removeprefix(f"{common}/")) for name in tree.videos})
        folder, problem = common, f"all videos are in the folders {some(inner)} of {common}"
    else:
        return
    remedy = f"give data.root={os.path.join(root, folder)}, or data.layout=classes if the folders here are the classes"
    raise UserError("data.root", root, problem, remedy)


def _read_metadata(root: str, split: str) -> Listing:
    """What the manifest in the root lists, or those in its folders of splits."""
    if any(os.path.exists(os.path.join(root, name)) for name in MANIFESTS):
        entries = _manifest_entries(root, "")
        if parts := _parts(root, {*map(_top, entries.names)}, split):
            entries = entries.take(np.flatnonzero([_top(name) in parts for name in entries.names]))
        read = [entries]
    else:
        below = _manifests(_walk(root).lists)
        folders = {os.path.dirname(name) for name in below}
        if not below or any(folder.lower() not in SPLIT_OF for folder in folders):
            remedy = f"give data.root={os.path.join(root, os.path.dirname(below[0]))}" if below else "write one"
            problem = f"no {' or '.join(MANIFESTS)} in {root}"
            raise UserError("data.layout", "metadata", problem, f"{remedy}, or use another data.layout")
        read = [_manifest_entries(root, f"{part}/") for part in _parts(root, folders, split)]
    used = {entries.labels[n] for entries in read for n in np.unique(entries.label).tolist() if n >= 0}
    return Listing.of(itertools.chain(*read), _in_order(used), {})


def _manifest_entries(root: str, base: str) -> Entries:
    """What the manifest in root/base lists. Rows that name a file again give it further captions, or repeat one."""
    paths = [path for path in (os.path.join(root, base, name) for name in MANIFESTS) if os.path.exists(path)]
    if len(paths) > 1:
        raise UserError("data.root", os.path.join(root, base), f"holds both {' and '.join(MANIFESTS)}", "keep one")
    (path,), rows = paths, Rows()
    for line, name, text, label in (_csv_manifest if path.endswith(".csv") else _json_manifest)(path):
        where = f"{path} line {line}"
        rows.add(line, inside(root, base + normal(name, where), where), text, label)
    if not len(rows):
        raise UserError("data.root", path, "it has no rows", "write one row a video: file_name, text and perhaps label")
    try:
        entries = rows.entries()
    except Conflict as conflict:
        line, name, before, label = conflict.args
        problem = f"{name} has the label {before} in an earlier row, and {label} here"
        raise UserError("data.root", f"{path} line {line}", problem, "give all rows of a file one label") from conflict
    repeated = len(rows) - len(entries.texts)
    if repeated or len(entries.texts) != len(entries):
        counts = len(entries.texts), len(entries), repeated
        log.info("%s: %d captions of %d files; %d rows repeat another", path, *counts)
    return entries


def _csv_manifest(path: str):
    """(line number, file name, text, label or None) of each row."""

    def untitled(row: list[str]) -> tuple[str, ...] | None:
        is_row = len(row) in (2, 3) and os.path.isfile(os.path.join(os.path.dirname(path), row[0]))
        return COLUMNS[: len(row)] if is_row else None

    labelled = "label" in csv_columns(path, "data.root", HEADER, untitled)
    for line, (name, text, *label) in csv_rows(path, "data.root", COLUMNS[: 2 + labelled], HEADER, untitled):
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
