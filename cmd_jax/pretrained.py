"""The parts of a pretrained image model that CMD keeps as they are, its VAE and text encoder (paper section 3.2).

A stage's facts say which they were. "vae" and "text_encoder" hold {"config": config.json, "weights": digest}, and the
latter "tokenizer": its identity; "image_model" holds {"unet": config.json, "scheduler": scheduler_config.json}, what
FineTunedContentStage needs to know.
"""

import json
from pathlib import Path

from cmd_jax.errors import UserError
from cmd_jax.files import read_json
from cmd_jax.interop import schedulers, sd_config
from cmd_jax.interop.clip import load_text_encoder, text_fields, text_from_config, text_rename
from cmd_jax.interop.clip_tokenizer import Tokenizer, check_tokenizer
from cmd_jax.interop.diffusers import SOURCE, load_vae
from cmd_jax.interop.folders import DIFFUSERS, TRANSFORMERS, check_folder, find_weights
from cmd_jax.interop.sd_weights import vae_rename
from cmd_jax.interop.torch_layout import digest_weights
from cmd_jax.models.conditions import Classes, Texts
from cmd_jax.models.frames import Pixels, VAELatents
from cmd_jax.running.distributed import agree, leader_alone

WEIGHTS = {"vae": (DIFFUSERS, vae_rename), "text_encoder": (TRANSFORMERS, text_rename)}
LONGEST_SHOWN = 40


def read_config(config, *parts: str) -> dict:
    """A JSON file of the folder `pretrained.path`."""
    if not config.path:
        raise UserError("pretrained.path", "", "missing", SOURCE)
    check_folder("pretrained.path", config.path, SOURCE, "model_index.json")
    path = Path(config.path).joinpath(*parts)
    if not path.exists():
        raise UserError("pretrained.path", config.path, f"holds no {'/'.join(parts)}", SOURCE)
    return read_json(path, "pretrained.path", SOURCE, "fetch the file again")


def stated(config) -> dict:
    """The facts that the folder `pretrained.path` states, without digests; {} where none is given."""
    if not config.path:
        return {}
    parts = {part: {"config": read_config(config, part, "config.json")} for part in WEIGHTS}
    return parts | {"image_model": image_model(config)}


def image_model(config) -> dict:
    """What FineTunedContentStage needs to know of the folder `pretrained.path`."""
    unet = read_config(config, "unet", "config.json")
    return {"unet": unet, "scheduler": read_config(config, "scheduler", "scheduler_config.json")}


def describe(config, part: str) -> dict:
    """The fact that a stage keeps of a part of the folder `pretrained.path`: "vae", "text_encoder" or "image_model".

    Every process must call it. All read what is small, and must read the same; process 0 reads the weights.
    """
    if part == "image_model":
        fact, seen = image_model(config), []
    else:
        fact, (stems, rename) = {"config": read_config(config, part, "config.json")}, WEIGHTS[part]
        files = find_weights(Path(config.path) / part, stems)
        seen = [[path.name, path.stat().st_size] for path in files.parts]
        if part == "text_encoder":
            fact["tokenizer"] = Tokenizer(Path(config.path) / "tokenizer").identity
    agree({f"pretrained.path: {part}": json.dumps([fact, seen], sort_keys=True)}, "let every process see the same")
    if part != "image_model":
        fact["weights"] = leader_alone(lambda: digest_weights(files, rename))
    return fact


def identity(part: str, fact: dict) -> dict:
    """What the outputs of a part depend on, by the names of files and fields; two facts are of one part if it is equal.

    Of a config these are the fields that matter, with defaults.
    """
    if part == "image_model":
        places = {"unet/config.json": sd_config.fields("unet", fact["unet"])}
        places["scheduler/scheduler_config.json"] = schedulers.fields(fact["scheduler"])
    else:
        of_config = text_fields(fact["config"]) if part == "text_encoder" else sd_config.fields(part, fact["config"])
        places = {f"{part}/config.json": of_config, "tokenizer": fact.get("tokenizer", {})}
        places[part] = {"digest of its weights": fact.get("weights")}
    return {f"{place}: {name}": value for place, fields in places.items() for name, value in fields.items()}


def check_same(config, part: str, facts: dict, origin: str) -> dict:
    """The fact of a part of the folder `pretrained.path`, which must be the one that `facts` tell of.

    origin: how a sentence goes on that ends with theirs, like "the autoencoder was trained with".
    """
    return compare(config.path, part, facts[part], describe(config, part), origin)


def compare(path, part: str, theirs: dict, ours: dict, origin: str) -> dict:
    """`ours`; UserError for the first field in which a part of the folder `path` is not that of the fact `theirs`."""
    if part in WEIGHTS and "weights" not in theirs:
        problem = f"its {part} cannot be compared: {origin} an earlier cmd_jax, which kept less of it"
        raise UserError("pretrained.path", path, problem, "train anew, or go on with that version")
    before, now = identity(part, theirs), identity(part, ours)
    # What both have comes first, and a digest, which tells least, last.
    one_has, digests = before.keys() ^ now.keys(), f"{part}: "
    for name in sorted(before | now, key=lambda name: (name in one_has, name.startswith(digests), name)):
        if _plain(before.get(name)) != _plain(now.get(name)):
            problem = f"its {name} is {_shown(now.get(name))}, {origin} {_shown(before.get(name))}"
            raise UserError("pretrained.path", path, problem, "give the folder that training was given")
    return ours


def _plain(value):
    return json.loads(json.dumps(value))


def _shown(value) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:12]}..."


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
    return VAELatents(sd_config.vae_from_config(facts["vae"]["config"], "float32")) if "vae" in facts else Pixels()


def stated_conditions(facts: dict) -> Classes | Texts:
    """The conditions that a diffusion stage's facts tell of, without parameters or tokens."""
    if "text_encoder" not in facts:
        return Classes(len(facts["class_names"]))
    return Texts(text_from_config(facts["text_encoder"]["config"]), {}, None, None)


def open_space(config, facts: dict, place) -> Pixels | VAELatents:
    """The space of frames of a trained autoencoder, by the VAE of `pretrained.path` where it has one."""
    if "vae" not in facts:
        return Pixels()
    check_same(config.pretrained, "vae", facts, "the autoencoder was trained with")
    return load_space(config.pretrained, place)
