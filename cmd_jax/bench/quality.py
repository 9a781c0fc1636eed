"""How near the videos of a cheaper run come to those of a dearer one that starts from the same noise."""

from functools import partial

import jax
import jax.numpy as jnp

from cmd_jax.sharding import replicated

FULL = {"dtype": "float32", "preset": "quality"}  # of the sampling group: what cheaper values are compared with


def references(config, dtype: str) -> dict[str, dict]:
    """{name: overrides} of the runs that one of a sample config, which computes in `dtype`, is a cheaper form of."""
    cheap = {"dtype": dtype, "preset": config.sampling.get("preset", "")}
    return {full: {f"sampling.{key}": full} for key, full in FULL.items() if cheap[key] not in ("", full)}


def psnr_to(video, reference, mesh) -> dict:
    """Videos [B, T, H, W, 3] on the mesh against those of a reference -> {"db": the mean over clips, "least_db"}.

    As they would be written: what lies outside [-1, 1] is held there. None for videos that are equal.
    """

    @partial(jax.jit, out_shardings=replicated(mesh))
    def decibels(video, reference):
        error = jnp.clip(video, -1, 1) - jnp.clip(reference, -1, 1)
        return 10 * jnp.log10(4.0 / jnp.mean(jnp.square(error), axis=(1, 2, 3, 4)))

    each = decibels(video, reference)
    return {"db": _finite(each.mean()), "least_db": _finite(each.min()), "clips": len(video)}


def _finite(value) -> float | None:
    value = float(value)
    return value if abs(value) < float("inf") else None
