"""Clips from a folder of video files: UCF-101's layout, class folders, or a manifest with texts (paper section 4.1)."""

import collections
import csv
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from cmd_jax.data import probe as probing
from cmd_jax.data import video
from cmd_jax.errors import UserError, choose, nearest

LISTS = "ucfTrainTestlist"
MANIFESTS = ("metadata.csv", "metadata.jsonl")
CACHE_FORMAT = 1
NAMED_IN_WARNING = 10
NOTE_EVERY = 30.0  # seconds

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One clip as its layout lists it; `name` is relative to the root."""

    name: str
    label: str | None = None
    text: str | None = None


class FolderSource:
    """Labelled or captioned clips from the video files under `root`; see `clip`.

    layout: "ucf101" (class folders, and inside the root or beside it `ucfTrainTestlist/` with `trainlist0N.txt`,
    `testlist0N.txt` for N = `fold`, and perhaps `classInd.txt`), "classes" (the top folder is the class; videos that
    lie directly in the root have none), "metadata" (`metadata.csv` or `.jsonl` with file_name, text and perhaps label)
    or "auto".
    split: "train", "test" or "all"; only ucf101 has a test part.

    Every file is decoded once here, in child processes (`cmd_jax.data.probe`), for `probe_timeout` seconds at most;
    `cache` is a JSON file that remembers the outcome by relative name, size and modification time. Unusable files are
    logged, kept in `bad` (name -> reason) and skipped.

    class_names: sorted, or in classInd's order; () without labels. texts: one per clip, None without a manifest.
    fingerprint: SHA-256 over class names and each usable clip's name, size, length, label and text.

    Raises UserError (data.root, data.layout, data.fold, data.split...) on a root, list or manifest that cannot be what
    was meant, when no file is usable, and when the unusable ones are more than `max_bad_fraction` of all.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        frames: int,
        height: int,
        width: int,
        stride: int = 1,
        layout: str = "auto",
        fold: int = 1,
        split: str = "train",
        max_bad_fraction: float = 0.05,
        probe_timeout: float = 20.0,
        random_start: bool = True,
        cache: str | os.PathLike | None = None,
        probe_command: Sequence[str] = probing.COMMAND,
    ):
        choose("data.layout", layout, ("auto", *LAYOUTS))
        choose("data.split", split, ("train", "test", "all"))
        if not 0 <= max_bad_fraction <= 1:
            raise UserError("data.max_bad_fraction", max_bad_fraction, "not a fraction", "give a number from 0 to 1")
        if not probe_timeout > 0:
            raise UserError(
                "data.probe_timeout", probe_timeout, "not a positive number of seconds", "give for example 20"
            )
        self.root = _check_root(root)
        self.frames, self.height, self.width, self.stride = frames, height, width, stride
        self.random_start = random_start
        self.bad: dict[str, str] = {}

        entries, self.class_names = LAYOUTS[layout if layout != "auto" else _detect(self.root)](
            self.root, fold, split, self.bad
        )
        stats = {}
        for entry in entries:
            try:
                stats[entry.name] = _stat(self.root, entry.name)
            except ValueError as error:
                self.bad[entry.name] = str(error)
        facts = _probe(self.root, stats, probe_timeout, cache and Path(cache), probe_command)
        needed = (frames - 1) * stride + 1
        for name, fact in facts.items():
            if "error" in fact:
                self.bad[name] = fact["error"]
            elif fact["frames"] < needed:
                length = f"has only {fact['frames']} frame{'s' * (fact['frames'] != 1)}"
                if fact["declared"] > fact["frames"]:
                    length = f"is truncated: only {fact['frames']} of {fact['declared']} frames decode"
                self.bad[name] = f"{length}; {needed} are needed"
        self._report_bad(len(self.bad.keys() | {entry.name for entry in entries}), max_bad_fraction)

        self._entries = [entry for entry in entries if entry.name not in self.bad]
        self._lengths = [facts[entry.name]["frames"] for entry in self._entries]
        number = {name: index for index, name in enumerate(self.class_names)}
        self._labels = [number.get(entry.label, len(number)) for entry in self._entries]
        texts = tuple(entry.text for entry in self._entries)
        self.texts: tuple[str, ...] | None = None if None in texts else texts
        rows = zip(self._entries, self._lengths, self._labels, strict=True)
        content = [self.class_names, *([e.name, stats[e.name].st_size, n, label, e.text] for e, n, label in rows)]
        self.fingerprint = hashlib.sha256("\n".join(map(json.dumps, content)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """The file's name relative to the root."""
        return self._entries[index].name

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """-> (video uint8 RGB [T,H,W,3], label); label is len(class_names), the null class, where the file has none.

        T = frames, `stride` apart, from a start that `rng` draws (0 where random_start is off); centre crop, then
        antialiased resize. Raises UserError if the file has changed since its test.
        """
        last = self._lengths[index] - (self.frames - 1) * self.stride - 1
        start = int(rng.integers(0, last + 1)) if self.random_start else 0
        frames = video.read_frames(os.path.join(self.root, self.name(index)), start, self.frames, self.stride)
        return video.fit(frames, self.height, self.width), self._labels[index]

    def _report_bad(self, total: int, max_bad_fraction: float):
        bad = len(self.bad)
        if not bad:
            return
        named = [f"{name} {reason}" for name, reason in sorted(self.bad.items())]
        more = [f"and {bad - NAMED_IN_WARNING} more"] if bad > NAMED_IN_WARNING else []
        log.warning(
            "%d of %d files in %s cannot be used: %s", bad, total, self.root, "; ".join(named[:NAMED_IN_WARNING] + more)
        )
        if bad == total:
            raise UserError(
                "data.root",
                self.root,
                f"none of its {total} files can be used, the first: {named[0]}",
                "mend or replace them",
            )
        if bad > max_bad_fraction * total:
            allowed = f"more than data.max_bad_fraction={max_bad_fraction:g}"
            problem = f"{bad} of {total} files cannot be used, {allowed}, the first: {named[0]}"
            raise UserError("data.root", self.root, problem, "mend or remove them, or raise data.max_bad_fraction")


def _check_root(root) -> str:
    path = os.path.realpath(os.path.expanduser(root))
    if not os.path.isdir(path):
        missing = "is not a folder" if os.path.exists(path) else "no such folder"
        raise UserError("data.root", root, missing, "give the folder that holds your videos")
    return path


def _lists_of(root: str) -> str | None:
    return next(
        (p for p in (os.path.join(root, LISTS), os.path.join(os.path.dirname(root), LISTS)) if os.path.isdir(p)), None
    )


def _detect(root: str) -> str:
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


def _stat(root: str, name: str) -> os.stat_result:
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


def _probe(
    root: str, stats: dict[str, os.stat_result], timeout: float, cache: Path | None, command: Sequence[str]
) -> dict[str, dict]:
    """Facts of each file (see probe.probe), from the cache where it knows the file by this size and time."""
    known = _load_cache(cache)
    keys = {name: [status.st_size, status.st_mtime_ns] for name, status in stats.items()}

    def is_known(name):
        return name in known and known[name]["key"] == keys[name] and known[name].get("hung", timeout) >= timeout

    todo = [name for name in stats if not is_known(name)]
    if not todo:
        return {name: known[name] for name in stats}
    log.info("testing %d of %d files in %s", len(todo), len(stats), root)
    results, noted = {}, time.monotonic()
    try:
        for path, fact in probing.probe([os.path.join(root, name) for name in todo], timeout, command):
            results[os.path.relpath(path, root)] = fact
            if time.monotonic() > noted + NOTE_EVERY:
                noted = time.monotonic()
                log.info("tested %d of %d files", len(results), len(todo))
    finally:  # an interrupted start keeps what it learnt
        known |= {name: {"key": keys[name], **fact} for name, fact in results.items() if not fact.get("transient")}
        if cache:
            _save_cache(cache, known)
    return {name: results.get(name) or known[name] for name in stats}


def _load_cache(path: Path | None) -> dict[str, dict]:
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        return content["files"] if content["format"] == CACHE_FORMAT else {}
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("%s is not readable (%s): all files are tested again", path, error)
        return {}


def _save_cache(path: Path, files: dict[str, dict]):
    """Atomic; a failure costs only the next start's time, so it is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            json.dump({"format": CACHE_FORMAT, "files": files}, file)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the outcome of testing the files is not kept in %s (%s)", path, error)
