"""Which clips are held out of training: a seeded cut by hashes of their groups, the same wherever their names are."""

import hashlib
import logging
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import UserError

log = logging.getLogger(__name__)

# Clips of one scene, as UCF-101 names them: v_CLASS_gGROUP_cCLIP.
SCENE = re.compile(r"(?:.*/)?(v_.+_g\d+)_c\d+\.\w+")


class Split(NamedTuple):
    """The clips of the data, or examples of them: indices, sorted, int64."""

    train: np.ndarray
    validation: np.ndarray

    @classmethod
    def whole(cls, clips: int) -> "Split":
        """Nothing is held out."""
        return cls(np.arange(clips), np.arange(0))

    def of_examples(self, examples: int) -> "Split":
        """The same of examples 0..examples-1, of which e is of clip e % clips."""
        held = np.zeros(len(self.train) + len(self.validation), bool)
        held[self.validation] = True
        held = np.resize(held, examples)
        return Split(np.flatnonzero(~held), np.flatnonzero(held))


def keys_of(names: Iterable[str]) -> np.ndarray:
    """Of each clip by its file's name, uint64 [N]: clips of one scene have the same, all others different ones."""

    def key(name: str) -> bytes:
        scene = SCENE.fullmatch(name)
        return hashlib.blake2b((scene[1] if scene else name).encode(errors="surrogateescape"), digest_size=8).digest()

    keys = bytearray()
    for name in names:  # to join them would hold all of them as objects first
        keys += key(name)
    return np.frombuffer(keys, "<u8").astype(np.uint64)


def split_of(data, source) -> Split:
    """That of a config's `data` group."""
    if not data.validation:
        return Split.whole(len(source))
    return cut(source.keys(), data.validation, data.validation_seed)


def cut(keys: np.ndarray, fraction: float, seed: int) -> Split:
    """Hold out clips of `keys`, uint64 [N], until they are `fraction` > 0 of all; those of one key go together.

    Which ones depends on the keys themselves and the seed: further clips move the edge, but do not mix the order.
    UserError where that leaves none to train on.
    """
    mixed = _mix(keys ^ _mix(np.array([seed], np.uint64)))
    count = max(1, int(np.ceil(fraction * len(keys))))
    held = mixed <= np.partition(mixed, count - 1)[count - 1]
    if held.all():
        problem = f"all {len(keys)} clips would be held out, those of one scene together"
        raise UserError("data.validation", fraction, problem, "use less, or add clips")
    if held.sum() > 2 * count:
        log.warning(
            "data.validation=%g holds out %d of %d clips: those of a scene go together", fraction, held.sum(), len(keys)
        )
    return Split(np.flatnonzero(~held), np.flatnonzero(held))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: one-to-one, and each bit depends on all; uint64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
