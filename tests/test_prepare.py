"""What the values of a store of latents depend on, by name."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import tiny
from interop.clip_folders import FIXTURES, change_json, copied

from cmd_jax.data.latents import LatentStatistics
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.models.autoencoder import Autoencoder
from cmd_jax.prepare import made_of
from cmd_jax.pretrained import ImageModelMetadata, TextEncoderMetadata, VAEMetadata, describe
from cmd_jax.trained import AutoencoderMetadata, DataMetadata, Metadata, Trained

CLIPS = {"frames": 4, "height": 16, "width": 32}


def metadata_of(folder=FIXTURES / "tiny-sd15", source=None, numbers=0.0, **model):
    """What a denoiser is trained on: clips of shapes, an autoencoder of VAE latents, and its captions' encoder."""
    config = tiny.config_of("autoencoder,kind=text", **{f"model__{key}": value for key, value in model.items()})
    trained = Trained(config, {"a": np.full(3, numbers)}, Metadata(digest="d"))
    parts = {kind.part: describe(folder, kind) for kind in (VAEMetadata, TextEncoderMetadata)}
    source = source or ShapesSource(clips=48, **CLIPS)
    data = DataMetadata(source.fingerprint, len(source))
    return Metadata(data=data, autoencoder=AutoencoderMetadata.of(trained), **parts)


def of(metadata=None, stage="content", **changes):
    config = tiny.config_of(f"{stage},kind=text", **{"latents__starts": 1, **changes})
    return made_of(config, metadata or metadata_of())


def other_folder(tmp_path, name, **changes):
    folder = copied("tiny-sd15", tmp_path / "sd")
    if name.endswith(".json"):
        change_json(folder / name, **changes)
    else:
        (folder / name).write_text("".join((folder / name).read_text().splitlines(keepends=True)[:-1]))
    return folder


OTHERS = {  # the name under which it differs -> what is changed
    "data": lambda _: {"source": ShapesSource(clips=49, **CLIPS)},
    "autoencoder: parameters": lambda _: {"numbers": 1.0},
    "autoencoder: model.position": lambda _: {"position": "none"},
    "autoencoder: model.heads": lambda _: {"heads": 4},
    "autoencoder: model.content": lambda _: {"content": "mean"},
    "autoencoder: model.dtype": lambda _: {"dtype": "bfloat16"},
    "vae/config.json: scaling_factor": lambda tmp: {"folder": other_folder(tmp, "vae/config.json", scaling_factor=0.2)},
    "tokenizer: merges": lambda tmp: {"folder": other_folder(tmp, "tokenizer/merges.txt")},
    "tokenizer: pad": lambda tmp: {"folder": other_folder(tmp, "tokenizer/special_tokens_map.json", pad_token="!")},
    "tokenizer: added_tokens": lambda tmp: {"folder": other_folder(tmp, "tokenizer/added_tokens.json", me=533)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_values_depend_on_is_named(name, tmp_path):
    ours, theirs = of(), of(metadata_of(**OTHERS[name](tmp_path)))
    assert [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)] == [name]


@pytest.mark.parametrize("change", [
    {"latents__starts": 2}, {"latents__store_seed": 1}, {"latents__store_dtype": "float16"}, {"data__height": 32},
    {"pretrained__dtype": "bfloat16"}, {"pretrained__vae_frames": 2},
])  # fmt: skip
def test_so_are_the_settings_of_the_encoding(change):
    ours, theirs, ((key, value),) = of(), of(**change), change.items()
    assert {name: x for name, x in theirs.items() if ours[name] != x} == {key.replace("__", "."): value}


def test_what_changes_nothing_is_not(tmp_path):
    folder = copied("tiny-sd15", tmp_path / "sd")
    change_json(folder / "vae" / "config.json", sample_size=512, _diffusers_version="0.1")
    change_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    change_json(folder / "text_encoder" / "config.json", hidden_act="gelu")  # tokens are kept, not states
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    more = {"statistics": LatentStatistics.unit(4, 4), "image_model": ImageModelMetadata({}, {})}
    assert of(replace(metadata_of(folder, remat="full"), **more)) == of()
    changes = {"train__steps": 9, "optimizer__learning_rate": 0.5, "data__threads": 1, "pretrained__path": folder}
    changes |= {"seed": 1, "train__batch_size": 8, "latents__store_shard": 7}
    assert of(**changes) == of(stage="motion") == of()


def test_no_field_of_the_autoencoder_is_forgotten():
    ours = {name.removeprefix("model.") for name in metadata_of().autoencoder.config if name.startswith("model.")}
    assert ours == {field.name for field in dataclasses.fields(Autoencoder)} - {"remat", "parent", "name"}
