import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.models.image_blocks import conv
from cmd_jax.performance.flops import count

RNG = np.random.default_rng(0)


def test_convolutions_of_enlarged_pictures_are_taken_on_small_ones():
    x = RNG.standard_normal((2, 5, 4, 3)).astype(np.float32)
    plain, enlarged = (conv(6, enlarge=e, dtype=jnp.float32, name=None) for e in (False, True))
    params = nn.unbox(enlarged.init(jax.random.key(0), x))
    params["params"]["bias"] = jnp.arange(6.0)

    def by_repetition(params, x):
        return plain.apply(params, x.repeat(2, axis=1).repeat(2, axis=2))

    expected, pullback = jax.vjp(by_repetition, params, x)
    result, pullback_of_result = jax.vjp(enlarged.apply, params, x)
    assert result.shape == (2, 10, 8, 6)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    direction = RNG.standard_normal(result.shape).astype(np.float32)
    for ours, theirs in zip(*(jax.tree.leaves(f(direction)) for f in (pullback_of_result, pullback)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    whole = count(by_repetition, params, x).convolution
    assert count(enlarged.apply, params, x).convolution == whole * 4 // 9
