"""Random parameters of full size, born in their shards on the devices."""

import math
from collections.abc import Callable
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.keys import derive
from cmd_jax.sharding import shardings_of

TABLE = 0.02  # standard deviation of what is neither a kernel nor of a norm


def draw(init: Callable, mesh, rules, seed: int, dtype: str = "float32"):
    """Parameters of the shapes that init(key) would make, laid out on the mesh by the rules; matrices in `dtype`.

    Not drawn by the initialisers themselves: those of a full UNet are one program, which takes XLA many minutes to
    compile, and what they leave zero would make a device run cooler, and so faster, than trained weights do. Kernels
    keep variance; norms and biases change nothing. Rounded to whatever dtype, the numbers are the same.
    """
    boxed = jax.eval_shape(init, jax.random.key(0))
    leaves = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=_is_boxed)[0]
    places = jax.tree.leaves(shardings_of(boxed, mesh, rules))
    key, drawn = jax.random.key(seed, impl="rbg"), []
    for number, ((path, leaf), place) in enumerate(zip(leaves, places, strict=True)):
        shape, names = (leaf.value.shape, leaf.names) if _is_boxed(leaf) else (leaf.shape, ())
        kind = jax.tree_util.keystr(path[-1:], simple=True)
        mean, std = _moments(kind, shape, names)
        if std == 0:
            drawn.append(jax.device_put(np.full(shape, mean, np.float32), place))
        else:
            drawn.append(_program(shape, std, dtype, place)(derive(key, "parameters", number)))
    return jax.tree.unflatten(jax.tree.structure(boxed, is_leaf=_is_boxed), drawn)


def _is_boxed(x) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _moments(kind: str, shape, names) -> tuple[float, float]:
    """(mean, standard deviation) of a parameter of that name; a stacked one has a kernel for each layer."""
    if kind in ("scale", "bias"):
        return float(kind == "scale"), 0.0
    if kind != "kernel":
        return 0.0, TABLE
    inputs = [size for size, name in zip(shape[:-1], names or ("",) * len(shape), strict=False) if name != "layers"]
    return 0.0, math.prod(inputs) ** -0.5


@cache  # a model has many parameters of few shapes
def _program(shape, std: float, dtype: str, place):
    def values(key):
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(values, out_shardings=place)
