"""The space in which CMD sees frames: pixels, or the latents of a pretrained image VAE (paper section 3.2)."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from cmd_jax.models.layout import constrain, rows_are, ways
from cmd_jax.models.vae import VAE


def pixels(video):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video):
    """Float [-1, 1], clipped there -> uint8 [0, 255]."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


class Pixels:
    """Frames as they are; `params` is empty."""

    factor, channels = 1, 3

    def __init__(self):
        self.params = {}

    def encode(self, params, video):
        """uint8 [B, T, H, W, 3] -> float32 [B, T, H, W, 3] in [-1, 1]."""
        return pixels(video)

    def decode(self, params, video):
        return video

    def encode_image(self, params, image):
        return image

    def decode_image(self, params, image):
        return image


class VAELatents:
    """Frames as scaled latents [h, w, C] of an image VAE, H/h = W/w = factor; the mode of each, without noise.

    params: of the VAE, or None where only shapes are needed. at_once: frames of each clip that the VAE takes at once;
    it must divide T. What the VAE needs of memory grows with it and the batch, not with T. Devices that do not split
    the batch share the frames of each clip, whatever else of it they split, and each takes its own one after the other.
    """

    def __init__(self, module: VAE, params=None, at_once: int = 1):
        self.module, self.params, self.at_once = module, params, at_once
        self.factor, self.channels = module.factor, module.latent_channels

    def encode(self, params, video):
        """uint8 [B, T, H, W, 3] -> float32 [B, T, h, w, C]."""
        return self._by_chunks(lambda frames: self.encode_image(params, pixels(frames)), video)

    def decode(self, params, latents):
        """[B, T, h, w, C] -> float32 [B, T, H, W, 3], roughly in [-1, 1]."""
        return self._by_chunks(lambda frames: self.decode_image(params, frames), latents)

    def encode_image(self, params, image):
        """Float [B, H, W, 3] in [-1, 1] -> [B, h, w, C]."""
        return self.module.apply({"params": params}, image, method="latents")

    def decode_image(self, params, latents):
        """[B, h, w, C] -> [B, H, W, 3], roughly in [-1, 1]."""
        return self.module.apply({"params": params}, latents, method="decode")

    def _by_chunks(self, one, video):
        """`one`, a function of images, over [B, T, ...], chunk after chunk of the frames of each device."""
        clips, frames, *picture = video.shape
        shared = ways(frames, "act_picture", beside="act_batch")
        at_once = math.gcd(self.at_once, frames // shared)

        def chunk(frames):
            return rearrange(one(rearrange(frames, "b c ... -> (b c) ...")), "(b c) ... -> b c ...", c=at_once)

        with rows_are("act_picture"):
            parts = video.reshape(clips * shared, frames // shared, *picture)
            if shared > 1:
                parts = constrain(parts, ("act_batch", None, *(None for _ in picture)))
            chunks = rearrange(parts, "b (n c) ... -> n b c ...", c=at_once)
            parts = rearrange(jax.lax.map(chunk, chunks), "n b c ... -> b (n c) ...")
        return parts.reshape(clips, frames, *parts.shape[2:])
