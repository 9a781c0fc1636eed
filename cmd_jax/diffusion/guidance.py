"""Classifier-free guidance: out = null + guidance * (conditional - null), on every predicted channel."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from cmd_jax.errors import UserError


def check_guidance(value) -> float:
    """`value` as a float; UserError (sampling.guidance) unless it is a finite number that is not negative."""
    try:
        guidance = float(value)
    except (TypeError, ValueError):
        guidance = math.nan
    if not (math.isfinite(guidance) and guidance >= 0):
        raise UserError("sampling.guidance", value, "not a finite number >= 0", "use 1 for no guidance")
    return guidance


def split_range(out, learned_range: bool):
    """Model output -> (mean part [B,...,C], variance part [B,...,C], or None without a learned range), both float32."""
    out = jnp.asarray(out, jnp.float32)
    if not learned_range:
        return out, None
    if out.shape[-1] % 2:
        raise ValueError(f"a learned range needs an even number of output channels, not {out.shape}")
    return tuple(jnp.split(out, 2, axis=-1))


def interleave(conditional, null):
    """Two trees of arrays [B,...] -> one of [2B,...]: row 2b is the b-th of the first, row 2b+1 that of the second."""
    return jax.tree.map(lambda *both: rearrange(list(both), "g b ... -> (b g) ..."), conditional, null)


def separate(both):
    """What `interleave` put together, [2B,...] -> two arrays [B,...]."""
    return tuple(rearrange(both, "(b g) ... -> g b ...", g=2))


def guide(out_conditional, out_null, guidance, learned_range: bool):
    """Two outputs [B,...,C] (or [B,...,2C] with a learned range) -> the guided one, same shape, float32.

    guidance 0 is the null output, 1 the conditional one. Variance channels are the conditional's.
    """
    conditional, variance = split_range(out_conditional, learned_range)
    null, _ = split_range(out_null, learned_range)
    mean = null + guidance * (conditional - null)
    return mean if variance is None else jnp.concatenate([mean, variance], axis=-1)
