"""The diffusion transformer (DiT) that draws content frames and motion latents (section 3.2; Peebles & Xie 2023)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cmd_jax.models.attention import attend
from cmd_jax.models.layers import dense, gelu_tanh, modulated_norm, patchify, scanned
from cmd_jax.models.layout import constrain, relaid

NORM_EPSILON = 1e-6
TIMESTEP_FEATURES = 256
POSITIONS = ("sincos", "table")
CONDITIONS = ("class", "text")
SIZES = {  # depth, width, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


def sincos_table(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed position table of a rows x columns grid -> [rows * columns, width] float32.

    The first half of the channels encodes the column, the second the row, each as sines then cosines.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = (a.ravel()[:, None] * frequencies for a in np.mgrid[:rows, :columns].astype(np.float64))
    return np.concatenate([f(a) for a in (column, row) for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def timestep_features(timesteps, features: int = TIMESTEP_FEATURES, shift: float = 0.0):
    """Sinusoidal features of (possibly fractional) timesteps in [0, 1000]: [B] -> [B, features], cosines then sines.

    shift: of the features // 2 frequencies, which fall from 1 to 1e-4; with 1 the last is exactly that.
    """
    half = features // 2
    frequencies = jnp.exp(-np.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class DiTBlock(nn.Module):
    """Attention and MLP, modulated and gated by the condition (adaLN-zero): x [B, N, D], condition [B, D] -> x."""

    heads: int
    dtype: jnp.dtype = jnp.float32
    mlp_epsilon: float = NORM_EPSILON

    @nn.compact
    def __call__(self, x, condition):
        width = x.shape[-1]
        project = partial(dense, width, ("embed", "heads"), dtype=self.dtype)
        modulation = dense(
            6 * width, ("embed", "modulation"), init=nn.initializers.zeros, dtype=self.dtype, name="modulation"
        )(condition)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        x = constrain(x, ("act_batch", "act_token", "act_embed"))

        y = modulated_norm(x, shift_a, scale_a, NORM_EPSILON, self.dtype)
        query, key, value = (
            rearrange(project(name=n)(y), "b n (h d) -> b n h d", h=self.heads) for n in ("query", "key", "value")
        )
        y = rearrange(attend(query, key, value), "b n h d -> b n (h d)")
        x = x + gate_a[:, None] * dense(width, ("heads", "embed"), dtype=self.dtype, name="out")(y)

        y = modulated_norm(x, shift_m, scale_m, self.mlp_epsilon, self.dtype)
        y = gelu_tanh(dense(4 * width, ("embed", "mlp"), dtype=self.dtype, name="mlp_in")(y))
        x = x + gate_m[:, None] * dense(width, ("mlp", "embed"), dtype=self.dtype, name="mlp_out")(y)
        return x, None


class DiT(nn.Module):
    """Denoiser of a 2-D grid: a content frame [B, H, W, C], or a motion latent [B, T, h+w, K].

    (x [B, R, S, C], timesteps [B] in [0, 1000], label, content) -> float32 [B, R, S, out_channels].
    condition: "class", label int32 [B] in 0..classes, of which `classes` is the null class of guidance; classes=None
    makes a model without label, classes=0 one with the null class only. Or "text": label is the mean-pooled features
    [B, E] of a text, which a linear map takes to the model's width (paper section 3.2).
    content_patch > 0 asks for a content frame [B, H, W, C'], whose patches join as extra tokens with an embedding and a
    position table of their own; only the grid's own tokens are read out (paper section 3.2). Instead of the frame its
    tokens [B, N, D] may be given, as `content_tokens` makes them.
    position: "sincos" tables of the real rectangular grid, or "table": tables stored with the parameters.
    label_init: standard deviation of the label table at first. DiT's 0.02 hardly sets the classes apart, which a short
    training then has to do first; 1.0 gives each class a direction of its own from the first step on.
    frequency_shift, mlp_epsilon: of the timestep features, and of the LayerNorms before MLPs; diffusers has others.
    keep=True gives (prediction, kept [B, N, D]): what the blocks added to the grid's N own tokens. reuse: such an array
    of another timestep, taken in place of running the blocks, and of looking at the content frame.
    """

    out_channels: int
    patch: int
    width: int
    depth: int
    heads: int
    classes: int | None
    condition: str = "class"
    content_patch: int = 0
    position: str = "sincos"
    label_init: float = 0.02
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    frequency_shift: float = 0.0
    mlp_epsilon: float = NORM_EPSILON

    def setup(self):
        self.embed = dense(self.width, ("patch", "embed"), dtype=self.dtype)
        if self.content_patch:
            self.embed_content = dense(self.width, ("patch", "embed"), dtype=self.dtype)

    def _tokens(self, x, patch, layer, table_name):
        tokens = layer(patchify(x, patch))
        table = sincos_table(tokens.shape[1], tokens.shape[2], self.width)
        if self.position == "table" and self.is_initializing():
            init = nn.with_logical_partitioning(lambda *_: jnp.asarray(table), ("token", "embed"))
            table = self.param(table_name, init, table.shape, jnp.float32)
        elif self.position == "table":
            table = self.get_variable("params", table_name)
        return rearrange(tokens, "b r s d -> b (r s) d") + jnp.asarray(table, self.dtype)

    def content_tokens(self, content):
        """Content frame [B, H, W, C'] -> its tokens [B, N, D], the same at every timestep."""
        return self._tokens(content, self.content_patch, self.embed_content, "content_positions")

    @nn.compact
    def __call__(self, x, timesteps, label=None, content=None, *, keep=False, reuse=None):
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        own = tokens = self._tokens(x, self.patch, self.embed, "positions")
        if self.content_patch and reuse is None:
            extra = content if content.ndim == 3 else self.content_tokens(content)
            tokens = jnp.concatenate([tokens, extra], axis=1)
        # Joined on each device, which then takes its own: what is joined over devices is sent.
        tokens = relaid(tokens, ("act_batch", None, "act_embed"))

        small = nn.initializers.normal(0.02)
        condition = timestep_features(timesteps, shift=self.frequency_shift)
        condition = dense(self.width, ("timestep", "embed"), init=small, dtype=self.dtype, name="time_in")(condition)
        condition = dense(self.width, ("embed", "embed_out"), init=small, dtype=self.dtype, name="time_out")(
            jax.nn.silu(condition)
        )
        if self.condition == "text":
            project = dense(self.width, ("embed", "embed_out"), init=small, dtype=self.dtype, name="text")
            condition = condition + project(label)
        elif self.classes is not None:
            table = nn.Embed(
                self.classes + 1,
                self.width,
                embedding_init=nn.with_logical_partitioning(
                    nn.initializers.normal(self.label_init), ("classes", "embed")
                ),
                dtype=self.dtype,
                name="label",
            )
            condition = condition + table(label)
        condition = jax.nn.silu(condition)

        if reuse is None:
            blocks = scanned(DiTBlock, self.depth, self.remat, broadcast=1)
            tokens, _ = blocks(self.heads, self.dtype, self.mlp_epsilon, name="blocks")(tokens, condition)
            tokens = tokens[:, : rows * columns]
        else:
            tokens = own + reuse
        kept = nn.with_logical_constraint(tokens - own, ("act_batch", "act_token", "act_embed")) if keep else None

        modulation = dense(
            2 * self.width,
            ("embed", "modulation"),
            init=nn.initializers.zeros,
            dtype=self.dtype,
            name="final_modulation",
        )(condition)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        tokens = modulated_norm(tokens, shift, scale, NORM_EPSILON, jnp.float32)
        size = self.patch * self.patch * self.out_channels
        tokens = dense(size, ("embed", "patch"), init=nn.initializers.zeros, dtype=jnp.float32, name="final")(tokens)
        out = rearrange(
            tokens,
            "b (r s) (p q c) -> b (r p) (s q) c",
            r=rows, s=columns, p=self.patch, q=self.patch,
        )  # fmt: skip
        return (out, kept) if keep else out
