import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cmd_jax.models.attention import attend
from cmd_jax.models.layers import scanned
from cmd_jax.performance.flops import Flops, count


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


W, X = array(8, 8), array(5, 8)
ONCE = 5 * 8 * 8


def counted(module, *inputs) -> Flops:
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return count(module.apply, params, *inputs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense(dtype):
    assert counted(nn.Dense(7, dtype=dtype), array(3, 11, 5)) == Flops(linear=3 * 11 * 5 * 7)


@pytest.mark.parametrize("stride, groups, padding", [(1, 1, "SAME"), (2, 1, "SAME"), (2, 4, "VALID")])
def test_convolution(stride, groups, padding):
    module = nn.Conv(12, (3, 5), strides=stride, feature_group_count=groups, padding=padding)
    rows, columns = (16, 24) if stride == 1 else (8, 12) if padding == "SAME" else (7, 10)
    expected = Flops(convolution=2 * rows * columns * 12 * (3 * 5 * 8 // groups))
    assert counted(module, array(2, 16, 24, 8)) == expected


def test_zeros_of_a_transposed_convolution_are_no_work():
    module = nn.ConvTranspose(12, (2, 2), strides=(2, 2), padding="VALID")
    assert counted(module, array(1, 16, 24, 8)) == Flops(convolution=16 * 24 * 8 * 12 * 2 * 2)


def test_attention():
    q, kv = array(2, 10, 3, 4), array(2, 7, 3, 4)
    assert count(attend, q, kv, kv, params=()) == Flops(attention=2 * (2 * 3 * 10 * 7 * 4))
    module = nn.MultiHeadDotProductAttention(num_heads=4)
    assert counted(module, array(2, 10, 16)) == Flops(linear=2 * 10 * 4 * 16 * 16, attention=2 * 2 * 10 * 10 * 16)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jax.nn.relu(nn.Dense(8)(x)), None


@pytest.mark.parametrize("remat, runs", [("none", 3), ("full", 4)])
def test_scanned_layers_and_remat(remat, runs):
    """Forward once; in a gradient also backward twice, and once more where nothing was kept."""

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scanned(Block, 6, remat, broadcast=0)()(x)[0]

    params = jax.eval_shape(Stack().init, jax.random.key(0), X)
    assert count(Stack().apply, params, X) == Flops(linear=6 * ONCE)
    gradient = count(jax.grad(lambda p, x: Stack().apply(p, x).sum(), argnums=(0, 1)), params, X)
    assert gradient.total == 2 * runs * 6 * ONCE
    assert gradient == Flops(linear=(runs - 1) * 6 * ONCE, attention=6 * ONCE)


def test_origins_pass_through_loops():
    def loop(w, x):
        # The carry begins as a constant and becomes an activation.
        carry, _ = jax.lax.scan(lambda c, _: (c @ w + x, None), jnp.zeros((5, 8)), None, length=4)
        # Scanned-over weights are weights.
        carry, _ = jax.lax.scan(lambda c, w: (c @ w, None), carry, jnp.stack([w, w.T, w.astype(jnp.bfloat16)]))
        return jax.lax.fori_loop(0, 7, lambda i, c: c @ (c.T @ c), carry)

    assert count(loop, W, X) == Flops(linear=(4 + 3) * ONCE, attention=7 * 2 * ONCE)


def test_branches_and_calls():
    def branch(w, x):
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w @ w, x)
        x = jax.jit(lambda x: x @ w)(x)
        x = jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, x)
        return jax.checkpoint(lambda x: x @ w)(x)

    assert count(branch, W, X) == Flops(linear=4 * ONCE)

    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))
    assert count(product, W, X) == Flops(linear=ONCE)
    gradient = count(jax.grad(lambda w, x: (product(w, x) ** 2).sum(), argnums=(0, 1)), W, X)
    assert gradient == Flops(linear=2 * ONCE, attention=ONCE)


def test_mapped_axes_count():
    assert count(jax.vmap(lambda w, x: x @ w, (None, 0)), W, array(3, 5, 8)) == Flops(linear=3 * ONCE)
    assert count(jax.vmap(lambda w, x: x @ w), array(3, 8, 8), array(3, 5, 8)) == Flops(linear=3 * ONCE)


def test_what_is_a_layer_and_what_is_not():
    constant = jnp.ones((8, 8))
    assert count(lambda w, x: x @ constant, W, X) == Flops(other=ONCE)
    assert count(lambda w, x: w @ w, W, X) == Flops(other=512)
    assert count(lambda w, x: jnp.cos(jnp.arange(8.0)) @ w, W, X) == Flops(linear=64)  # timestep features
    assert count(lambda w, x: (w / jnp.linalg.norm(w)) @ x.T, W, X) == Flops(linear=ONCE)  # weight normalisation
    assert count(lambda w, x: w[jnp.array([0, 1])] @ w, W, X) == Flops(linear=2 * 64)  # an embedding of a null text
    assert count(lambda x, w: x @ w, X, W, params=(1,)) == Flops(linear=ONCE)
    assert count(lambda x, w: x @ w, X, W, params=()) == Flops(attention=ONCE)
    kernel = lambda w, x: jax.lax.conv(x, x, (1, 1), "SAME")  # noqa: E731
    assert count(kernel, W, array(4, 4, 3, 3)) == Flops(other=4 * 4 * 3 * 3 * 4 * 9)


def test_products_of_unknown_number_are_refused():
    with pytest.raises(ValueError, match="cannot count the products in a while"):
        count(lambda w, x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x), W, X)


def test_sums():
    flops = Flops(1, 2, 3, 4)
    assert flops.layers == 3 and flops.total == 20
    assert flops + flops == flops * 2 == Flops(2, 4, 6, 8)
