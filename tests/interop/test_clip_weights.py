"""CLIP folders in and out."""

import functools
import json
import shutil
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
from interop.clip_folders import FIXTURES, change_json, copied, message
from PIL import Image
from safetensors.numpy import load_file, save_file

from cmd_jax import defaults
from cmd_jax.errors import UserError
from cmd_jax.interop import clip, folders
from cmd_jax.interop.clip_tokenizer import Tokenizer
from cmd_jax.interop.weights import flatten
from cmd_jax.sharding import abstract, make_mesh, partitioning

SD = ["tiny-sd15", "tiny-sd21"]


@functools.cache
def reference(name):
    with np.load(FIXTURES / name / "reference.npz") as file:
        return {key: file[key] for key in ("prompts", "input_ids", "text_hidden") if key in file} | (
            dict(file) if name == "tiny-clip" else {}
        )


@functools.cache
def encoder(name):
    return clip.load_text_encoder(FIXTURES / name / "text_encoder")


def relative_error(value, wanted):
    return np.abs(np.asarray(value) - wanted).max() / np.abs(wanted).max()


# The recorded numbers.


@pytest.mark.parametrize("name", SD)
def test_text_states_are_the_recorded_ones(name):
    module, params = encoder(name)
    ids = reference(name)["input_ids"]
    states, pooled = jax.device_get(jax.jit(module.apply)({"params": params}, ids))
    assert relative_error(states, reference(name)["text_hidden"]) < 1e-5
    ends = (ids == Tokenizer(FIXTURES / name / "tokenizer").end).argmax(axis=1)
    np.testing.assert_array_equal(pooled, states[np.arange(len(ids)), ends])


def test_clip_outputs_are_the_recorded_ones():
    module, params, nothing = clip.load(FIXTURES / "tiny-clip")
    wanted = reference("tiny-clip")

    @jax.jit
    def run(params, ids, images):
        apply = partial(module.apply, {"params": params})
        return apply(ids, method=module.embed_text), apply(images, method=module.embed_images), apply(ids, images)

    out = run(params, wanted["input_ids"], wanted["pixel_values"].transpose(0, 2, 3, 1))
    for value, name in zip(out, ("text_embeds", "image_embeds", "logits_per_text"), strict=True):
        assert relative_error(value, wanted[name]) < 1e-5, name
    assert nothing is None


# Weights.


@pytest.mark.parametrize("name", SD)
def test_weights_go_back_as_they_came(name):
    module, params = encoder(name)
    state, stored = clip.text_encoder_state(params), load_file(FIXTURES / name / "text_encoder" / "model.safetensors")
    assert state.keys() == {f"text_model.{key}" for key in stored}
    for key, value in stored.items():
        np.testing.assert_array_equal(state[f"text_model.{key}"], value)


def test_what_was_written_is_read_again(tmp_path):
    module, params = encoder("tiny-sd21")
    state = clip.text_encoder_state(params)
    buffer = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    save_file(
        {name: np.ascontiguousarray(value) for name, value in (state | buffer).items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(clip.text_encoder_config(module)))
    again, same = clip.load_text_encoder(tmp_path)
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_parameters_have_the_wanted_dtype_whatever_is_stored(stored, tmp_path):
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    original = load_file(folder / "model.safetensors")
    kind = np.dtype(getattr(ml_dtypes, stored, None) or stored)
    save_file({name: value.astype(kind) for name, value in original.items()}, folder / "model.safetensors")
    name = "encoder.layers.1.mlp.fc1.weight"
    for wanted in ("bfloat16", "float32"):
        module, params = clip.load_text_encoder(folder, dtype=wanted)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {str(module.dtype)} == {wanted}
        value = original[name].astype(kind).astype(wanted)
        np.testing.assert_array_equal(params["blocks"]["mlp_in"]["kernel"][1], value.T)


def test_bfloat16_states_are_near(tmp_path):
    module, params = clip.load_text_encoder(FIXTURES / "tiny-sd21" / "text_encoder", dtype="bfloat16")
    states, _ = jax.jit(module.apply)({"params": params}, reference("tiny-sd21")["input_ids"])
    assert states.dtype == np.float32
    assert relative_error(states, reference("tiny-sd21")["text_hidden"]) < 0.05


def change_weights(folder, changes):
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items() if v is not None}, path)


BAD_WEIGHTS = {
    "renamed": (
        {"final_layer_norm.bias": None, "final_layer_norm.beta": np.ones(32, np.float32)},
        r"missing: text_model\.final_layer_norm\.bias; .* no place for 1: text_model\.final_layer_norm\.beta; ",
    ),
    "misshapen": (
        {"encoder.layers.2.mlp.fc1.weight": np.ones((100, 32), np.float32)},
        r"1 of another shape: text_model\.encoder\.layers\.2\.mlp\.fc1\.weight \[100, 32\], expected \[128, 32\]; .*"
        r"\(likely intermediate_size=128 is wrong\)",
    ),
    "twice": (
        {"text_model.final_layer_norm.bias": np.ones(32, np.float32)},
        r"final_layer_norm\.bias and (text_model\.)?final_layer_norm\.bias are one tensor; ",
    ),
}


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_wrong_tensors_are_named(fault, tmp_path):
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    changes, pattern = BAD_WEIGHTS[fault]
    change_weights(folder, changes)
    with pytest.raises(UserError, match=pattern):
        clip.load_text_encoder(folder)


@pytest.mark.parametrize(
    ("depth", "said"),
    [(2, r"no place for 16: text_model\.encoder\.layers\.2\."), (4, r"missing: text_model\.encoder\.layers\.3\.")],
)
def test_another_depth_is_blamed_on_the_config(depth, said, tmp_path):
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    change_json(folder / "config.json", num_hidden_layers=depth)
    with pytest.raises(UserError, match=said + r".* and 13 more; .*\(likely num_hidden_layers is wrong\)$"):
        clip.load_text_encoder(folder)


def test_a_size_of_a_whole_clip_is_blamed_on_its_tower(tmp_path):
    folder = copied("tiny-clip", tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", text_config=config["text_config"] | {"intermediate_size": 160})
    text = message(clip.load, folder)
    assert "text_model.encoder.layers.0.mlp.fc1.bias [128], expected [160]" in text
    assert text.endswith("(likely intermediate_size=160 is wrong)")


@pytest.mark.parametrize("fault", ["torn", "no weights", "no config", "no folder", "torn config", "list config"])
def test_damaged_folders_are_one_line(fault, tmp_path):
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    path = folder / "model.safetensors"
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:100_000])
    elif fault == "no weights":
        path.unlink()
    elif fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "no folder":
        folder = tmp_path / "absent"
    else:
        (folder / "config.json").write_text('{"hidden_size": 3' if fault == "torn config" else "[1]")
    said = {
        "torn": "damaged or incomplete",
        "no weights": "model.safetensors: no such file",
        "no config": "config.json: no such file",
        "no folder": "no such folder",
        "torn config": "not readable as JSON",
        "list config": "not a JSON object",
    }
    assert said[fault] in message(clip.load_text_encoder, folder)


# config.json.

BAD_FIELDS = {
    "hidden_act": ("gelu_new", "use one of quick_gelu, gelu"),
    "hidden_size": (30.5, "not a positive whole number"),
    "num_attention_heads": (5, "does not divide hidden_size=32"),
    "layer_norm_eps": (0, "not a small positive number"),
    "eos_token_id": (533, "not one of the 533 ids"),
    "model_type": ("siglip_text_model", "use one of clip_text_model"),
    "quantization_config": ({"bits": 4}, "not supported"),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_config_that_means_another_function_is_refused(field, tmp_path):
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    value, said = BAD_FIELDS[field]
    change_json(folder / "config.json", **{field: value})
    text = message(clip.load_text_encoder, folder)
    assert text.startswith(f"{folder}/config.json: {field}={value}: ") and said in text


def test_fields_of_other_models_are_noted_once(tmp_path, caplog):
    folders.note.cache_clear()
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    change_json(folder / "config.json", rope_theta=10000.0, torchscript=False)
    for _ in range(2):
        assert clip.load_text_encoder(folder)[0] == encoder("tiny-sd15")[0]
    (record,) = caplog.records
    assert "rope_theta" in record.getMessage() and "torchscript" not in record.getMessage()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "clip_text_model"}, "not a whole CLIP"),
        ({"projection_dim": 0}, "projection_dim=0: not a positive whole number"),
        ({"text_config": 3}, "text_config=3: not a group of fields"),
        ({"vision_config": {"num_channels": 4}}, "vision_config.num_channels=4"),
        ({"vision_config": {"patch_size": 300}}, "vision_config.patch_size=300: larger than image_size=224"),
        ({"text_config_dict": {"hidden_act": "relu"}}, "text_config_dict.hidden_act=relu"),
    ],
)
def test_a_config_of_a_whole_clip_is_checked_too(changes, said, tmp_path):
    folder = copied("tiny-clip", tmp_path / "x")
    change_json(folder / "config.json", **changes)
    assert said in message(clip.load, folder)


def test_fields_that_are_left_out_have_clip_s_values(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"torch_dtype": "float16", "pruned_heads": {}}}))
    text = message(clip.load, tmp_path)
    assert "model.safetensors: no such file" in text  # ViT-B/32, but for its weights


def test_the_legacy_end_of_text_is_the_highest_id(tmp_path):
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    change_json(folder / "config.json", eos_token_id=2)
    module, params = clip.load_text_encoder(folder)
    assert module.end_token is None and clip.text_encoder_config(module)["eos_token_id"] == 2
    ids = reference("tiny-sd15")["input_ids"]
    usual, params = encoder("tiny-sd15")
    np.testing.assert_array_equal(*(jax.jit(m.apply)({"params": params}, ids)[1] for m in (module, usual)))


# Texts.


def test_a_whole_clip_brings_its_tokenizer_if_it_fits(tmp_path):
    folder = copied("tiny-clip", tmp_path / "x")
    shutil.copytree(FIXTURES / "tiny-sd15" / "tokenizer", folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    encode = clip.load(folder)[2]
    assert encode(["a cat"]).shape == (1, 77)
    change_json(folder / "tokenizer_config.json", model_max_length=78)
    assert "model_max_length=78: the text tower has 77 positions; " in message(clip.load, folder)
    change_json(folder / "tokenizer_config.json", model_max_length=77)
    change_json(folder / "special_tokens_map.json", eos_token="#")
    assert "eos_token=2: the text tower wants 532; " in message(clip.load, folder)
    change_json(folder / "special_tokens_map.json", eos_token="<|endoftext|>")
    change_json(folder / "vocab.json", more=533)
    assert "vocabulary=534: the text tower has embeddings for 533 tokens; " in message(clip.load, folder)


# Images.


@pytest.mark.parametrize(("height", "width"), [(64, 48), (40, 90), (32, 32), (300, 224), (17, 16)])
def test_frames_are_resized_cropped_and_normalised(height, width):
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    size = 32
    out = clip.preprocess(frames, size)
    assert out.shape == (2, size, size, 3) and out.dtype == np.float32
    scale = size / min(height, width)
    image = Image.fromarray(frames[1]).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    top, left = round((image.height - size) / 2), round((image.width - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(out[1], (pixels / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 0, 8, 3), np.uint8)]
)
def test_other_frames_are_refused(frames):
    assert "not uint8 [N,H,W,3]" in message(clip.preprocess, frames)


@pytest.mark.parametrize("changes", [{"image_mean": [0.5, 0.5, 0.5]}, {"resample": 2}])
def test_a_clip_with_other_preprocessing_is_refused(changes, tmp_path):
    folder = copied("tiny-clip", tmp_path / "x")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_std": clip.STD, "image_mean": clip.MEAN, "resample": 3})
    )
    clip.load(folder)
    change_json(folder / "preprocessor_config.json", **changes)
    assert f"preprocessor_config.json: {list(changes)[0]}=" in message(clip.load, folder)


# Meshes.


def check_eight_devices():
    mesh_config = defaults.stage("content").mesh.copy_and_resolve_references()
    mesh_config.update(data=2, fsdp=2, tensor=2)
    mesh = make_mesh(mesh_config)
    shardings = partial(abstract, mesh=mesh, rules=defaults.RULES)
    folder, ids = FIXTURES / "tiny-sd15" / "text_encoder", reference("tiny-sd15")["input_ids"][[0, 1, 2, 0]]
    module, one = clip.load_text_encoder(folder, dtype="bfloat16")
    _, many = clip.load_text_encoder(folder, dtype="bfloat16", shardings=shardings)
    assert not isinstance(jax.tree.leaves(one)[0], jax.Array)
    wanted = flatten(shardings(lambda key: module.init(key, ids)["params"]))
    for name, array in flatten(many).items():
        assert array.sharding == wanted[name].sharding and array.dtype == jax.numpy.bfloat16, name
        np.testing.assert_array_equal(array, flatten(one)[name], err_msg=name)
    query = many["blocks"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape == (3, 16, 16)
    jax.tree.map(np.testing.assert_array_equal, clip.text_encoder_state(many), clip.text_encoder_state(one))

    module, one = clip.load_text_encoder(folder)
    _, many = clip.load_text_encoder(folder, shardings=shardings)
    states, pooled = jax.jit(module.apply)({"params": one}, ids)
    with partitioning(mesh, defaults.RULES):
        spread = jax.jit(module.apply)({"params": many}, ids)
    assert relative_error(spread[0], np.asarray(states)) < 1e-5 and relative_error(spread[1], np.asarray(pooled)) < 1e-5

    folder, wanted = FIXTURES / "tiny-clip", reference("tiny-clip")
    (module, one, _), (_, many, _) = clip.load(folder), clip.load(folder, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, one, many)
    kernel = many["vision"]["embed"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 8, 3, 20)
    images = wanted["pixel_values"].transpose(0, 2, 3, 1)[[0, 1, 2, 2]]
    with partitioning(mesh, defaults.RULES):
        logits = jax.jit(module.apply)({"params": many}, wanted["input_ids"][[0, 1, 2, 2]], images)
    assert relative_error(logits[:3, :3], wanted["logits_per_text"]) < 1e-5
