"""CLIP (Radford et al. 2021): its text tower conditions Stable Diffusion, both towers together give CLIPSIM."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from cmd_jax.errors import UserError
from cmd_jax.models.layers import dense, layer_norm, scanned
from cmd_jax.models.layout import constrain

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
}
SMALL = nn.initializers.normal(0.02)


class CLIPBlock(nn.Module):
    """Pre-norm self-attention and MLP: [B, N, D] -> [B, N, D]. causal: a token sees itself and those before it."""

    heads: int
    mlp_width: int
    activation: str
    causal: bool
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        norm = partial(layer_norm, self.epsilon, dtype=self.dtype)
        project = partial(dense, width, ("embed", "heads"), dtype=self.dtype)
        x = constrain(x, ("act_batch", "act_token", "act_embed"))

        y = norm(name="attention_norm")(x)
        query, key, value = (
            rearrange(project(name=n)(y), "b n (h d) -> b n h d", h=self.heads) for n in ("query", "key", "value")
        )
        # At most a few hundred tokens: the plain implementation, whose logits and softmax are float32.
        y = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        y = rearrange(y, "b n h d -> b n (h d)")
        x = x + dense(width, ("heads", "embed"), dtype=self.dtype, name="out")(y)

        y = norm(name="mlp_norm")(x)
        y = ACTIVATIONS[self.activation](dense(self.mlp_width, ("embed", "mlp"), dtype=self.dtype, name="mlp_in")(y))
        return x + dense(width, ("mlp", "embed"), dtype=self.dtype, name="mlp_out")(y), None


def _blocks(tower, causal: bool):
    blocks = scanned(CLIPBlock, tower.depth, tower.remat, broadcast=0)
    settings = tower.heads, tower.mlp_width, tower.activation, causal, tower.epsilon, tower.dtype
    return blocks(*settings, name="blocks")


def _table(rows: int, width: int, axis: str, dtype, name: str) -> nn.Embed:
    init = nn.with_logical_partitioning(SMALL, (axis, "embed"))
    return nn.Embed(rows, width, embedding_init=init, dtype=dtype, name=name)


class CLIPText(nn.Module):
    """Text tower: token ids int32 [B, L] -> (states [B, L, D] after the final norm, pooled [B, D]), float32.

    Tokens see only what is before them, so that padding after the end of a text changes nothing in it. L is at most
    `length`. pooled is the state at the first `end_token`; None stands for the highest id of each text, which is the
    end of text in CLIP's own vocabulary.
    activation: a name of ACTIVATIONS.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    length: int = 77
    activation: str = "quick_gelu"
    end_token: int | None = None
    epsilon: float = 1e-5
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids):
        if ids.shape[1] > self.length:
            problem = f"{ids.shape[1]} tokens, and the text tower has {self.length} positions"
            raise UserError("ids", ids.shape, problem, "cut the texts as its own tokenizer does")
        x = _table(self.vocabulary, self.width, "token", self.dtype, "tokens")(ids)
        table = nn.with_logical_partitioning(SMALL, ("token", "embed"))
        table = self.param("positions", table, (self.length, self.width), jnp.float32)
        x, _ = _blocks(self, causal=True)(x + table[: ids.shape[1]].astype(self.dtype))
        states = layer_norm(self.epsilon, dtype=jnp.float32, name="final_norm")(x)
        end = jnp.argmax(ids if self.end_token is None else ids == self.end_token, axis=1)
        return states, jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]


class CLIPVision(nn.Module):
    """Vision tower: normalised images [B, image_size, image_size, 3] -> pooled [B, D] float32, the class token's state.

    A border that is narrower than a patch is left out. activation: a name of ACTIVATIONS.
    """

    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images):
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            size = f"{self.image_size}x{self.image_size}x3"
            raise UserError("images", images.shape, f"the vision tower takes {size}", "resize and crop them")
        norm = partial(layer_norm, self.epsilon)
        kernel_axes = ("conv_height", "conv_width", "channels", "embed")
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            use_bias=False,
            kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), kernel_axes),
            dtype=self.dtype,
            name="embed",
        )(images)
        x = rearrange(x, "b h w d -> b (h w) d")
        first = self.param("class_token", nn.with_logical_partitioning(SMALL, ("embed",)), (self.width,), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(first.astype(self.dtype), (len(x), 1, self.width)), x], axis=1)
        table = nn.with_logical_partitioning(SMALL, ("token", "embed"))
        table = self.param("positions", table, x.shape[1:], jnp.float32)
        x = norm(dtype=self.dtype, name="pre_norm")(x + table.astype(self.dtype))
        x, _ = _blocks(self, causal=False)(x)
        return norm(dtype=jnp.float32, name="post_norm")(x[:, 0])


class CLIP(nn.Module):
    """Both towers and their maps to one space of `features` dimensions.

    (ids [T, L], images [B, S, S, 3]) -> logits [T, B]: cosines times the learned scale. `embed_text` and `embed_images`
    give the unit vectors, whose products are the cosines of CLIPSIM.
    """

    text: CLIPText
    vision: CLIPVision
    features: int

    def setup(self):
        self.text_projection, self.image_projection = (
            dense(self.features, ("embed", "embed_out"), init=SMALL, use_bias=False, dtype=jnp.float32)
            for _ in range(2)
        )
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), (), jnp.float32)

    def embed_text(self, ids):
        """Token ids int32 [B, L] -> unit vectors [B, features] float32."""
        return _unit(self.text_projection(self.text(ids)[1]))

    def embed_images(self, images):
        """Normalised images [B, S, S, 3] -> unit vectors [B, features] float32."""
        return _unit(self.image_projection(self.vision(images)))

    def __call__(self, ids, images):
        cosines = jnp.einsum("td,bd->tb", self.embed_text(ids), self.embed_images(images))
        return jnp.exp(self.logit_scale.astype(jnp.float32)) * cosines


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def mean_pool(states, ids, end_token: int):
    """Text features of the motion model: states [B, L, D], ids [B, L] -> [B, D], float32.

    The mean over the tokens of the text itself, from the start token up to and with the first `end_token`; padding is
    left out, also where it repeats the end token.
    """
    before = jnp.cumsum(ids == end_token, axis=1) - (ids == end_token)
    weight = (before == 0).astype(jnp.float32)[:, :, None]
    return jnp.sum(weight * states.astype(jnp.float32), axis=1) / jnp.sum(weight, axis=1)
