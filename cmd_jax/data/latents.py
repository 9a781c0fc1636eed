"""The statistics of the channels of latents, from sums that shards and processes make one by one."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

SUMS = {"count": int, "sum": [float], "squares": [float]}  # of a kind of latents, as JSON has them


class Sums:
    """Number, sum and sum of squares of each channel; float64, and the same however the latents come in batches."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray):
        """values [..., C]: those of one clip."""
        values = values.reshape(-1, values.shape[-1]).astype(np.float64)
        self.count += len(values)
        self.sum, self.squares = self.sum + values.sum(0), self.squares + np.square(values).sum(0)

    def as_json(self) -> dict:
        """As `SUMS`."""
        return {"count": self.count, "sum": np.ravel(self.sum).tolist(), "squares": np.ravel(self.squares).tolist()}


@dataclass(frozen=True)
class ChannelStatistics:
    """Of each channel of latents, in the autoencoder's units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]  # positive

    @classmethod
    def of(cls, sums: Iterable[dict]) -> "ChannelStatistics":
        """Of all that was summed up, as `SUMS`, in that order; not of nothing."""
        parts = [part for part in sums if part["count"]]
        count = sum(part["count"] for part in parts)
        total, squares = (sum(np.array(part[name]) for part in parts) for name in ("sum", "squares"))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
        return cls(tuple(mean.tolist()), tuple(np.maximum(std, 1e-6).tolist()))


@dataclass(frozen=True)
class LatentStatistics:
    """By what content frames and motion latents are normalised for a denoiser: (x - mean) / std."""

    content: ChannelStatistics
    motion: ChannelStatistics

    @classmethod
    def of(cls, sums: Iterable[dict[str, dict]]) -> "LatentStatistics":
        """Of parts {"content": sums, "motion": sums}, each as `SUMS`."""
        parts = list(sums)
        return cls(*(ChannelStatistics.of(part[name] for part in parts) for name in ("content", "motion")))

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
