"""Encoded clips, made once and kept in a file that says all that its numbers depend on."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cmd_jax.files import atomic_path
from cmd_jax.running.distributed import gather, is_leader

MADE_OF = "made_of"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation, which is positive, of each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, values: np.ndarray) -> "ChannelStatistics":
        """Of the channels of values [..., C]."""
        values = values.reshape(-1, values.shape[-1]).astype(np.float64)
        return cls(tuple(values.mean(0).tolist()), tuple(np.maximum(values.std(0), 1e-6).tolist()))


@dataclass(frozen=True)
class LatentStatistics:
    """Of the channels of both latents, in the autoencoder's units; denoisers see zero mean and unit variance."""

    content: ChannelStatistics
    motion: ChannelStatistics

    @classmethod
    def of(cls, latents: dict[str, np.ndarray]) -> "LatentStatistics":
        """Of {"content": [N, h, w, C], "motion": [N, T, h+w, K]}."""
        return cls(ChannelStatistics.of(latents["content"]), ChannelStatistics.of(latents["motion"]))

    @classmethod
    def unit(cls, content: int, motion: int) -> "LatentStatistics":
        """Zero and one for so many channels of each: nothing is normalised."""
        return cls(*(ChannelStatistics((0.0,) * channels, (1.0,) * channels) for channels in (content, motion)))

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """{"content" or "motion": {"mean" or "std": float32 [C]}}."""
        return {
            name: {key: np.asarray(value, np.float32) for key, value in channels.items()}
            for name, channels in asdict(self).items()
        }


def path_of(workdir: Path, what: dict) -> Path:
    """The file for latents that are made of `what`."""
    return workdir / f"latents-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.npz"


def write_latents(path: Path, latents: dict[str, np.ndarray], what: dict):
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **latents, **{MADE_OF: json.dumps(what)})


def latents_of(workdir: Path, what: dict, encode: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Latents from the file for those made of `what`, or from `encode`, which fills that file.

    Every process must call it: unless all can read the file, all encode.
    """
    path = path_of(workdir, what)
    latents = read_latents(path, what)
    found = [json.loads(text) for text in gather(json.dumps(latents is not None))]
    if all(found):
        return latents
    if any(found):
        log.warning("%s is not read by every process, and made anew", path)
    latents = encode()
    if is_leader():
        write_latents(path, latents, what)
    return latents


def read_latents(path: Path, what: dict) -> dict[str, np.ndarray] | None:
    """The latents of a file; None where there is none, and, which is logged, where it is damaged or made of others."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            latents = dict(file)  # which checks the sums of all parts
        stored = json.loads(latents.pop(MADE_OF).item())
    except Exception as e:  # noqa: BLE001  a damaged file can fail in any way
        log.warning("%s is damaged and made anew (%s: %s)", path, type(e).__name__, e)
        return None
    if stored != what:
        different = [name for name in what if stored.get(name) != what[name]]
        log.warning("%s is of another %s, and made anew", path, ", ".join(different) or "kind")
        return None
    return latents
