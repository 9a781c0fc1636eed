"""Scaled dot-product attention, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.models.attention_kernels import blocked, plain
from cmd_jax.models.layout import splits, with_own_queries

WHOLE_TOKENS = {"cpu": 128}  # of queries or keys up to which all scores exist at once
WHOLE_TOKENS_ELSEWHERE = 1024


def attend(query, key, value, axes=("act_batch", "act_token")):
    """Softmax attention over the token axis: query [..., N, heads, head_dim], key and value [..., M, heads, head_dim]
    -> [..., N, heads, head_dim].

    Logits and softmax are float32 whatever the inputs' dtype. Where both N and M are many, scores exist by tiles,
    forward and backward, so that memory grows with N + M and not with N * M: 8,192 tokens of 5 heads have 1.3 GB of
    scores. axes: logical ones of the queries' dimensions up to N; where the mesh splits more than the batch, each
    device takes its own queries, and all keys and values of theirs.
    """
    backend = jax.default_backend()
    if min(query.shape[-3], key.shape[-3]) <= WHOLE_TOKENS.get(backend, WHOLE_TOKENS_ELSEWHERE):
        kernel, alone = plain, splits("act_token", "act_time")
    else:  # what runs head after head is no matter of XLA's to split
        kernel, alone = lambda *x: blocked(*x, backend == "cpu"), splits("heads", *filter(None, axes))
    return with_own_queries(kernel, query, key, value, axes) if alone else kernel(query, key, value)


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
