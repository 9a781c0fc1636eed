"""How close a decoded clip is to its original."""

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray, range: float = 2.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each clip: two [B,T,H,W,C] that span `range` (2 for [-1,1]) -> float64 [B], dB.

    The squared error is averaged over the whole clip before the logarithm. Equal clips give inf.
    ValueError on unlike shapes.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"clips of shape {a.shape} and {b.shape} cannot be compared")
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=(1, 2, 3, 4))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(range**2 / error)
