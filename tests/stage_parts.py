"""Toy batches, configs and parameters of stages."""

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax import defaults
from cmd_jax.models.frames import VAELatents
from cmd_jax.models.vae import VAE
from cmd_jax.stages import (
    ContentStage,
    MotionStage,
)

B, T, H, W, C, K, CLASSES = 3, 4, 8, 16, 3, 5, 7
RNG = np.random.default_rng(0)
BATCH = {
    "video": jnp.asarray(RNG.integers(0, 256, (B, T, H, W, C), np.uint8)),
    "label": jnp.asarray([0, 6, 2], jnp.int32),
}
KEY = jax.random.key(3)
LATENTS = VAELatents(VAE(3, 4, (8, 16), 1, groups=8))  # half as high and wide
PATHS = {"content": ContentStage, "motion": MotionStage}


def names(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def awake(stage, scale=0.1):
    """Parameters off their initial values, the zeros of adaLN-zero too; drawn on the host, which compiles nothing."""
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    shapes = jax.tree.map(lambda x: getattr(x, "value", x), shapes, is_leaf=lambda x: hasattr(x, "names"))
    rng = np.random.default_rng(1)

    def one(x):
        fan_in = x.shape[-2] if len(x.shape) > 1 else 1 / scale**2
        return jnp.asarray(rng.standard_normal(x.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map(one, shapes)


def autoencoder_config(**loss):
    config = defaults.stage("autoencoder")
    config.data.update(frames=T, height=H, width=W)
    config.model.update(patch=4, width=16, depth=1, heads=2, head_dim=8, motion_channels=K)
    config.loss.update(discriminator_channels=4, discriminator_layers=1)
    config.loss.update(loss)
    return config


def denoiser_config(name, kind="flow", **diffusion):
    config = defaults.stage(name)
    config.data.update(frames=T, height=H, width=W)
    config.model.update(patch=4 if name == "content" else 2, width=16, depth=1, heads=2)
    config.diffusion.update(kind=kind, learned_range=kind == "gaussian", clip=0.0)
    config.diffusion.update(diffusion)
    return config
