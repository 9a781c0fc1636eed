"""How fast a device multiplies matrices: what a share of its peak is a share of."""

import time
from functools import cache

import jax
import jax.numpy as jnp

from cmd_jax.performance.apart import apart

# {platform: (rows of the square matrices, products in a chain)}: long enough that starting a chain costs nothing.
SIZES = {"cpu": (1536, 2)}
ACCELERATOR = (8192, 16)


@cache
def matmul_peak(dtype: str = "float32", seconds: float = 0.3) -> float:
    """Floating-point operations a second (two a multiply-add) of products in `dtype` on the first local device of the
    default backend, in JAX's default precision; the best of all chains of large products that end within `seconds`.

    A CPU multiplies with all threads that one computation may use; devices made of one CPU share them. Measured
    once a process. Adds to `seconds` the time to compile a chain and to run it once.
    """
    return apart(_measure, dtype, seconds)


def device_peak(dtype: str = "float32") -> float:
    """`matmul_peak` of a device while all of this process' devices work: those made of one CPU share its threads."""
    return matmul_peak(dtype) / (jax.local_device_count() if jax.default_backend() == "cpu" else 1)


def _measure(dtype: str, seconds: float) -> float:
    device = jax.local_devices()[0]
    size, products = SIZES.get(device.platform, ACCELERATOR)

    @jax.jit
    def matrices(key):
        # Numbers like those of a network: a device that multiplies zeros runs cooler, and so faster.
        x, weights = (jax.random.normal(k, (size, size), jnp.float32) for k in jax.random.split(key))
        return x.astype(dtype), (weights * size**-0.5).astype(dtype)

    @jax.jit
    def chain(x, weights):
        for _ in range(products):
            x = x @ weights
        return x

    with jax.default_device(device):
        x, weights = matrices(jax.random.key(0))
        x = jax.block_until_ready(chain(x, weights))
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end or best == float("inf"):
            begun = time.perf_counter()
            x = jax.block_until_ready(chain(x, weights))
            best = min(best, time.perf_counter() - begun)
    return 2 * size**3 * products / best
