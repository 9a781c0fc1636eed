"""What a clip is conditioned on: its class, or a text (paper section 3.2). Both know a null condition for guidance.

params: arrays that make conditions of batches and are never trained;
of(params, batch) -> condition, a tree of arrays [B, ...];
null(params, count, ids=None) -> the null condition, `count` times.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.diffusion.gaussian import column
from cmd_jax.models.clip import CLIPText, mean_pool


class Classes:
    """Labels 0..count-1, batch["label"] int32 [B]; `count` itself is the null class."""

    def __init__(self, count: int):
        self.count, self.params = count, {}

    def of(self, params, batch):
        return batch["label"]

    def null(self, params, count: int, ids=None):
        return jnp.full(count, self.count, jnp.int32)


class Text(NamedTuple):
    """Texts as the models see them: states [B, L, E], pooled [B, E] their mean over the text's own tokens; float32."""

    states: jax.Array
    pooled: jax.Array


class Texts:
    """Texts, batch["ids"] int32 [B, L], and batch["states"] [B, L, E] where they were encoded before.

    null_ids: token ids [L] of the empty text. end_token: id of the end of text. params: of the encoder, or None where
    only shapes are needed.
    """

    def __init__(self, module: CLIPText, params, null_ids: np.ndarray, end_token: int):
        self.module, self.params, self.null_ids, self.end_token = module, params, null_ids, end_token

    def of(self, params, batch) -> Text:
        states = batch["states"] if "states" in batch else self.states(params, batch["ids"])
        return Text(states, mean_pool(states, batch["ids"], self.end_token))

    def states(self, params, ids):
        """Token ids [B, L] -> [B, L, E]."""
        return self.module.apply({"params": params}, ids)[0]

    def null(self, params, count: int, ids=None) -> Text:
        """Of `ids` [L], a negative prompt, or of the empty text; encoded once."""
        ids = jnp.asarray(self.null_ids if ids is None else ids)[None]
        with nn.logical_axis_rules(()):  # one row cannot be split over the mesh: each device encodes it for itself
            one = self.of(params, {"ids": ids})
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), one)


def drop(condition, null, dropped):
    """The condition, or where dropped [B] is true the null condition."""
    return jax.tree.map(lambda c, n: jnp.where(column(dropped, c), n, c), condition, null)
