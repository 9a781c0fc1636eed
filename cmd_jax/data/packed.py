"""Texts and listings of clips in a few arrays: ten million Python strings would take gigabytes, and a worker of a
cluster reads its own part of a listing straight from the disk."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmd_jax.data.roots import Entry


class Packed(Sequence[str]):
    """Texts, one after the other as UTF-8. data: uint8 [bytes]; edges: int64 [N + 1], where each begins and ends.

    Names of files may be no UTF-8: Python's surrogates for such bytes are kept.
    """

    def __init__(self, data: np.ndarray, edges: np.ndarray):
        self.data, self.edges = data, edges

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Packed":
        data, lengths = bytearray(), []
        for text in texts:
            piece = text.encode("utf-8", "surrogateescape")
            data += piece
            lengths.append(len(piece))
        return cls(np.frombuffer(data, np.uint8), np.cumsum([0, *lengths], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self.data[self.edges[index] : self.edges[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    def take(self, which: np.ndarray) -> "Packed":
        """Those at `which`, int [M], in that order."""
        starts, lengths = self.edges[which], np.diff(self.edges)[which]
        edges = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(edges[-1]) + np.repeat(starts - edges[:-1], lengths)
        return Packed(self.data[places], edges)


class Rows:
    """Rows of n numbers, some for each clip. data: int64 [K, n]; edges: int64 [N + 1], where each clip's are."""

    def __init__(self, data: np.ndarray, edges: np.ndarray):
        self.data, self.edges = data, edges

    @classmethod
    def of(cls, rows: Sequence[Sequence[Sequence[int]]], n: int) -> "Rows":
        data = np.array([*itertools.chain(*rows)], np.int64).reshape(-1, n)
        return cls(data, np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def __getitem__(self, index: int) -> np.ndarray:
        return self.data[self.edges[index] : self.edges[index + 1]]


class Entries(Sequence[Entry]):
    """A listing's clips as arrays.

    names: relative to the root. labels: the names of the classes; label int32 [N], which of them a clip has, or -1.
    texts: the captions of all clips; text_edges int64 [N + 1], where those of each begin and end.
    """

    def __init__(self, names: Packed, labels: Packed, label: np.ndarray, texts: Packed, text_edges: np.ndarray):
        self.names, self.labels, self.label, self.texts, self.text_edges = names, labels, label, texts, text_edges

    @classmethod
    def of(cls, entries: Sequence[Entry], labels: Sequence[str] = ()) -> "Entries":
        """labels: those to begin with, in their order."""
        number = {name: i for i, name in enumerate(labels)}
        label = np.array(
            [-1 if e.label is None else number.setdefault(e.label, len(number)) for e in entries], np.int32
        )
        edges = np.cumsum([0, *(len(e.texts) for e in entries)], dtype=np.int64)
        texts = Packed.of(text for e in entries for text in e.texts)
        return cls(Packed.of(e.name for e in entries), Packed.of(number), label, texts, edges)

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
        starts, counts = self.text_edges[which], np.diff(self.text_edges)[which]
        edges = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(edges[-1]) + np.repeat(starts - edges[:-1], counts)
        return Entries(self.names.take(which), self.labels, self.label[which], self.texts.take(places), edges)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `save` keeps, by file name."""
        packed = {name: getattr(self, name) for name in ("names", "labels", "texts")}
        arrays = {f"{name}.{part}": getattr(p, part) for name, p in packed.items() for part in ("data", "edges")}
        return arrays | {"label": self.label, "text_edges": self.text_edges}

    def digest(self) -> str:
        """SHA-256 over all of it."""
        digest = hashlib.sha256()
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.shape} ".encode() + np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, folder: Path):
        """Write a file an array into an existing folder."""
        for name, array in self.arrays().items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> "Entries":
        """What `save` wrote, read from the disk as it is needed."""

        def array(name: str) -> np.ndarray:
            path = folder / f"{name}.npy"
            try:
                return np.load(path, mmap_mode="r")
            except ValueError:  # what is empty cannot be mapped
                return np.load(path)

        packed = (Packed(array(f"{name}.data"), array(f"{name}.edges")) for name in ("names", "labels", "texts"))
        names, labels, texts = packed
        return cls(names, labels, array("label"), texts, array("text_edges"))


class Listing(NamedTuple):
    """What a folder lists: the clips, and the names of their classes, which `entries.label` counts.

    bad: name -> why what bears it cannot be used. absent: rows of WebVid's lists whose files are not there.
    """

    entries: Entries
    class_names: tuple[str, ...]
    bad: dict[str, str]
    absent: int = 0

    @classmethod
    def of(cls, entries: Sequence[Entry], class_names: tuple[str, ...], bad: dict[str, str], absent: int = 0):
        """class_names: all that the entries have, and perhaps more."""
        return cls(Entries.of(entries, class_names), class_names, bad, absent)


def used_classes(label: np.ndarray, class_names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Of the listed classes those that have a clip, and the clips' labels among these.

    label: int [N], numbers of listed classes, -1 for none -> (names, int32 [N], len(names) for none).
    """
    used = np.bincount(label[label >= 0], minlength=len(class_names)) > 0
    numbers = np.append(np.cumsum(used) - 1, np.count_nonzero(used)).astype(np.int32)  # -1 finds the last
    return tuple(name for name, has in zip(class_names, used, strict=True) if has), numbers[label]


def draw_text(texts: Sequence[str], rng: np.random.Generator) -> str | None:
    """The one text, one of several that `rng` draws, or None where there is none."""
    return texts[rng.integers(len(texts))] if len(texts) > 1 else texts[0] if texts else None
