"""Scaled dot-product attention, and rotary positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.models.layout import splits, with_own_queries

WHOLE_TOKENS = 1024  # up to so many queries, or keys, all scores exist at once
QUERY_BLOCK = 256


def attend(query, key, value, axes=("act_batch", "act_token")):
    """Softmax attention over the token axis: query [..., N, heads, head_dim], key and value [..., M, heads, head_dim]
    -> [..., N, heads, head_dim].

    Logits and softmax are float32 whatever the inputs' dtype. Where both N and M exceed WHOLE_TOKENS the queries are
    taken in blocks, forward and backward, so that memory grows with N + M and not with N * M: 8,192 tokens of 5 heads
    have 1.3 GB of scores. axes: logical ones of the queries' dimensions up to N; where the mesh splits more than the
    batch, each device takes its own queries, and all keys and values of theirs.
    """
    if splits("act_token", "act_time"):
        return with_own_queries(_blocked, query, key, value, axes)
    return _blocked(query, key, value)


def _blocked(query, key, value):
    if min(query.shape[-3], key.shape[-3]) <= WHOLE_TOKENS:
        return _attend(query, key, value)
    *outer, tokens, heads, width = query.shape
    blocks = -(-tokens // QUERY_BLOCK)
    padding = [(0, 0)] * len(outer) + [(0, blocks * QUERY_BLOCK - tokens), (0, 0), (0, 0)]
    query = jnp.pad(query, padding).reshape(*outer, blocks, QUERY_BLOCK, heads, width)
    # Without the checkpoint the backward pass would keep the softmax of every block.
    block = jax.checkpoint(partial(_attend, key=key, value=value), prevent_cse=False)
    out = jnp.moveaxis(jax.lax.map(block, jnp.moveaxis(query, -4, 0)), 0, -4)
    return out.reshape(*outer, blocks * QUERY_BLOCK, heads, width)[..., :tokens, :, :]


def _attend(query, key, value):
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
