"""Texts and listings of clips in a few arrays: ten million Python strings would take gigabytes, and a worker of a
cluster reads its own part of a listing straight from the disk."""

import contextlib
import hashlib
import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmd_jax.buckets import BucketPath
from cmd_jax.cache import local
from cmd_jax.data.roots import Entry
from cmd_jax.errors import some
from cmd_jax.files import atomic_path

BLOCK = 2**12  # texts that are moved at a time: their places take eight times the room of what is moved

log = logging.getLogger(__name__)


class Packed(Sequence[str]):
    """Texts, one after the other as UTF-8. data: uint8 [bytes]; edges: int64 [N + 1], where each begins and ends.

    Names of files may be no UTF-8: Python's surrogates for such bytes are kept.
    """

    def __init__(self, data: np.ndarray, edges: np.ndarray):
        self.data, self.edges = data, edges

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Packed":
        packer = Packer()
        for text in texts:
            packer.add(text)
        return packer.packed()

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self.data[self.edges[index] : self.edges[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    def take(self, which: np.ndarray) -> "Packed":
        """Those at `which`, int [M], in that order."""
        edges = _edges(self.edges[which + 1] - self.edges[which])
        data = np.empty(edges[-1], np.uint8)
        for first in range(0, len(which), BLOCK):
            part = which[first : first + BLOCK]
            data[edges[first] : edges[first + len(part)]] = self.data[_places(self.edges, part)]
        return Packed(data, edges)


class Packer:
    """Texts that are being packed, one by one."""

    def __init__(self):
        self._data, self._lengths = bytearray(), array("I")

    def add(self, text: str):
        piece = text.encode("utf-8", "surrogateescape")
        self._data += piece
        self._lengths.append(len(piece))

    def packed(self) -> Packed:
        """To be called once, at the end."""
        edges, self._lengths = _edges(self._lengths), None
        return Packed(np.frombuffer(self._data, np.uint8), edges)


def _edges(lengths) -> np.ndarray:
    """int [N] -> int64 [N + 1], where things of these lengths, one after the other, begin and end."""
    edges = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=edges[1:])
    return edges


def _places(edges: np.ndarray, which: np.ndarray) -> np.ndarray:
    """The places of what lies between the edges of `which`, int [M], in that order: int64."""
    starts, lengths = edges[which], edges[which + 1] - edges[which]
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


class Ragged:
    """Rows of n numbers, some for each clip. data: int64 [K, n]; edges: int64 [N + 1], where each clip's are."""

    def __init__(self, data: np.ndarray, edges: np.ndarray):
        self.data, self.edges = data, edges

    @classmethod
    def of(cls, rows: Sequence[Sequence[Sequence[int]]], n: int) -> "Ragged":
        data = np.array([*itertools.chain(*rows)], np.int64).reshape(-1, n)
        return cls(data, _edges([*map(len, rows)]))

    def __getitem__(self, index: int) -> np.ndarray:
        return self.data[self.edges[index] : self.edges[index + 1]]


class Entries(Sequence[Entry]):
    """A listing's clips as arrays.

    names: relative to the root. labels: the names of the classes; label int32 [N], which of them a clip has, or -1.
    texts: the captions of all clips; text_edges int64 [N + 1], where those of each begin and end.
    """

    def __init__(self, names: Packed, labels: Packed, label: np.ndarray, texts: Packed, text_edges: np.ndarray):
        self.names, self.labels, self.label, self.texts, self.text_edges = names, labels, label, texts, text_edges
        self._copies: contextlib.ExitStack | None = None  # of a bucket's files, which stay as long as this

    @classmethod
    def of(cls, entries: Iterable[Entry], labels: Iterable[str] = ()) -> "Entries":
        """labels: those to begin with, in their order. The entries are gone through once."""
        number = {name: i for i, name in enumerate(labels)}
        names, texts, label, counts = Packer(), Packer(), array("i"), array("I")
        for name, of_name, captions in entries:
            names.add(name)
            label.append(-1 if of_name is None else number.setdefault(of_name, len(number)))
            for caption in captions:
                texts.add(caption)
            counts.append(len(captions))
        return cls(names.packed(), Packed.of(number), np.array(label, np.int32), texts.packed(), _edges(counts))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Entry:
        index = range(len(self))[index]
        label = int(self.label[index])
        return Entry(self.names[index], self.labels[label] if label >= 0 else None, self.texts_of(index))

    def texts_of(self, index: int) -> tuple[str, ...]:
        """The captions of clip `index` >= 0."""
        return tuple(self.texts[i] for i in range(*self.text_edges[index : index + 2].tolist()))

    def __iter__(self) -> Iterator[Entry]:
        return (self[index] for index in range(len(self)))

    def take(self, which: np.ndarray) -> "Entries":
        """Those at `which`, int [M], in that order."""
        edges = _edges(self.text_edges[which + 1] - self.text_edges[which])
        texts = self.texts.take(_places(self.text_edges, which))
        return Entries(self.names.take(which), self.labels, self.label[which], texts, edges)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `save` keeps, by file name."""
        packed = {name: getattr(self, name) for name in ("names", "labels", "texts")}
        arrays = {f"{name}.{part}": getattr(p, part) for name, p in packed.items() for part in ("data", "edges")}
        return arrays | {"label": self.label, "text_edges": self.text_edges}

    def digest(self) -> str:
        """SHA-256 over all of it."""
        digest = hashlib.sha256()
        for name, column in self.arrays().items():
            digest.update(f"{name} {column.shape} ".encode())
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def save(self, folder: Path):
        """Write a file an array into a folder."""
        for name, column in self.arrays().items():
            write_array(folder / f"{name}.npy", column)

    @classmethod
    def load(cls, folder: Path) -> "Entries":
        """What `save` wrote, read from the disk as it is needed; what lies in a bucket from its copy."""
        copies = contextlib.ExitStack()

        def column(name: str) -> np.ndarray:
            path = copies.enter_context(local(folder / f"{name}.npy"))
            try:
                return np.load(path, mmap_mode="r")
            except ValueError:  # what is empty cannot be mapped
                return np.load(path)

        packed = (Packed(column(f"{name}.data"), column(f"{name}.edges")) for name in ("names", "labels", "texts"))
        names, labels, texts = packed
        entries = cls(names, labels, column("label"), texts, column("text_edges"))
        entries._copies = copies
        return entries


def write_array(path: Path | BucketPath, array: np.ndarray):
    """A .npy file."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


class Listing(NamedTuple):
    """What a folder lists: the clips, and the names of their classes, which `entries.label` counts.

    bad: name -> why what bears it cannot be used. absent: rows of WebVid's lists whose files are not there.
    """

    entries: Entries
    class_names: tuple[str, ...]
    bad: dict[str, str]
    absent: int = 0

    @classmethod
    def of(cls, entries: Iterable[Entry], class_names: tuple[str, ...], bad: dict[str, str], absent: int = 0):
        """class_names: all that the entries have, and perhaps more."""
        return cls(Entries.of(entries, class_names), class_names, bad, absent)


def used_classes(label: np.ndarray, class_names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Of the listed classes those that have a clip, and the clips' labels among these; the others are told.

    label: int [N], numbers of listed classes, -1 for none -> (names, int32 [N], len(names) for none).
    """
    used = np.bincount(label[label >= 0], minlength=len(class_names)) > 0
    numbers = np.append(np.cumsum(used) - 1, np.count_nonzero(used)).astype(np.int32)  # -1 finds the last
    if not used.all():
        empty = [name for name, has in zip(class_names, used, strict=True) if not has]
        log.warning("classes without a usable clip are left out: %s", some(empty))
    return tuple(name for name, has in zip(class_names, used, strict=True) if has), numbers[label]
