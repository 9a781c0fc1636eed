"""The rows of a list of clips, of which several may name one: a table in arrays, no dict of ten million names."""

from array import array

import numpy as np

from cmd_jax.data.packed import Entries, Packed, Packer


class Conflict(Exception):
    """A row gives a clip another label than its first one did: (number of its line, name, the first label, its own)."""


class Rows:
    """Rows as they are read; `entries` makes clips of them."""

    def __init__(self):
        self._names, self._texts, self._number = Packer(), Packer(), {}
        self._hashes, self._label, self._line = array("q"), array("i"), array("I")

    def __len__(self) -> int:
        return len(self._line)

    def add(self, line: int, name: str, text: str, label: str | None = None):
        self._names.add(name)
        self._texts.add(text)
        self._hashes.append(hash(name))
        self._label.append(-1 if label is None else self._number.setdefault(label, len(self._number)))
        self._line.append(line)

    def entries(self) -> Entries:
        """A clip a name, in the order in which they first appear, each with its different texts in their order.

        To be called once, at the end. May raise Conflict.
        """
        names, texts, labels = self._names.packed(), self._texts.packed(), Packed.of(self._number)
        label, first = np.array(self._label, np.int32), _first_equal(np.frombuffer(self._hashes, np.int64), names)
        if first is None:
            return Entries(names, labels, label, texts, np.arange(len(self) + 1))
        for row in np.flatnonzero(label != label[first])[:1].tolist():
            before, now = (labels[n] if n >= 0 else None for n in label[[first[row], row]].tolist())
            raise Conflict(self._line[row], names[row], before, now)
        clips, order = np.flatnonzero(first == np.arange(len(self))), np.argsort(first, kind="stable")
        order = order[_differing(texts, order, first[order])]
        edges = np.append(np.searchsorted(first[order], clips), len(order))
        return Entries(names.take(clips), labels, label[clips], texts.take(order), edges)


def _first_equal(hashes: np.ndarray, texts: Packed) -> np.ndarray | None:
    """For each text the place of the first that equals it, int64 [N]; None if no two are equal.

    hashes: int64 [N], equal for equal texts.
    """
    ordered = np.sort(hashes)
    if (ordered[1:] != ordered[:-1]).all():
        return None
    order, rows = np.argsort(hashes, kind="stable"), np.arange(len(hashes))
    begins = np.append(True, ordered[1:] != ordered[:-1])
    first = np.empty_like(rows)
    first[order] = order[np.maximum.accumulate(np.where(begins, rows, 0))]
    collided: dict[str, int] = {}
    for row in np.flatnonzero(first != rows).tolist():
        if (text := texts[row]) != texts[int(first[row])]:
            first[row] = collided.setdefault(text, row)
    return first


def _differing(texts: Packed, order: np.ndarray, clip: np.ndarray) -> np.ndarray:
    """Which rows of `order` have a text that none before them of the same clip has: bool [N]. clip: of each, sorted."""
    kept, alone = np.ones(len(order), bool), np.append(True, np.diff(clip) != 0)
    among_others = ~(alone & np.append(alone[1:], True))
    seen, last = set(), None
    for place in np.flatnonzero(among_others).tolist():
        if clip[place] != last:
            seen, last = set(), clip[place]
        text = texts[int(order[place])]
        kept[place] = text not in seen
        seen.add(text)
    return kept
