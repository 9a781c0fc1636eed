"""Clips from a folder of video files: UCF-101's layout, class folders, or lists with texts (paper section 4.1)."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cmd_jax.buckets import BucketPath
from cmd_jax.data import probe as probing
from cmd_jax.data import timing, video
from cmd_jax.data.draws import draw_start, draw_text, frames_needed
from cmd_jax.data.layouts import list_clips
from cmd_jax.data.outcomes import Outcomes
from cmd_jax.data.packed import Ragged, used_classes
from cmd_jax.data.roots import check_bad, check_root, stat_inside
from cmd_jax.data.sizes import Size, nearest_size
from cmd_jax.data.splits import keys_of
from cmd_jax.errors import UserError
from cmd_jax.files import as_path

READING = 1  # raise it whenever the same files give other clips
NAMED_IN_WARNING = 10
NOTE_EVERY = 30.0  # seconds

log = logging.getLogger(__name__)


class FolderSource:
    """Labelled or captioned clips from the video files under `root`; see `clip`.

    layout: "ucf101" (class folders, or as `unrar e` leaves them all files in one, and inside the root or beside it
    `ucfTrainTestlist/` with `trainlist0N.txt`, `testlist0N.txt` for N = `fold`, and perhaps `classInd.txt`), "classes"
    (the top folder is the class; videos that lie directly in the root have none, or if all are named as UCF-101's the
    class in the name), "metadata" (`metadata.csv` or `.jsonl` with file_name, text and perhaps label; several rows of a
    file are captions of it), "webvid" (WebVid's CSV files in the root, and mp4 files `page_dir/videoid.mp4` below it or
    below `videos/` in it; see `cmd_jax.data.webvid`) or "auto", which refuses a root that is likely a wrong one.
    split: "train", "val", "test" or "all". Where all that a root of class folders or of a manifest holds is in folders
    named train, val, test or the like, those are its splits; else it is all of the split train.

    Every file is decoded once here, in child processes (`cmd_jax.data.probe`). One that gives no further frame for
    `probe_timeout` seconds hangs, and `probe_cap` seconds are the most that one may take (0: any time). `cache` is a
    file that remembers each outcome, as soon as it is there, by relative name, size and modification time. Unusable
    files are logged, kept in `bad` (name -> reason) and skipped.

    class_names: those with a usable clip, sorted, or in classInd's order; () without labels.
    fps: frames a second to which each file is brought by the times of its frames (`cmd_jax.data.timing`) before every
    stride-th is taken; 0: all frames as they come.
    further_sizes: beside height x width; `buckets` uint8 [N] says which of all `sizes` a clip is fitted to, that
    nearest to its aspect.
    labels: int32 [N], len(class_names) for none. lengths: int32 [N], frames of each file, at fps where that is given.
    has_texts: whether every clip has captions, as in metadata and webvid.
    absent: how many rows of WebVid's lists name a file that is not there, which is no fault; 0 in other layouts.
    fingerprint: SHA-256 over the shape of clips and how they are drawn, class names, and each usable clip's name, size,
    length, label and texts.

    Raises UserError (data.root, data.layout, data.fold, data.split...) on a root, list or manifest that cannot be what
    was meant, when no file is usable, and when the unusable ones are more than `max_bad_fraction` of all.
    """

    shelf = None  # nothing is fetched

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        frames: int,
        height: int,
        width: int,
        further_sizes: Sequence[Size] = (),
        stride: int = 1,
        fps: float = 0.0,
        layout: str = "auto",
        fold: int = 1,
        split: str = "train",
        max_bad_fraction: float = 0.05,
        probe_timeout: float = 20.0,
        probe_cap: float = 3600.0,
        random_start: bool = True,
        cache: str | os.PathLike | BucketPath | None = None,
        probe_command: Sequence[str] = probing.COMMAND,
    ):
        if not 0 <= max_bad_fraction <= 1:
            raise UserError("data.max_bad_fraction", max_bad_fraction, "not a fraction", "give a number from 0 to 1")
        if not probe_timeout > 0:
            raise UserError(
                "data.probe_timeout", probe_timeout, "not a positive number of seconds", "give for example 20"
            )
        if not probe_cap >= 0:
            raise UserError("data.probe_cap", probe_cap, "not a number of seconds", "give for example 3600; 0: any")
        self.root = check_root(root)
        self.frames, self.sizes, self.stride = frames, ((height, width), *further_sizes), stride
        self.fps, self.random_start = fps, random_start

        entries, listed, self.bad, self.absent = list_clips(self.root, layout, fold, split)
        stats = {}
        for name in entries.names:
            try:
                stats[name] = stat_inside(self.root, name)
            except ValueError as error:
                self.bad[name] = str(error)
        limits = probe_timeout, probe_cap or math.inf
        facts = _probe(self.root, stats, *limits, cache and as_path(cache), probe_command, times=fps > 0)
        needed, lengths = frames_needed(frames, stride), {}
        for name, fact in facts.items():
            if "error" in fact:
                self.bad[name] = fact["error"]
                continue
            lengths[name] = fact["frames"]
            if fps:
                lengths[name] = timing.length_at(timing.seconds(fact["steps"], _tick(fact))[-1], fps)
            if shortage := video.shortage(lengths[name], needed, fps, fact["frames"], fact["declared"]):
                self.bad[name] = shortage
        self._report_bad(len(self.bad.keys() | {*entries.names}), max_bad_fraction)

        self._entries = entries.take(np.flatnonzero([name not in self.bad for name in entries.names]))
        self.class_names, self.labels = used_classes(self._entries.label, listed)
        self.lengths = np.array([lengths[name] for name in self._entries.names], np.int32)
        shown = np.array([[facts[name][side] for name in self._entries.names] for side in ("width", "height")])
        self.buckets = nearest_size(*shown, self.sizes)
        self._key_frames = Ragged.of([facts[name]["key_frames"] for name in self._entries.names], 3)
        self._steps = Ragged.of([facts[name]["steps"] for name in self._entries.names], 2) if fps else None
        self._ticks = np.array([_tick(facts[name]) for name in self._entries.names]) if fps else None
        self.has_texts = bool((np.diff(self._entries.text_edges) > 0).all())
        cut = [READING, frames, height, width, stride, random_start, *([fps] if fps else [])]
        cut += [further_sizes, self.buckets.tolist()] if further_sizes else []
        digest = hashlib.sha256(json.dumps(cut).encode())
        digest.update(b"\n" + json.dumps(self.class_names).encode())
        for (name, _, texts), length, label in zip(self._entries, self.lengths, self.labels, strict=True):
            row = [name, stats[name].st_size, int(length), int(label), texts]
            digest.update(b"\n" + json.dumps(row).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """The file's name relative to the root."""
        return self._entries.names[index]

    def keys(self) -> np.ndarray:
        """By what clips are held out: uint64 [N], see `splits.cut`."""
        return keys_of(self._entries.names)

    def label(self, index: int) -> int:
        """Its class; len(class_names), the null class, where the file has none."""
        return int(self.labels[index])

    def texts(self, index: int) -> tuple[str, ...]:
        """Its captions."""
        return self._entries.texts_of(index)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int, str | None]:
        """-> (video uint8 RGB [T,H,W,3], its `label`, its caption or None).

        T = frames, `stride` apart, from a start that `rng` draws (0 where random_start is off); centre crop of what a
        player shows, then antialiased resize. Of several captions `rng` then draws one. Raises UserError if the file
        has changed since its test.
        """
        needed = frames_needed(self.frames, self.stride)
        start = draw_start(int(self.lengths[index]), needed, rng) if self.random_start else 0
        wanted = range(start, start + needed, self.stride)
        if self.fps:
            wanted = timing.frames_at(timing.seconds(self._steps[index], self._ticks[index]), self.fps, wanted)
        path, size = os.path.join(self.root, self.name(index)), self.sizes[self.buckets[index]]
        key_frames = [video.KeyFrame(*row) for row in self._key_frames[index].tolist()]
        return video.read_frames(path, wanted, size, key_frames), self.label(index), draw_text(self.texts(index), rng)

    def _report_bad(self, total: int, max_bad_fraction: float):
        bad = len(self.bad)
        if not bad:
            return
        named = [f"{name} {reason}" for name, reason in sorted(self.bad.items())]
        more = [f"and {bad - NAMED_IN_WARNING} more"] if bad > NAMED_IN_WARNING else []
        log.warning(
            "%d of %d files in %s cannot be used: %s", bad, total, self.root, "; ".join(named[:NAMED_IN_WARNING] + more)
        )
        check_bad(self.root, bad, total, max_bad_fraction, f", the first: {named[0]}")


def _probe(
    root: str,
    stats: dict[str, os.stat_result],
    timeout: float,
    cap: float,
    cache: Path | BucketPath | None,
    command: Sequence[str],
    times: bool,
) -> dict[str, dict]:
    """Facts of each file (see probe.probe), from the cache where it knows the file by this size and time."""
    outcomes, facts, todo = Outcomes(cache), {}, {}
    for name, status in stats.items():
        key = [status.st_size, status.st_mtime_ns]
        known = outcomes.of(name, key)
        told = known and ("error" in known or "steps" in known or not times)
        if told and known.get("hung", timeout) >= timeout and known.get("endless", cap) >= cap:
            facts[name] = known
        else:
            todo[os.path.join(root, name)] = name, key
    if not todo:
        return facts
    log.info("testing %d of %d files in %s", len(todo), len(stats), root)
    noted = time.monotonic()
    with outcomes.appending() as keep:
        for done, (path, fact) in enumerate(probing.probe(list(todo), timeout, command, cap, times), 1):
            name, key = todo[path]
            facts[name] = fact
            if not fact.get("transient"):
                keep(name, key, fact)
            if time.monotonic() > noted + NOTE_EVERY:
                noted = time.monotonic()
                log.info("tested %d of %d files", done, len(todo))
    return facts


def _tick(facts: dict) -> float:
    """Seconds of one of a file's units of time."""
    return facts["tick"][0] / facts["tick"][1]
