import inspect
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models.attention import attend, rotary_table, rotate
from cmd_jax.models.autoencoder import Autoencoder
from cmd_jax.models.discriminator import PatchDiscriminator
from cmd_jax.models.dit import DiT
from cmd_jax.models.layers import (
    REMAT_POLICIES,
    Unpatchify,
    dense,
    gated,
    gelu_tanh,
    group_norm,
    layer_norm,
    modulated_norm,
    multiply,
    patchify,
)
from cmd_jax.models.unet import UNet
from cmd_jax.models.vae import VAE
from cmd_jax.models.vgg import LPIPS
from cmd_jax.sharding import LOGICAL_AXES

RNG = np.random.default_rng(0)


def test_patches_are_flattened_as_row_column_channel():
    x = RNG.standard_normal((2, 3, 6, 9, 2))
    patches = patchify(x, 3)
    assert patches.shape == (2, 3, 2, 3, 18)
    for row, column, channel in np.ndindex(3, 3, 2):
        value = patches[1, 2, 1, 2, (row * 3 + column) * 2 + channel]
        assert value == x[1, 2, 3 + row, 6 + column, channel]


def test_unpatchify_with_the_identity_undoes_patchify():
    x = RNG.standard_normal((2, 3, 6, 9, 2)).astype(np.float32)
    bias = np.array([0.5, -2], np.float32)
    params = {"kernel": np.eye(18, dtype=np.float32), "bias": bias}
    np.testing.assert_allclose(Unpatchify(3, 2).apply({"params": params}, patchify(x, 3)), x + bias, atol=1e-6)


def test_unpatchify_is_a_transposed_convolution():
    tokens = RNG.standard_normal((1, 2, 3, 4)).astype(np.float32)
    kernel = RNG.standard_normal((4, 2 * 2 * 5)).astype(np.float32)
    image = Unpatchify(2, 5).apply({"params": {"kernel": kernel, "bias": np.zeros(5, np.float32)}}, tokens)
    expected = jax.lax.conv_transpose(
        tokens,
        kernel.reshape(4, 2, 2, 5).transpose(1, 2, 0, 3),
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        transpose_kernel=False,
    )
    flipped = expected.reshape(1, 2, 2, 3, 2, 5)[:, :, ::-1, :, ::-1].reshape(1, 4, 6, 5)  # lax's kernel is mirrored
    np.testing.assert_allclose(image, flipped, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer", "group", "modulated"])
def test_norms_keep_the_digits_of_data_far_from_zero(norm):
    """Mean 100, deviation 1: squares of 10,000 whose difference is 1. Taken as that difference it is wrong by 1e-3."""
    x = RNG.normal(100, 1, (8, 384)).astype(np.float32)
    exact = x.astype(np.float64)
    module = layer_norm(1e-6, dtype=jnp.float32)
    if norm == "group":
        module, exact = group_norm(4, 1e-6, dtype=jnp.float32, name=None), exact.reshape(8, 4, 96)
    found = module.init_with_output(jax.random.key(0), x)[0]
    if norm == "modulated":
        found = modulated_norm(x[:, None], *np.zeros((2, *x.shape), np.float32), 1e-6, jnp.float32)[:, 0]
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    assert np.abs(found - exact.reshape(x.shape)).max() < 3e-5


def test_attention_averages_values_by_similarity():
    query, key, value = (RNG.standard_normal((2, 4, 3, 6)).astype(np.float32) for _ in range(3))
    out = attend(query, key, value)
    for head in range(3):
        logits = query[1, 2, head] @ key[1, :, head].T / np.sqrt(6)
        share = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(out[1, 2, head], share @ value[1, :, head], atol=1e-5)


def test_rotated_queries_and_keys_know_only_their_distance():
    query, key = (np.repeat(RNG.standard_normal((1, 1, 8)), 6, axis=0).astype(np.float32) for _ in range(2))
    table = rotary_table(np.arange(6), 4)
    turned_query, turned_key = rotate(query, table), rotate(key, table)
    logits = np.einsum("qhd,khd->qk", turned_query, turned_key)
    np.testing.assert_allclose(logits[1:, 1:], logits[:-1, :-1], atol=1e-5)
    assert np.abs(logits[0] - logits[0, 0])[1:].min() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(turned_query, axis=-1), np.linalg.norm(query, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned_query[0], query[0])


def dit(**changes):
    settings = {"out_channels": 6, "patch": 2, "width": 16, "depth": 2, "heads": 2, "classes": 4}
    return DiT(**settings | changes)


CLIP, FRAME, ONE = ((2, 8, 16, 24, 3), (2, 16, 24, 3), (2,))
AUTOENCODER = Autoencoder(width=16, depth=2, heads=2, head_dim=8)


HALF = jnp.bfloat16
UNET = UNet(4, 4, (16, 32), 1, (True, False), (False, True), (2, 2), 8, groups=8, dtype=HALF)


@pytest.mark.parametrize(
    "module, shapes, last",
    [
        (AUTOENCODER.clone(dtype=HALF), [CLIP], "content_logits rows_to_motion columns_to_motion to_video"),
        (dit(dtype=HALF), [FRAME, ONE, ONE], "final"),
        (UNET, [(2, 8, 12, 4), ONE, (2, 5, 8)], "conv_out"),
        (VAE(3, 4, (8, 16), 1, groups=8, dtype=HALF), [FRAME], "encoder/conv_out quant decoder/conv_out"),
        (PatchDiscriminator(2, 8, dtype=HALF), [FRAME], "logits"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_the_last_projections_are_float32_and_no_norm_is_of_the_fast_kind(module, shapes, last):
    """Whatever dtype the rest has: what comes out is not rounded to 8 bits, and statistics are exact."""
    made, norms = {}, []

    def record(method, arguments, options, context):
        out, layer = method(*arguments, **options), context.module
        if isinstance(layer, (nn.Dense, nn.Conv, Unpatchify)):
            made["/".join(layer.path)] = out.dtype
        if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
            norms.append(layer.use_fast_variance)
        return out

    inputs = [jax.ShapeDtypeStruct(s, jnp.float32 if len(s) > 1 else jnp.int32) for s in shapes]
    with nn.intercept_methods(record):
        jax.eval_shape(module.init, jax.random.key(0), *inputs)
    exact = {name for name, dtype in made.items() if dtype == jnp.float32}
    assert exact == set(last.split()) and len(made) > len(exact)
    assert (norms or isinstance(module, DiT)) and not any(norms)  # a DiT's are functions, tested above


@pytest.mark.parametrize(
    "module, shapes, stacked",
    [
        (AUTOENCODER, [CLIP], True),
        (AUTOENCODER.clone(content="mean", position="none"), [CLIP], True),
        (dit(), [FRAME, ONE, ONE], True),
        (dit(classes=None, position="table"), [FRAME, ONE], True),
        (dit(content_patch=4, position="table"), [FRAME, ONE, ONE, FRAME], True),
        (PatchDiscriminator(2, 8), [FRAME], False),
        (PatchDiscriminator(3, 8), [CLIP], False),
        (LPIPS(), [FRAME, FRAME], False),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_every_parameter_names_its_axes(module, shapes, stacked):
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32 if len(s) > 1 else jnp.int32) for s in shapes]
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(leaves) > 5
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert isinstance(leaf, nn.LogicallyPartitioned), name
        assert len(leaf.names) == leaf.value.ndim, (name, leaf.names, leaf.value.shape)
        assert set(leaf.names) <= LOGICAL_AXES.keys(), (name, leaf.names)
        assert len(set(leaf.names)) == len(leaf.names), (name, leaf.names)  # one mesh axis can't split two dimensions
        assert (leaf.names[0] == "layers") == ("blocks/" in name) and leaf.value.dtype == jnp.float32
    assert any("blocks/" in jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves) == stacked


def test_gradients_of_dense_are_those_of_a_product_without_transposes():
    x, kernel, dy = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 5), (5, 4), (2, 3, 4)))
    layer = dense(4, ("embed", "mlp"), use_bias=False)

    def gradients(x, kernel):
        return jax.vjp(lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x), x, kernel)[1](dy)

    expected = jax.vjp(jnp.matmul, x, kernel)[1](dy)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), gradients(x, kernel), expected)
    assert "transpose[" not in str(jax.make_jaxpr(gradients)(x, kernel))  # the order at which a CPU is slow


@pytest.mark.parametrize(("remat", "products"), [("none", 6), ("dots", 6), ("full", 8)])
def test_remat_sees_the_products_of_dense_layers(remat, products):
    """Two forward, four backward; "full" repeats the forward ones."""
    block = lambda x, kernel: jnp.sin(multiply(jnp.sin(multiply(x, kernel)), kernel)).sum()  # noqa: E731
    block = block if remat == "none" else jax.checkpoint(block, policy=REMAT_POLICIES[remat])
    gradient = jax.make_jaxpr(jax.grad(block, argnums=(0, 1)))(jnp.ones((2, 5)), jnp.ones((5, 5)))
    assert str(gradient).count("dot_general[") == products


NORM = layer_norm(1e-6, dtype=jnp.float32)
CHEAP = {  # name: (what keeps its arguments only, the same by the book)
    "gated": (gated, lambda value, gate: value * jax.nn.gelu(gate, approximate=False)),
    "gelu_tanh": (gelu_tanh, partial(jax.nn.gelu, approximate=True)),
    "modulated_norm": (
        lambda x, shift, scale: modulated_norm(x, shift[:, 0], scale[:, 0], 1e-6, jnp.float32),
        lambda x, shift, scale: jax.nn.standardize(x, epsilon=1e-6) * (1 + scale[:, :1]) + shift[:, :1],
    ),
    "layer_norm": (
        lambda x, scale, bias: NORM.apply({"params": {"scale": scale[0, 0], "bias": bias[0, 0]}}, x),
        lambda x, scale, bias: jax.nn.standardize(x, epsilon=1e-6) * scale[0, 0] + bias[0, 0],
    ),
}


@pytest.mark.parametrize("name", CHEAP)
def test_cheap_layers_keep_their_arguments_alone_for_the_backward_pass(name):
    ours, expected = CHEAP[name]
    count = 1 if name == "gelu_tanh" else len(inspect.signature(expected).parameters)
    arguments = tuple(RNG.normal(0, 2, (count, 2, 3, 8)).astype(np.float32))
    direction = RNG.standard_normal((2, 3, 8)).astype(np.float32)
    out, pullback = jax.vjp(ours, *arguments)
    theirs, pullback_of_theirs = jax.vjp(expected, *arguments)
    np.testing.assert_allclose(out, theirs, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), pullback(direction), pullback_of_theirs(direction))
    kept = sum(x.size for x in jax.tree.leaves(pullback) if x.size >= out.size)
    assert kept <= len(arguments) * out.size
