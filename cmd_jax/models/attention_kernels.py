"""Softmax attention, computed in several ways: query [..., N, heads, head_dim], key and value [..., M, heads, head_dim]
-> [..., N, heads, head_dim]. Logits and softmax are float32 in all of them."""

from functools import partial

import jax
import jax.numpy as jnp

QUERY_TILE, KEY_TILE = 512, 256  # at most; a tile of float32 scores and what multiplies it stay in a core's L2 cache


def plain(query, key, value):
    """All scores exist at once, and the backward pass keeps the softmax."""
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked(query, key, value, in_turn: bool):
    """Scores exist by tiles of queries x keys (Milakov & Gimelshein 2018, Dao et al. 2022): memory grows with N + M.

    The backward pass computes the tiles anew from the logarithms of the softmax's denominators, all that is kept
    besides arguments and result. in_turn: each head of each clip after the other, which suits the caches of a CPU;
    else all together. It has no forward-mode derivative.
    """
    return _blocked_forward(query, key, value, in_turn)[0]


def _blocked_forward(query, key, value, in_turn):
    run = _in_turn if in_turn else lambda function, *arrays: function(*arrays)
    out, log_sums = run(_forward_tiles, *map(_heads_first, (query, key, value)))
    out = _heads_first(out)
    return out, (query, key, value, out, log_sums)


def _blocked_backward(in_turn, kept, gradient):
    query, key, value, out, log_sums = kept
    run = _in_turn if in_turn else lambda function, *arrays: function(*arrays)
    # What the softmax's derivative takes off each row: sum_k p_k dp_k = the gradient's product with the result.
    means = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(-1, -2)
    arrays = (*map(_heads_first, (query, key, value, gradient)), log_sums, means)
    gradients = map(_heads_first, run(_backward_tiles, *arrays))
    return tuple(d.astype(x.dtype) for d, x in zip(gradients, (query, key, value), strict=True))


blocked.defvjp(_blocked_forward, _blocked_backward)


def _heads_first(x):
    """[..., N, heads, d] <-> [..., heads, N, d]."""
    return jnp.swapaxes(x, -3, -2)


def _in_turn(function, *arrays):
    """function of each clip's and head's arrays, one after the other: leading axes are those of the queries' heads."""
    outer = arrays[0].shape[:-2]
    flat = [x.reshape(-1, *x.shape[len(outer) :]) for x in arrays]
    return jax.tree.map(lambda x: x.reshape(*outer, *x.shape[1:]), jax.lax.map(lambda xs: function(*xs), tuple(flat)))


def _tile(count: int, most: int) -> int:
    """Size of equal tiles of `count` rows: the greatest divisor, if there is one above most / 2, or with padding."""
    return next((size for size in range(min(count, most), most // 2, -1) if count % size == 0), 0) or -(
        -count // -(-count // most)
    )


def _tiles(x, axis: int, size: int):
    """Cut an axis, counted from the end, into tiles of `size`, the last padded with zeros, and put them first."""
    axis += x.ndim
    count = -(-x.shape[axis] // size)
    padding = [(0, count * size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, padding).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _whole(tiles, axis: int, count: int):
    """Undo `_tiles`."""
    axis += tiles.ndim - 1
    x = jnp.moveaxis(tiles, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, count, axis=axis)


def _scores(query, key, there):
    """Logits of tiles [..., q, d] and [..., k, d] -> float32 [..., q, k]; there: bool [k], not padding; None: all."""
    logits = jnp.einsum("...qd,...kd->...qk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    return logits if there is None else jnp.where(there, logits, -jnp.inf)


def _key_tiles(key, value):
    """Tiles of keys, of values and of which of them are there."""
    count, size = key.shape[-2], _tile(key.shape[-2], KEY_TILE)
    there = _tiles(jnp.ones(count, bool), -1, size) if count % size else None
    return _tiles(key, -2, size), _tiles(value, -2, size), there


def _forward_tiles(query, key, value):
    """[..., N, d], [..., M, d] twice -> the result [..., N, d] and the logarithms of denominators, float32 [..., N]."""
    keys, size = _key_tiles(key, value), _tile(query.shape[-2], QUERY_TILE)

    def rows(query):
        def step(carry, tile):
            most, denominator, total = carry
            key, value, there = tile
            logits = _scores(query, key, there)
            new_most = jnp.maximum(most, logits.max(axis=-1))
            weights, shrink = jnp.exp(logits - new_most[..., None]), jnp.exp(most - new_most)
            product = jnp.einsum(
                "...qk,...kd->...qd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
            )
            denominator = denominator * shrink + weights.sum(axis=-1)
            return (new_most, denominator, total * shrink[..., None] + product), None

        zeros = jnp.zeros(query.shape, jnp.float32)
        (most, denominator, total), _ = jax.lax.scan(step, (zeros[..., 0] - jnp.inf, zeros[..., 0], zeros), keys)
        return (total / denominator[..., None]).astype(value.dtype), most + jnp.log(denominator)

    out, log_sums = jax.lax.map(rows, _tiles(query, -2, size))
    return _whole(out, -2, query.shape[-2]), _whole(log_sums, -1, query.shape[-2])


def _backward_tiles(query, key, value, gradient, log_sums, means):
    """Gradients of `_forward_tiles`' arguments from that of its result and two numbers a row, float32 [..., N]."""
    count, size, scale = query.shape[-2], _tile(query.shape[-2], QUERY_TILE), query.shape[-1] ** -0.5
    rows = tuple(_tiles(x, axis, size) for x, axis in ((query, -2), (gradient, -2), (log_sums, -1), (means, -1)))
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_keys(d_query, tile):
        key, value, there = tile

        def of_rows(carry, row):
            query, gradient, log_sum, mean = row
            weights = jnp.exp(_scores(query, key, there) - log_sum[..., None])
            d_logits = weights * (product("...qd,...kd->...qk", gradient, value) - mean[..., None]) * scale
            weights, d_logits = weights.astype(value.dtype), d_logits.astype(query.dtype)
            # The narrow operand is the one that is transposed: XLA:CPU takes twice as long the other way round.
            d_key = carry[0] + product("...qd,...qk->...dk", query, d_logits)
            d_value = carry[1] + product("...qd,...qk->...dk", gradient, weights)
            return (d_key, d_value), product("...qk,...kd->...qd", d_logits, key)

        zeros = jnp.zeros(key.swapaxes(-1, -2).shape, jnp.float32)
        d_keys, more = jax.lax.scan(of_rows, (zeros, zeros), rows)
        return d_query + more, d_keys

    d_query, d_keys = jax.lax.scan(of_keys, jnp.zeros(rows[0].shape, jnp.float32), _key_tiles(key, value))
    d_key, d_value = (_whole(x.swapaxes(-1, -2), -2, key.shape[-2]) for x in d_keys)
    return _whole(d_query, -2, count), d_key, d_value
