"""The CMD release's models as trained stages, which sampling takes like those of a workdir, and stages as its models.

The release differs from what is trained here in four things, all of which stages can express: no positions in the
autoencoder, position tables of square grids, no class in the motion model, and motion latents with the columns first.
"""

from dataclasses import replace

import numpy as np

from cmd_jax import __version__, defaults
from cmd_jax.config import check_trained
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.errors import UserError, divisible
from cmd_jax.interop.cmd_config import AUTOENCODER, DENOISER, complete
from cmd_jax.interop.cmd_release import load, model, state_dict
from cmd_jax.models.dit import DiT, sincos_table
from cmd_jax.pretrained import VAEMetadata, stated_space
from cmd_jax.running.hosts import check_tree, digest
from cmd_jax.stages import FrozenAutoencoder
from cmd_jax.trained import AutoencoderMetadata, ConvertedMetadata, Metadata, Trained, belongs

RELEASED = {"autoencoder": "autoencoder", "content": "content_dit", "motion": "motion_dit"}  # stage -> kind of `load`


def autoencoder_stage(config: dict, weights: dict[str, np.ndarray], vae: VAEMetadata | None = None) -> Trained:
    """The release's autoencoder as a stage.

    config: of `load`, as far as the weights don't tell it, and frames and image_size, the shape of a clip as the model
    sees it. vae: for mode "latent", that of the VAE.
    """
    config = complete("autoencoder", config, weights)
    _, params = load("autoencoder", config, weights)
    frames, sides = _shape(config)
    if (config["mode"] == "latent") != (vae is not None):
        problem, remedy = "needs the VAE whose latents it takes", "name the Stable Diffusion folder"
        if vae is not None:
            problem, remedy = "takes no latents of a VAE", "leave the Stable Diffusion folder out"
        raise UserError("config.mode", config["mode"], problem, remedy)
    space, ours = stated_space(vae), defaults.stage("autoencoder")
    if config["channels"] != space.channels:
        problem = f"{config['mode']} frames have {space.channels}"
        raise UserError("config.channels", config["channels"], problem, "give weights and VAE of one model")
    ours.model.update({**{key: config[theirs] for key, theirs in AUTOENCODER.items()}, "position": "none"})
    ours.data.update(frames=frames, height=sides[0] * space.factor, width=sides[1] * space.factor)
    if vae is not None:
        ours.loss.update(l1=0.0, l2=1.0, lpips=0.0)
    return _trained(ours, {"autoencoder": params}, Metadata(vae=vae), config)


def denoiser_stage(
    name: str, config: dict, weights: dict[str, np.ndarray], autoencoder: Trained, class_names: list[str] | None = None
) -> Trained:
    """The release's content or motion model as the stage `name` on a converted autoencoder.

    config: of `load`, as far as neither the weights nor the autoencoder tell it. class_names: of a content model, else
    its numbers; of a motion model, which is the same for all of them, those of the content stage.
    """
    config = complete(RELEASED[name], config, weights) | _fitting(name, config, weights, autoencoder)
    module, params = load(RELEASED[name], config, weights)
    for key in ("frequency_shift", "mlp_epsilon"):
        if getattr(module, key) != getattr(DiT, key):
            problem = f"the release's models, and so these stages, have {getattr(DiT, key)}"
            raise UserError(f"config.{key}", config[key], problem, "leave it out")
    if class_names is None:
        class_names = [str(i) for i in range(module.classes or 0)]
    if module.classes not in (None, len(class_names)):
        problem = f"but the model has {module.classes}"
        raise UserError("classes", f"{len(class_names)} names", problem, "give one for each, in the model's order")
    if module.classes is None:
        params["label"] = {"embedding": np.zeros((len(class_names) + 1, module.width), np.float32)}
    ours = defaults.stage(name)
    ours.data.update({key: autoencoder.config.data[key] for key in ("frames", "height", "width")})
    ours.model.update({**{key: config[theirs] for key, theirs in DENOISER.items()}, "position": "table"})
    if name == "motion":
        ours.model.content_patch = module.content_patch
    ours.diffusion.learned_range = module.out_channels == 2 * config["in_channels"]
    shapes = _frozen(autoencoder)
    metadata = Metadata(
        class_names=tuple(class_names), autoencoder=AutoencoderMetadata.of(autoencoder), vae=autoencoder.metadata.vae,
        statistics=LatentStatistics.unit(shapes.content_shape[-1], shapes.motion_shape[-1]),
    )  # fmt: skip
    return _trained(ours, params, metadata, config)


def release_weights(trained: Trained, autoencoder: Trained | None = None) -> dict[str, np.ndarray]:
    """A stage in the release's names and layouts: one that was converted from it, or one that its code can run.

    autoencoder: of the stage, needed for a content or motion stage that was trained here.
    UserError where the release's code would not compute what the stage does.
    """
    name, params = trained.config.stage, trained.params
    params = params["autoencoder"] if name == "autoencoder" else dict(params)
    if trained.metadata.converted:
        config = trained.metadata.converted.config
    else:
        _refuse_other(trained)
        config = _config(trained, autoencoder)
    if name != "autoencoder":
        if trained.config.model.position == "sincos":
            params |= _tables(name, config)
        if config.get("num_classes") is None:
            params = _without_classes(params)
    check_tree("weights", params, model(RELEASED[name], config)[1], "give the weights that belong to their config")
    return state_dict(RELEASED[name], config, params)


def _trained(ours, params, metadata: Metadata, config: dict) -> Trained:
    check_trained(ours)  # or what is written could not be read again
    converted = ConvertedMetadata(__version__, config)
    return Trained(ours, params, replace(metadata, digest=digest(params), converted=converted))


def _shape(config: dict) -> tuple[int, tuple[int, int]]:
    """Frames, rows and columns of a clip."""
    remedy = "give what the model was trained with, frames=16,image_size=64"
    for key in ("frames", "image_size"):
        if key not in config:
            raise UserError("config", key, "missing from the config", remedy)
    frames, size = config["frames"], config["image_size"]
    sides = tuple(size) if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    for key, numbers in (("frames", (frames,)), ("image_size", sides)):
        if not all(type(n) is int and n > 0 for n in numbers):
            raise UserError(f"config.{key}", config[key], "not a positive whole number", remedy)
    for side in sides:
        divisible("config.image_size", side, "patch_size", config["patch_size"])
    return frames, sides


def _frozen(autoencoder: Trained) -> FrozenAutoencoder:
    """The autoencoder's shapes, without its parameters."""
    return FrozenAutoencoder(autoencoder.config, None, stated_space(autoencoder.metadata.vae))


def _grid(name: str, autoencoder: Trained) -> dict:
    """The part of a denoiser's config that its autoencoder settles."""
    shapes = _frozen(autoencoder)
    (*content, channels), (*motion, motion_channels) = shapes.content_shape, shapes.motion_shape
    if name == "content":
        return {"input_size": content, "in_channels": channels}
    return {
        "input_size": motion,
        "in_channels": motion_channels,
        "content_size": content,
        "content_channels": channels,
        "motion_order": "rows_first",
    }


def _fitting(name: str, config: dict, weights: dict, autoencoder: Trained) -> dict:
    """`_grid`, which must not contradict what is given or what the weights tell."""
    grid, told = _grid(name, autoencoder), complete(RELEASED[name], config, weights)
    for key, value in grid.items():
        found = told.get(key, value)
        found = [found] * 2 if key.endswith("_size") and type(found) is int else found
        if found != value:
            problem = f"the {name} model has {key}={found}, with this autoencoder it would be {value}"
            raise UserError("autoencoder", autoencoder.metadata.digest[:12], problem, "give the one it belongs to")
    return grid


def _refuse_other(trained: Trained):
    """A stage trained here must compute what the release's code does."""
    config, wanted = trained.config, {"model.position": "none", "model.content": "weighted"}
    if config.stage != "autoencoder":
        if config.model.condition == "text":
            raise UserError("weights", config.stage, "reads texts", "the release's code has classes only")
        wanted = {"diffusion.kind": "gaussian", "diffusion.schedule": "linear", "diffusion.timesteps": 1000,
                  "diffusion.prediction": "eps", "latents.normalize": False}  # fmt: skip
    for field, value in wanted.items():
        group, key = field.split(".")
        if config[group][key] != value:
            problem = f"the release's code knows {value} only"
            raise UserError(field, config[group][key], problem, "such a stage can't be used there")


def _config(trained: Trained, autoencoder: Trained | None) -> dict:
    """What `load` would need to know of a stage trained here."""
    config, name = trained.config, trained.config.stage
    if name == "autoencoder":
        return {theirs: config.model[key] for key, theirs in AUTOENCODER.items()}
    if autoencoder is None:
        raise UserError("autoencoder", None, f"the {name} stage does not tell its grid", "give its autoencoder too")
    if not belongs(trained.metadata, autoencoder):
        problem = f"the {name} stage was trained with another one"
        raise UserError("autoencoder", autoencoder.metadata.digest[:12], problem, "give the one it belongs to")
    sizes = {theirs: config.model[key] for key, theirs in DENOISER.items()} | _grid(name, autoencoder)
    sizes["learn_sigma"] = config.diffusion.learned_range
    if name == "content":
        return sizes | {"num_classes": len(trained.metadata.class_names)}
    return sizes | {"content_patch_size": config.model.content_patch}


def _tables(name: str, config: dict) -> dict:
    """The sin-cos tables of the real grids, which our model computes and theirs stores."""

    def table(size, patch):
        rows, columns = (n // config[patch] for n in config[size])
        return sincos_table(rows, columns, config["hidden_size"])

    tables = {"positions": table("input_size", "patch_size")}
    return tables if name == "content" else tables | {"content_positions": table("content_size", "content_patch_size")}


def _without_classes(params: dict) -> dict:
    """The same function without a class table, where all classes have the same row."""
    row, *others = params.pop("label")["embedding"]
    if any((other != row).any() for other in others):
        problem, remedy = "its motion depends on the class", "the release's code knows no class there"
        raise UserError("weights", "motion", problem, remedy)
    if row.any():
        time_out = params["time_out"]
        params["time_out"] = time_out | {"bias": time_out["bias"] + row}
    return params
