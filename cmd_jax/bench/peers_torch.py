"""The CMD autoencoder in plain PyTorch (paper section 3.1, appendix B), which ours is timed against.

Written as a PyTorch user would write it for speed: queries, keys and values from one product, value and gate from
another, `scaled_dot_product_attention`, channels last. With our parameters (`state_of`) it computes what ours does.
"""

import re

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from cmd_jax.interop.tensors import LAYOUTS, Tensor, state_dict_of, tensor
from cmd_jax.models.attention import rotary_table
from cmd_jax.models.autoencoder import NORM_EPSILON

# Ours -> torch's: parts of one product, in their order.
FUSED = {"qkv": ("query", "key", "value"), "hidden": ("value", "gate")}


def rotate(x, table):
    """Turn channel pairs (i, i + head_dim / 2) of [..., N, head_dim] by a table [2, N, head_dim / 2]."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Self-attention of sequences [S, N, D] -> same; table: rotary, or None."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)

    def forward(self, x, table):
        query, key, value = rearrange(self.qkv(x), "s n (three h d) -> three s h n d", three=3, h=self.heads)
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        return self.out(rearrange(F.scaled_dot_product_attention(query, key, value), "s h n d -> s n (h d)"))


class GEGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        value, gate = self.hidden(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class Block(nn.Module):
    """[B, T, N, D] -> same: attention over time, over space, feed-forward."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.time_norm, self.space_norm, self.mlp_norm = (nn.LayerNorm(width, NORM_EPSILON) for _ in range(3))
        self.time, self.space = Attention(width, heads, head_dim), Attention(width, heads, head_dim)
        self.mlp = GEGLU(width)

    def forward(self, x, time_table, space_table):
        b, t, n, _ = x.shape
        y = self.time(rearrange(self.time_norm(x), "b t n d -> (b n) t d"), time_table)
        x = x + rearrange(y, "(b n) t d -> b t n d", n=n)
        x = x + self.space(self.space_norm(x).flatten(0, 1), space_table).unflatten(0, (b, t))
        return x + self.mlp(self.mlp_norm(x))


class TimeSformer(nn.Module):
    """[B, T, h, w, D] -> same."""

    def __init__(self, width, depth, heads, head_dim, position, rotary_base):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, head_dim) for _ in range(depth))
        self.head_dim, self.base = head_dim, rotary_base if position == "rotary" else None
        self.tables = {}

    def _tables(self, t: int, h: int, w: int, like):
        """As the original holds them: made once for a size, on the device."""
        if self.base is None:
            return None, None
        if (t, h, w, like.dtype, like.device) not in self.tables:
            table = lambda p, pairs: torch.from_numpy(rotary_table(p, pairs, base=self.base)).to(like)  # noqa: E731
            rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            space = [table(place.flatten(), self.head_dim // 4) for place in (rows, columns)]
            made = table(torch.arange(t), self.head_dim // 2), torch.cat(space, dim=-1)
            self.tables[t, h, w, like.dtype, like.device] = made
        return self.tables[t, h, w, like.dtype, like.device]

    def forward(self, x):
        _, t, h, w, _ = x.shape
        tables = self._tables(t, h, w, x)
        x = x.flatten(2, 3)
        for block in self.blocks:
            x = block(x, *tables)
        return x.unflatten(2, (h, w))


class Unpatchify(nn.Module):
    """Transposed convolution with kernel = stride as one product: [..., h, w, D] -> [..., h*p, w*p, C]."""

    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(patch * patch * channels, width))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x):
        x = F.linear(x, self.weight)
        p = self.patch
        return rearrange(x, "... h w (p q c) -> ... (h p) (w q) c", p=p, q=p) + self.bias


class Autoencoder(nn.Module):
    """Fields as of `cmd_jax.models.autoencoder.Autoencoder`, content "weighted": clip [B, T, H, W, C] -> clip."""

    def __init__(
        self, channels, patch, width, depth, heads, head_dim, motion_channels, mode, position, rotary_base=10000.0
    ):
        super().__init__()
        trunk = width, depth, heads, head_dim, position, rotary_base
        self.patch, self.mode = patch, mode
        self.embed_video = nn.Linear(patch * patch * channels, width)
        self.encoder = TimeSformer(*trunk)
        self.content_logits = Unpatchify(width, patch, channels)
        self.rows_to_motion, self.columns_to_motion = (nn.Linear(width, motion_channels) for _ in range(2))
        self.embed_content = nn.Linear(patch * patch * channels, width)
        self.embed_rows, self.embed_columns = (nn.Linear(motion_channels, width) for _ in range(2))
        self.decoder = TimeSformer(*trunk)
        self.to_video = Unpatchify(width, patch, channels)

    def _patches(self, x):
        return rearrange(x, "... (h p) (w q) c -> ... h w (p q c)", p=self.patch, q=self.patch)

    def encode(self, video):
        """-> content [B, H, W, C], motion [B, T, h+w, K]."""
        features = self.encoder(self.embed_video(self._patches(video)))
        content = (self.content_logits(features).softmax(dim=1) * video).sum(dim=1)
        rows, columns = self.rows_to_motion(features.mean(dim=3)), self.columns_to_motion(features.mean(dim=2))
        return content, torch.cat([rows, columns], dim=2).tanh()

    def decode(self, content, motion):
        content = self.embed_content(self._patches(content))
        rows, columns = motion.split([content.shape[1], content.shape[2]], dim=2)
        x = content[:, None] + self.embed_rows(rows)[:, :, :, None] + self.embed_columns(columns)[:, :, None]
        video = self.to_video(self.decoder(x))
        return 2 * video.sigmoid() - 1 if self.mode == "pixel" else video

    def forward(self, video):
        return self.decode(*self.encode(video))


def state_of(params) -> dict[str, torch.Tensor]:
    """Our autoencoder's host parameters as the state dict of that one."""
    return {name: torch.from_numpy(array.copy()) for name, array in state_dict_of(params, _tensor).items()}


def _tensor(path: str, shape: tuple[int, ...]) -> Tensor:
    """The product that a parameter is, or is a part of."""
    layered = "/blocks/" in path
    *layers, layer, role = path.replace("/blocks/", "/blocks/{}/").split("/")
    part, parts = 0, 1
    for name, fused in FUSED.items() if layered else ():
        if layer in fused and (layers[-1] == "mlp") == (name == "hidden"):
            part, parts, layer = fused.index(layer), len(fused), name
    name = ".".join([*layers, layer, re.sub("kernel|scale", "weight", role)])
    return tensor(path, shape, name, LAYOUTS[len(shape) - layered], part, parts, layered)
