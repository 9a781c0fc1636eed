import numpy as np
import pytest

from cmd_jax.evaluation.reconstruction import psnr


def test_psnr_of_known_errors():
    a = np.zeros((3, 2, 4, 5, 3), np.float32)
    b = a.copy()
    b[1] += 0.2  # mse 0.04 of a peak of 2: 20 dB
    b[2, 0] += 0.2  # half of the pixels: 3.01 dB more
    with np.errstate(all="raise"):
        assert np.allclose(psnr(a, b)[1:], [20.0, 20.0 + 10 * np.log10(2)], atol=1e-5)
    assert psnr(a, b)[0] == np.inf
    assert np.allclose(psnr(a, b, range=1.0)[1], 20.0 - 20 * np.log10(2), atol=1e-5)


def test_psnr_averages_within_a_clip_before_the_logarithm():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 4, 8, 6, 7, 3))
    each = [10 * np.log10(4 / np.mean((x - y) ** 2)) for x, y in zip(a, b, strict=True)]
    assert np.allclose(psnr(a, b), each) and psnr(a, b).shape == (4,)
    assert psnr(a[:0], b[:0]).shape == (0,)  # a process without rows in the last batch


def test_uint8_does_not_wrap_and_shapes_must_agree():
    a, b = np.zeros((1, 1, 2, 2, 3), np.uint8), np.full((1, 1, 2, 2, 3), 255, np.uint8)
    assert np.allclose(psnr(a, b, range=255), 0.0)
    with pytest.raises(ValueError, match="compared"):
        psnr(a, b[:, :, :1])
