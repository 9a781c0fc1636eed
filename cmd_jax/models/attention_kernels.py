"""Softmax attention, computed in several ways: query [..., N, heads, head_dim], key and value [..., M, heads, head_dim]
-> [..., N, heads, head_dim]. Logits and softmax are float32 in all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

QUERY_TILE, KEY_TILE = 512, 256  # at most; a tile of float32 scores and what multiplies it stay in a core's L2 cache
LANES = 128  # what the tiles of a TPU's vector unit are wide
FEW_KEYS = 32


def plain(query, key, value):
    """All scores exist at once, and the backward pass keeps them."""
    query, key, value = map(_heads_first, (query, key, value))
    logits, few = _scores(query, key, None), key.shape[-2] <= FEW_KEYS
    weights = jax.nn.softmax(logits) if few else jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    out = jnp.einsum("...qk,...kd->...qd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    # The division of few weights is cheaper than that of results, also in the backward pass.
    out = out if few else out / weights.sum(-1, keepdims=True)
    return _heads_first(out.astype(value.dtype))


def cudnn(query, key, value, implementation="cudnn"):
    """The fused kernel of NVIDIA's cuDNN, of float16 and bfloat16."""
    *outer, tokens, heads, width = query.shape
    arrays = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    out = jax.nn.dot_product_attention(*arrays, implementation=implementation)
    return out.reshape(*outer, tokens, heads, width)


def flash(query, key, value, interpret=False):
    """The splash attention that comes with JAX's Pallas, for TPUs; without forward-mode derivative.

    Tokens are padded to whole lanes, and queries scaled before they are multiplied, in their own dtype.
    """
    # Imported where it is used: Pallas takes a second that no other kernel needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    *outer, tokens, heads, width = query.shape
    keys = key.shape[-3]
    scaled = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    query, key, value = (
        jnp.pad(
            _heads_first(x).reshape(-1, heads, x.shape[-3], width), [(0, 0), (0, 0), (0, -x.shape[-3] % LANES), (0, 0)]
        )
        for x in (scaled, key, value)
    )
    rows, columns = query.shape[-2], key.shape[-2]
    sizes = [_lanes(count) for count in (rows, columns)]
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((rows, columns))] * heads),
        block_sizes=splash.BlockSizes(**dict(zip(names, 3 * sizes, strict=True))),
        interpret=interpret,
    )
    # Padded keys are of another segment than all queries.
    there = splash.SegmentIds(np.zeros(rows, np.int32), (np.arange(columns) >= keys).astype(np.int32))
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, there if columns > keys else None))(query, key, value)
    return _heads_first(out[..., :tokens, :].reshape(*outer, heads, tokens, width))


def _lanes(count: int) -> int:
    """The greatest divisor of `count`, a multiple of LANES, that is one too, up to 4 of them."""
    return next(size for size in (4 * LANES, 3 * LANES, 2 * LANES, LANES) if count % size == 0)


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
            # The narrow operand is the one that is transposed: the other way all of it takes XLA:CPU 1.6 times as long.
            d_key = carry[0] + product("...qd,...qk->...dk", query, d_logits)
            d_value = carry[1] + product("...qd,...qk->...dk", gradient, weights)
            return (d_key, d_value), product("...qk,...kd->...qd", d_logits, key)

        zeros = jnp.zeros(key.swapaxes(-1, -2).shape, jnp.float32)
        d_keys, more = jax.lax.scan(of_rows, (zeros, zeros), rows)
        return d_query + more, d_keys

    d_query, d_keys = jax.lax.scan(of_keys, jnp.zeros(rows[0].shape, jnp.float32), _key_tiles(key, value))
    d_key, d_value = (_whole(x.swapaxes(-1, -2), -2, key.shape[-2]) for x in d_keys)
    return _whole(d_query, -2, count), d_key, d_value
