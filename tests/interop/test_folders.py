"""Which files of a folder hold the weights, and what is said of a folder that is not the one meant."""

import json
import logging

import pytest
from interop.clip_folders import FIXTURES, copied, message

from cmd_jax.errors import UserError
from cmd_jax.interop import clip
from cmd_jax.interop.clip_tokenizer import Tokenizer
from cmd_jax.interop.diffusers import load_pipeline, load_vae
from cmd_jax.interop.folders import DIFFUSERS, TRANSFORMERS, find_weights
from cmd_jax.interop.weights import read_metadata, read_state_dict
from cmd_jax.pretrained import read_config

D, OF_TWO = "diffusion_pytorch_model", ("-00001-of-00002", "-00002-of-00002")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 3438354725\n"


def put(folder, *names):
    """Empty files, and indexes of the shards that are called so: `INDEX>SHARD{}`."""
    folder.mkdir(exist_ok=True)
    for name in names:
        index, _, shard = name.partition(">")
        shards = [shard.format(which) for which in OF_TWO] if shard else []
        (folder / index).write_text(json.dumps({"weight_map": dict(enumerate(shards))}) if shards else "")
        for shard in shards:
            (folder / shard).touch()
    return folder


# Every form that either library writes, the preferred first.
PLAIN = (
    f"{D}.safetensors",
    f"{D}.safetensors.index.json>{D}{{}}.safetensors",
    f"{D}.bin",
    f"{D}.bin.index.json>{D}{{}}.bin",
)
FP16 = (
    f"{D}.fp16.safetensors",
    f"{D}.safetensors.index.fp16.json>{D}.fp16{{}}.safetensors",
    f"{D}.safetensors.fp16.index.json>{D}{{}}.fp16.safetensors",  # of earlier versions
    f"{D}.fp16.bin",
    f"{D}.bin.index.fp16.json>{D}.fp16{{}}.bin",
)


@pytest.mark.parametrize("stems", [DIFFUSERS, TRANSFORMERS], ids=["diffusers", "transformers"])
def test_the_files_of_a_part_in_order_of_preference(stems, tmp_path, caplog):
    forms = [*PLAIN, *FP16]
    if stems is TRANSFORMERS:
        forms = [name.replace(D, "model" if "safetensors" in name else "pytorch_model") for name in forms]
    unrelated = ("config.json", f"x{D}.safetensors", "flax_model.msgpack", "pytorch_lora_weights.safetensors")
    caplog.set_level(logging.INFO)
    for i, name in enumerate(forms):
        folder = put(tmp_path / str(i), *forms[i:], *unrelated)
        index, _, shard = name.partition(">")
        files = find_weights(folder, stems)
        assert files.name == folder / index
        assert files.parts == tuple(folder / (shard or index).format(which) for which in (OF_TWO if shard else [""]))
        # A variant is said to be one, since full precision may be had elsewhere.
        assert (f"{files.name}: " in caplog.text and "fp16" in caplog.text) == (i >= len(PLAIN))
        caplog.clear()


def test_of_several_variants_one_must_be_chosen_by_its_name(tmp_path):
    folder = put(tmp_path / "x", FP16[1], f"{D}.non_ema.safetensors", f"{D}.non_ema.bin")
    with pytest.raises(UserError) as error:
        find_weights(folder, DIFFUSERS)
    assert "fp16, non_ema" in error.value.problem
    # What it says to do does it: for one file, and for the index of several.
    for old, new in ((f"{D}.non_ema.safetensors", PLAIN[0]), (FP16[1].split(">")[0], f"{D}.safetensors.index.json")):
        assert f"{old} to {new}" in error.value.remedy
        (folder / old).rename(folder / new)
        assert find_weights(folder, DIFFUSERS).name == folder / new
        (folder / new).rename(folder / old)


def without(folder, name):
    (folder / name).unlink()
    return folder


def linked(folder, name):
    (folder / name).symlink_to("../../blobs/0a1b")
    return folder


NO_WEIGHTS = {
    "nothing": (lambda f: put(f, "config.json"), f"{{}}/{D}.safetensors: no such file; "),
    "Flax": (lambda f: put(f, "diffusion_flax_model.msgpack"), "{}: holds only Flax weights (diffusion_flax_model"),
    "OpenVINO": (lambda f: put(f, "openvino_model.bin", "openvino_model.xml"), "{}: holds only a compiled graph ("),
    "ONNX": (lambda f: put(f, "model.onnx", "weights.pb"), "{}: holds only a compiled graph (model.onnx); fetch "),
    "TensorFlow": (lambda f: put(f, "tf_model.h5"), "{}: holds only TensorFlow weights (tf_model.h5); fetch "),
    "other names": (lambda f: put(f, "pytorch_lora_weights.safetensors"), "no such file, only pytorch_lora_weights.s"),
    "a lost shard": (
        lambda f: without(put(f, FP16[1]), f"{D}.fp16-00002-of-00002.safetensors"),
        f"{D}.fp16-00002-of-00002.safetensors: missing, {D}.safetensors.index.fp16.json names it; ",
    ),
    "a lost index": (
        lambda f: without(put(f, PLAIN[1]), f"{D}.safetensors.index.json"),
        f"{{}}: holds {D}-00001-of-00002.safetensors, but no index of it; ",
    ),
    "an index of nothing": (lambda f: put(f, f"{D}.safetensors.index.json"), "index.json: not readable as JSON"),
    "a lost blob": (lambda f: linked(put(f), PLAIN[0]), f"{D}.safetensors: a link to ../../blobs/0a1b, where nothing"),
}


@pytest.mark.parametrize("fault", NO_WEIGHTS)
def test_a_folder_without_weights_is_told_what_it_holds(fault, tmp_path):
    make, said = NO_WEIGHTS[fault]
    folder = make(tmp_path / "x")
    assert said.format(folder) in message(find_weights, folder, DIFFUSERS)


# Pointers of git-lfs, in place of any file.


def pointer(path):
    path.write_text(POINTER)
    return path


@pytest.mark.parametrize("name", [
    "vae/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "text_encoder/model.safetensors", "scheduler/scheduler_config.json",
])  # fmt: skip
def test_a_pointer_of_git_lfs_is_called_so(name, tmp_path):
    folder = copied("tiny-sd15", tmp_path / "x")
    path, part = pointer(folder / name), name.partition("/")[0]
    parts = {"tokenizer": Tokenizer, "text_encoder": clip.load_text_encoder, "vae": load_vae}
    said = message(parts[part], folder / part) if part in parts else message(load_pipeline, folder)
    assert f"={path}: a git-lfs pointer" in said and "git lfs pull" in said


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pointers_of_single_files(name, tmp_path):
    for read in (read_state_dict, read_metadata):
        assert "a git-lfs pointer" in message(read, pointer(tmp_path / name))


# Folders that are near the right one.


def in_hub_cache(folder, source, *commits):
    """As huggingface_hub keeps a model; the last commit is main's."""
    for commit in commits:
        (folder / "snapshots").mkdir(parents=True, exist_ok=True)
        copied(source, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commits[-1])
    return folder


def pipeline_of(path):
    return read_config(path, "vae/config.json")


@pytest.mark.parametrize("open_it", [load_pipeline, pipeline_of])
def test_the_right_folder_is_named(open_it, tmp_path):
    root = in_hub_cache(tmp_path / "models--a--b", "tiny-sd15", "0ld", "c0ffee")
    snapshot = root / "snapshots" / "c0ffee"
    for near in (root, root / "snapshots", tmp_path):
        said = message(open_it, near)
        assert f"={near}: " in said and f"give its snapshot {snapshot} or " in said
    for near in (snapshot / "unet", copied("tiny-sd15", tmp_path / "y" / "sd").parent):
        right = near.parent if near.name == "unet" else near / "sd"
        assert f"={near}: holds no model_index.json; give {right}, " in message(open_it, near)
    one_file = tmp_path / "v1-5-pruned.safetensors"
    one_file.touch()
    assert f"={one_file}: a file, not a folder; " in message(open_it, one_file)
    assert "from_single_file" in message(open_it, one_file)
    assert open_it(snapshot)


def test_the_snapshot_of_a_clip_is_named(tmp_path):
    root = in_hub_cache(tmp_path / "models--openai--clip", "tiny-clip", "c0ffee")
    for load in (clip.load, clip.load_text_encoder):
        assert message(load, root).endswith(f"give its snapshot {root}/snapshots/c0ffee")
    # A pipeline has several parts with a config.json: none of them is guessed.
    assert message(clip.load, FIXTURES / "tiny-sd15").startswith(f"path={FIXTURES}/tiny-sd15/config.json: no such file")


def test_a_pipeline_of_flax_is_told_how_to_become_one_of_pytorch(tmp_path):
    folder = copied("tiny-sd15", tmp_path / "x")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "FlaxAutoencoderKL"]}))
    said = message(load_pipeline, folder)
    assert said.startswith("model_index.json:vae=") and "a model of Flax" in said and "from_flax=True" in said
