"""The CMD autoencoder: video <-> content frame + motion latent (paper section 3.1, appendix B)."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cmd_jax.models.attention import attend, rotary_table, rotate
from cmd_jax.models.layers import Unpatchify, dense, gated, layer_norm, patchify, scanned
from cmd_jax.models.layout import constrain, relaid

NORM_EPSILON = 1e-5  # of the original PyTorch layers
POSITIONS = ("rotary", "none")
CONTENTS = ("weighted", "mean", "first")
MODES = ("pixel", "latent")


class Latents(NamedTuple):
    """A clip as CMD sees it.

    content: [B, H, W, C], in the space of frames. motion: [B, T, h+w, K] in (-1, 1), rows first, then columns.
    """

    content: jax.Array
    motion: jax.Array


class AxialAttention(nn.Module):
    """Self-attention along one axis of a token grid: [B, T, N, D] -> [B, T, N, D].

    axis 1 attends over frames, axis 2 over the cells of one frame. heads * head_dim may differ from D.
    table: rotary table [2, tokens on that axis, head_dim / 2], or None for no positions.
    """

    heads: int
    head_dim: int
    axis: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, table=None):
        width = x.shape[-1]
        project = partial(dense, self.heads * self.head_dim, ("embed", "heads"), dtype=self.dtype)
        query, key, value = (
            jnp.swapaxes(rearrange(project(name=n)(x), "b t n (h d) -> b t n h d", h=self.heads), self.axis, 2)
            for n in ("query", "key", "value")
        )
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        axes = ("act_batch", "act_token", None) if self.axis == 1 else ("act_batch", "act_time", "act_token")
        x = jnp.swapaxes(attend(query, key, value, axes), self.axis, 2)
        return dense(width, ("heads", "embed"), dtype=self.dtype, name="out")(rearrange(x, "b t n h d -> b t n (h d)"))


class GEGLU(nn.Module):
    """Gated feed-forward with exact GELU: [..., D] -> [..., D], hidden width 4 D."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        value = dense(4 * width, ("embed", "mlp"), dtype=self.dtype, name="value")(x)
        gate = dense(4 * width, ("embed", "mlp"), dtype=self.dtype, name="gate")(x)
        return dense(width, ("mlp", "embed"), dtype=self.dtype, name="out")(gated(value, gate))


class FactorizedBlock(nn.Module):
    """Attention over time, then over space, then GEGLU, each on a normalised residual: [B, T, N, D] -> same."""

    heads: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, time_table, space_table):
        norm = partial(layer_norm, NORM_EPSILON, dtype=self.dtype)
        attention = partial(AxialAttention, self.heads, self.head_dim, dtype=self.dtype)
        frames = ("act_batch", "act_time", "act_token", "act_embed")
        x = constrain(x, frames)
        # Where devices have frames of their own, each takes cells of all frames for this, and gives them back.
        y = relaid(norm(name="time_norm")(x), ("act_batch", None, "act_token", "act_embed"))
        x = x + relaid(attention(axis=1, name="time")(y, time_table), frames)
        x = x + attention(axis=2, name="space")(norm(name="space_norm")(x), space_table)
        x = x + GEGLU(self.dtype, name="mlp")(norm(name="mlp_norm")(x))
        return x, None


class TimeSformer(nn.Module):
    """`depth` factorised space-time blocks: [B, T, h, w, D] -> same.

    position: "rotary" (over time, and axial over space; head_dim a multiple of 4) or "none".
    """

    depth: int
    heads: int
    head_dim: int
    position: str = "rotary"
    rotary_base: float = 10000.0
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        _, t, h, w, _ = x.shape
        time_table = space_table = None
        if self.position == "rotary":
            table = partial(rotary_table, base=self.rotary_base)
            time_table = table(np.arange(t), self.head_dim // 2)
            rows, columns = (a.ravel() for a in np.mgrid[:h, :w])
            space_table = np.concatenate([table(p, self.head_dim // 4) for p in (rows, columns)], axis=-1)
        blocks = scanned(FactorizedBlock, self.depth, self.remat, broadcast=2)
        x = rearrange(x, "b t h w d -> b t (h w) d")
        x, _ = blocks(self.heads, self.head_dim, self.dtype, name="blocks")(x, time_table, space_table)
        return rearrange(x, "b t (h w) d -> b t h w d", h=h)


class Autoencoder(nn.Module):
    """Clip [B, T, H, W, C] -> Latents -> clip. H and W are free multiples of `patch`; T is free too.

    mode "pixel" squashes the reconstruction to (-1, 1), "latent" leaves it linear. content: how the content frame is
    made: "weighted" (learned softmax over frames, per pixel and channel; the paper's), "mean" or "first" (ablations).
    Paper section 3.1; sizes in appendix B.
    """

    channels: int = 3
    patch: int = 2
    width: int = 384
    depth: int = 8
    heads: int = 8
    head_dim: int = 48
    motion_channels: int = 8
    mode: str = "pixel"
    position: str = "rotary"
    rotary_base: float = 10000.0
    content: str = "weighted"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        trunk = partial(
            TimeSformer, self.depth, self.heads, self.head_dim, self.position, self.rotary_base, self.remat, self.dtype
        )
        embed = partial(dense, self.width, dtype=self.dtype)
        # A small map to K keeps the tanh away from saturation early in training, where its gradient dies.
        to_motion = partial(
            dense,
            self.motion_channels,
            ("embed", "motion"),
            init=nn.initializers.normal(0.2 / self.width**0.5),
            dtype=jnp.float32,
        )
        self.embed_video = embed(("patch", "embed"))
        self.encoder = trunk()
        if self.content == "weighted":
            self.content_logits = Unpatchify(self.patch, self.channels)
        self.rows_to_motion, self.columns_to_motion = to_motion(), to_motion()
        self.embed_content = embed(("patch", "embed"))
        self.embed_rows, self.embed_columns = embed(("motion", "embed")), embed(("motion", "embed"))
        self.decoder = trunk()
        self.to_video = Unpatchify(self.patch, self.channels)

    def _features(self, video):
        return self.encoder(self.embed_video(patchify(video, self.patch)))

    def _weights(self, features, video):
        if self.content == "weighted":
            return jax.nn.softmax(self.content_logits(features), axis=1)
        frames = video.shape[1]
        weights = np.full(frames, 1 / frames) if self.content == "mean" else np.eye(frames)[0]
        return jnp.broadcast_to(weights.astype(np.float32)[:, None, None, None], video.shape)

    def content_weights(self, video):
        """What each frame gives to the content frame, for inspection: [B, T, H, W, C] -> same, summing to 1 over T."""
        return self._weights(self._features(video), video)

    def encode(self, video) -> Latents:
        """Clip [B, T, H, W, C] in [-1, 1] (pixels) or VAE latents -> Latents."""
        features = self._features(video)
        content = jnp.sum(self._weights(features, video) * video.astype(jnp.float32), axis=1)
        features = features.astype(jnp.float32)
        rows = self.rows_to_motion(features.mean(axis=3))
        columns = self.columns_to_motion(features.mean(axis=2))
        motion = jnp.tanh(jnp.concatenate([rows, columns], axis=2))
        return Latents(content, motion)

    def decode(self, latents: Latents):
        """Latents -> clip [B, T, H, W, C], float32."""
        content = self.embed_content(patchify(latents.content, self.patch))
        rows, columns = jnp.split(latents.motion, [content.shape[1]], axis=2)
        x = content[:, None] + self.embed_rows(rows)[:, :, :, None] + self.embed_columns(columns)[:, :, None]
        video = self.to_video(self.decoder(x))
        return 2 * jax.nn.sigmoid(video) - 1 if self.mode == "pixel" else video

    def __call__(self, video):
        """Clip -> (reconstruction, Latents)."""
        latents = self.encode(video)
        return self.decode(latents), latents
