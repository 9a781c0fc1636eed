"""The UNet, on the tiny pipelines that diffusers saved with what it computes (reference.npz)."""

import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.interop.diffusers import load_unet
from cmd_jax.interop.sd_config import unet_from_config
from cmd_jax.interop.sd_weights import unet_tensor
from cmd_jax.models.unet import init_unet, timestep_features
from cmd_jax.sharding import LOGICAL_AXES

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = ["tiny-sd15", "tiny-sd21"]
PUBLISHED = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SD 2.1": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}
COMMON = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "layers_per_block": 2,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


@functools.cache
def pipeline(folder):
    """(module, params, inputs, output) with channels last."""
    reference = np.load(FIXTURES / folder / "reference.npz")
    sample, out = (reference[name].transpose(0, 2, 3, 1) for name in ("sample", "unet_out"))
    return (
        *load_unet(FIXTURES / folder / "unet"),
        (sample, reference["timesteps"], reference["text_hidden"]),
        out,
    )


SMALL = {  # two levels, one with transformers
    "attention_head_dim": 2,
    "block_out_channels": [8, 16],
    "cross_attention_dim": 6,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


@functools.cache
def small():
    """(module, params off their initial zeros, inputs, target)."""
    module = unet_from_config(SMALL)
    shapes = jax.eval_shape(lambda: nn.meta.unbox(init_unet(module, jax.random.key(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(0.3 * rng.standard_normal(x.shape), np.float32), shapes)
    inputs = rng.standard_normal((2, 4, 6, 4)), np.array([5, 700]), rng.standard_normal((2, 3, 6))
    return module, params, jax.tree.map(jnp.asarray, inputs), rng.standard_normal((2, 4, 6, 4))


@functools.cache
def loss_and_gradients(remat):
    module, params, inputs, target = small()

    def loss(params):
        return jnp.mean((module.clone(remat=remat).apply({"params": params}, *inputs) - target) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return jax.device_get(compiled(params)), compiled.as_text().count(" convolution(")


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_computes_what_diffusers_computes(folder):
    module, params, inputs, out = pipeline(folder)
    found = jax.jit(module.apply)({"params": params}, *inputs)
    assert found.dtype == jnp.float32 and found.shape == out.shape and found.shape[1] != found.shape[2]
    np.testing.assert_allclose(found, out, atol=1e-4 * np.abs(out).max(), rtol=0)


def test_a_gradient_reaches_every_parameter():
    (_, gradients), _ = loss_and_gradients("none")
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.abs(gradient).max() > 1e-6 and np.isfinite(gradient).all(), jax.tree_util.keystr(path)


def test_remat_computes_again_and_changes_nothing():
    (loss, gradients), convolutions = loss_and_gradients("none")
    (loss_again, gradients_again), more = loss_and_gradients("full")
    assert more > convolutions
    np.testing.assert_allclose(loss_again, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients_again), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_bfloat16_is_near_float32():
    module, params, inputs, out = pipeline("tiny-sd21")
    module = module.clone(dtype="bfloat16")
    found = jax.jit(module.apply)({"params": params}, *inputs)
    assert found.dtype == jnp.float32
    error = np.abs(found - out).max() / np.abs(out).max()
    assert 1e-4 < error < 0.05, error


@pytest.mark.parametrize("shape, problem", [
    ((1, 6, 8, 4), "sample=6x8: H and W must be multiples of 4, because the UNet has 3 levels; "
                   "use a multiple of 4 for each"),
    ((1, 8, 7, 4), "sample=8x7: H and W must be multiples of 4, because the UNet has 3 levels; "
                   "use a multiple of 4 for each"),
    ((1, 8, 8, 9), "sample=9 channels: the UNet takes 4; use its latents"),
])  # fmt: skip
def test_a_sample_that_does_not_fit_is_named(shape, problem):
    module, params, (_, _, text), _ = pipeline("tiny-sd15")
    with pytest.raises(UserError) as error:
        jax.eval_shape(module.apply, {"params": params}, jnp.zeros(shape), jnp.zeros(1), text[:1])
    assert str(error.value) == problem


@pytest.mark.parametrize("model, parameters", [("SD 1.5", 859_520_964), ("SD 2.1", 865_910_724)])
def test_the_published_sizes(model, parameters):
    """Numbers of values and of tensors of the published weights; every parameter names its axes."""
    config = COMMON | PUBLISHED[model]
    module = unet_from_config(config)
    boxed = jax.eval_shape(functools.partial(init_unet, module), jax.random.key(0))
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for path, leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == leaf.value.ndim == len(set(leaf.names)) and set(leaf.names) <= LOGICAL_AXES.keys()
    assert sum(leaf.value.size for _, leaf in leaves) == parameters
    paths = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.value.shape) for path, leaf in leaves]
    tensors = {unet_tensor(config)(path.removesuffix("/value"), shape).name for path, shape in paths}
    assert len(tensors) == 686 and module.factor == 8


def test_features_of_timesteps_in_both_orders():
    times = np.array([0, 1.5, 981])
    for shift in (0, 1):
        angles = times[:, None] * 10000.0 ** (-np.arange(8) / (8 - shift))
        expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        for first, columns in ((True, expected), (False, np.roll(expected, 8, axis=1))):
            np.testing.assert_allclose(timestep_features(times, 16, first, shift), columns, atol=1e-4)


def test_the_heads_of_a_level_are_a_list_or_one_number():
    config = json.loads((FIXTURES / "tiny-sd15" / "unet" / "config.json").read_text())
    assert unet_from_config(config).heads == (4, 4, 4)
    assert unet_from_config(config | {"attention_head_dim": [1, 2, 8]}).heads == (1, 2, 8)


def test_deep_features_stand_in_for_all_but_the_outer_level():
    module, params, (sample, times, text), _ = small()
    apply = jax.jit(module.apply, static_argnames="keep")
    out, kept = apply({"params": params}, sample, times, text, keep=True)
    assert kept.shape == (*sample.shape[:-1], module.widths[1])
    outer = ("conv_", "time_", "norm_out", "down_0_resnet", "down_0_attention", "up_1_")
    outer = {name: values for name, values in params.items() if name.startswith(outer)}
    assert len(outer) < len(params)
    again = apply({"params": outer}, sample, times, text, reuse=kept)
    np.testing.assert_allclose(again, out, atol=1e-5 * np.abs(out).max(), rtol=0)
    assert np.abs(apply({"params": outer}, sample + 1, times, text, reuse=kept) - out).max() > 1e-3
