"""Clips from a dataset that `cmd-jax ingest` made: windows of its records, without a video decoder.

It lies in DIR/clips/1.0.0: shards of records (`cmd_jax.data.records`), and of each split index-SPLIT.npz:

    counts, sizes   int64 [shards]: records, and bytes
    sha256          uint8 [shards, 32]
    length          int32 [N]: frames of a record
    bucket          uint8 [N]: which of the plan's sizes, height x width or those of `buckets`, they have
    label           int32 [N]: number of a listed class, or -1
    key             uint64 [N]: see `cmd_jax.data.splits`
    text_count      int32 [N]
    plan            uint8: JSON, {"id": digest of the plan, "fields": all that the records depend on}

A record has `video` (raw: one bytes of T H W 3, see `video_name`; jpeg, png: T images), `label`, `name`, `texts` and
`fps`.
"""

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cmd_jax.cache import local
from cmd_jax.data.ahead import Shelf
from cmd_jax.data.codecs import CODECS, decoded, video_name
from cmd_jax.data.draws import draw_start, draw_text, frames_needed
from cmd_jax.data.examples import parse, text_of
from cmd_jax.data.packed import used_classes
from cmd_jax.data.records import VERSION, Records, Shards
from cmd_jax.data.roots import check_bad
from cmd_jax.data.sizes import Size, as_text
from cmd_jax.data.splits import keys_of
from cmd_jax.errors import UserError
from cmd_jax.files import COUNT, as_path, parse_json

READING = 1  # raise it whenever the same records give other clips
NAME = "clips"
PLAN = {
    "id": str,
    "fields": {
        "height": COUNT, "width": COUNT, "buckets": str, "fps": float, "codec": str, "clips": COUNT,
        "class_names": [str], "bad": dict,
        ...: object,
    },
}  # fmt: skip
COLUMNS = {
    "counts": np.int64, "sizes": np.int64, "sha256": np.uint8, "length": np.int32, "bucket": np.uint8,
    "label": np.int32, "key": np.uint64,
    "text_count": np.int32, "plan": np.uint8,
}  # fmt: skip
MAKE = "make it with cmd-jax ingest"

log = logging.getLogger(__name__)


class DatasetSource:
    """The clips of a dataset's split, in its order; as `FolderSource` has them of the folder it was made of.

    root: DIR. The window of a clip starts where a folder's would, so that both give the same batches where the codec is
    exact, and clips of fewer frames than a window has are left out. height, width and further_sizes must be the
    dataset's; `buckets` uint8 [N] says which of these a clip has. fps: the dataset's, or 0.

    class_names: those of the clips used. labels: int32 [N], len(class_names) for none. lengths: int32 [N], frames of
    the records. has_texts: whether every clip has captions. bad: empty; ingest's report has what it could not use.
    fingerprint: SHA-256 over the plan's id, the shards' SHA-256s and how windows are cut.

    UserError (data.root, data.split, data.height...) for what is no dataset, not whole, or of other frames, and where
    ingest and this leave out more than `max_bad_fraction` of all clips.
    """

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
        split: str = "train",
        max_bad_fraction: float = 0.05,
        random_start: bool = True,
    ):
        self.frames, self.sizes, self.stride = frames, ((height, width), *further_sizes), stride
        self.random_start, self.bad = random_start, {}
        self.folder = open_folder(root)
        index = read_index(self.folder, split)
        self.index = index.path
        plan = index.plan["fields"]
        self._check_cut(plan, fps)
        self.codec, self._video = plan["codec"], video_name(plan["codec"], plan["buckets"])
        shards = Shards(self.folder, split, len(index["counts"]))
        paths, digests = [shards.path(k) for k in range(shards.count)], [bytes(x).hex() for x in index["sha256"]]
        self._records = Records(paths, index["sizes"], index["counts"], digests)
        self._first = np.cumsum(index["counts"]) - index["counts"]
        self._first_keys = self._all_keys().take(self._first, mode="clip")
        self._known = np.zeros(shards.count, bool)
        if not len(self._records) == len(index["length"]) == len(index["label"]) == len(index["text_count"]):
            raise UserError("data.root", index.path, "its columns are not of one length", index.REMEDY)

        self._needed = frames_needed(frames, stride)
        usable = index["length"] >= self._needed
        total = plan["clips"] + len(plan["bad"])
        self._places = np.flatnonzero(usable).astype(np.int32)
        self._check_bad(total, index["length"], max_bad_fraction)
        self.lengths, self.buckets = index["length"][self._places], index["bucket"][self._places]
        self.class_names, self.labels = used_classes(index["label"][self._places], plan["class_names"])
        self.has_texts = bool((index["text_count"][self._places] > 0).all())
        cut = json.dumps(["dataset", READING, index.plan["id"], frames, stride, random_start])
        self.fingerprint = hashlib.sha256(cut.encode() + index["sha256"].tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shelf(self) -> Shelf | None:
        """Of a dataset in a bucket."""
        records = self._records
        if not records.remote:
            return None
        return Shelf(lambda: records.sizes, lambda index: records.shard_of(int(self._places[index])), records.fetch)

    def name(self, index: int) -> str:
        """The file's name relative to the root that the dataset was made of."""
        return text_of(self._parsed(index)["name"][0])

    def label(self, index: int) -> int:
        """Its class; len(class_names), the null class, where it has none."""
        return int(self.labels[index])

    def texts(self, index: int) -> tuple[str, ...]:
        """Its captions."""
        return tuple(map(text_of, self._parsed(index)["texts"]))

    def keys(self) -> np.ndarray:
        """uint64 [N], see `cmd_jax.data.splits`."""
        return self._all_keys()[self._places]

    def _all_keys(self) -> np.ndarray:
        return read_columns(self.index, ["key"])["key"]

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int, str | None]:
        """-> (video uint8 RGB [T,H,W,3], its `label`, its caption or None), drawn as a FolderSource draws them."""
        return self._cut(index, self._parsed(index), rng)

    def _parsed(self, index: int) -> dict[str, list]:
        place = int(self._places[index])
        shard = self._records.shard_of(place)
        if not self._known[shard]:
            self._check_shard(shard)
        return parse(self._records[place])

    def _check_shard(self, shard: int):
        """UserError where it is another's, as many are of one size: by the name of its first clip."""
        path, _ = self._records.where(place := int(self._first[shard]))
        name = text_of(parse(self._records[place])["name"][0])
        if keys_of([name])[0] != self._first_keys[shard]:
            remedy = "bring back the one of this dataset"
            raise UserError("shard", path, f"is another's: it begins with {name}, and not as the index says", remedy)
        self._known[shard] = True

    def _cut(self, index: int, record: dict[str, list], rng: np.random.Generator):
        length = int(self.lengths[index])
        start = draw_start(length, self._needed, rng) if self.random_start else 0
        wanted = range(start, start + self._needed, self.stride)
        try:
            size = self.sizes[self.buckets[index]]
            video = decoded(record[self._video], self.codec, length, size, wanted)
        except (OSError, ValueError, SyntaxError) as error:
            shard, row = self._records.where(int(self._places[index]))
            problem = f"record {row} is not what its index says ({error})"
            raise UserError("shard", shard, problem, "run cmd-jax ingest again in another folder") from error
        return video, self.label(index), draw_text([*map(text_of, record["texts"])], rng)

    def _check_cut(self, plan: dict, fps: float):
        (height, width), *further = self.sizes
        for name, value in {"height": height, "width": width, "buckets": as_text(further)}.items():
            if plan[name] != value:
                problem = f"the dataset in {self.folder} has {name}={plan[name]}"
                raise UserError(f"data.{name}", value, problem, "use that, or make another with cmd-jax ingest")
        if fps and plan["fps"] != fps:
            theirs = f"fps={plan['fps']:g}" if plan["fps"] else "its clips' own frame rates (fps=0)"
            problem = f"the dataset in {self.folder} has {theirs}"
            raise UserError("data.fps", fps, problem, f"use {plan['fps']:g}, or make another with cmd-jax ingest")
        if plan["codec"] not in CODECS:
            problem = f"its codec {plan['codec']} is none of {', '.join(CODECS)}"
            raise UserError("data.root", self.folder, problem, "read it with the version of cmd-jax that made it")

    def _check_bad(self, total: int, lengths: np.ndarray, max_bad_fraction: float):
        """Warn of the clips that are too short; UserError where these and what ingest left out are too many."""
        short, bad = len(lengths) - len(self._places), total - len(self._places)
        if short:
            log.warning(
                "%d of %d clips in %s are left out: the shortest has %d frames; %d are needed",
                short, total, self.folder, lengths.min(), self._needed,
            )  # fmt: skip
        why = f": {short} have fewer than {self._needed} frames, {bad - short} were left out by ingest"
        check_bad(self.folder, bad, total, max_bad_fraction, why, "use fewer data.frames")


class Index(dict):
    """The columns of a split (see the module) but `key` and `plan`, by name. plan: as `PLAN`."""

    REMEDY = "bring the file back, or remove it and run cmd-jax ingest again"

    def __init__(self, path: Path):
        super().__init__(read_columns(path, [name for name in COLUMNS if name != "key"]))
        self.path = path
        self.plan = parse_json(self.pop("plan").tobytes(), "data.root", path, self.REMEDY, PLAN)


def indices(folder: Path) -> dict[str, Path]:
    """Those of the finished splits in DIR/clips/1.0.0, by split."""
    return {path.stem.removeprefix("index-"): path for path in sorted(folder.glob("index-*.npz"))}


def read_columns(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Of an index. UserError where it is damaged."""
    try:
        with local(path) as copy, np.load(copy) as file:
            columns = {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        problem = f"cannot be read ({str(error).splitlines()[0][:100]})"
        raise UserError("data.root", path, problem, Index.REMEDY) from error
    for name, column in columns.items():
        if column.dtype != COLUMNS[name] or column.ndim != 1 + (name == "sha256"):
            raise UserError("data.root", path, f"its {name} is {column.dtype} {list(column.shape)}", Index.REMEDY)
    return columns


def open_folder(root: str | os.PathLike) -> Path:
    """DIR/clips/1.0.0 of a dataset DIR; UserError where there is none, or only another kind of folder."""
    if not root:
        raise UserError("data.root", root, "missing", "give the folder of a dataset, what cmd-jax ingest had as --out")
    root = as_path(root)
    folder = root / NAME / VERSION
    if folder.is_dir():
        return folder
    if not root.is_dir():
        missing = "is not a folder" if root.exists() else "no such folder"
        raise UserError("data.root", root, missing, "give the folder of a dataset")
    if any(root.glob("*/*/dataset_info.json")):
        problem, remedy = "its datasets are not clips, perhaps latents", "give it as latents.store"
    elif any(root.glob("dataset_info.json")) or any(root.glob(".ingest")):
        problem, remedy = "is the inside of a dataset", f"give data.root={root.parent.parent}"
    elif any(root.glob("*/dataset_info.json")):
        problem, remedy = "is the inside of a dataset", f"give data.root={root.parent}"
    else:
        problem, remedy = "holds no dataset", f"{MAKE}, or set data.source=folder for a folder of videos"
    raise UserError("data.root", root, problem, remedy)


def read_index(folder: Path, split: str) -> Index:
    """Of a finished split; UserError for one that is absent or not finished."""
    shards = Shards(folder, split, 0)
    splits = indices(folder)
    if split in splits and (folder / "dataset_info.json").exists():
        return Index(shards.index)
    if split in splits or shards.work.exists():
        problem = f"its split {split} is not finished"
        raise UserError("data.root", folder, problem, "run cmd-jax ingest again until it says that it is")
    remedy = f"use {' or '.join(splits)}" if splits else MAKE
    raise UserError("data.split", split, f"the dataset in {folder} has no such split", remedy)
