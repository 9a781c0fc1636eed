"""The parts of a pretrained image model that CMD keeps as they are, its VAE and text encoder (paper section 3.2)."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from cmd_jax.errors import UserError, brief
from cmd_jax.files import COUNT, as_json, as_path, read_json
from cmd_jax.interop import schedulers, sd_config
from cmd_jax.interop.clip import load_text_encoder, text_fields, text_from_config, text_rename
from cmd_jax.interop.clip_tokenizer import Tokenizer, check_tokenizer
from cmd_jax.interop.diffusers import SOURCE, load_vae
from cmd_jax.interop.folders import DIFFUSERS, TRANSFORMERS, check_folder, find_weights
from cmd_jax.interop.sd_known import ARCHITECTURES
from cmd_jax.interop.sd_weights import vae_rename
from cmd_jax.interop.weights import digest_weights
from cmd_jax.models.conditions import Classes, Texts
from cmd_jax.models.frames import Pixels, VAELatents
from cmd_jax.running.distributed import agree, leader_alone

TOKENIZER = {"vocabulary": str, "merges": str, "added_tokens": [list], "start": COUNT, "end": COUNT, "pad": COUNT,
             "max_length": COUNT}  # fmt: skip


class Part:
    """Metadata of a part of a Stable Diffusion folder, by which it is known again wherever the folder lies."""

    part: ClassVar[str]

    def files(self) -> dict[str, dict]:
        """{file: the fields on which outputs depend}, with the defaults of fields that a config leaves out."""
        raise NotImplementedError

    def identity(self) -> dict:
        """All that the outputs depend on, {"file: field": value}; equal for parts that compute the same."""
        return {f"{file}: {name}": value for file, fields in self.files().items() for name, value in fields.items()}


@dataclass(frozen=True)
class VAEMetadata(Part):
    """The VAE in whose latents an autoencoder was trained."""

    config: dict  # vae/config.json
    weights: str  # digest of the tensors; "" where they were not read

    part: ClassVar[str] = "vae"
    layout: ClassVar[tuple] = DIFFUSERS, vae_rename  # how files and tensors may be called

    def files(self):
        fields = sd_config.fields("vae", self.config)
        return {"vae/config.json": fields, "vae": {"digest of its weights": self.weights}}


@dataclass(frozen=True)
class TextEncoderMetadata(Part):
    """The text encoder whose outputs a denoiser was conditioned on."""

    config: dict  # text_encoder/config.json
    weights: str  # as of VAEMetadata
    tokenizer: Annotated[dict, TOKENIZER]  # `Tokenizer.identity`

    part: ClassVar[str] = "text_encoder"
    layout: ClassVar[tuple] = TRANSFORMERS, text_rename

    def files(self):
        files = {"text_encoder/config.json": text_fields(self.config), "tokenizer": self.tokenizer}
        return files | {"text_encoder": {"digest of its weights": self.weights}}


@dataclass(frozen=True)
class ImageModelMetadata(Part):
    """The image model that a content stage was fine-tuned from."""

    unet: dict  # unet/config.json
    scheduler: dict  # scheduler/scheduler_config.json

    part: ClassVar[str] = "image_model"

    def files(self):
        files = {"unet/config.json": sd_config.fields("unet", self.unet)}
        return files | {"scheduler/scheduler_config.json": schedulers.fields(self.scheduler)}


def read_config(folder: Path | str, name: str) -> dict:
    """The JSON file `name` of a Stable Diffusion folder, that of `pretrained.path`."""
    if not folder:
        raise UserError("pretrained.path", "", "missing", SOURCE)
    check_folder("pretrained.path", folder, SOURCE, "model_index.json")
    path = as_path(folder) / name
    if not path.exists():
        raise UserError("pretrained.path", folder, f"holds no {name}", SOURCE)
    return read_json(path, "pretrained.path", SOURCE, "fetch the file again")


def stated(folder: Path | str, kind: type[Part], architecture: str = "") -> Part:
    """A part of a folder by its configs alone, which is all that shapes depend on; without a folder, of a known
    architecture."""
    if architecture and not folder:
        known = ARCHITECTURES[architecture]
        if kind is ImageModelMetadata:
            return ImageModelMetadata(known.unet, known.scheduler)
        return VAEMetadata(known.vae, "") if kind is VAEMetadata else TextEncoderMetadata(known.text, "", {})
    if kind is ImageModelMetadata:
        unet = read_config(folder, "unet/config.json")
        return ImageModelMetadata(unet, read_config(folder, "scheduler/scheduler_config.json"))
    config = read_config(folder, f"{kind.part}/config.json")
    return VAEMetadata(config, "") if kind is VAEMetadata else TextEncoderMetadata(config, "", {})


def describe(folder: Path | str, kind: type[Part]) -> Part:
    """A part of a folder by all that its outputs depend on.

    Every process must call it. All read what is small, and must read the same; process 0 reads the weights.
    """
    part, seen = stated(folder, kind), []
    if kind is not ImageModelMetadata:
        stems, rename = kind.layout
        files = find_weights(as_path(folder) / kind.part, stems)
        seen = [[path.name, path.stat().st_size] for path in files.parts]
    if kind is TextEncoderMetadata:
        part = replace(part, tokenizer=Tokenizer(as_path(folder) / "tokenizer").identity)
    small = json.dumps([as_json(part), seen], sort_keys=True)
    agree({f"pretrained.path: {kind.part}": small}, "let every process see the same")
    if kind is not ImageModelMetadata:
        part = replace(part, weights=leader_alone(lambda: digest_weights(files, rename)))
    return part


def check_same(folder: Path | str, theirs: Part, origin: str) -> Part:
    """The part of a folder that must be the same as `theirs`.

    origin: how a sentence goes on that ends with theirs, like "the autoencoder was trained with".
    """
    return compare(folder, theirs, describe(folder, type(theirs)), origin)


def compare(folder: Path | str, theirs: Part, ours: Part, origin: str) -> Part:
    """`ours`; UserError for the first field in which this part of a folder is not the same as `theirs`."""
    before, now = theirs.identity(), ours.identity()
    # What both have comes first, and a digest, which tells least, last.
    one_has, digests = before.keys() ^ now.keys(), f"{ours.part}: "
    for name in sorted(before | now, key=lambda name: (name in one_has, name.startswith(digests), name)):
        if before.get(name) != now.get(name):
            problem = f"its {name} is {brief(now.get(name))}, {origin} {brief(before.get(name))}"
            raise UserError("pretrained.path", folder, problem, "give the folder that training was given")
    return ours


def load_space(pretrained, shardings) -> VAELatents:
    """The space of the VAE of a config's `pretrained` group. shardings: as of `load_vae`."""
    read_config(pretrained.path, "vae/config.json")
    module, params = load_vae(as_path(pretrained.path) / "vae", pretrained.dtype, shardings)
    return VAELatents(module, params, pretrained.vae_frames)


def load_texts(pretrained, shardings) -> tuple[Texts, Tokenizer]:
    """The text encoder of a config's `pretrained` group as conditions, and its tokenizer."""
    read_config(pretrained.path, "text_encoder/config.json")
    module, params = load_text_encoder(as_path(pretrained.path) / "text_encoder", pretrained.dtype, shardings)
    tokenizer = Tokenizer(as_path(pretrained.path) / "tokenizer")
    check_tokenizer(tokenizer, module)
    return Texts(module, params, tokenizer([""])[0], tokenizer.end), tokenizer


def stated_space(vae: VAEMetadata | None) -> Pixels | VAELatents:
    """The space of an autoencoder's frames, without parameters."""
    return VAELatents(sd_config.vae_from_config(vae.config, "float32")) if vae else Pixels()


def stated_conditions(classes: int, text_encoder: TextEncoderMetadata | None) -> Classes | Texts:
    """What a denoiser is conditioned on, texts where there is an encoder of them, without parameters or tokens."""
    return Texts(text_from_config(text_encoder.config), {}, None, None) if text_encoder else Classes(classes)


def open_space(pretrained, vae: VAEMetadata | None, shardings) -> Pixels | VAELatents:
    """The space of a trained autoencoder's frames; a config's `pretrained` group must name the same VAE."""
    if vae is None:
        return Pixels()
    check_same(pretrained.path, vae, "the autoencoder was trained with")
    return load_space(pretrained, shardings)
