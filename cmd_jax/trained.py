"""A trained stage as those that build on it see it: its config, its parameters and what it was trained on."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from cmd_jax import defaults
from cmd_jax.builders import reads_text
from cmd_jax.config import from_dict
from cmd_jax.errors import UserError
from cmd_jax.files import COUNT, check_like, parse_json, read_json
from cmd_jax.interop.weights import flatten, read_metadata, read_state_dict, unflatten, write_safetensors
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.hosts import check_tree, digest

WRITTEN = "give the stage as training wrote it"
# What a stage says of what it was trained on, for `check_like`.
TOKENIZER = {"vocabulary": str, "merges": str, "added_tokens": [list], "start": COUNT, "end": COUNT, "pad": COUNT,
             "max_length": COUNT}  # fmt: skip
# Of a pretrained model, see pretrained.py; and as earlier versions kept it, which can only be refused.
VAE = {"config": dict, "weights": str}, {"config": dict, "digest": str}
TEXT_ENCODER = {"config": dict, "weights": str, "tokenizer": TOKENIZER}, {"config": dict, "digest": str}
CHANNELS = {"mean": [float], "std": [float]}
FACTS = {
    "class_names?": [str],
    "clips?": COUNT,
    "fingerprint?": str,  # of the data
    "digest?": str,  # of the parameters as they were trained, which rounded ones keep
    "autoencoder?": str,  # digest of the autoencoder that a denoiser belongs to
    "autoencoder_params?": str,  # digest of the very numbers it was trained with
    "autoencoder_config?": {...: (str, int, float, bool)},  # what else its latents depend on
    "statistics?": {"content": CHANNELS, "motion": CHANNELS},
    "vae?": VAE,
    "text_encoder?": TEXT_ENCODER,
    "image_model?": {"unet": dict, "scheduler": dict},
    "converted?": {
        "cmd_jax": str,
        "config": dict,
        "tables?": [str],
    },  # interop.cmd_stages
}


class Trained(NamedTuple):
    """A trained stage: its resolved config, the EMA parameters, and class_names, statistics, digests."""

    config: ConfigDict
    params: dict
    facts: dict


def load_trained(path: Path | str, stage: str, place: Callable[[ConfigDict, dict], dict] | None = None) -> Trained:
    """The EMA parameters of a stage, from its workdir folder or from a weights file written by `export`.

    place: (config, facts) -> ShapeDtypeStructs with shardings; the parameters are compared with these and read straight
    into their shards, one at a time. Without it they are numpy arrays.
    """
    path = Path(path)
    config, facts = read_stage(path, stage)
    if path.suffix == ".safetensors":
        if place:
            params = _read_placed(path, place(config, facts))
        else:
            params = unflatten({k: v.astype(np.float32) for k, v in read_state_dict(path).items()})
        return Trained(config, params, facts)
    with contextlib.closing(Checkpoints(path, read_only=True, items=("ema",))) as checkpoints:
        facts |= {"digest": checkpoints.digest("ema")}
        params = checkpoints.restore_item("ema", place(config, facts) if place else None)
    return Trained(config, params, facts)


def belongs(facts: dict, autoencoder: Trained) -> bool:
    """Whether a diffusion stage of these facts was trained on this autoencoder, or on one of the same bits.

    The latter is that of an autoencoder which lost its last checkpoint and was trained to its end again, and of facts
    that are older than digests of checkpoints.
    """
    model = facts.get("autoencoder_config", {})  # which earlier versions did not keep
    if not model.items() <= config_facts(autoencoder.config).items():
        return False
    known = (facts["autoencoder"], facts.get("autoencoder_params"))
    return autoencoder.facts["digest"] == known[0] or digest(autoencoder.params) in known


def autoencoder_facts(autoencoder: Trained) -> dict:
    """What a diffusion stage keeps of the autoencoder that makes its latents.

    "autoencoder": digest of the training, which rounded weights keep too; "autoencoder_params": of the very numbers;
    "autoencoder_config": what else latents depend on; "vae" where there is one, see pretrained.py.
    """
    config = autoencoder.config
    facts = {"autoencoder": autoencoder.facts["digest"], "autoencoder_params": digest(autoencoder.params)}
    facts["autoencoder_config"] = config_facts(config)
    return facts | {key: autoencoder.facts[key] for key in ("vae",) if key in autoencoder.facts}


def config_facts(config: ConfigDict) -> dict:
    """The values of an autoencoder's config on which its latents depend, beside the parameters."""
    model = {f"model.{key}": value for key, value in config.model.items() if key != "remat"}
    return model | {f"data.{side}": config.data[side] for side in ("frames", "height", "width")}


def read_stage(path: Path, stage: str) -> tuple[ConfigDict, dict]:
    """Config and facts of a stage's workdir folder or weights file.

    UserError if there is none, if it is another stage's, or if they are not what training could have written.
    """
    if path.suffix == ".safetensors":
        field, texts = "weights", read_metadata(path)
        if not {"config", "facts"} <= texts.keys():
            raise UserError("weights", path, "holds no config of cmd_jax", "give a file that training exported")
        values, facts = (parse_json(texts[name], field, path) for name in ("config", "facts"))
    else:
        field = "workdir"
        if not all((path / name).is_file() for name in ("config.json", "facts.json")):
            raise UserError("workdir", path, f"holds no trained {stage} stage", f"train the {stage} stage there first")
        values, facts = (read_json(path / name, field, remedy=WRITTEN) for name in ("config.json", "facts.json"))
    config = from_dict(values, field, path)
    if config.stage != stage:
        raise UserError("weights", path, f"is a {config.stage} stage", f"give one of the {stage} stage")
    check_facts(facts, config, field, path, digested=field == "weights")
    return config, facts


def check_facts(facts: dict, config: ConfigDict, field: str, place, digested: bool = False):
    """UserError (field=place) for facts that a stage of that config cannot have. digested: their digest is needed."""
    needed = {"digest"} if digested else set()
    if config.stage != "autoencoder":
        needed |= {"class_names", "autoencoder", "statistics"}
        needed |= {"text_encoder"} if reads_text(config) else set()
        needed |= {"image_model"} if defaults.fine_tunes(config) else set()
    elif config.model.mode == "latent":
        needed |= {"vae"}
    problem = check_like(facts, {key.rstrip("?") if key[:-1] in needed else key: like for key, like in FACTS.items()})
    for name, channels in facts["statistics"].items() if not problem and "statistics" in facts else ():
        if len(channels["mean"]) != len(channels["std"]) or min(channels["std"], default=0) <= 0:
            problem = f"statistics.{name} is not a mean and a positive std of each channel"
    if problem:
        raise UserError(field, place, f"its facts are damaged: {problem}", WRITTEN)


def _read_placed(path: Path, like: dict) -> dict:
    """Tensors of a safetensors file as float32 arrays laid out as `like`; only the parts for devices here are read."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: jax.ShapeDtypeStruct(s.get_shape(), np.float32) for name, s in slices.items()}
            check_tree(f"weights {path.name}", unflatten(found), like, "give the weights that belong to their config")

            def read(name: str, wanted):
                def part(index):
                    return np.asarray(slices[name][index] if index else file.get_tensor(name)).astype(np.float32)

                return jax.make_array_from_callback(wanted.shape, wanted.sharding, part)

            return unflatten({name: read(name, wanted) for name, wanted in flatten(like).items()})
    except (SafetensorError, OSError) as e:
        raise UserError("weights", path, f"damaged or incomplete ({e})", "fetch or write the file again") from e


def export(path: Path, trained: Trained, dtype=np.float32):
    """Write a stage as one safetensors file. `facts` keep the digest of the original also where `dtype` is narrower."""
    tensors = {k: np.asarray(v).astype(dtype) for k, v in flatten(trained.params).items()}
    config, facts = json.dumps(trained.config.to_dict(), sort_keys=True), json.dumps(trained.facts, sort_keys=True)
    write_safetensors(path, tensors, {"config": config, "facts": facts})
