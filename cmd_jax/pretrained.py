"""The parts of a pretrained image model that CMD keeps as they are, its VAE and text encoder (paper section 3.2).

A stage's facts say which they were: "vae" and "text_encoder" hold {"config": config.json, "digest": of the weights};
"image_model" holds what FineTunedContentStage needs.
"""

import hashlib
from pathlib import Path

from cmd_jax.conditions import Classes, Texts
from cmd_jax.errors import UserError
from cmd_jax.files import read_json
from cmd_jax.frames import Pixels, VAELatents
from cmd_jax.interop.clip import load_text_encoder, text_from_config
from cmd_jax.interop.clip_tokenizer import Tokenizer, check_tokenizer
from cmd_jax.interop.diffusers import SOURCE, load_vae
from cmd_jax.interop.folders import check_folder
from cmd_jax.interop.sd_config import vae_from_config


def read_config(config, *parts: str) -> dict:
    """A JSON file of the folder `pretrained.path`."""
    if not config.path:
        raise UserError("pretrained.path", "", "missing", SOURCE)
    check_folder("pretrained.path", config.path, SOURCE, "model_index.json")
    path = Path(config.path).joinpath(*parts)
    if not path.exists():
        raise UserError("pretrained.path", config.path, f"holds no {'/'.join(parts)}", SOURCE)
    return read_json(path, "pretrained.path", SOURCE, "fetch the file again")


def image_model(config) -> dict:
    """What FineTunedContentStage needs to know of the folder `pretrained.path`."""
    unet = read_config(config, "unet", "config.json")
    return {"unet": unet, "scheduler": read_config(config, "scheduler", "scheduler_config.json")}


def stated(config) -> dict:
    """The facts that the folder `pretrained.path` states, without digests; {} where none is given."""
    if not config.path:
        return {}
    parts = {part: {"config": read_config(config, part, "config.json")} for part in ("vae", "text_encoder")}
    return parts | {"image_model": image_model(config)}


def describe(config, part: str) -> dict:
    """The fact that a stage keeps of a part of the folder `pretrained.path`."""
    stated, content = read_config(config, part, "config.json"), hashlib.sha256()
    for path in sorted((Path(config.path) / part).iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            with open(path, "rb") as file:
                content.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return {"config": stated, "digest": content.hexdigest()}


def load_space(config, place) -> VAELatents:
    """The space of the VAE of a `pretrained` group."""
    read_config(config, "vae", "config.json")
    module, params = load_vae(Path(config.path) / "vae", config.dtype, place)
    return VAELatents(module, params, config.vae_frames)


def load_texts(config, place) -> tuple[Texts, Tokenizer]:
    """The text encoder of a `pretrained` group as conditions, and its tokenizer."""
    read_config(config, "text_encoder", "config.json")
    module, params = load_text_encoder(Path(config.path) / "text_encoder", config.dtype, place)
    tokenizer = Tokenizer(Path(config.path) / "tokenizer")
    check_tokenizer(tokenizer, module)
    return Texts(module, params, tokenizer([""])[0], tokenizer.end), tokenizer


def stated_space(facts: dict) -> Pixels | VAELatents:
    """The space that an autoencoder's facts tell of, without parameters."""
    return VAELatents(vae_from_config(facts["vae"]["config"], "float32")) if "vae" in facts else Pixels()


def stated_conditions(facts: dict) -> Classes | Texts:
    """The conditions that a diffusion stage's facts tell of, without parameters or tokens."""
    if "text_encoder" not in facts:
        return Classes(len(facts["class_names"]))
    return Texts(text_from_config(facts["text_encoder"]["config"]), {}, None, None)


def check_same(config, part: str, facts: dict, whose: str):
    """The part of the folder `pretrained.path` must be that of which the facts of a trained stage tell."""
    if describe(config, part)["digest"] != facts[part]["digest"]:
        problem = f"its {part} is not the one that the {whose} was trained with"
        raise UserError("pretrained.path", config.path, problem, "give the folder that training was given")
