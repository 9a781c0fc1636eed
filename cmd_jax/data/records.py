"""Shards of records that TFDS reads too: ArrayRecord files of TensorFlow's Example, each written whole or not at all.

A split of a dataset lies in DIR/NAME/VERSION, as TFDS wants it: its shards, beside them `.ingest/SPLIT/NNNNN.json`, the
facts of each finished one, and in the end `index-SPLIT.npz`, its columns, and TFDS's own features.json and
dataset_info.json. Reading needs neither TFDS nor TensorFlow.
"""

import bisect
import contextlib
import errno
import hashlib
import itertools
import os
import resource
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from cmd_jax.cache import Copy, current
from cmd_jax.errors import UserError
from cmd_jax.files import COUNT, atomic_path, is_remote, leftovers, parse_json, remove_tree, write_json, write_text

OPTIONS = "group_size:1,uncompressed"  # a record is read alone, and hardly anything in it can be compressed
VERSION = "1.0.0"
REMEDY = "fetch it again, or remove its facts in .ingest/ and run cmd-jax ingest again"
FACTS = {"records": COUNT, "bytes": COUNT, "sha256": str, ...: object}


class Shards(NamedTuple):
    """The files of one split. folder: DIR/NAME/VERSION."""

    folder: Path
    split: str
    count: int

    @property
    def name(self) -> str:
        return self.folder.parent.name

    @property
    def work(self) -> Path:
        """The folder of what is only needed until the split is whole."""
        return self.folder / ".ingest" / self.split

    @property
    def index(self) -> Path:
        return self.folder / f"index-{self.split}.npz"

    def path(self, k: int) -> Path:
        return self.folder / f"{self.name}-{self.split}.array_record-{k:05d}-of-{self.count:05d}"

    def facts_path(self, k: int) -> Path:
        return self.work / f"{k:05d}.json"


def finished(shards: Shards, k: int) -> dict | None:
    """The facts of shard k, None until it is finished. UserError if its file is not the one that was finished."""
    try:
        text = shards.facts_path(k).read_bytes()
    except FileNotFoundError:
        return None
    facts = parse_json(text, "shard", shards.facts_path(k), REMEDY, FACTS)
    check_size(shards.path(k), facts["bytes"])
    return facts


def check_size(path: Path, size: int, there: Mapping[str, SimpleNamespace] | None = None):
    """UserError for a shard that is absent, or cut off: it would open as one without records.

    there: of the files of its folder, by name, where it was listed.
    """
    try:
        found = (path.stat() if there is None else there[path.name]).st_size
    except (FileNotFoundError, KeyError):
        found = None
    if found != size:
        problem = "is missing" if found is None else f"has {found} bytes, not {size}: it is damaged or another's"
        raise UserError("shard", path, problem, REMEDY)


def write_shard(shards: Shards, k: int, records: Iterable[bytes], facts: Callable[[], dict]) -> dict:
    """Write shard k, unless it is finished -> its facts.

    records: Examples as `example` makes them, in order. facts: asked once they are written, for what is to be known of
    them beside their number, bytes and digest; JSON. Both files come by rename, so that a killed process leaves either
    nothing or what needs no second writing.
    """
    if done := finished(shards, k):
        return done
    shards.work.mkdir(parents=True, exist_ok=True)
    for path in leftovers(shards.folder, shards.path(k).name):
        remove_tree(path)
    try:
        digest, size, count = _write_file(shards, k, records)
    except _Quicker as other:
        return other.args[0]
    whole = {**facts(), "records": count, "bytes": size, "sha256": digest}
    write_json(shards.facts_path(k), whole)
    return whole


class _Quicker(Exception):
    """Another process has finished the shard meanwhile: its file stays as it is."""


def _write_file(shards: Shards, k: int, records: Iterable[bytes]) -> tuple[str, int, int]:
    """-> (SHA-256, bytes, records)."""
    count = 0
    with atomic_path(shards.path(k)) as temporary:
        writer = ArrayRecordWriter(str(temporary), OPTIONS)
        try:
            for record in records:
                with _as_os_error():
                    writer.write(record)
                count += 1
        finally:
            with _as_os_error():
                writer.close()
        with open(temporary, "rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
        if done := finished(shards, k):
            raise _Quicker(done)
    return digest, size, count


@contextlib.contextmanager
def _as_os_error():
    """ArrayRecord's word for a full disk and the like is RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.EIO, str(error).partition(";")[0]) from error


class Records:
    """Random access to the records of finished shards, from any thread, by their places: those of the first shard come
    first. Shards of a bucket are read from the copies in `cache.current()`.

    sizes, counts, digests: of each shard, as its facts have them: bytes, records, and (of a bucket) its SHA-256 in hex.
    """

    def __init__(
        self, paths: Sequence[Path], sizes: Sequence[int], counts: Sequence[int], digests: Sequence[str] = ()
    ):  # fmt: skip
        self.paths, self.sizes, self.digests = list(paths), [*map(int, sizes)], digests
        self._edges = [0, *np.cumsum(counts, dtype=np.int64).tolist()]  # a list: to search it takes no microsecond
        self.remote = bool(self.paths) and is_remote(self.paths[0])
        there = self.paths[0].parent.stats() if self.remote and len(self.paths) > 1 else None
        for path, size in zip(self.paths, self.sizes, strict=True):
            check_size(path, size, there)
        raise_open_files()
        self._readers: dict[int, _Open] = {}

    def __len__(self) -> int:
        return self._edges[-1]

    def __getitem__(self, place: int) -> bytes:
        shard, row = self._split(place)
        for _ in range(8):  # of threads that meet the same damage one may get another's old reader more than once
            opened = None
            try:
                opened = self._readers.get(shard) or self._open(shard)
                return self._read(opened, row)
            except UserError:
                if not (self.remote and self._discarded(shard, opened)):
                    raise
        return self._read(self._open(shard), row)

    def _read(self, opened: "_Open", row: int) -> bytes:
        opened.used = next(_clock)
        try:
            return opened.reader.read([row])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            problem = f"record {row} cannot be read ({str(error).splitlines()[0][:100]})"
            raise UserError("shard", self.paths[opened.shard], problem, REMEDY) from error

    def where(self, place: int) -> tuple[Path, int]:
        """The file, and the number of the record in it."""
        shard, row = self._split(place)
        return self.paths[shard], row

    def shard_of(self, place: int) -> int:
        return bisect.bisect_right(self._edges, place) - 1

    def fetch(self, shard: int) -> Copy:
        """Its copy, of a bucket's."""
        return current().fetch(self.paths[shard], self.sizes[shard], self.digests[shard], give_up)

    def _split(self, place: int) -> tuple[int, int]:
        shard = self.shard_of(place)
        return shard, place - self._edges[shard]

    def _open(self, shard: int) -> "_Open":
        copy = self.fetch(shard) if self.remote else None  # which others need not wait for
        with _opening:
            if shard in self._readers:
                return self._readers[shard]
            while len(_opened) >= most_open():
                _close(_opened.popleft())
            # Without reading ahead, which is for those that read a shard from end to end.
            reader = ArrayRecordReader(str(copy.path if copy else self.paths[shard]), "readahead_buffer_size:0")
            count = self._edges[shard + 1] - self._edges[shard]
            if reader.num_records() != count:  # none, for a file that could not be opened
                problem = f"{reader.num_records()} records can be read, where {count} should be"
                raise UserError("shard", self.paths[shard], problem, REMEDY)
            self._readers[shard] = opened = _Open(weakref.ref(self), shard, reader, copy)
            _opened.append(opened)
            return opened

    def _discarded(self, shard: int, failed: "_Open | None") -> bool:
        """Whether the copy of a shard, that was read as `failed`, was damaged on the disk of this machine, since it was
        found to be sound; or may have been, since another thread has dealt with it meanwhile."""
        with _mending:
            opened = self._readers.get(shard)
            if opened is not failed:
                return True
            if opened:
                with _opening, contextlib.suppress(ValueError):
                    _opened.remove(opened)
                    _close(opened)
            copy = opened.copy if opened else self.fetch(shard)
            if current().is_sound(copy):
                return False
            current().discard(copy)
            return True


class _Open:
    """A shard that is open. copy: that of a bucket's, else None. used: when it was last read from, by `_clock`."""

    __slots__ = ("copy", "reader", "records", "shard", "used")

    def __init__(self, records: weakref.ref, shard: int, reader: ArrayRecordReader, copy: Copy | None):
        self.records, self.shard, self.reader, self.copy, self.used = records, shard, reader, copy, next(_clock)


_clock = itertools.count()
_opening, _mending = threading.Lock(), threading.Lock()
_opened: deque[_Open] = deque()  # the open shards of all Records


def _close(opened: _Open):
    """Forget it; a thread that reads from it just now keeps it, and its copy, that long."""
    if (owner := opened.records()) is not None:
        owner._readers.pop(opened.shard, None)


def give_up() -> bool:
    """Close half of the copies that this process has open, those that were not read from for the longest time, so that
    there is room for others, of other processes too -> whether there were any."""
    with _opening:
        copies = sorted((x for x in _opened if x.copy), key=lambda x: x.used)
        for opened in copies[: -(-len(copies) // 2)]:
            _opened.remove(opened)
            _close(opened)
        return bool(copies)


def most_open() -> int:
    """Shards that may be open at a time: with their copies two thirds of the files that this process may have open."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 3)


def raise_open_files():
    """A file stays open for each shard that was touched: allow as many as the system lets this process have."""
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def write_dataset(
    folder: Path,
    features,
    splits: Mapping[str, tuple[Sequence[int], int]],
    *,
    description: str,
    citation: str = "",
    metadata: Mapping | None = None,
):
    """TFDS's own files, with which `tfds.data_source(NAME, split=SPLIT, data_dir=DIR)` opens the splits anywhere.

    features: a tfds.features.FeaturesDict. splits: name -> (records of each shard, bytes of all of them). metadata:
    what else there is to know, as JSON. It is written last of all: what has no dataset_info.json is not finished.
    """
    with tempfile.TemporaryDirectory(prefix="cmd-jax-") as drafts:
        _write_info(Path(drafts), folder.parent.name, folder.name, features, splits, description, citation, metadata)
        for path in sorted(Path(drafts).iterdir(), key=lambda path: path.name == "dataset_info.json"):
            write_text(folder / path.name, path.read_text("utf-8"))


def _write_info(drafts: Path, name: str, version: str, features, splits, description, citation, metadata):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    template = tfds.core.ShardedFileTemplate(data_dir=drafts, dataset_name=name, filetype_suffix="array_record")
    identity = DatasetIdentity(name=name, version=tfds.core.Version(version), data_dir=str(drafts), module_name="")
    about = dict(description=description, citation=citation, metadata=tfds.core.MetadataDict(metadata or {}))
    info = tfds.core.DatasetInfo(builder=identity, features=features, **about)
    info.set_file_format("array_record")
    info.set_splits(
        tfds.core.SplitDict(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[int(n) for n in counts],
                num_bytes=int(size),
                filename_template=template.replace(split=split),
            )
            for split, (counts, size) in splits.items()
        )
    )
    info.write_to_directory(drafts)
