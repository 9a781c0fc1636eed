import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models.attention import QUERY_BLOCK, WHOLE_TOKENS, attend

LONG = WHOLE_TOKENS + QUERY_BLOCK // 2 + 7  # no whole number of blocks


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def whole(query, key, value):
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / query.shape[-1] ** 0.5, axis=-1).astype(value.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def loss(function):
    return jax.jit(jax.value_and_grad(lambda *args: (function(*args).astype(jnp.float32) ** 3).sum(), (0, 1, 2)))


@pytest.mark.parametrize(
    "outer, queries, keys, dtype, tolerance",
    [
        ((), LONG, LONG, jnp.float32, 1e-5),
        ((2, 1), LONG, WHOLE_TOKENS + 1, jnp.float32, 1e-5),  # keys of another number
        ((2,), 5 * QUERY_BLOCK, 5 * QUERY_BLOCK, jnp.bfloat16, 2e-2),  # a whole number of blocks
    ],
)
def test_blocks_of_queries_give_what_the_whole_gives_forward_and_backward(outer, queries, keys, dtype, tolerance):
    args = [draw(*outer, n, 2, 4, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys))]
    assert "while" in jax.jit(attend).lower(*args).as_text()
    out, expected = (jax.jit(f)(*args) for f in (attend, whole))
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    (value, gradients), (expected_value, expected_gradients) = (loss(f)(*args) for f in (attend, whole))
    np.testing.assert_allclose(value, expected_value, rtol=tolerance, atol=tolerance * queries)
    pairs = zip((out, *gradients), (expected, *expected_gradients), strict=True)
    for found, wanted in ((np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs):
        np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("queries, keys", [(LONG, 77), (WHOLE_TOKENS, LONG)])
def test_few_queries_or_few_keys_are_taken_whole(queries, keys):
    shapes = [jax.ShapeDtypeStruct((n, 2, 4), jnp.float32) for n in (queries, keys, keys)]
    assert "while" not in jax.jit(attend).lower(*shapes).as_text()


def test_memory_grows_with_the_tokens_not_with_their_square():
    """64x128 latents: 5 heads of 64, 8,192 tokens, whose scores would be 1.3 GB."""
    shapes = [jax.ShapeDtypeStruct((1, 8192, 5, 64), jnp.float32)] * 3
    arrays = 8192 * 5 * 64 * 4
    scores = 5 * QUERY_BLOCK * 8192 * 4

    def bytes_of(function):
        return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(attend) < 2 * scores + 4 * arrays
    assert bytes_of(loss(attend)) < 4 * scores + 12 * arrays
    assert bytes_of(whole) > 5 * 8192**2 * 4
