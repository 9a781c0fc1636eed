"""CLIP folders in and out. Run as a script it holds what needs eight devices; a test starts it so."""

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from cmd_jax import defaults
from cmd_jax.errors import UserError
from cmd_jax.interop import clip
from cmd_jax.interop.weights import flatten
from cmd_jax.sharding import make_mesh, partitioning
from cmd_jax.state import abstract

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
SD = ["tiny-sd15", "tiny-sd21"]
NASTY = {
    "empty": "",
    "blanks": " \t\n\u00a0\u3000 ",
    "NUL": "a\0b \0",
    "control": "a\x01b\x1f\x7f\x85c",
    "emoji": "a 👩‍👩‍👧‍👦 🏳️‍🌈 cat😀dog",
    "right to left": "\u202eقطة حمراء تجري שלום\u202c",
    "combining": "e\u0301 \u00e9 Z\u0351\u0343\u034a\u0361a\u0300\u0315lgo n\u0303",
    "compatibility": "ﬁne Ⅷ ① ﷺ",
    "case": "İstanbul ǅ ẞ ΣΑΣ",
    "apostrophes": "it's they're I'M we'LL ''s 'tis o'clock'''s",
    "digits": "1234 ٣٤ ²½ 4k",
    "punctuation": "...---,,,???(red)[dog] #cat@the_dog &c.",
    "special tokens": "a <|endoftext|> b<|startoftext|>c <|ENDOFTEXT|>",
    "one long word": "redcat" * 2000,
    "long": "a red cat, " * 1000,
    "Chinese": "一只红色的猫在奔跑",
    "Thai": "แมวสีแดงกำลังวิ่ง",
    "last code points": "\uffff\U0010ffff\U000e0001",
}


@functools.cache
def reference(name):
    with np.load(FIXTURES / name / "reference.npz") as file:
        return {key: file[key] for key in ("prompts", "input_ids", "text_hidden") if key in file} | (
            dict(file) if name == "tiny-clip" else {}
        )


@functools.cache
def encoder(name):
    return clip.load_text_encoder(FIXTURES / name / "text_encoder")


@functools.cache
def tokenizer(name):
    return clip.load_tokenizer(FIXTURES / name / "tokenizer")


def relative_error(value, wanted):
    return np.abs(np.asarray(value) - wanted).max() / np.abs(wanted).max()


def copied(source, folder):
    shutil.copytree(FIXTURES / source, folder, copy_function=shutil.copyfile)
    return folder


def change_json(path, **changes):
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "absent"}))


def message(function, *arguments, **more):
    with pytest.raises(UserError) as error:
        function(*arguments, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# The recorded numbers.


@pytest.mark.parametrize("name", SD)
def test_token_ids_are_the_recorded_ones(name):
    ids = tokenizer(name)(reference(name)["prompts"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, reference(name)["input_ids"])


@pytest.mark.parametrize("name", SD)
def test_text_states_are_the_recorded_ones(name):
    module, params = encoder(name)
    ids = reference(name)["input_ids"]
    states, pooled = jax.device_get(jax.jit(module.apply)({"params": params}, ids))
    assert relative_error(states, reference(name)["text_hidden"]) < 1e-5
    ends = (ids == tokenizer(name).end).argmax(axis=1)
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


def test_a_download_of_the_fp16_variant_is_read(tmp_path):
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    jax.tree.map(np.testing.assert_array_equal, clip.load_text_encoder(folder)[1], encoder("tiny-sd15")[1])


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
    "missing": ({"final_layer_norm.bias": None}, r"lacks final_layer_norm\.bias \(32,\); give the weights"),
    "extra": ({"adapter": np.ones((2, 3), np.float32)}, r"the model has no place for adapter \(2, 3\); give"),
    "renamed": (
        {"final_layer_norm.bias": None, "final_layer_norm.beta": np.ones(32, np.float32)},
        r"lacks final_layer_norm\.bias \(32,\), and there is no place for final_layer_norm\.beta \(32,\); ",
    ),
    "misshapen": (
        {"encoder.layers.2.mlp.fc1.weight": np.ones((100, 32), np.float32)},
        r"encoder\.layers\.2\.mlp\.fc1\.weight has shape \(100, 32\), expected \(128, 32\); .*"
        r"\(likely intermediate_size=128\)",
    ),
    "transposed": (
        {"embeddings.token_embedding.weight": np.ones((32, 533), np.float32)},
        r"token_embedding\.weight has shape \(32, 533\), expected \(533, 32\)",
    ),
    "whole numbers": (
        {"final_layer_norm.bias": np.ones(32, np.int8)},
        r"dtype of final_layer_norm\.bias=I8: not one of the choices; use one of F64",
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
    ("depth", "said"), [(2, r"has no place for encoder\.layers\.2\."), (4, r"lacks encoder\.layers\.3\.")]
)
def test_another_depth_is_blamed_on_the_config(depth, said, tmp_path):
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    change_json(folder / "config.json", num_hidden_layers=depth)
    with pytest.raises(UserError, match=said + r".* and 13 more tensors; .*correct it \(num_hidden_layers\)$"):
        clip.load_text_encoder(folder)


def test_a_size_of_a_whole_clip_is_blamed_on_its_tower(tmp_path):
    folder = copied("tiny-clip", tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", text_config=config["text_config"] | {"intermediate_size": 160})
    text = message(clip.load, folder)
    assert "text_model.encoder.layers.0.mlp.fc1.bias has shape (128,), expected (160,)" in text or "fc1.weight" in text
    assert text.endswith("(likely intermediate_size=160)")


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
        "no config": "config.json: cannot be read (No such file or directory)",
        "no folder": "no such folder",
        "torn config": "not JSON",
        "list config": "holds no fields",
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
    "rope_theta": (10000.0, "not a field whose meaning is known here"),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_config_that_means_another_function_is_refused(field, tmp_path):
    folder = copied("tiny-sd15/text_encoder", tmp_path / "x")
    value, said = BAD_FIELDS[field]
    change_json(folder / "config.json", **{field: value})
    text = message(clip.load_text_encoder, folder)
    assert text.startswith(f"{folder}/config.json: {field}={value}: ") and said in text


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


@pytest.mark.parametrize("name", SD)
@pytest.mark.parametrize("kind", NASTY)
def test_any_text_becomes_ids(name, kind):
    encode = tokenizer(name)
    (ids,) = encode([NASTY[kind]])
    ends = np.flatnonzero(ids == encode.end)
    assert ids.shape == (77,) and ids[0] == encode.start and len(ends)
    assert ids.min() >= 0 and ids.max() < encode.vocabulary
    if kind in ("long", "one long word"):
        assert ends.tolist() == [76]
    elif kind in ("empty", "blanks"):
        assert ids.tolist() == [encode.start, encode.end] + [encode.pad] * 75
    else:
        assert ids[-1] == encode.pad


def test_case_and_white_space_do_not_count():
    encode = tokenizer("tiny-sd21")
    one, *others = encode(["a red cat", "  A\tRED \n\ncat ", "a\u00a0red\u2003cat"])
    assert all((ids == one).all() for ids in others)
    one, other = encode(["caf\u00e9", "cafe\u0301"])
    assert (one == other).all()


def test_an_exclamation_mark_is_no_padding():
    ids = tokenizer("tiny-sd21")(["a! cat"])[0].tolist()
    assert ids[:5] == [531, 320, 256, 515, 532] and set(ids[5:]) == {tokenizer("tiny-sd21").pad} == {0}


def test_no_text_is_no_ids():
    assert tokenizer("tiny-sd15")([]).shape == (0, 77)


def test_half_a_character_is_refused():
    text = message(tokenizer("tiny-sd15"), ["a cat", "b \udcff"])
    assert text == r"text=b \udcff: character 3 is half of one, not valid Unicode; write it in UTF-8"


def test_cut_texts_are_told_once(caplog):
    encode = clip.load_tokenizer(FIXTURES / "tiny-sd15" / "tokenizer")
    fits, longer = "a " * 75, "a " * 76
    with caplog.at_level(logging.WARNING):
        assert (encode([fits])[0] == encode([longer])[0]).all()
        encode([fits, longer, longer])
    (record,) = caplog.records
    assert record.getMessage() == (
        "1 of 1 texts are longer than 75 tokens and lose their ends (counted from 0: 0); told once"
    )


def special(content):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def test_special_tokens_come_from_the_map_then_the_config_then_clip(tmp_path):
    folder = copied("tiny-sd21/tokenizer", tmp_path / "x")
    change_json(folder / "tokenizer_config.json", pad_token="<|endoftext|>")
    assert clip.load_tokenizer(folder).pad == 0
    change_json(folder / "special_tokens_map.json", pad_token=special("#"), bos_token=special("<|startoftext|>"))
    assert (clip.load_tokenizer(folder).pad, clip.load_tokenizer(folder).start) == (2, 531)
    (folder / "special_tokens_map.json").unlink()
    assert clip.load_tokenizer(folder).pad == 532
    (folder / "tokenizer_config.json").unlink()
    assert (clip.load_tokenizer(folder).pad, clip.load_tokenizer(folder).max_length) == (532, 77)


def test_the_length_is_the_folder_s(tmp_path):
    folder = copied("tiny-sd15/tokenizer", tmp_path / "x")
    change_json(folder / "tokenizer_config.json", model_max_length=12)
    assert clip.load_tokenizer(folder)(["a cat"]).shape == (1, 12)
    change_json(folder / "tokenizer_config.json", model_max_length=10**30)
    assert clip.load_tokenizer(folder).max_length == 77


def test_a_tokenizer_is_saved_as_it_was(tmp_path):
    tokenizer("tiny-sd21").save(tmp_path / "new" / "tokenizer")
    for path in (FIXTURES / "tiny-sd21" / "tokenizer").iterdir():
        assert (tmp_path / "new" / "tokenizer" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("pairs", [list, " ".join])
def test_tokenizer_json_serves_instead(pairs, tmp_path):
    folder = copied("tiny-sd21/tokenizer", tmp_path / "x")
    vocabulary, merges = json.loads((folder / "vocab.json").read_text()), (folder / "merges.txt").read_text()
    merges = [pairs(line.split(" ")) for line in merges.splitlines()[1:] if line]
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": [special("!")]}))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    texts = list(NASTY.values())
    np.testing.assert_array_equal(clip.load_tokenizer(folder)(texts), tokenizer("tiny-sd21")(texts))


def spoil(folder, name, content):
    (folder / name).write_bytes(content)


BAD_TOKENIZERS = {
    "no merges": (lambda f: (f / "merges.txt").unlink(), "holds no merges.txt; give a folder with vocab.json"),
    "torn vocabulary": (lambda f: spoil(f, "vocab.json", b'{"a": 1,'), "not JSON"),
    "vocabulary of words": (lambda f: spoil(f, "vocab.json", b'{"a": "b"}'), "special token '<|startoftext|>' is not"),
    "ids that are none": (lambda f: change_json(f / "vocab.json", a="b"), "damaged (TypeError"),
    "merges of no tokens": (lambda f: spoil(f, "merges.txt", b"#version: 0.2\nq q\n"), "damaged (Exception: "),
    "merges of three": (lambda f: spoil(f, "merges.txt", b"#version: 0.2\nr e d\n"), "damaged ("),
    "merges in Latin-1": (lambda f: spoil(f, "merges.txt", b"\xff \xfe\n"), "damaged (UnicodeDecodeError"),
    "lost padding": (
        lambda f: change_json(f / "special_tokens_map.json", pad_token="<pad>"), "special token '<pad>' is not"
    ),
    "added tokens": (
        lambda f: change_json(f / "tokenizer_config.json", added_tokens_decoder={"533": special("<me>")}),
        "tokens added to the vocabulary are not supported ('<me>')",
    ),
    "another kind": (
        lambda f: change_json(f / "tokenizer_config.json", tokenizer_class="T5Tokenizer"), "use one of CLIPTokenizer"
    ),
    "left": (lambda f: change_json(f / "tokenizer_config.json", padding_side="left"), "use one of right"),
    "upper case": (lambda f: change_json(f / "tokenizer_config.json", do_lower_case=False), "use one of True"),
    "length": (lambda f: change_json(f / "tokenizer_config.json", model_max_length=2), "not a whole number from 3"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_TOKENIZERS)
def test_bad_tokenizers_are_one_line(fault, tmp_path):
    folder = copied("tiny-sd21/tokenizer", tmp_path / "x")
    change, said = BAD_TOKENIZERS[fault]
    change(folder)
    assert said in message(clip.load_tokenizer, folder)


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


def test_eight_devices():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-4000:]


def check_eight_devices():
    mesh_config = defaults.stage("content").mesh.copy_and_resolve_references()
    mesh_config.update(data=2, fsdp=2, tensor=2)
    mesh = make_mesh(mesh_config)
    place = partial(abstract, mesh=mesh, rules=defaults.RULES)
    folder, ids = FIXTURES / "tiny-sd15" / "text_encoder", reference("tiny-sd15")["input_ids"][[0, 1, 2, 0]]
    module, one = clip.load_text_encoder(folder, dtype="bfloat16")
    _, many = clip.load_text_encoder(folder, dtype="bfloat16", place=place)
    assert not isinstance(jax.tree.leaves(one)[0], jax.Array)
    wanted = flatten(place(lambda key: module.init(key, ids)["params"]))
    for name, array in flatten(many).items():
        assert array.sharding == wanted[name].sharding and array.dtype == jax.numpy.bfloat16, name
        np.testing.assert_array_equal(array, flatten(one)[name], err_msg=name)
    query = many["blocks"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape == (3, 16, 16)
    jax.tree.map(np.testing.assert_array_equal, clip.text_encoder_state(many), clip.text_encoder_state(one))

    module, one = clip.load_text_encoder(folder)
    _, many = clip.load_text_encoder(folder, place=place)
    states, pooled = jax.jit(module.apply)({"params": one}, ids)
    with partitioning(mesh, defaults.RULES):
        spread = jax.jit(module.apply)({"params": many}, ids)
    assert relative_error(spread[0], np.asarray(states)) < 1e-5 and relative_error(spread[1], np.asarray(pooled)) < 1e-5

    folder, wanted = FIXTURES / "tiny-clip", reference("tiny-clip")
    (module, one, _), (_, many, _) = clip.load(folder), clip.load(folder, place=place)
    jax.tree.map(np.testing.assert_array_equal, one, many)
    kernel = many["vision"]["embed"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 8, 3, 20)
    images = wanted["pixel_values"].transpose(0, 2, 3, 1)[[0, 1, 2, 2]]
    with partitioning(mesh, defaults.RULES):
        logits = jax.jit(module.apply)({"params": many}, wanted["input_ids"][[0, 1, 2, 2]], images)
    assert relative_error(logits[:3, :3], wanted["logits_per_text"]) < 1e-5


if __name__ == "__main__":
    check_eight_devices()
    print("done")
