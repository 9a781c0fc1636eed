import jax
import numpy as np
import pytest

from cmd_jax.diffusion.guidance import check_guidance, guide
from cmd_jax.errors import UserError

SHAPE = (2, 4, 6, 10)
CONDITIONAL, NULL = (jax.random.normal(jax.random.key(seed), SHAPE) for seed in (0, 1))


def test_one_is_the_conditional_and_zero_the_null():
    np.testing.assert_allclose(guide(CONDITIONAL, NULL, 1.0, False), CONDITIONAL, atol=1e-6)
    assert np.array_equal(guide(CONDITIONAL, NULL, 0.0, False), NULL)


@pytest.mark.parametrize("learned_range", [False, True])
def test_every_mean_channel_is_guided_and_no_variance_channel(learned_range):
    out = guide(CONDITIONAL, NULL, 4.0, learned_range)
    channels = 5 if learned_range else 10
    assert out.shape == SHAPE
    np.testing.assert_allclose(out[..., :channels], (4 * CONDITIONAL - 3 * NULL)[..., :channels], atol=1e-5)
    assert np.array_equal(out[..., channels:], CONDITIONAL[..., channels:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "strong", None])
def test_bad_guidance(value):
    with pytest.raises(UserError, match=f"^sampling.guidance={value}: "):
        check_guidance(value)


def test_good_guidance():
    assert check_guidance(0) == 0.0 and check_guidance("7.5") == 7.5
    with pytest.raises(ValueError, match="even number"):
        guide(CONDITIONAL[..., :3], NULL[..., :3], 2.0, True)
