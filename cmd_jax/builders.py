"""What a config stands for: modules, diffusion processes, and the sizes that they take."""

import jax.numpy as jnp

from cmd_jax import defaults
from cmd_jax.data.sizes import check_sizes
from cmd_jax.declare import check_values
from cmd_jax.diffusion.flow import Flow
from cmd_jax.diffusion.gaussian import Gaussian
from cmd_jax.diffusion.schedules import BETAS, Schedule
from cmd_jax.errors import UserError, divisible
from cmd_jax.interop.sd_config import unet_from_config
from cmd_jax.models.autoencoder import Autoencoder
from cmd_jax.models.dit import DiT
from cmd_jax.models.frames import Pixels, VAELatents
from cmd_jax.models.unet import UNet


def build_autoencoder(model) -> Autoencoder:
    """The module of an autoencoder config's `model` group."""
    check_values(model, defaults.AUTOENCODER_MODEL, "model.")
    return Autoencoder(**{**model.to_dict(), "dtype": jnp.dtype(model.dtype)})


def build_process(diffusion, clip: float | None = None) -> Gaussian | Flow:
    """The diffusion process of a content or motion config's `diffusion` group, and of a clip as `clip_of` makes it."""
    check_values(diffusion, defaults.DIFFUSION, "diffusion.")
    if diffusion.kind == "flow":
        if diffusion.learned_range:
            raise UserError("diffusion.learned_range", True, "flow matching has no variance", "set it to False")
        return Flow(time_mean=diffusion.time_mean, time_std=diffusion.time_std, clip=clip)
    schedule = Schedule.from_betas(BETAS[diffusion.schedule](diffusion.timesteps))
    return Gaussian(schedule, diffusion.prediction, diffusion.learned_range, clip)


def clip_of(config, space: Pixels | VAELatents) -> float | None:
    """Where sampling holds x0, by the config of a content or motion stage on frames of `space`; None: nowhere.

    Unless diffusion.clip says it: 1 for content frames that are pixels, and as they are; none for all that is latent.
    """
    clip, pixels = config.diffusion.clip, isinstance(space, Pixels)
    if config.stage == "content" and clip > 0 and not pixels:
        problem = "content frames are latents of the VAE here, which have no such bound: samples would be crushed"
        raise UserError("diffusion.clip", clip, problem, f"use {defaults.CLIP_BY_SPACE}, by what is diffused, or 0.0")
    if clip == defaults.CLIP_BY_SPACE:
        return 1.0 if config.stage == "content" and pixels and not config.latents.normalize else None
    return clip or None


def build_denoiser(model, channels: int, classes: int | None, process: Gaussian | Flow) -> DiT:
    """The DiT of a content or motion config's `model` group; channels: of what is diffused."""
    check_values(model, defaults.MOTION_MODEL, "model.")
    out_channels = channels * (2 if process.learned_range else 1)
    return DiT(out_channels=out_channels, classes=classes, **{**model.to_dict(), "dtype": jnp.dtype(model.dtype)})


def frames_shape(clip: tuple[int, int, int, int], module: Autoencoder, space: Pixels | VAELatents):
    """[T, H, W, 3] of a clip -> [T, h, w, C], as the autoencoder sees it in `space`.

    UserError if they do not fit.
    """
    if module.channels != space.channels:
        problem = f"the latents of the VAE have {space.channels}"
        raise UserError("model.channels", module.channels, problem, f"use {space.channels}")
    frames, height, width, _ = clip
    for side, size in (("height", height), ("width", width)):
        divisible(f"data.{side}", size, f"{space.factor} of the VAE x model.patch", space.factor * module.patch)
    return frames, height // space.factor, width // space.factor, space.channels


def check_fits(config, autoencoder, image_model=None):
    """UserError for sizes and units that the denoiser of a content or motion config cannot take."""
    if config.denoiser == "unet":
        unet = unet_from_config(image_model.unet)
        check_sizes(config.data, lambda size: check_levels(unet, autoencoder.resized(*size)))
    else:
        check_sizes(config.data, lambda size: check_patches(config, autoencoder.resized(*size)))
        clip_of(config, autoencoder.space)


def check_levels(unet: UNet, autoencoder):
    """The content frame must be halved from each level of the UNet to the next."""
    step = unet.factor * autoencoder.space.factor
    for side, size in zip(("height", "width"), autoencoder.clip_shape[1:3], strict=True):
        if size % step:
            problem = f"the VAE and the UNet halve it until 1/{step} is left"
            raise UserError(f"data.{side}", size, problem, f"use a multiple of {step}")


def check_patches(config, autoencoder):
    """The grids that a DiT cuts into patches must be multiples of them."""
    patch, (height, width, _) = config.model.patch, autoencoder.content_shape
    frames, cells, _ = autoencoder.motion_shape
    of = "" if autoencoder.space.factor == 1 else f" / {autoencoder.space.factor} of the VAE"
    rows, columns = ("data.height" + of, height), ("data.width" + of, width)
    if config.stage == "content":
        sides = [(*rows, "patch", patch), (*columns, "patch", patch)]
    else:
        extra = config.model.content_patch
        sides = [("data.frames", frames, "patch", patch), ("h+w", cells, "patch", patch)]
        sides += [(*rows, "content_patch", extra), (*columns, "content_patch", extra)]
    for field, size, by, p in sides:
        if size % p:
            raise UserError(field, size, f"not a multiple of {config.stage} model.{by}={p}", f"change model.{by}")
