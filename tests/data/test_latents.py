"""Encoded clips in a file: another one for whatever their numbers depend on, and none that is damaged is used."""

import dataclasses
import json
import logging
import types
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from data.clip_files import numbered, write_clip
from interop.clip_folders import FIXTURES, change_json, copied

from cmd_jax import prepare
from cmd_jax.data import latents
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.latents import LatentStatistics, path_of, read_latents, write_latents
from cmd_jax.data.pipeline import video_reader
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.data.splits import Split
from cmd_jax.models.autoencoder import Autoencoder
from cmd_jax.prepare import LIBRARIES, provenance_of
from cmd_jax.pretrained import ImageModelMetadata, TextEncoderMetadata, VAEMetadata, describe
from cmd_jax.report.console import make_console
from cmd_jax.sharding import make_mesh
from cmd_jax.trained import AutoencoderMetadata, DataMetadata, Metadata, Trained

CLIPS = {"frames": 4, "height": 16, "width": 32}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(tiny.config_of("content").mesh)


def metadata_of(folder=FIXTURES / "tiny-sd15", source=None, numbers=0.0, **model):
    """What a denoiser is trained on: clips of shapes, an autoencoder of VAE latents, and its captions' encoder."""
    config = tiny.config_of("autoencoder,kind=text", **{f"model__{key}": value for key, value in model.items()})
    trained = Trained(config, {"a": np.full(3, numbers)}, Metadata(digest="d"))
    parts = {kind.part: describe(folder, kind) for kind in (VAEMetadata, TextEncoderMetadata)}
    source = source or ShapesSource(clips=48, **CLIPS)
    data = DataMetadata(source.fingerprint, len(source))
    return Metadata(data=data, autoencoder=AutoencoderMetadata.of(trained), **parts)


def name_of(mesh, metadata=None, stage="content", **changes):
    config = tiny.config_of(f"{stage},kind=text", **{"latents__cache_clips": 48, **changes})
    return path_of(FIXTURES, provenance_of(config, metadata or metadata_of(), mesh)).name


def other_folder(tmp_path, name, **changes):
    folder = copied("tiny-sd15", tmp_path / "sd")
    if name.endswith(".json"):
        change_json(folder / name, **changes)
    else:
        (folder / name).write_text("".join((folder / name).read_text().splitlines(keepends=True)[:-1]))
    return folder


OTHERS = {
    "clips": lambda _: {"source": ShapesSource(clips=49, **CLIPS)},
    "frames": lambda _: {"source": ShapesSource(clips=48, **CLIPS | {"frames": 8})},
    "height": lambda _: {"source": ShapesSource(clips=48, **CLIPS | {"height": 32})},
    "width": lambda _: {"source": ShapesSource(clips=48, **CLIPS | {"width": 16})},
    "split": lambda _: {"source": ShapesSource(clips=48, **CLIPS, split="test")},
    "numbers of the autoencoder": lambda _: {"numbers": 1.0},
    "its positions": lambda _: {"position": "none"},
    "its heads": lambda _: {"heads": 4},
    "its content frame": lambda _: {"content": "mean"},
    "its dtype": lambda _: {"dtype": "bfloat16"},
    "scaling factor": lambda tmp: {"folder": other_folder(tmp, "vae/config.json", scaling_factor=0.2)},
    "merges": lambda tmp: {"folder": other_folder(tmp, "tokenizer/merges.txt")},
    "padding": lambda tmp: {"folder": other_folder(tmp, "tokenizer/special_tokens_map.json", pad_token="!")},
    "an added word": lambda tmp: {"folder": other_folder(tmp, "tokenizer/added_tokens.json", me=533)},
    "activation": lambda tmp: {"folder": other_folder(tmp, "text_encoder/config.json", hidden_act="gelu")},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_latents_are_made_of_names_their_file(what, mesh, tmp_path):
    assert name_of(mesh, metadata_of(**OTHERS[what](tmp_path))) != name_of(mesh)


@pytest.mark.parametrize("changes", [
    {"latents__cache_clips": 96}, {"latents__cache_clips": 0}, {"seed": 1}, {"train__batch_size": 8},
    {"pretrained__dtype": "bfloat16"}, {"pretrained__vae_frames": 2},
])  # fmt: skip
def test_so_do_the_settings_of_the_encoding(changes, mesh):
    assert name_of(mesh, **changes) != name_of(mesh)


def test_so_do_the_machine_and_the_libraries(mesh, monkeypatch):
    device = lambda kind: types.SimpleNamespace(device_kind=kind)  # noqa: E731
    meshes = [
        types.SimpleNamespace(shape=shape, devices=np.array([device(kind)] * 4))
        for shape, kind in (({"data": 4}, "cpu"), ({"data": 2, "fsdp": 2}, "cpu"), ({"data": 4}, "TPU v5"))
    ]
    names = {name_of(mesh) for mesh in meshes}
    for library in (*LIBRARIES, "jax"):
        monkeypatch.setattr("cmd_jax.prepare.version", lambda name, library=library: f"{name == library}")
        monkeypatch.setattr("cmd_jax.prepare.versions", lambda library=library: {"jax": str(library == "jax")})
        names.add(name_of(mesh))
    assert len(names) == 3 + len(LIBRARIES) + 1


def test_what_changes_nothing_keeps_the_file(mesh, tmp_path):
    folder = copied("tiny-sd15", tmp_path / "sd")
    change_json(folder / "vae" / "config.json", sample_size=512, _diffusers_version="0.1")
    change_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    more = {"statistics": LatentStatistics.unit(4, 4), "image_model": ImageModelMetadata({}, {})}
    same = replace(metadata_of(folder, remat="full"), **more)
    assert name_of(mesh, same) == name_of(mesh)
    changes = {"train__steps": 9, "optimizer__learning_rate": 0.5, "data__threads": 1, "pretrained__path": folder}
    assert name_of(mesh, **changes) == name_of(mesh, stage="motion") == name_of(mesh)


def test_no_field_of_the_autoencoder_is_forgotten():
    ours = {name.removeprefix("model.") for name in metadata_of().autoencoder.config if name.startswith("model.")}
    assert ours == {field.name for field in dataclasses.fields(Autoencoder)} - {"remat", "parent", "name"}


# The file.

WHAT = {"data": "f", "seed": 0}
LATENTS = {"content": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "label": np.array([3, 4], np.int32)}


@pytest.fixture
def path(tmp_path):
    write_latents(tmp_path / "latents-0.npz", LATENTS, WHAT)
    return tmp_path / "latents-0.npz"


def test_latents_are_read_as_they_were_written(path, caplog):
    found = read_latents(path, WHAT)
    assert found.keys() == LATENTS.keys()
    for name, values in LATENTS.items():
        assert found[name].dtype == values.dtype and (found[name] == values).all()
    assert read_latents(path.with_name("latents-1.npz"), WHAT) is None and not caplog.records


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGES = {
    "cut": lambda content: content[:-40],
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a flipped bit of a number": lambda content: flipped(content, content.index(LATENTS["content"].tobytes()) + 30),
    "a flipped bit of a header": lambda content: flipped(content, content.index(b"fortran_order")),
    "something else": lambda content: b"not a zip file",
    "of an earlier version": None,
    "made of something that is none": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_said_to_be_and_not_used(damage, path, caplog):
    if damage == "of an earlier version":
        np.savez(path, **LATENTS)
    elif damage == "made of something that is none":
        np.savez(path, **LATENTS, made_of="[1")
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert read_latents(path, WHAT) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING" and str(path) in record.getMessage()


@pytest.mark.parametrize("other", [WHAT | {"seed": 1}, {"data": "f"}, WHAT | {"more": 1}])
def test_a_file_of_other_latents_under_that_name_is_not_used(other, path, caplog):
    assert read_latents(path, other) is None
    assert str(path) in caplog.text


# Clips and their files.


def frame_means(workdir, source, mesh, **changes):
    """The mean of every frame, encoded or read from a file."""
    config = tiny.config_of("content", **{"latents__cache_clips": 4, **changes})
    encode = lambda params, batch: {"means": jnp.mean(batch["video"].astype(jnp.float32), axis=(2, 3, 4))}  # noqa: E731
    metadata, console = Metadata(data=DataMetadata(source.fingerprint, 4)), make_console(quiet=True)
    encoding, split = (video_reader(source), encode, {}), Split.whole(len(source))
    return prepare.encoded_clips(config, workdir, source, split, encoding, metadata, mesh, console)["means"]


def test_a_run_with_another_stride_or_size_reads_its_clips_anew(mesh, tmp_path, caplog, monkeypatch):
    for name in ("a", "b"):
        write_clip(tmp_path / "data" / "c" / f"{name}.avi", numbered(20))
    sources = {
        name: FolderSource(tmp_path / "data", **{**CLIPS, "random_start": False, "cache": tmp_path / "probe", **change})
        for name, change in {"": {}, "stride": {"stride": 3}, "frames": {"frames": 6}, "height": {"height": 48}}.items()
    }
    means = {name: frame_means(tmp_path, source, mesh) for name, source in sources.items()}
    assert len(list(tmp_path.glob("latents-*.npz"))) == 4
    np.testing.assert_allclose(means[""][0], np.arange(4) * 12, atol=1)  # grey levels of the frames, see clip_files
    np.testing.assert_allclose(means["stride"][0], np.arange(4) * 36, atol=1)
    assert means["frames"].shape == (4, 6)

    config = tiny.config_of("content", latents__cache_clips=4)
    metadata = Metadata(data=DataMetadata(sources[""].fingerprint, 2))
    damaged = path_of(tmp_path, provenance_of(config, metadata, mesh))
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(frame_means(tmp_path, sources[""], mesh), means[""])
    assert str(damaged) in caplog.text
    monkeypatch.setattr(prepare, "encode_clips", None)  # made anew, it is read again
    for name, source in sources.items():
        np.testing.assert_array_equal(frame_means(tmp_path, source, mesh), means[name])


def test_a_file_that_one_process_cannot_read_is_made_by_all(mesh, tmp_path, monkeypatch):
    source = ShapesSource(clips=4, **CLIPS)
    first, calls = frame_means(tmp_path, source, mesh), []
    encode = prepare.encode_clips
    monkeypatch.setattr(prepare, "encode_clips", lambda *arguments: calls.append(1) or encode(*arguments))
    monkeypatch.setattr(latents, "gather", lambda text: [text, json.dumps(False)])
    np.testing.assert_array_equal(frame_means(tmp_path, source, mesh), first)
    assert calls == [1]
