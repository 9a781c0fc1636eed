"""Shards of records that TFDS reads too: ArrayRecord files of TensorFlow's Example, each written whole or not at all.

A split of a dataset lies in DIR/NAME/VERSION, as TFDS wants it: its shards, beside them `.ingest/SPLIT/NNNNN.json`, the
facts of each finished one, and in the end `index-SPLIT.npz`, its columns, and TFDS's own features.json and
dataset_info.json. Reading needs neither TFDS nor TensorFlow.
"""

import bisect
import contextlib
import errno
import hashlib
import os
import resource
import shutil
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from cmd_jax.errors import UserError
from cmd_jax.files import (
    COUNT,
    atomic_path,
    leftovers,
    read_json,
    remove_tree,
    sync_path,
    temporary_prefix,
    write_json,
)

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
    if not shards.facts_path(k).exists():
        return None
    facts = read_json(shards.facts_path(k), "shard", remedy=REMEDY, like=FACTS)
    check_size(shards.path(k), facts["bytes"])
    return facts


def check_size(path: Path, size: int):
    """UserError for a shard that is absent, or cut off: it would open as one without records."""
    found = path.stat().st_size if path.exists() else None
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


def example(features: Mapping[str, bytes | str | int | float | Sequence[bytes] | Sequence[str]]) -> bytes:
    """An Example of bytes, texts, numbers, or lists of one kind, the same bytes whatever the order of the names.

    What is bytes may be any buffer of them. As in `parse`, protobuf would copy them more often than it takes to write.
    """
    entries = []
    for name in sorted(features):
        value = features[name]
        values = [value] if isinstance(value, str | int | float | bytes | bytearray | memoryview) else value
        feature = _message(2, _message(_kind(values), _values(values)))
        entries += _message(1, [*_message(1, [name.encode()]), *feature])
    return b"".join(_message(1, entries))


def _kind(values: Sequence) -> int:
    """The number of the list that a Feature keeps them in: of bytes, floats, or whole numbers."""
    first = values[0] if len(values) else b""
    return 3 if isinstance(first, int) else 2 if isinstance(first, float) else 1


def _values(values: Sequence) -> list:
    kind = _kind(values)
    if kind == 1:
        pieces = (v.encode("utf-8", "surrogateescape") if isinstance(v, str) else v for v in values)
        return [part for piece in pieces for part in _message(1, [piece])]
    packed = struct.pack(f"<{len(values)}f", *values) if kind == 2 else b"".join(map(_as_varint, values))
    return _message(1, [packed])


def _message(number: int, parts: list) -> list:
    """The parts of a field: its tag and length, and its content."""
    return [bytes([number << 3 | 2]) + _as_varint(sum(map(len, parts))), *parts]


def _as_varint(value: int) -> bytes:
    value, out = value & (1 << 64) - 1, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def parse(record: bytes) -> dict[str, list]:
    """The lists of an Example: memoryviews into `record` for bytes, whole numbers, or floats.

    protobuf's own parser copies a record twice, which is most of the time that reading a window of it takes. ValueError
    for what is no Example.
    """
    view, features = memoryview(record), {}
    try:
        position, end = _content(record, 0, 1)  # Example.features
        while position < end:
            position, stop = _content(record, position, 1)  # an entry of the map
            position, after = _content(record, position, 1)
            name, (position, stop) = record[position:after].decode(), _content(record, after, 2)
            kind = record[position] >> 3 if position < stop else 1
            position, stop = _content(record, position, kind) if position < stop else (stop, stop)
            if kind == 1:
                values = features[name] = []
                while position < stop:
                    first, position = _content(record, position, 1)
                    values.append(view[first:position])
            else:
                features[name] = (_floats if kind == 2 else _integers)(record, position, stop)
                position = stop
    except IndexError as error:
        raise ValueError("it ends within a field") from error
    return features


def text_of(value: bytes | memoryview) -> str:
    """A text of a record; names of files may be no UTF-8."""
    return bytes(value).decode("utf-8", "surrogateescape")


def _varint(record: bytes, position: int) -> tuple[int, int]:
    """(value, the position behind it)."""
    if (value := record[position]) < 128:
        return value, position + 1
    value, shift = value & 127, 7
    while True:
        position += 1
        byte = record[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
        shift += 7


def _content(record: bytes, position: int, number: int) -> tuple[int, int]:
    """Where the content of field `number`, one with a length, begins and ends; its tag is at `position`."""
    if record[position] != number << 3 | 2:
        raise ValueError(f"it has the tag {record[position]} where field {number} should begin")
    length, position = _varint(record, position + 1)
    if position + length > len(record):
        raise ValueError("a field is longer than its message")
    return position, position + length


def _integers(record: bytes, position: int, end: int) -> list[int]:
    values = []
    while position < end:
        position, stop = _content(record, position, 1)
        while position < stop:
            value, position = _varint(record, position)
            values.append(value - (1 << 64) if value >> 63 else value)
    return values


def _floats(record: bytes, position: int, end: int) -> list[float]:
    first, stop = _content(record, position, 1) if position < end else (end, end)
    return [x for (x,) in struct.iter_unpack("<f", record[first:stop])]


class Records:
    """Random access to the records of finished shards, from any thread, by their places: those of the first shard come
    first.

    sizes, counts: of each shard, as its facts have them.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], counts: Sequence[int]):
        self.paths = list(paths)
        self._edges = [0, *np.cumsum(counts, dtype=np.int64).tolist()]  # a list: to search it takes no microsecond
        for path, size in zip(self.paths, sizes, strict=True):
            check_size(path, int(size))
        raise_open_files()
        self._readers: dict[int, ArrayRecordReader] = {}

    def __len__(self) -> int:
        return self._edges[-1]

    def __getitem__(self, place: int) -> bytes:
        shard, row = self._split(place)
        reader = self._readers.get(shard) or self._open(shard)
        try:
            return reader.read([row])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            problem = f"record {row} cannot be read ({str(error).splitlines()[0][:100]})"
            raise UserError("shard", self.paths[shard], problem, REMEDY) from error

    def where(self, place: int) -> tuple[Path, int]:
        """The file, and the number of the record in it."""
        shard, row = self._split(place)
        return self.paths[shard], row

    def _split(self, place: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._edges, place) - 1
        return shard, place - self._edges[shard]

    def _open(self, shard: int) -> ArrayRecordReader:
        with _opening:
            if shard in self._readers:
                return self._readers[shard]
            while len(_opened) >= most_open():
                records, first = _opened.popleft()
                if (owner := records()) is not None:
                    owner._readers.pop(first, None)  # a thread that reads from it just now keeps it that long
            # Without reading ahead, which is for those that read a shard from end to end.
            reader = ArrayRecordReader(str(self.paths[shard]), "readahead_buffer_size:0")
            count = self._edges[shard + 1] - self._edges[shard]
            if reader.num_records() != count:  # none, for a file that could not be opened
                problem = f"{reader.num_records()} records can be read, where {count} should be"
                raise UserError("shard", self.paths[shard], problem, REMEDY)
            self._readers[shard] = reader
            _opened.append((weakref.ref(self), shard))
            return reader


_opening = threading.Lock()
_opened: deque[tuple[weakref.ref, int]] = deque()  # the open shards of all Records, with their numbers


def most_open() -> int:
    """Shards that may be open at a time: half of the files that this process may have open."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


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
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    name, version = folder.parent.name, folder.name
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, filetype_suffix="array_record")
    identity = DatasetIdentity(name=name, version=tfds.core.Version(version), data_dir=str(folder), module_name="")
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
    drafts = folder / f"{temporary_prefix()}metadata"
    shutil.rmtree(drafts, ignore_errors=True)
    drafts.mkdir(parents=True)
    try:
        info.write_to_directory(drafts)
        for path in sorted(drafts.iterdir(), key=lambda path: path.name == "dataset_info.json"):
            sync_path(path)
            os.replace(path, folder / path.name)
        sync_path(folder)
    finally:
        shutil.rmtree(drafts, ignore_errors=True)
