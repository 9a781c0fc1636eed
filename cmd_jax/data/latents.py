"""Latents of clips: the statistics of their channels, and files of them that keep their provenance.

A provenance is all that the numbers depend on, as JSON has it; it names the file, too.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cmd_jax.files import atomic_path
from cmd_jax.running.distributed import gather, is_leader

PROVENANCE = "made_of"  # its name in the file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChannelStatistics:
    """Of each channel of latents, in the autoencoder's units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]  # positive

    @classmethod
    def of(cls, values: np.ndarray) -> "ChannelStatistics":
        """Measured on values [..., C]."""
        values = values.reshape(-1, values.shape[-1]).astype(np.float64)
        return cls(tuple(values.mean(0).tolist()), tuple(np.maximum(values.std(0), 1e-6).tolist()))


@dataclass(frozen=True)
class LatentStatistics:
    """By what content frames and motion latents are normalised for a denoiser: (x - mean) / std."""

    content: ChannelStatistics
    motion: ChannelStatistics

    @classmethod
    def of(cls, latents: dict[str, np.ndarray]) -> "LatentStatistics":
        """Measured on {"content": [N, h, w, C], "motion": [N, T, h+w, K]}."""
        return cls(ChannelStatistics.of(latents["content"]), ChannelStatistics.of(latents["motion"]))

    @classmethod
    def unit(cls, content: int, motion: int) -> "LatentStatistics":
        """Zero means and unit deviations of so many channels: latents are taken as they are."""
        return cls(*(ChannelStatistics((0.0,) * channels, (1.0,) * channels) for channels in (content, motion)))

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """{"content" or "motion": {"mean" or "std": float32 [C]}}."""
        return {
            name: {key: np.asarray(value, np.float32) for key, value in channels.items()}
            for name, channels in asdict(self).items()
        }


def path_of(workdir: Path, provenance: dict) -> Path:
    """The file of the latents of a provenance."""
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()
    return workdir / f"latents-{digest[:16]}.npz"


def write_latents(path: Path, latents: dict[str, np.ndarray], provenance: dict):
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **latents, **{PROVENANCE: json.dumps(provenance)})


def latents_of(workdir: Path, provenance: dict, encode: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{name: [N, ...]} from the file of that provenance, or of `encode`, whose latents are written there.

    Every process must call it: unless all can read the file, all encode.
    """
    path = path_of(workdir, provenance)
    latents = read_latents(path, provenance)
    found = [json.loads(text) for text in gather(json.dumps(latents is not None))]
    if all(found):
        return latents
    if any(found):
        log.warning("%s is not read by every process, and made anew", path)
    latents = encode()
    if is_leader():
        write_latents(path, latents, provenance)
    return latents


def read_latents(path: Path, provenance: dict) -> dict[str, np.ndarray] | None:
    """The latents of a file; None where there is none or, which is logged, it is damaged or of another provenance."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            latents = dict(file)  # which checks the sums of all parts
        stored = json.loads(latents.pop(PROVENANCE).item())
    except Exception as e:  # noqa: BLE001  a damaged file can fail in any way
        log.warning("%s is damaged and made anew (%s: %s)", path, type(e).__name__, e)
        return None
    if stored != provenance:
        different = [name for name in provenance if stored.get(name) != provenance[name]]
        log.warning("%s is of another %s, and made anew", path, ", ".join(different) or "kind")
        return None
    return latents
