"""Folders in the diffusers layout, read and written; tests/interop/test_diffusers_peer.py asks diffusers itself."""

import functools
import json
import os
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from interop.clip_folders import FIXTURES, change_json, copied, message
from safetensors.numpy import load_file, save_file

from cmd_jax.interop import folders, sd_config
from cmd_jax.interop.diffusers import STEM, load_pipeline, load_unet, load_vae, save_pipeline
from cmd_jax.interop.sd_config import unet_from_config, vae_from_config
from cmd_jax.interop.weights import flatten

FOLDERS = ["tiny-sd15", "tiny-sd21"]
WEIGHTS = f"{STEM}.safetensors"


@functools.cache
def pipeline(folder):
    return load_pipeline(FIXTURES / folder)


def config_of(part):
    return json.loads((FIXTURES / "tiny-sd15" / part / "config.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_was_read_is_written_back_with_the_same_names_and_bytes(folder, tmp_path):
    original, saved = FIXTURES / folder, tmp_path / "saved"
    save_pipeline(saved, pipeline(folder))
    for part in ("unet", "vae"):
        before, after = (load_file(place / part / WEIGHTS) for place in (original, saved))
        assert before.keys() == after.keys()
        for name, array in before.items():
            assert (array.dtype, array.shape) == (after[name].dtype, after[name].shape), name
            assert array.tobytes() == after[name].tobytes(), name
    texts = [load_file(place / "text_encoder" / "model.safetensors") for place in (original, saved)]
    before, after = ({name.removeprefix("text_model."): array for name, array in text.items()} for text in texts)
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
                 *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))):  # fmt: skip
        assert json.loads((saved / name).read_text()) == json.loads((original / name).read_text()), name
    assert (saved / "tokenizer/merges.txt").read_text() == (original / "tokenizer/merges.txt").read_text()
    assert os.listdir(tmp_path) == ["saved"]

    again = load_pipeline(saved)
    assert (again.scheduler, again.configs) == (pipeline(folder).scheduler, pipeline(folder).configs)
    for part in ("unet", "vae", "text_encoder"):
        (module, params), (module_again, params_again) = getattr(pipeline(folder), part), getattr(again, part)
        assert module == module_again
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), params, params_again)
        assert jax.tree.all(same)


def test_nothing_is_written_over_and_nothing_stays_of_what_failed(tmp_path):
    assert message(save_pipeline, tmp_path, pipeline("tiny-sd15")) == (
        f"pipeline={tmp_path}: exists already; give the path of a new folder"
    )
    (tmp_path / "file").touch()
    assert message(save_pipeline, tmp_path / "file" / "x", pipeline("tiny-sd15")).startswith(
        f"pipeline={tmp_path}/file/x: could not be written ("
    )
    broken = pipeline("tiny-sd15")._replace(scheduler={"steps": object()})
    with pytest.raises(TypeError):
        save_pipeline(tmp_path / "broken", broken)
    assert os.listdir(tmp_path) == ["file"]


def check_eight_devices():
    from cmd_jax import defaults
    from cmd_jax.sharding import abstract, make_mesh, partitioning

    config = defaults.stage("autoencoder")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    mesh, rules = make_mesh(config.mesh), dict(config.rules) | {"conv_in": ("fsdp",), "conv_out": ("tensor",)}
    shardings = partial(abstract, mesh=mesh, rules=tuple(rules.items()))
    folder = FIXTURES / "tiny-sd21"
    reference = np.load(folder / "reference.npz")
    sample, image, noise, moments = (
        reference[name].transpose(0, 2, 3, 1) for name in ("sample", "image", "unet_out", "vae_mean")
    )
    unet, params = load_unet(folder / "unet", shardings=shardings)
    alone = flatten(load_unet(folder / "unet")[1])
    for name, array in flatten(params).items():
        assert isinstance(array, jax.Array) and len(array.sharding.device_set) == 8
        np.testing.assert_array_equal(array, alone[name])
    shards = {
        "conv_in/kernel": (3, 3, 2, 8),
        "down_1_resnet_0/conv2/kernel": (3, 3, 16, 16),
        "down_0_attention_0/block_0/mlp/gate/kernel": (8, 32),
        "down_0_attention_0/block_0/cross/key/kernel": (24, 8),
    }
    for name, shape in shards.items():
        assert {s.data.shape for s in flatten(params)[name].addressable_shards} == {shape}, name
    vae, vae_params = load_vae(folder / "vae", shardings=shardings)
    with partitioning(mesh, tuple(rules.items())):
        out = jax.jit(unet.apply)({"params": params}, sample, reference["timesteps"], reference["text_hidden"])
        mean = jax.jit(partial(vae.apply, method="encode"))({"params": vae_params}, image).mean
    for found, expected in ((out, noise), (mean, moments)):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


# Other kinds of files.


def rewrite(folder, change):
    """Read the weights, let `change` mend or replace the dict, and write them."""
    tensors = load_file(folder / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / WEIGHTS)


def same_as_original(params, part="vae", tolerance=0.0):
    original = (load_vae if part == "vae" else load_unet)(FIXTURES / "tiny-sd15" / part)[1]
    close = jax.tree.map(lambda a, b: a.dtype == np.float32 and np.abs(a - b).max() <= tolerance, params, original)
    return jax.tree.all(close)


def test_half_precision_weights_are_read_as_float32_under_their_own_name(tmp_path):
    folder = copied("tiny-sd15/vae", tmp_path / "vae")
    rewrite(folder, lambda tensors: {name: a.astype(np.float16) for name, a in tensors.items()})
    (folder / WEIGHTS).rename(folder / f"{STEM}.fp16.safetensors")
    assert same_as_original(load_vae(folder)[1], tolerance=1e-3)


def split(folder):
    """Weights in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name)
    index = {"weight_map": {n: file for file, half in zip(names, halves, strict=True) for n in half}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder / f"{WEIGHTS}.index.json", [folder / name for name in names]


def test_weights_in_several_files(tmp_path):
    folder = copied("tiny-sd15/unet", tmp_path / "unet")
    index, parts = split(folder)
    assert same_as_original(load_unet(folder)[1], "unet")
    parts[1].unlink()
    line = message(load_unet, folder)  # a long path is shown shortened
    assert line.startswith(f"weights={str(parts[1])[:100]}")
    assert line.endswith(f": missing, {index.name} names it; fetch the whole folder")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../x.safetensors"}}))
    assert "names ../x.safetensors, outside its folder" in message(load_unet, folder)
    for text in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        line = message(load_unet, folder)
        assert line.startswith(f"weights={str(index)[:100]}"), text


def test_names_of_attention_as_in_the_published_vaes(tmp_path):
    folder = copied("tiny-sd15/vae", tmp_path / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new, name in old.items():
            for key in [key for key in tensors if f".{new}." in key]:
                tensors[key.replace(f".{new}.", f".{name}.")] = tensors.pop(key)
        assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors

    rewrite(folder, rename)
    assert same_as_original(load_vae(folder)[1])


# What does not fit.


def shrink(name, *shape):
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


def drop(*names):
    return lambda tensors: {key: array for key, array in tensors.items() if not key.startswith(names)}


FIELD = "give weights and config.json of one model (likely unet/config.json:{} is wrong)"
EXTRA_TENSORS = {"class_embedding.weight": np.zeros((2, 2), np.float32)}
WRONG_UNETS = {
    "all three kinds": (
        lambda tensors: drop("conv_in.bias")(tensors) | EXTRA_TENSORS | {"conv_out.bias": np.zeros(5, np.float32)},
        {},
        "1 of 494 tensors are missing: conv_in.bias; the model has no place for 1: class_embedding.weight; "
        "1 of another shape: conv_out.bias [5], expected [4]; " + FIELD.format("class_embed_type=None"),
    ),
    "a level less": (
        drop("down_blocks.2", "up_blocks.0"),
        {},
        "58 of 494 tensors are missing: down_blocks.2.resnets.0.conv1.bias, down_blocks.2.resnets.0.conv1.weight, "
        "down_blocks.2.resnets.0.conv2.bias and 55 more; " + FIELD.format("block_out_channels=[16, 32, 32]"),
    ),
    "layers": (None, {"layers_per_block": 1}, FIELD.format("layers_per_block=1")),
    "depth": (None, {"transformer_layers_per_block": 2}, FIELD.format("transformer_layers_per_block=2")),
    "types": (None, {"down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2}, "down_block_types=['Down"),
    "text": (
        None,
        {"cross_attention_dim": 24},
        "22 of another shape: down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight [16, 32], "
        "expected [16, 24], down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight [16, 32], expected "
        "[16, 24], down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight [16, 32], expected [16, 24] and "
        "19 more; " + FIELD.format("cross_attention_dim=24"),
    ),
    "projections": (None, {"use_linear_projection": True}, FIELD.format("use_linear_projection=True")),
    "in": (
        None,
        {"in_channels": 9},
        "conv_in.weight [16, 4, 3, 3], expected [16, 9, 3, 3]; " + FIELD.format("in_channels=9"),
    ),
    "out": (None, {"out_channels": 8}, FIELD.format("out_channels=8")),
    "widths": (None, {"block_out_channels": [16, 32, 48]}, FIELD.format("block_out_channels=[16, 32, 48]")),
}


@pytest.mark.parametrize("change, config, said", WRONG_UNETS.values(), ids=WRONG_UNETS)
def test_tensors_that_do_not_fit_are_named_with_the_likely_field(change, config, said, tmp_path):
    folder = copied("tiny-sd15/unet", tmp_path / "unet")
    if change:
        rewrite(folder, change)
    change_json(folder / "config.json", **config)
    told = message(load_unet, folder)
    assert told.startswith(f"weights={folder / WEIGHTS}: ") and said in told and "\n" not in told


@pytest.mark.parametrize(
    "change", [{"latent_channels": 8}, {"layers_per_block": 2}, {"block_out_channels": [8, 8, 16]}]
)
def test_a_vae_that_does_not_fit_its_config(change, tmp_path):
    folder = copied("tiny-sd15/vae", tmp_path / "vae")
    change_json(folder / "config.json", **change)
    ((field, value),) = change.items()
    assert f"(likely vae/config.json:{field}={value} is wrong)" in message(load_vae, folder)


@pytest.mark.parametrize("damage, problem", [
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged or incomplete ("),
    (lambda path: path.write_bytes(b""), "damaged or incomplete ("),
    (lambda path: path.write_bytes(b"\xff" * 64), "damaged or incomplete ("),
    (lambda path: rewrite(path.parent, lambda t: t | {"conv_in.bias": np.zeros(16, np.int32)}),
     "not of dtype F64, F32, F16, BF16: conv_in.bias of I32; "),
])  # fmt: skip
def test_damaged_weights(damage, problem, tmp_path):
    folder = copied("tiny-sd15/unet", tmp_path / "unet")
    damage(folder / WEIGHTS)
    assert message(load_unet, folder).startswith(f"weights={folder / WEIGHTS}: {problem}")


# Configs.

REMEDY = "take a Stable Diffusion 1.x or 2.x model"


@pytest.mark.parametrize("field, value, problem", [
    ("mid_block_type", "UNetMidBlock2D", "not supported, only 'UNetMidBlock2DCrossAttn'"),
    ("act_fn", "gelu", "not supported, only 'silu' or 'swish'"),
    ("quantization_config", {"load_in_4bit": True}, "not supported, only None"),
    ("transformer_layers_per_block", [1, 2, 10], "not a positive whole number"),
    ("cross_attention_dim", [32, 32, 32], "not a positive whole number"),
    ("layers_per_block", 0, "not a positive whole number"),
    ("norm_eps", 0, "not a number above 0"),
    ("attention_head_dim", 5, "not numbers of heads that divide block_out_channels=[16, 32, 32]"),
    ("attention_head_dim", [2, 4], "not numbers of heads that divide block_out_channels=[16, 32, 32]"),
    ("block_out_channels", [16, 20, 32], "not a list of multiples of norm_num_groups=8"),
    ("down_block_types", ["DownBlock2D"] * 2, "not one block for each of block_out_channels=[16, 32, 32]"),
    ("up_block_types", ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
     "AttnUpBlock2D is not supported, only UpBlock2D and CrossAttnUpBlock2D"),
    ("_class_name", "UNet3DConditionModel", "not a UNet2DConditionModel"),
])  # fmt: skip
def test_a_unet_that_we_do_not_have_is_refused_by_field(field, value, problem):
    told = message(unet_from_config, config_of("unet") | {field: value})
    assert told.startswith(f"unet/config.json:{field}=") and told.endswith(f": {problem}; {REMEDY}"), told


@pytest.mark.parametrize("field, value, problem", [
    ("shift_factor", 0.1, "not supported, only None"),
    ("latents_mean", [0.0], "not supported, only None"),
    ("use_quant_conv", False, "not supported, only True"),
    ("mid_block_add_attention", False, "not supported, only True"),
    ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
     "AttnDownEncoderBlock2D is not supported, only DownEncoderBlock2D"),
    ("scaling_factor", "1", "not a positive number"),
    ("out_channels", 4, "differs from in_channels=3"),
    ("_class_name", "VQModel", "not a AutoencoderKL"),
])  # fmt: skip
def test_a_vae_that_we_do_not_have_is_refused_by_field(field, value, problem):
    told = message(vae_from_config, config_of("vae") | {field: value})
    assert told.startswith(f"vae/config.json:{field}=") and told.endswith(f"; {REMEDY}"), told
    assert problem in told


@pytest.mark.parametrize("part, from_config", [("unet", unet_from_config), ("vae", vae_from_config)])
def test_no_field_that_would_change_the_function_is_passed_over(part, from_config):
    for field, values in sd_config.FIELDS[part][0].items():
        for value in values:
            from_config(config_of(part) | {field: value})
        assert message(from_config, config_of(part) | {field: "other"}).startswith(
            f"{part}/config.json:{field}=other: "
        )


EMA = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 0.6667,
       "update_after_step": 0, "use_ema_warmup": False}  # fmt: skip


@pytest.mark.parametrize("part, load", [("unet", load_unet), ("vae", load_vae)])
def test_fields_that_are_not_diffusers_own_are_noted_once(part, load, tmp_path, caplog):
    folders.note.cache_clear()
    folder = copied(f"tiny-sd15/{part}", tmp_path / part)
    change_json(folder / "config.json", **EMA)
    module, params = load(folder)
    load(folder)
    assert module == load(FIXTURES / "tiny-sd15" / part)[0] and same_as_original(params, part)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and ", ".join(EMA) in record.getMessage()
    assert "_diffusers_version" not in caplog.text and "although" not in caplog.text
    # What a later version writes may mean something.
    from_config = {"unet": unet_from_config, "vae": vae_from_config}[part]
    from_config(config_of(part) | {"swirl": 2, "_diffusers_version": "0.100.0.dev0"})
    assert "swirl" in caplog.text and "0.100.0.dev0" in caplog.text


def test_a_whole_number_will_do_as_scaling_factor():
    factor = vae_from_config(config_of("vae") | {"scaling_factor": 1}).scaling_factor
    assert factor == 1.0 and isinstance(factor, float)


def test_configs_from_before_a_field_was_made_have_its_default():
    needed = ("attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types",
              "layers_per_block", "norm_num_groups", "up_block_types")  # fmt: skip
    full = config_of("unet")
    assert unet_from_config({name: full[name] for name in needed}) == unet_from_config(full)
    assert unet_from_config(full | {"upcast_attention": True, "sample_size": 96}) == unet_from_config(full)
    assert message(unet_from_config, {}) == "unet/config.json=attention_head_dim: missing; fetch the file again"
    full = config_of("vae")
    needed = ("block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups", "up_block_types")
    assert vae_from_config({name: full[name] for name in needed}) == vae_from_config(full)


# Whole folders.


@pytest.mark.parametrize("path, change, problem", [
    ("", None, "pipeline={folder}: no such folder; give the folder of a Stable Diffusion 1.x or 2.x model"),
    ("model_index.json", None, "pipeline={folder}: holds no model_index.json; give the folder of a Stable Diffusion"),
    ("model_index.json", "{", "pipeline={folder}/model_index.json: not readable as JSON ("),
    ("model_index.json", "[]", "pipeline={folder}/model_index.json: not a JSON object; fetch the file again"),
    ("model_index.json", '{"unet": ["diffusers", "PriorTransformer"]}',
     "model_index.json:unet=PriorTransformer: not a UNet2DConditionModel; give the folder"),
    ("unet/config.json", None, "pipeline={folder}/unet/config.json: no such file; give the folder of a Stable"),
    (f"vae/{WEIGHTS}", None, "weights={folder}/vae/" + WEIGHTS + ": no such file; fetch the whole folder, or"),
    ("scheduler/scheduler_config.json", None, "pipeline={folder}/scheduler/scheduler_config.json: no such file; give"),
])  # fmt: skip
def test_what_a_folder_lacks_is_named(path, change, problem, tmp_path):
    folder = tmp_path / "model"
    if path:
        copied("tiny-sd21", folder)
        (folder / path).unlink()
        if change is not None:
            (folder / path).write_text(change)
    assert message(load_pipeline, folder).startswith(problem.format(folder=folder))


@pytest.mark.parametrize("part, problem", [
    ("text_encoder", "unet/config.json:cross_attention_dim=48: the text encoder's hidden_size is 32; take"),
    ("inpainting", "unet/config.json:in_channels=9 -> 4: the VAE's latents have 4 channels; take"),
])  # fmt: skip
def test_parts_of_different_models_are_refused(part, problem, tmp_path):
    folder = copied("tiny-sd21", tmp_path / "model")
    if part == "text_encoder":
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(FIXTURES / "tiny-sd15" / part / file, folder / part / file)
    else:
        change_json(folder / "unet" / "config.json", in_channels=9)
        rewrite(folder / "unet", shrink("conv_in.weight", 16, 9, 3, 3))
    assert message(load_pipeline, folder).startswith(problem)
