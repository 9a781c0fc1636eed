"""Config files of Stable Diffusion's UNet and VAE, as diffusers writes them, as our modules.

A field that is absent has diffusers' default. None of diffusers' fields is ignored that would change what is computed;
fields that are not diffusers' are noted.
"""

import sys

from cmd_jax.errors import UserError
from cmd_jax.interop.folders import check_class, is_size, note_unknown
from cmd_jax.models.unet import UNet
from cmd_jax.models.vae import VAE

REMEDY = "take a Stable Diffusion 1.x or 2.x model"
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
# Fields that would change the function -> values with which they don't; the first is the default.
UNET_FIXED = dict.fromkeys((
    "addition_embed_type", "addition_time_embed_dim", "class_embed_type", "cross_attention_norm", "encoder_hid_dim",
    "encoder_hid_dim_type", "num_attention_heads", "num_class_embeds", "projection_class_embeddings_input_dim",
    "quantization_config", "reverse_transformer_layers_per_block", "time_cond_proj_dim", "time_embedding_act_fn",
    "time_embedding_dim", "timestep_post_act",
), (None,)) | dict.fromkeys((
    "center_input_sample", "class_embeddings_concat", "dual_cross_attention", "only_cross_attention",
    "resnet_skip_time_act",
), (False,)) | {
    "act_fn": ("silu", "swish"), "attention_type": ("default",), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
    "downsample_padding": (1,), "dropout": (0,), "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn",), "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",), "time_embedding_type": ("positional",),
}  # fmt: skip
# Attention's scores are float32 here in any case. Heads of an embedding that is refused don't matter.
UNET_FREE = ("sample_size", "upcast_attention", "addition_embed_type_num_heads")
UNET_NEEDED = (
    "attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types", "layers_per_block",
    "up_block_types",
)  # fmt: skip
UNET_DEFAULTS = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
VAE_FIXED = {
    "act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,), "mid_block_add_attention": (True,),
    "quantization_config": (None,), "shift_factor": (None,), "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}  # fmt: skip
VAE_FREE = ("sample_size", "force_upcast")
VAE_NEEDED = ("block_out_channels", "down_block_types", "layers_per_block", "up_block_types")
VAE_DEFAULTS = {
    "in_channels": 3,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "out_channels": 3,
    "scaling_factor": 0.18215,
}
FIELDS = {
    "unet": (UNET_FIXED, UNET_FREE, UNET_NEEDED, UNET_DEFAULTS),
    "vae": (VAE_FIXED, VAE_FREE, VAE_NEEDED, VAE_DEFAULTS),
}
DOWN_TYPES = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # whether transformers follow the residual blocks
UP_TYPES = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
COUNTS = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups",
          "cross_attention_dim", "transformer_layers_per_block")  # fmt: skip


def unet_from_config(config: dict, dtype="float32", remat: str = "none") -> UNet:
    """unet/config.json -> module. UserError for a field whose value would need what the module doesn't have."""
    config = fields("unet", config)
    widths = _widths("unet", config)
    heads = config["attention_head_dim"]
    heads = tuple(heads) if isinstance(heads, list | tuple) else (heads,) * len(widths)
    if len(heads) != len(widths) or any(not is_size(n) or width % n for n, width in zip(heads, widths, strict=False)):
        problem = f"not numbers of heads that divide block_out_channels={list(widths)}"
        raise _bad("unet", "attention_head_dim", config, problem)
    if widths[0] % 2:
        raise _bad("unet", "block_out_channels", config, "the first must be even")
    for name, least in (("norm_eps", 0), ("freq_shift", -1)):
        if isinstance(config[name], bool) or not isinstance(config[name], int | float) or config[name] <= least:
            raise _bad("unet", name, config, f"not a number above {least}")
    return UNet(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        widths=widths,
        layers=config["layers_per_block"],
        down_attention=_types("unet", config, "down_block_types", DOWN_TYPES),
        up_attention=_types("unet", config, "up_block_types", UP_TYPES),
        heads=heads,
        text_width=config["cross_attention_dim"],
        transformer_depth=config["transformer_layers_per_block"],
        groups=config["norm_num_groups"],
        norm_epsilon=config["norm_eps"],
        cosines_first=bool(config["flip_sin_to_cos"]),
        frequency_shift=config["freq_shift"],
        remat=remat,
        dtype=dtype,
    )


def vae_from_config(config: dict, dtype="float32", remat: str = "none") -> VAE:
    """vae/config.json -> module. UserError for a field whose value would need what the module doesn't have."""
    config = fields("vae", config)
    widths = _widths("vae", config)
    _types("vae", config, "down_block_types", {"DownEncoderBlock2D": False})
    _types("vae", config, "up_block_types", {"UpDecoderBlock2D": False})
    if config["in_channels"] != config["out_channels"]:
        raise _bad("vae", "out_channels", config, f"differs from in_channels={config['in_channels']}")
    factor = config["scaling_factor"]
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= sys.float_info.max:
        raise _bad("vae", "scaling_factor", config, "not a positive number")
    return VAE(
        channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        widths=widths,
        layers=config["layers_per_block"],
        groups=config["norm_num_groups"],
        scaling_factor=float(factor),
        remat=remat,
        dtype=dtype,
    )


def fields(part: str, config: dict) -> dict:
    """The fields of a part's config.json that its function depends on, with defaults; "unet" or "vae".

    UserError for a field that would change the function and is not supported.
    """
    fixed, free, needed, defaults = FIELDS[part]
    known = (*fixed, *free, *needed, *defaults)
    note_unknown(f"{part}/config.json", config, known)
    for name in needed:
        if name not in config:
            raise UserError(f"{part}/config.json", name, "missing", "fetch the file again")
    check_class(f"{part}/config.json:_class_name", config.get("_class_name", CLASSES[part]), CLASSES[part], REMEDY)
    for name, value in config.items():
        if name in fixed and value not in fixed[name]:
            raise _bad(part, name, config, f"not supported, only {' or '.join(map(repr, fixed[name]))}")
    config = defaults | {name: value for name, value in config.items() if name in (*needed, *defaults)}
    for name in config.keys() & set(COUNTS):
        if not is_size(config[name]):
            raise _bad(part, name, config, "not a positive whole number")
    return config


def _bad(part: str, name: str, config: dict, problem: str) -> UserError:
    return UserError(f"{part}/config.json:{name}", config[name], problem, REMEDY)


def _widths(part: str, config: dict) -> tuple[int, ...]:
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    if not isinstance(widths, list | tuple) or not widths or any(not is_size(n) or n % groups for n in widths):
        raise _bad(part, "block_out_channels", config, f"not a list of multiples of norm_num_groups={groups}")
    return tuple(widths)


def _types(part: str, config: dict, name: str, known: dict[str, bool]) -> tuple[bool, ...]:
    types = config[name]
    if not isinstance(types, list | tuple) or len(types) != len(config["block_out_channels"]):
        raise _bad(part, name, config, f"not one block for each of block_out_channels={config['block_out_channels']}")
    for kind in types:
        if kind not in list(known):
            raise _bad(part, name, config, f"{kind} is not supported, only {' and '.join(known)}")
    return tuple(known[kind] for kind in types)
