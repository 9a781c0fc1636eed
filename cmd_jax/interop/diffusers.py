"""Stable Diffusion 1.x and 2.x in the diffusers folder layout: our modules and parameters out, and folders back.

shardings: as of cmd_jax.interop.kept.load_params. dtype: of parameters and of what the modules compute in;
`module.clone(dtype=..., remat=...)` changes how a module computes, not its parameters.
"""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cmd_jax.errors import UserError
from cmd_jax.files import as_path, is_remote, read_json, remove_tree, write_json
from cmd_jax.interop import sd_config
from cmd_jax.interop.clip import load_text_encoder, text_encoder_state
from cmd_jax.interop.clip_tokenizer import Tokenizer, check_tokenizer
from cmd_jax.interop.folders import DIFFUSERS, check_class, check_folder, find_weights
from cmd_jax.interop.kept import load_params
from cmd_jax.interop.sd_weights import (
    UNET_SUSPECTS,
    VAE_SUSPECTS,
    suspect,
    unet_tensor,
    vae_rename,
    vae_tensor,
)
from cmd_jax.interop.tensors import state_dict_of
from cmd_jax.interop.weights import write_safetensors
from cmd_jax.models.unet import UNet, init_unet
from cmd_jax.models.vae import VAE, init_vae
from cmd_jax.running.hosts import to_host

STEM = DIFFUSERS["safetensors"]
CLASSES = sd_config.CLASSES | {"text_encoder": "CLIPTextModel"}
SOURCE = (
    "give the folder of a Stable Diffusion 1.x or 2.x model in the diffusers layout, for example a download of "
    "huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"
)


class Pipeline(NamedTuple):
    """A text-to-image model.

    unet, vae, text_encoder: (module, params). scheduler: what scheduler_config.json holds. configs: what config.json
    holds for "unet", "vae" and "text_encoder", and model_index.json for "model_index".
    """

    unet: tuple
    vae: tuple
    text_encoder: tuple
    tokenizer: Tokenizer
    scheduler: dict
    configs: dict[str, dict]


def load_pipeline(path, dtype="float32", shardings=None) -> Pipeline:
    """A folder with model_index.json, as diffusers writes it. UserError for what is missing, damaged or unsupported."""
    path = as_path(path)
    check_folder("pipeline", path, SOURCE, "model_index.json")
    if not (path / "model_index.json").is_file():
        raise UserError("pipeline", path, "holds no model_index.json", SOURCE)
    index = _read_json(path / "model_index.json")
    for part, name in CLASSES.items():
        found = index.get(part)
        check_class(f"model_index.json:{part}", found[-1] if isinstance(found, list) and found else found, name, SOURCE)
    configs = {"model_index": index} | {part: _read_json(path / part / "config.json") for part in CLASSES}
    pipeline = Pipeline(
        unet=load_unet(path / "unet", dtype, shardings),
        vae=load_vae(path / "vae", dtype, shardings),
        text_encoder=load_text_encoder(path / "text_encoder", dtype, shardings),
        tokenizer=Tokenizer(path / "tokenizer"),
        scheduler=_read_json(path / "scheduler" / "scheduler_config.json"),
        configs=configs,
    )
    check_tokenizer(pipeline.tokenizer, pipeline.text_encoder[0])
    unet, width = pipeline.unet[0], pipeline.text_encoder[0].width
    if unet.text_width != width:
        problem = f"the text encoder's hidden_size is {width}"
        raise UserError("unet/config.json:cross_attention_dim", unet.text_width, problem, "take parts of one model")
    latent = pipeline.vae[0].latent_channels
    if (unet.in_channels, unet.out_channels) != (latent, latent):
        channels, problem = f"{unet.in_channels} -> {unet.out_channels}", f"the VAE's latents have {latent} channels"
        raise UserError("unet/config.json:in_channels", channels, problem, "take a text-to-image model")
    return pipeline


def load_unet(folder, dtype="float32", shardings=None) -> tuple[UNet, dict]:
    """A `unet` folder -> (module, params)."""
    config = _read_json(as_path(folder) / "config.json")
    unet = sd_config.unet_from_config(config, dtype)
    blame = partial(suspect, "unet", config, UNET_SUSPECTS)
    files = find_weights(folder, DIFFUSERS)
    return unet, load_params(files, partial(init_unet, unet), unet_tensor(config), dtype, shardings, blame=blame)


def load_vae(folder, dtype="float32", shardings=None) -> tuple[VAE, dict]:
    """A `vae` folder -> (module, params)."""
    config = _read_json(as_path(folder) / "config.json")
    vae = sd_config.vae_from_config(config, dtype)
    blame = partial(suspect, "vae", config, VAE_SUSPECTS)
    files = find_weights(folder, DIFFUSERS)
    return vae, load_params(files, partial(init_vae, vae), vae_tensor, dtype, shardings, rename=vae_rename, blame=blame)


def save_pipeline(path, pipeline: Pipeline):
    """Write a folder that diffusers loads as a StableDiffusionPipeline; it appears whole or not at all.

    In a bucket, which has no rename, model_index.json comes last, without which it is no pipeline.

    Every process must call it where parameters are spread over several; process 0 writes. UserError if `path` exists.
    """
    path = as_path(path)
    if path.exists():
        raise UserError("pipeline", path, "exists already", "give the path of a new folder")
    params = {part: to_host(getattr(pipeline, part)[1]) for part in CLASSES}
    if params["unet"] is None:
        return
    unfinished = path if is_remote(path) else path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for part in (*CLASSES, "tokenizer", "scheduler"):
            (unfinished / part).mkdir(parents=True)
        for part, stem, state in (
            ("unet", STEM, state_dict_of(params["unet"], unet_tensor(pipeline.configs["unet"]))),
            ("vae", STEM, state_dict_of(params["vae"], vae_tensor)),
            ("text_encoder", "model", text_encoder_state(params["text_encoder"])),
        ):
            write_safetensors(unfinished / part / f"{stem}.safetensors", state, {"format": "pt"})
            write_json(unfinished / part / "config.json", pipeline.configs[part])
        pipeline.tokenizer.save(unfinished / "tokenizer")
        write_json(unfinished / "scheduler" / "scheduler_config.json", pipeline.scheduler)
        write_json(unfinished / "model_index.json", _model_index(pipeline))
        if unfinished != path:
            os.rename(unfinished, path)
    except BaseException as e:
        remove_tree(unfinished)
        if not isinstance(e, OSError):
            raise
        problem = f"could not be written ({e.strerror or e})"
        raise UserError("pipeline", path, problem, "give a place with room and rights") from e


def _model_index(pipeline: Pipeline) -> dict:
    """The folder's parts. A safety checker, which the original may have had, is not among those that we keep."""
    parts = {part: ["transformers" if part == "text_encoder" else "diffusers", name] for part, name in CLASSES.items()}
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": pipeline.configs.get("model_index", {}).get("_diffusers_version", "0.42.1"),
        **parts,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", pipeline.scheduler.get("_class_name", "DDIMScheduler")],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


def _read_json(path: Path) -> dict:
    return read_json(path, "pipeline", SOURCE, "fetch the file again")
