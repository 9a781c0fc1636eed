"""Stages, checkpoints and models whose JSON somebody changed: one line from every reader, exit code 2 of every verb.

The random changes of test_fuzz.py, which is slow, go through the same readers.
"""

import json
import shutil
from pathlib import Path

import fuzz_json
import numpy as np
import pytest
import tiny

from cmd_jax.config import to_json
from cmd_jax.errors import UserError
from cmd_jax.interop.weights import read_metadata, read_state_dict, write_safetensors
from cmd_jax.main import main
from cmd_jax.trained import AutoencoderMetadata, Metadata, Trained, export, read_stage

CONFIGS = Path(__file__).parents[1] / "configs"
DEEP = "[" * 100_000 + "]" * 100_000
UNREADABLE = {
    "empty": b"",
    "torn": b'{"a": 1, "b',
    "no text": b"\x00\xff\xfe",
    "a number": b"5",
    "nothing": b"null",
    "deep": b'{"a": ' + DEEP.encode() + b"}",
}


@pytest.mark.parametrize("name", fuzz_json.readers())
def test_what_is_no_json_object_is_one_line(name, tmp_path):
    reader = fuzz_json.readers()[name]
    for file in reader.files:
        for damage, content in UNREADABLE.items():
            if reader.passes:
                fuzz_json.read_with(tmp_path / "folder", name, {file: content})
                continue
            with pytest.raises(UserError) as e:
                fuzz_json.read_with(tmp_path / "folder", name, {file: content})
            assert str(e.value).isprintable(), damage


@pytest.mark.parametrize("name", fuzz_json.readers())
def test_each_part_of_another_kind_is_read_or_one_line(name, tmp_path):
    """Never a traceback; and of each file some part is refused."""
    reader = fuzz_json.readers()[name]
    for file, value in reader.files.items():
        refused = 0
        for key in range(len(value)) if isinstance(value, list) else list(value)[:40]:
            for odd in ({"odd": [None]}, -1e308):
                changed = json.loads(json.dumps(value))
                changed[key] = odd
                try:
                    fuzz_json.read_with(tmp_path / "folder", name, {file: json.dumps(changed).encode()})
                except UserError as e:
                    refused += str(e).isprintable()
        assert bool(refused) != reader.passes or not value, file


# Stages, in all the verbs that read them.


def changed(values: dict, path: str, new) -> dict:
    values = json.loads(json.dumps(values))
    *groups, key = path.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    inner[key] = new
    return values


CHANGES = [  # which text, key, new value, what the line names
    ("config", "stage", "kontent", "there is no stage kontent"),
    ("config", "stage", ["content"], "there is no stage"),
    ("config", "stray", 1, '"stray"'),
    ("config", "model.stray", {}, 'model has "stray"'),
    ("config", "model", [], "model is []"),
    ("config", "model.width", "64", 'model.width is "64"'),
    ("config", "model.width", 64.0, "model.width is 64.0"),
    ("config", "model.depth", 0, "model.depth=0"),
    ("config", "model.heads", 2**62, f"model.heads={2**62}"),
    ("config", "optimizer.eps", float("nan"), "optimizer.eps is NaN"),
    ("config", "rules", [["embed"]], "rules[0] has 1 items"),
    ("config", "model.dtype", "complex64", "model.dtype=complex64"),
    ("facts", "stray", 1, '"stray"'),
    ("facts", "class_names", "abc", 'class_names is "abc"'),
    ("facts", "class_names", [1], "class_names[0] is 1"),
    ("facts", "digest", None, "digest is null"),
    ("facts", "data.clips", -1, "data.clips is -1"),
    ("facts", "vae", {"config": {}}, "vae lacks weights"),
]
OF_DENOISERS = [
    ("config", "denoiser", "gan", "denoiser=gan"),
    ("config", "denoiser", ["dit"], "denoiser=['dit']"),
    ("config", "denoiser", "unet", "diffusion"),  # whose keys are not those of the UNet
    ("facts", "statistics.content.std", [0.0, 1.0, 1.0], "statistics.content"),
    ("facts", "statistics.content.mean", [1.0], "statistics.content"),
    ("facts", "statistics.motion", {}, "statistics.motion lacks mean"),
    ("facts", "autoencoder", 5, "autoencoder.digest is 5"),
]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Weights of all stages, which fit in nothing but their configs and metadata, and the same in a workdir."""
    folder = tmp_path_factory.mktemp("stages")
    for name in ("autoencoder", "content", "motion"):
        trained = Trained(tiny.config_of(name), {"a": np.zeros(1)}, fuzz_json.STAGE)
        export(folder / f"{name}.safetensors", trained)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(to_json(trained.config))
        (folder / name / "facts.json").write_text(json.dumps(fuzz_json.METADATA))
    return folder


def spoil(stages: Path, name: str, which: str, new: str | bytes):
    """Replace config or metadata of a stage, in its weights file and in its folder."""
    file = stages / f"{name}.safetensors"
    text = new if isinstance(new, str) else new.decode(errors="replace")
    write_safetensors(file, read_state_dict(file), read_metadata(file) | {which: text})
    (stages / name / f"{which}.json").write_bytes(new if isinstance(new, bytes) else new.encode())


@pytest.mark.parametrize("which, key, new, words", CHANGES + OF_DENOISERS)
def test_a_stage_that_cannot_be_is_named(stages, tmp_path, which, key, new, words):
    folder = tmp_path / "stages"
    shutil.copytree(stages, folder)
    for name in ("autoencoder", "content") if (which, key, new, words) in CHANGES else ("content",):
        values = json.loads((stages / name / f"{which}.json").read_text())
        spoil(folder, name, which, json.dumps(changed(values, key, new)))
        for place, field in ((folder / f"{name}.safetensors", "weights"), (folder / name, "workdir")):
            with pytest.raises(UserError) as e:
                read_stage(place, name)
            assert e.value.field == field and str(e.value.value).startswith(str(place)) and words in e.value.problem


def test_older_configs_and_metadata_are_read(stages, tmp_path):
    folder = tmp_path / "stages"
    shutil.copytree(stages, folder)
    values = json.loads((stages / "content" / "config.json").read_text())
    for key in ("processes", "pretrained"):
        del values[key]
    del values["data"]["probe_timeout"], values["model"]["condition"], values["mesh"]["preset"]
    (folder / "content" / "config.json").write_text(json.dumps(values))
    flat = {key: fuzz_json.FLAT[key] for key in ("class_names", "autoencoder", "statistics")}
    (folder / "content" / "facts.json").write_text(json.dumps(flat))
    config, found = read_stage(folder / "content", "content")
    assert found == Metadata(("run",), autoencoder=AutoencoderMetadata(""), statistics=fuzz_json.STAGE.statistics)
    assert config.to_dict() == json.loads(to_json(tiny.config_of("content")))


VERBS = {
    "sample": ["sample", "--config={tiny}:sample", "--config.weights={stages}", "--workdir={out}"],
    "evaluate": ["evaluate", "--config={tiny}:sample", "--config.weights={stages}", "--workdir={out}"],
    "sample a workdir": ["sample", "--config={tiny}:sample", "--workdir={stages}"],
    "doctor": ["doctor", "--config={tiny}:sample", "--config.weights={stages}"],
    "doctor of a workdir": ["doctor", "--config={tiny}:motion", "--workdir={stages}"],
    "train": ["train", "--config={tiny}:autoencoder", "--workdir={stages}"],
    "train on": ["train", "--config={tiny}:content", "--workdir={stages}"],
    "convert": ["convert", "cmd-autoencoder", "{stages}/autoencoder.safetensors", "{out}/x.safetensors", "--to=torch"],
}
DAMAGES = {
    "an unknown stage": ("config", '{"stage": "kontent"}'),
    "a stray key": ("config", '{"stage": "autoencoder", "stray": 1}'),
    "deep": ("config", DEEP),
    "empty": ("config", ""),
    "a wrong type": ("config", '{"stage": "autoencoder", "model": 5}'),
    "metadata that is a list": ("facts", "[]"),
}


CASES = [(verb, damage) for verb in VERBS for damage in DAMAGES]
CASES.remove(("train", "metadata that is a list"))  # read after the checkpoint, of which there is none here


@pytest.mark.parametrize("verb, damage", CASES)
def test_every_verb_answers_in_one_line(stages, tmp_path, capsys, verb, damage):
    folder, out = tmp_path / "stages", tmp_path / "out"
    shutil.copytree(stages, folder)
    out.mkdir()
    (folder / "autoencoder" / "checkpoints" / "1").mkdir(parents=True)
    which, text = DAMAGES[damage]
    spoil(folder, "autoencoder", which, text)
    arguments = [a.format(tiny=tiny.CONFIG_FILE, stages=folder, out=out) for a in VERBS[verb]]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "=" in error[0] and "autoencoder" in error[0]
    assert not any(out.iterdir())
