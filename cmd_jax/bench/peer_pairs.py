"""What is timed side by side: our modules and PyTorch's at the same shapes, on the same weights where both compute the
same function."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet3DConditionModel
from einops import rearrange
from jax.sharding import SingleDeviceSharding
from torch.nn import functional as F

from cmd_jax.bench import peers_torch
from cmd_jax.interop import cmd_release
from cmd_jax.interop.diffusers_dit import COMPUTES, in_facebooks_names
from cmd_jax.interop.sd_config import unet_from_config, vae_from_config
from cmd_jax.interop.sd_known import ARCHITECTURES
from cmd_jax.interop.sd_weights import unet_tensor, vae_tensor
from cmd_jax.interop.tensors import to_params
from cmd_jax.interop.weights import Weights, flatten
from cmd_jax.models.autoencoder import Autoencoder, Latents
from cmd_jax.models.dit import SIZES, DiT, sincos_table
from cmd_jax.models.unet import init_unet
from cmd_jax.models.vae import init_vae

FRAMES, CLASSES, TOKENS = 16, 101, 77
# ModelScope's public config of its UNet3D is diffusers' default, which is stated here all the same.
UNET3D = {
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 1024,
    "attention_head_dim": 64, "norm_num_groups": 32, "sample_size": 32,
}  # fmt: skip
NARROW = {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 32}  # of small models


class Ours(NamedTuple):
    """apply(params, *inputs) -> array; parameters lie on the device."""

    apply: Callable
    params: Any
    inputs: tuple


class Theirs(NamedTuple):
    """call(model, *inputs) -> tensor; model and inputs lie on the device."""

    name: str
    model: torch.nn.Module
    call: Callable
    inputs: tuple


class Pair(NamedTuple):
    """as_ours: the peer's output in our layout, on the host. note: the shapes, and how the functions differ."""

    ours: Ours
    theirs: Theirs
    as_ours: Callable
    note: str


def autoencoder(batch: int, small: bool, dtype: str) -> Pair:
    """The whole of it, clip -> clip, at the paper's size for 16x64x64 pixels."""
    side, sizes = 64, dict(width=384, depth=8, heads=8, head_dim=48)
    if small:
        side, sizes = 8, dict(width=32, depth=2, heads=2, head_dim=16)
    module = Autoencoder(**sizes, dtype=jnp.dtype(dtype))
    video = drawn(0, batch, FRAMES, side, side, 3)
    params = random_params(lambda key: module.init(key, video)["params"], dtype)
    fields = ("channels", "patch", "motion_channels", "mode", "position", "rotary_base")
    model = peers_torch.Autoencoder(**sizes, **{name: getattr(module, name) for name in fields})
    model.load_state_dict(peers_torch.state_of(jax.tree.map(lambda x: np.asarray(x, np.float32), params)))
    return Pair(
        Ours(lambda params, video: module.apply({"params": params}, video)[0], params, (video,)),
        theirs("plain PyTorch, scaled_dot_product_attention", model, dtype, lambda model, x: model(x), video),
        host,
        f"clips {list(video.shape)}, width {module.width}, depth {module.depth}; the same function",
    )


def content_dit(batch: int, small: bool, dtype: str) -> Pair:
    """DiT-L/2 on content frames of 64x64 pixels: 1,024 tokens."""
    (depth, width, heads), side = ((2, 32, 2), 16) if small else (SIZES["L"], 64)
    model = dit_peer(depth, width, heads, side, channels=3)
    module, params = from_facebooks("content_dit", model, {}, input_size=side)
    x, times, labels = drawn(0, batch, side, side, 3), steps_of(batch), np.arange(batch)
    return Pair(
        Ours(partial(applied, module.clone(dtype=jnp.dtype(dtype))), on_device(params, dtype), (x, times, labels)),
        theirs("diffusers DiTTransformer2DModel", model, dtype, call_dit, channels_first(x), times, labels),
        channels_last,
        f"frames {list(x.shape)}, width {width}, depth {depth}; the same function, though the peer embeds timestep and "
        "class in each block",
    )


def motion_dit(batch: int, small: bool, dtype: str) -> Pair:
    """DiT-L/2 on motion latents of 16x64x64 clips: 256 motion tokens and 256 of the content frame."""
    (depth, width, heads), side, frames = ((2, 32, 2), 8, 4) if small else (SIZES["L"], 32, FRAMES)
    x, content = drawn(0, batch, frames, 2 * side, 8), drawn(1, batch, 2 * side, 2 * side, 3)
    config = dict(input_size=[frames, 2 * side], content_size=2 * side, content_channels=3, content_patch_size=4)
    model = MotionPeer(dit_peer(depth, width, heads, 2 * side, channels=8), **config)
    module, params = from_facebooks("motion_dit", model.dit, model.more_state(), **config)
    inputs = x, steps_of(batch), np.arange(batch), content
    return Pair(
        Ours(partial(applied, module.clone(dtype=jnp.dtype(dtype))), on_device(params, dtype), inputs),
        theirs(
            "blocks of diffusers DiTTransformer2DModel", model, dtype, lambda model, *inputs: model(*inputs),
            channels_first(x), *inputs[1:3], channels_first(content),
        ),
        channels_last,
        f"motion {list(x.shape)} with content {list(content.shape)}, {model.tokens} tokens, width {width}, depth "
        f"{depth}; the same function: diffusers' embedding and blocks, with a second embedding and a rectangular end "
        "of our own, since its forward() knows squares only",
    )  # fmt: skip


class MotionPeer(torch.nn.Module):
    """A DiTTransformer2DModel on a rectangle with a content frame beside it: [B, 8, T, h+w] -> [B, 16, T, h+w]."""

    def __init__(self, dit: DiTTransformer2DModel, input_size, content_size, content_channels, content_patch_size):
        super().__init__()
        self.dit, width, patch = dit, dit.inner_dim, content_patch_size
        self.grid, side = [n // dit.patch_size for n in input_size], content_size // patch
        self.embed_content = torch.nn.Conv2d(content_channels, width, patch, stride=patch)
        self.tokens = self.grid[0] * self.grid[1] + side * side
        for name, grid in (("table", self.grid), ("content_table", (side, side))):
            self.register_buffer(name, torch.from_numpy(sincos_table(*grid, width)))

    def more_state(self) -> dict[str, np.ndarray]:
        """What the motion DiT of the CMD release has more than facebook's, in its names."""
        state = {name: value.numpy() for name, value in self.state_dict().items()}
        tables = {"pos_embed": state["table"][None], "keyframe_pos_embed": state["content_table"][None]}
        return tables | {
            f"keyframe_embedder.proj.{part}": state[f"embed_content.{part}"] for part in ("weight", "bias")
        }

    def forward(self, x, times, labels, content):
        dit, (rows, columns) = self.dit, self.grid
        tokens = dit.pos_embed.proj(x).flatten(2).mT + self.table
        extra = self.embed_content(content).flatten(2).mT + self.content_table
        tokens = torch.cat([tokens, extra], dim=1)
        for block in dit.transformer_blocks:
            tokens = block(tokens, timestep=times, class_labels=labels)
        condition = dit.transformer_blocks[0].norm1.emb(times, labels, hidden_dtype=tokens.dtype)
        shift, scale = dit.proj_out_1(F.silu(condition)).chunk(2, dim=1)
        tokens = dit.norm_out(tokens[:, : rows * columns]) * (1 + scale[:, None]) + shift[:, None]
        return rearrange(
            dit.proj_out_2(tokens), "b (r s) (p q c) -> b c (r p) (s q)",
            r=rows, s=columns, p=dit.patch_size, q=dit.patch_size,
        )  # fmt: skip


def unet(batch: int, small: bool, dtype: str, side: int = 64) -> Pair:
    """Stable Diffusion 2.1-base's UNet on latents of side x side."""
    model = UNet2DConditionModel.from_config(unet_config(small)).eval()
    module, params = loaded(model, unet_from_config, init_unet, unet_tensor, dtype)
    side = 8 if small else side
    sample, text = drawn(0, batch, 4, side, side), drawn(1, batch, TOKENS, model.config.cross_attention_dim)
    times = steps_of(batch)
    return Pair(
        Ours(partial(applied, module), params, (np.moveaxis(sample, 1, -1), times, text)),
        theirs("diffusers UNet2DConditionModel", model, dtype, call_unet, sample, times, text),
        channels_last,
        f"latents [{batch}, {side}, {side}, 4], {TOKENS} text states; the same function",
    )


def vae(batch: int, small: bool, dtype: str, side: int = 64) -> Pair:
    """Stable Diffusion's VAE decoder: latents of side x side to pictures of 8 side."""
    config = ARCHITECTURES["sd21"].vae | ({"block_out_channels": NARROW["block_out_channels"]} if small else {})
    model = AutoencoderKL.from_config(config).eval()
    module, params = loaded(model, vae_from_config, init_vae, lambda _: vae_tensor, dtype)
    side = 4 if small else side
    latents = drawn(0, batch, 4, side, side)
    return Pair(
        Ours(partial(applied, module, method="decode"), params, (np.moveaxis(latents, 1, -1),)),
        theirs(
            "diffusers AutoencoderKL", model, dtype,
            lambda model, x: model.decode(x / model.config.scaling_factor).sample, latents,
        ),
        channels_last,
        f"latents [{batch}, {side}, {side}, 4] to pictures of {8 * side}x{8 * side}; the same function",
    )  # fmt: skip


PAIRS = {
    "autoencoder": autoencoder,
    "dit-content": content_dit,
    "dit-motion": motion_dit,
    "unet": unet,
    "unet-32": partial(unet, side=32),
    "vae": vae,
}


def clip_256(small: bool, dtype: str) -> tuple[dict[str, Ours], Theirs]:
    """A clip of 16x256x256 in Stable Diffusion's latents [16, 32, 32, 4], with guidance, so that denoisers see 2 rows.

    -> ours: the CMD decoder, and an evaluation of the content and one of the motion denoiser; "_alone": without
    guidance, one row; "_reusing": with what is deep in the network reused (a step cache). Theirs: a step of
    ModelScope's UNet3D. The motion model is XL/2 with content patches of 4: 128 + 64 tokens.
    """
    side, frames = (8, 4) if small else (32, FRAMES)
    depth, width, heads = (2, 32, 2) if small else SIZES["XL"]
    cmd = dict(width=32, depth=2, heads=2, head_dim=16) if small else {}
    cmd = Autoencoder(channels=4, mode="latent", **cmd, dtype=jnp.dtype(dtype))
    text_width = unet_config(small)["cross_attention_dim"]
    motion = DiT(
        out_channels=16, patch=2, width=width, depth=depth, heads=heads, classes=None, condition="text",
        content_patch=4, dtype=jnp.dtype(dtype),
    )  # fmt: skip
    content = unet_from_config(unet_config(small), jnp.dtype(dtype))
    frame, latent = drawn(0, 2, side, side, 4), drawn(1, 2, frames, side, 8)
    times, text = steps_of(2), drawn(2, 2, TOKENS, text_width)
    motion_inputs = latent, times, text.mean(1), frame
    video = np.zeros((1, frames, side, side, 4), np.float32)

    def init_motion(key):
        return motion.init(key, *motion_inputs)["params"]

    def decode(params, content, motion):
        return cmd.apply({"params": params}, Latents(content, motion), method="decode")

    ours = {
        **evaluations("content", content, random_params(partial(init_unet, content), dtype), frame, times, text),
        **evaluations("motion", motion, random_params(init_motion, dtype), *motion_inputs),
        "decoder": Ours(
            decode, random_params(lambda key: cmd.init(key, video)["params"], dtype), (frame[:1], latent[:1])
        ),
    }
    model = UNet3DConditionModel(**UNET3D | (NARROW | {"attention_head_dim": 8} if small else {})).eval()
    noise = drawn(3, 2, 4, frames, side, side)
    return ours, theirs("diffusers UNet3DConditionModel", model, dtype, call_unet, noise, times, text)


def evaluations(name: str, module, params, *inputs) -> dict[str, Ours]:
    """Of one denoiser on two rows, or alone on one."""
    found = {}
    for ending, given in (("", inputs), ("_alone", [x[:1] for x in inputs])):
        kept = jax.eval_shape(partial(applied, module, keep=True), params, *given)[1]
        found[name + ending] = Ours(partial(applied, module), params, tuple(given))
        found[f"{name}_reusing{ending}"] = Ours(
            lambda params, kept, *inputs: module.apply({"params": params}, *inputs, reuse=kept),
            params, (drawn(4, *kept.shape), *given),
        )  # fmt: skip
    return found


def dit_peer(depth: int, width: int, heads: int, side: int, channels: int) -> DiTTransformer2DModel:
    """With a learned range, and the embeddings of all blocks alike, as facebook's DiT has them once."""
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels, out_channels=2 * channels,
        num_layers=depth, sample_size=side, patch_size=2, num_embeds_ada_norm=CLASSES, norm_num_groups=1,
    ).eval()  # fmt: skip
    first, *others = model.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model


def from_facebooks(kind: str, model: DiTTransformer2DModel, more: dict, **sizes):
    """-> our module and host parameters, with the peer's weights and those of `more`, in the release's names."""
    state = in_facebooks_names({name: value.numpy() for name, value in model.state_dict().items()}) | more
    config = COMPUTES | sizes | dict(
        patch_size=model.patch_size, in_channels=model.config.in_channels, hidden_size=model.inner_dim,
        depth=model.config.num_layers, heads=model.config.num_attention_heads, num_classes=CLASSES,
    )  # fmt: skip
    return cmd_release.load(kind, config, state)


def on_device(params, dtype: str):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def call_dit(model, x, times, labels):
    return model(x, times, labels).sample


def call_unet(model, sample, times, text):
    return model(sample, times, text).sample


def unet_config(small: bool) -> dict:
    """Stable Diffusion 2.1-base's."""
    return ARCHITECTURES["sd21"].unet | (NARROW | {"attention_head_dim": [2, 2, 4, 4]} if small else {})


def applied(module, params, *inputs, **method):
    return module.apply({"params": params}, *inputs, **method)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def steps_of(batch: int) -> np.ndarray:
    return np.linspace(10, 900, batch).astype(np.int64)


def random_params(init: Callable, dtype: str):
    """Normal numbers of standard deviation 0.02 for all that init(key) makes, since a zero may be cheaper to compute
    with than a number; on the device."""
    shapes = jax.eval_shape(lambda key: nn.unbox(init(key)), jax.random.key(0))
    keys = iter(range(len(jax.tree.leaves(shapes))))
    return jax.tree.map(lambda leaf: jnp.asarray(0.02 * drawn(next(keys), *leaf.shape), dtype), shapes)


def loaded(model, from_config: Callable, init: Callable, tensor_of: Callable, dtype: str):
    """A diffusers model -> (our module, its parameters on the device), with the same weights."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    module = from_config(config, jnp.dtype(dtype))
    shapes = jax.eval_shape(lambda key: nn.unbox(init(module, key)), jax.random.key(0))
    here = SingleDeviceSharding(jax.devices()[0])
    like = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for path, x in flatten(shapes).items()}
    tensors = [tensor_of(config)(path, leaf.shape) for path, leaf in like.items()]
    weights = Weights.of({name: value.numpy() for name, value in model.state_dict().items()})
    return module, to_params(tensors, weights, dtype, like)


def theirs(name: str, model, dtype: str, call: Callable, *inputs: np.ndarray) -> Theirs:
    device, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, dtype)
    tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in inputs)
    tensors = tuple(x.to(device, dtype if x.is_floating_point() else None) for x in tensors)
    model = model.to(device)
    return Theirs(name, model if dtype == torch.float32 else model.to(dtype), call, tensors)


def host(tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def channels_first(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -1, 1)


def channels_last(tensor) -> np.ndarray:
    return np.moveaxis(host(tensor), 1, -1)
