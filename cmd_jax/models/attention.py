"""Scaled dot-product attention, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np


def attend(query, key, value):
    """Softmax attention over the token axis: [..., N, heads, head_dim] x3 -> [..., N, heads, head_dim].

    Logits and softmax are float32 whatever the inputs' dtype.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def rotary_table(positions, pairs: int, base: float = 10000.0) -> np.ndarray:
    """Cosines and sines of the rotations at integer positions [N] -> [2, N, pairs]; wavelengths rise geometrically
    up to 2 pi base."""
    frequencies = base ** (-np.arange(pairs) / pairs)
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def rotate(x, table):
    """Turn channel pairs of queries or keys: [..., N, heads, head_dim], rotary table [2, N, head_dim / 2] -> same.

    Pair i is made of channels i and i + head_dim / 2.
    """
    cos, sin = jnp.asarray(table)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
