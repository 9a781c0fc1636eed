import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models.attention import WHOLE_TOKENS, attend
from cmd_jax.models.attention_kernels import KEY_TILE, QUERY_TILE, blocked, plain

UNEVEN = 2 * QUERY_TILE + 7  # 1,031, a prime: tiles are padded


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arguments(outer, queries, keys, heads=2, width=4, dtype=jnp.float32):
    return [draw(*outer, n, heads, width, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys))]


def whole(query, key, value):
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / query.shape[-1] ** 0.5, axis=-1).astype(value.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def with_gradients(function):
    """(query, key, value) -> the result and the gradients of each argument."""

    def loss(*args):
        out = function(*args)
        return (out.astype(jnp.float32) ** 3).sum(), out

    def run(*args):
        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*args)
        return out, *gradients

    return jax.jit(run)


def assert_same(function, args, tolerance, expected=whole):
    for a, b, like in zip(
        with_gradients(function)(*args), with_gradients(expected)(*args), (args[0], *args), strict=True
    ):
        assert (a.shape, a.dtype) == (like.shape, like.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize(
    "outer, queries, keys, dtype, tolerance",
    [
        ((), UNEVEN, 2 * KEY_TILE + 1, jnp.float32, 1e-5),  # tiles of both are padded
        ((2, 1), 2 * QUERY_TILE, 77, jnp.float32, 1e-5),
        ((2,), 2 * QUERY_TILE, 5 * KEY_TILE // 2, jnp.bfloat16, 2e-2),
    ],
)
def test_tiles_give_what_the_whole_gives_forward_and_backward(outer, queries, keys, dtype, tolerance, in_turn):
    assert_same(lambda *args: blocked(*args, in_turn), arguments(outer, queries, keys, dtype=dtype), tolerance)


def test_plain_gives_what_the_formula_gives_forward_and_backward():
    assert_same(plain, arguments((2, 3), 16, 9), 1e-5)
    assert_same(plain, arguments((2,), 16, 16, dtype=jnp.bfloat16), 2e-2)


def test_great_logits_neither_overflow_nor_vanish():
    """Logits of some hundreds, of which the greatest are in the last tile."""
    query, key, value = arguments((), 300, 2 * KEY_TILE)
    key = key.at[:KEY_TILE].multiply(1e-2) * 200
    assert_same(lambda *args: blocked(*args, True), (query, key, value), 1e-4)
    np.testing.assert_allclose(plain(query, key, value), whole(query, key, value), atol=1e-4)


def test_tiles_in_a_scan_with_recomputed_blocks():
    """As models stack their blocks: scanned, each under jax.checkpoint."""
    query, key, value = arguments((), 2 * QUERY_TILE, KEY_TILE)

    def stacked(attention, query, key, value):
        block = jax.checkpoint(lambda x, scale: (attention(x * scale, key, value), None), prevent_cse=False)
        return jax.lax.scan(block, query, jnp.array([1.0, 2.0]))[0]

    def by_tiles(*args):
        return stacked(lambda *a: blocked(*a, True), *args)

    assert_same(by_tiles, (query, key, value), 1e-5, lambda *args: stacked(whole, *args))


@pytest.mark.parametrize("queries, keys, tiled", [(2048, 77, False), (128, 2048, False), (256, 256, True)])
def test_few_queries_or_few_keys_are_taken_whole(queries, keys, tiled):
    assert WHOLE_TOKENS["cpu"] == 128
    shapes = [jax.ShapeDtypeStruct((n, 2, 4), jnp.float32) for n in (queries, keys, keys)]
    assert ("while" in jax.jit(attend).lower(*shapes).as_text()) == tiled


def test_memory_grows_with_the_tokens_not_with_their_square():
    """64x128 latents: 5 heads of 64, 8,192 tokens, whose scores would be 1.3 GB."""
    shapes = [jax.ShapeDtypeStruct((1, 8192, 5, 64), jnp.float32)] * 3
    arrays = 8192 * 5 * 64 * 4
    scores = QUERY_TILE * KEY_TILE * 4

    def bytes_of(function):
        return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    for function, heads in ((attend, 1), (lambda *args: blocked(*args, False), 5)):
        assert bytes_of(function) < 3 * heads * scores + 6 * arrays
        assert bytes_of(with_gradients(function)) < 5 * heads * scores + 14 * arrays
    assert bytes_of(whole) > 5 * 8192**2 * 4
