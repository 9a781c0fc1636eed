"""The Stable Diffusions of the paper by their published config files, for shapes without a folder of weights.

The numbers are those of the config.json of CompVis/Runway's 1.5 and Stability's 2.1-base in the diffusers layout.
"""

from typing import NamedTuple

from cmd_jax.interop.sd_config import CLASSES

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
TEXT = {"model_type": "clip_text_model", "max_position_embeddings": 77, "layer_norm_eps": 1e-5}


def unet_config(widths: tuple[int, ...], layers: int, sample_size: int, **fields) -> dict:
    """unet/config.json of a UNet with attention in all levels but the last, as Stable Diffusion's."""
    attended = len(widths) - 1
    return {
        "_class_name": CLASSES["unet"],
        "act_fn": "silu",
        "block_out_channels": list(widths),
        "center_input_sample": False,
        "down_block_types": ["CrossAttnDownBlock2D"] * attended + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": sample_size,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attended,
        **fields,
    }


def vae_config(widths: tuple[int, ...], layers: int, groups: int, sample_size: int) -> dict:
    """vae/config.json of an image VAE with 4 latent channels."""
    return {
        "_class_name": CLASSES["vae"],
        "act_fn": "silu",
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "out_channels": 3,
        "sample_size": sample_size,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


class Architecture(NamedTuple):
    """The configs of a folder's parts as JSON has them; the text tower's without the tokenizer's ids."""

    unet: dict
    vae: dict
    text: dict
    scheduler: dict


WIDTHS = (320, 640, 1280, 1280)
VAE = vae_config((128, 256, 512, 512), layers=2, groups=32, sample_size=512)
PUBLISHED = SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}


def _text(width: int, layers: int, heads: int, activation: str, projection: int) -> dict:
    return TEXT | {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": projection,
        "vocab_size": 49408,
    }


ARCHITECTURES = {
    "sd15": Architecture(
        unet_config(WIDTHS, 2, 64, attention_head_dim=8, cross_attention_dim=768),
        VAE,
        _text(768, 12, 12, "quick_gelu", 768),
        PUBLISHED,
    ),
    "sd21": Architecture(
        unet_config(
            WIDTHS, 2, 64, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True
        ),
        VAE,
        _text(1024, 23, 16, "gelu", 512),
        PUBLISHED,
    ),
}
