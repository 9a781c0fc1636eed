"""The VAE, on the tiny pipelines that diffusers saved with what it computes (reference.npz)."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.interop.diffusers import load_vae
from cmd_jax.interop.sd_config import vae_from_config
from cmd_jax.models.vae import VAE, init_vae
from cmd_jax.sharding import LOGICAL_AXES

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = ["tiny-sd15", "tiny-sd21"]


@functools.cache
def tiny(folder):
    """(module, params, arrays by name, channels last)."""
    reference = np.load(FIXTURES / folder / "reference.npz")
    names = ("image", "vae_mean", "vae_logvar", "sample", "decoded")
    return (
        *load_vae(FIXTURES / folder / "vae"),
        {name: reference[name].transpose(0, 2, 3, 1) for name in names},
    )


@functools.cache
def compiled(folder, method, **changes):
    module = tiny(folder)[0].clone(**changes)
    return jax.jit(functools.partial(module.apply, method=method))


def run(folder, method, *args, **changes):
    return compiled(folder, method, **changes)({"params": tiny(folder)[1]}, *args)


def assert_near(found, expected, tolerance=1e-4):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_computes_what_diffusers_computes(folder):
    _, _, reference = tiny(folder)
    moments = run(folder, "encode", reference["image"])
    assert moments.mean.shape[1] != moments.mean.shape[2]
    assert_near(moments.mean, reference["vae_mean"])
    assert_near(moments.log_variance, reference["vae_logvar"])
    # The reference decoded the first samples of its UNet, taken for scaled latents.
    assert_near(run(folder, "decode", reference["sample"][:2]), reference["decoded"])


def test_latents_are_the_scaled_mode_or_a_sample():
    module, _, reference = tiny("tiny-sd21")
    assert_near(run("tiny-sd21", "latents", reference["image"]), reference["vae_mean"] * module.scaling_factor)
    draws = run("tiny-sd21", "latents", np.repeat(reference["image"][:1], 64, axis=0), jax.random.key(0))
    noise = draws / module.scaling_factor - reference["vae_mean"][0]
    noise = noise / np.exp(0.5 * reference["vae_logvar"][0])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert np.abs(noise.mean(axis=0)).max() < 0.6  # each cell by itself; the standard error is 1/8


@pytest.mark.parametrize("rows, columns", [(30, 32), (32, 33)])
def test_pictures_of_a_size_that_does_not_fit_are_named(rows, columns):
    module, params, _ = tiny("tiny-sd15")
    with pytest.raises(UserError) as error:
        jax.eval_shape(functools.partial(module.apply, method="encode"), {"params": params},
                       jnp.zeros((1, rows, columns, 3)))  # fmt: skip
    assert str(error.value) == (
        f"images={rows}x{columns}: H and W must be multiples of 4, because the VAE has 3 levels; "
        "use a multiple of 4 for each"
    )


def test_a_gradient_reaches_every_parameter_and_remat_changes_nothing():
    module, rng = VAE(3, 2, widths=(8, 16), layers=1, groups=4), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: nn.meta.unbox(init_vae(module, jax.random.key(0))))
    params = jax.tree.map(lambda x: np.asarray(0.3 * rng.standard_normal(x.shape), np.float32), shapes)
    images = rng.uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)

    def loss(params, remat):
        out = module.clone(remat=remat).apply({"params": params}, images)
        return jnp.mean((out - images) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (jax.device_get(gradient(params, remat)) for remat in ("none", "full"))
    for (path, g), h in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(again), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(g).all() and (np.abs(h - g).max() <= 1e-5 * max(1, np.abs(g).max())), name
        if name.startswith("quant/"):  # its second half makes the variances, which the mode ignores
            assert not g[..., 2:].any()
        if not name.endswith("key/bias"):  # a softmax does not see what is added to all its logits
            assert np.abs(g).max() > 1e-6, name


def test_bfloat16_is_near_float32():
    _, _, reference = tiny("tiny-sd15")
    latents = run("tiny-sd15", "encode", reference["image"], dtype="bfloat16").mean
    decoded = run("tiny-sd15", "decode", reference["sample"][:2], dtype="bfloat16")
    for found, expected in ((latents, reference["vae_mean"]), (decoded, reference["decoded"])):
        assert found.dtype == jnp.float32
        assert 1e-4 < np.abs(found - expected).max() / np.abs(expected).max() < 0.08


def test_the_published_size():
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "layers_per_block": 2,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    module = vae_from_config(config)
    boxed = jax.eval_shape(functools.partial(init_vae, module), jax.random.key(0))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for leaf in leaves:
        assert len(leaf.names) == leaf.value.ndim == len(set(leaf.names)) and set(leaf.names) <= LOGICAL_AXES.keys()
    assert sum(leaf.value.size for leaf in leaves) == 83_653_863
    assert (len(leaves), module.factor, module.scaling_factor) == (248, 8, 0.18215)
