"""Trained stages: their metadata on disk, loading from a folder or a weights file, and which autoencoder they need."""

import hashlib
import json
import shutil
from dataclasses import FrozenInstanceError

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from cmd_jax.data.latents import ChannelStatistics, LatentStatistics
from cmd_jax.errors import UserError
from cmd_jax.files import as_json, read_json
from cmd_jax.pretrained import ImageModelMetadata, TextEncoderMetadata, VAEMetadata
from cmd_jax.running.hosts import digest
from cmd_jax.trained import (
    AutoencoderMetadata,
    ConvertedMetadata,
    DataMetadata,
    Metadata,
    Trained,
    belongs,
    check_metadata,
    export,
    load_trained,
)

pytestmark = pytest.mark.xdist_group("tiny")
TOKENIZER = {"vocabulary": "v", "merges": "m", "added_tokens": [], "start": 1, "end": 2, "pad": 2, "max_length": 77}
FULL = Metadata(
    class_names=("run", "jump"),
    data=DataMetadata("f", 2),
    digest="d",
    autoencoder=AutoencoderMetadata("a", "p", {"model.heads": 2, "model.mode": "latent", "model.gate": True}),
    statistics=LatentStatistics(ChannelStatistics((0.5,), (2.0,)), ChannelStatistics((0.0, -1.5), (1.0, 0.25))),
    vae=VAEMetadata({"act_fn": "silu"}, "w"),
    text_encoder=TextEncoderMetadata({"hidden_act": "gelu"}, "w", TOKENIZER),
    image_model=ImageModelMetadata({"sample_size": None}, {"solver": "ddim"}),
    converted=ConvertedMetadata("0", {"num_classes": None}),
)  # fmt: skip
# The same, as the first versions wrote it, except for what these did not have.
FLAT = {name: value for name, value in as_json(FULL).items() if name not in ("data", "autoencoder")}
FLAT |= {"fingerprint": "f", "clips": 2, "autoencoder": "a", "autoencoder_params": "p"}
FLAT |= {"autoencoder_config": FULL.autoencoder.config}


@pytest.fixture(scope="module")
def folder():
    return tiny.trained() / "autoencoder"


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def metadata_of(values, argument="content,kind=text", **options):
    return check_metadata(json.loads(json.dumps(values)), tiny.config_of(argument), "weights", "x", **options)


def test_metadata_are_read_as_they_were_written():
    assert metadata_of(as_json(FULL)) == FULL == metadata_of(FLAT)
    assert metadata_of(as_json(Metadata()), "autoencoder") == Metadata()
    bare = Metadata((), autoencoder=AutoencoderMetadata("a"), statistics=FULL.statistics)
    names = ("class_names", "autoencoder", "statistics")
    assert metadata_of({name: FLAT[name] for name in names} | {"class_names": []}, "motion") == bare
    with pytest.raises(FrozenInstanceError):
        FULL.digest = "other"


@pytest.mark.parametrize("name", [field for field in as_json(FULL) if field not in ("data", "vae", "converted")])
def test_what_a_stage_needs_must_be_there(name):
    values = {key: value for key, value in as_json(FULL).items() if key != name}
    with pytest.raises(UserError, match=f"^weights=x: .*lacks {name}"):
        metadata_of(values, needed=("digest",))
    values = {"class_names": [], "digest": "d"}
    assert metadata_of(values, "autoencoder").vae is None
    with pytest.raises(UserError, match="lacks vae"):
        metadata_of(values, "autoencoder,kind=text")


def test_folder_weights_file_and_half_precision_agree(folder, tmp_path):
    from_folder = load_trained(folder, "autoencoder")
    from_file = load_trained(folder / "ema.safetensors", "autoencoder")
    assert from_file.config.to_dict() == from_folder.config.to_dict()
    assert from_file.metadata == from_folder.metadata
    files = read_json(folder / "checkpoints" / str(tiny.STEPS) / "manifest.json")["files"]
    files = {name: facts for name, facts in files.items() if name.startswith("ema/")}
    assert from_folder.metadata.digest == hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    summary = read_json(folder / "summary.json")
    assert digest(from_file.params) == digest(from_folder.params) == summary["digests"]["ema"]

    export(tmp_path / "half.safetensors", from_folder, np.float16)
    half = load_trained(tmp_path / "half.safetensors", "autoencoder")
    assert half.metadata == from_folder.metadata  # the digest is that of the original
    exact = leaves(from_folder.params)
    for name, x in leaves(half.params).items():
        assert x.dtype == np.float32
        assert np.abs(x - exact[name]).max() <= 1e-3 * np.abs(exact[name]).max()
    assert (tmp_path / "half.safetensors").stat().st_size < 0.7 * (folder / "ema.safetensors").stat().st_size


def test_an_autoencoder_is_known_by_its_checkpoint_or_by_its_bits(folder):
    """The latter to stages older than digests of checkpoints, or where it was trained to its end again."""
    trained = load_trained(folder, "autoencoder")
    bits, other = digest(trained.params), Trained(trained.config, {"w": np.zeros(2)}, Metadata(digest="another"))
    of = lambda *known: Metadata(autoencoder=AutoencoderMetadata(*known))  # noqa: E731
    assert belongs(of(trained.metadata.digest), trained)
    assert belongs(of("that of a lost checkpoint", bits), trained)
    assert belongs(of(bits), trained)
    assert not belongs(of("another"), trained)
    assert not belongs(of(trained.metadata.digest, bits), other)


def test_parameters_are_read_straight_into_their_shards(folder, tmp_path):
    whole = load_trained(folder, "autoencoder")
    export(tmp_path / "half.safetensors", whole, np.float16)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def laid_out(x):
        return NamedSharding(mesh, PartitionSpec(*["data"][: x.ndim]))

    def shardings(config, metadata):
        assert config.stage == "autoencoder" and len(metadata.class_names) == 48
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=laid_out(x)), whole.params)

    def others(config, metadata):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 1), x.dtype, sharding=laid_out(x)), whole.params)

    for path in (folder, folder / "ema.safetensors", tmp_path / "half.safetensors"):
        plain, placed = load_trained(path, "autoencoder"), load_trained(path, "autoencoder", shardings)
        assert all(x.sharding.mesh == mesh and x.dtype == np.float32 for x in jax.tree.leaves(placed.params))
        assert digest(placed.params) == digest(plain.params)
        assert placed.metadata == plain.metadata
        with pytest.raises(UserError, match="this config wants "):
            load_trained(path, "autoencoder", others)


def test_what_is_no_trained_stage_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="is a autoencoder stage; give one of the content stage"):
        load_trained(folder, "content")
    with pytest.raises(UserError, match="holds no trained motion stage; train the motion stage there first"):
        load_trained(tmp_path, "motion")
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "facts.json", tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_trained(tmp_path, "autoencoder")
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "facts.json"}
    with pytest.raises(UserError, match="no such file"):
        load_trained(tmp_path / "missing.safetensors", "autoencoder")
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="holds no config of cmd_jax"):
        load_trained(tmp_path / "foreign.safetensors", "autoencoder")


def test_export_keeps_config_and_metadata(tmp_path):
    trained = Trained(tiny.config_of("motion"), {"a": {"b": np.eye(2)}}, tiny.metadata("é, ü"))
    export(tmp_path / "x.safetensors", trained)
    again = load_trained(tmp_path / "x.safetensors", "motion")
    assert again.metadata == trained.metadata
    assert again.config.model.to_dict() == trained.config.model.to_dict()
    assert np.array_equal(again.params["a"]["b"], np.eye(2))
