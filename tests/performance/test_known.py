"""Products under a switch are counted by which branch each turn of a scan takes, where constants alone say it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from cmd_jax.performance.flops import Flops, count, operations

W, X = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((5, 8), jnp.float32)
ONCE = 5 * 8 * 8
TABLE = np.array([0, 1, 2, 1, 1, 0, 2])
BRANCHES = [lambda w, x: x, lambda w, x: x @ w, lambda w, x: jnp.sin(x @ w) @ w]


def over_a_table(w, x):
    return jax.lax.scan(lambda x, i: (jax.lax.switch(i, BRANCHES, w, x), None), x, jnp.asarray(TABLE))[0]


def looked_up_backwards_by_a_counter(w, x):
    def body(carry, _):
        i, x = carry
        return (i - 1, jax.lax.switch(jnp.asarray(TABLE)[i], BRANCHES, w, x)), None

    return jax.lax.scan(body, (len(TABLE) - 1, x), None, length=len(TABLE))[0][1]


def looked_up_in_a_loop(w, x):
    return jax.jit(lambda x: jax.lax.fori_loop(
        0, len(TABLE), lambda i, x: jax.lax.switch(jnp.take(jnp.asarray(TABLE), i), BRANCHES, w, x), x
    ))(x)  # fmt: skip


@pytest.mark.parametrize("fn", [over_a_table, looked_up_backwards_by_a_counter, looked_up_in_a_loop])
def test_a_switch_over_a_table(fn):
    def unrolled(w, x):
        for i in TABLE:
            x = BRANCHES[i](w, x)
        return x

    w, x = (jax.random.normal(jax.random.key(i), s.shape) for i, s in enumerate((W, X)))
    if fn is not looked_up_backwards_by_a_counter:
        np.testing.assert_allclose(fn(w, x), unrolled(w, x), rtol=1e-5)
    assert count(fn, W, X) == count(unrolled, W, X) == Flops(linear=TABLE.sum() * ONCE)


def test_the_gradient_of_a_switch_over_a_table():
    kept = count(jax.grad(lambda w, x: over_a_table(w, x).sum(), argnums=(0, 1)), W, X)
    assert kept.total == 2 * 3 * TABLE.sum() * ONCE
    again = count(jax.grad(lambda w, x: jax.checkpoint(over_a_table)(w, x).sum(), argnums=(0, 1)), W, X)
    assert kept.total < again.total <= 2 * 4 * TABLE.sum() * ONCE


def test_nested_scans_whose_branches_ask_again():
    """Guidance between two noise levels in the last segment, and every other layer in the first."""
    levels, steps = jnp.linspace(1, 0, 6), range(6)

    def layer(w, x, step, i):
        return jax.lax.cond((i + step) % 2 == 0, lambda x: x @ w, lambda x: x, x)

    def step(w, x, i, level):
        def first(x):
            return jax.lax.fori_loop(0, 4, lambda j, x: layer(w, x, i, j), x)

        def second(x):
            return jax.lax.cond((level > 0.15) & (level < 0.65), lambda x: x @ w @ w @ w, lambda x: x, x)

        return jax.lax.switch(jnp.where(i < 2, 0, 1), (first, second), x)

    def nested(w, x):
        return jax.lax.scan(lambda x, s: (step(w, x, *s), None), x, (jnp.arange(6), levels))[0]

    expected = sum(2 if i < 2 else 3 * (0.15 < levels[i] < 0.65) for i in steps)
    assert count(nested, W, X) == Flops(linear=int(expected) * ONCE)


def test_an_index_that_is_not_known_counts_the_dearest_branch():
    def body(w, x, table):
        return jax.lax.scan(lambda x, i: (jax.lax.switch(i, BRANCHES, w, x), None), x, table)[0]

    index = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert count(body, W, X, index) == Flops(linear=4 * 2 * ONCE)
    assert count(lambda w, x: jax.lax.switch(jnp.int32(x[0, 0]), BRANCHES, w, x), W, X) == Flops(linear=2 * ONCE)


def test_a_kernel_counts_in_each_place_of_its_grid():
    def kernel(x, y, out):
        @pl.when(pl.program_id(0) >= 0)
        def _():
            out[...] = x[...] @ y[...]

    block = pl.BlockSpec((16, 8), lambda i: (i, 0))
    call = pl.pallas_call(
        kernel, jax.ShapeDtypeStruct((64, 8), jnp.float32), grid=(4,),
        in_specs=[block, pl.BlockSpec((8, 8), lambda i: (0, 0))], out_specs=block,
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((3, 64, 8), jnp.float32)
    assert count(call, x.update(shape=(64, 8)), W, params=()) == Flops(attention=64 * 64)
    assert count(jax.vmap(call, (0, None)), x, W, params=()) == Flops(attention=3 * 64 * 64)


@pytest.mark.parametrize("shapes", ["BTNH", "BNTH"])
def test_cudnn_attention(shapes, monkeypatch):
    """Traced as on a GPU: forward two products, and backward five, where autodiff of the plain form takes four."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    q, kv = ((2, 32, 4, 64), (2, 16, 4, 64)) if shapes == "BTNH" else ((2, 4, 32, 64), (2, 4, 16, 64))
    q, kv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q, kv))

    def attend(q, k, v):
        return cudnn.dot_product_attention(q, k, v, qkv_layout=shapes)

    size = 2 * 4 * 64 * 32 * 16
    assert count(attend, q, kv, kv, params=()) == Flops(attention=2 * size)
    gradient = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    assert count(gradient, q, kv, kv, params=()) == Flops(attention=(2 + 5) * size)


def test_work_under_shard_map_counts_once_a_device():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"))
    spec = jax.sharding.PartitionSpec("data")
    x = jax.ShapeDtypeStruct((8, 5, 8), jnp.float32)
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec)
    # What two devices of "tensor" do twice is done twice.
    assert count(split, x, W, params=(1,)) == Flops(linear=2 * 8 * ONCE)


def test_operations_of_a_traced_program():
    traced = jax.jit(jax.value_and_grad(lambda w, x: over_a_table(w, x).sum())).trace(W, X)
    assert operations(traced.jaxpr) == count(jax.value_and_grad(lambda w, x: over_a_table(w, x).sum()), W, X).total
