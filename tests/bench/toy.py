"""A config file at toy size, which imports nothing that a benchmark must not: `toy.py:STAGE[,sd=15]`.

With sd=15 frames are latents and conditions texts, of a Stable Diffusion architecture that tests make a small one.
"""

from cmd_jax import defaults
from cmd_jax.config import parse_argument


def get_config(argument: str = ""):
    stage, values = parse_argument(argument, sd=0)
    text = bool(values["sd"])
    config = defaults.stage(stage, denoiser="unet" if text and stage == "content" else None)
    config.data.update(frames=4, height=16, width=32 if text else 24, clips=48)
    config.pretrained.architecture = f"sd{values['sd']}" if text else ""
    if stage == "sample":
        config.sampling.update(batch_size=2, guidance=2.0, content_steps=3, motion_steps=4)
        return config
    config.train.update(batch_size=4, steps=6)
    if stage == "autoencoder":
        config.model.update(patch=4, width=16, depth=1, heads=2, head_dim=8, motion_channels=4)
        if text:
            config.model.update(mode="latent", channels=4, patch=2)
        config.loss.update(lpips=0.0)
        return config
    config.latents.starts = 1
    if not (text and stage == "content"):
        config.model.update(patch=4 if stage == "content" else 2, width=16, depth=1, heads=2)
        config.model.condition = "text" if text else "class"
        config.diffusion.update(kind="flow", learned_range=False)
    return config
