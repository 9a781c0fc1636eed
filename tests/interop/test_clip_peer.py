"""Our CLIP against transformers': other sizes and activations, texts, and weights there and back."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import peer as peers
import pytest
from interop.clip_folders import change_json, copied
from peer import torch, transformers

from cmd_jax.interop import clip
from cmd_jax.interop.clip_tokenizer import Tokenizer
from cmd_jax.interop.weights import write_safetensors

pytestmark = peers.grouped
FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXT = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 50, "num_attention_heads": 3, "num_hidden_layers": 2}
VISION = {"image_size": 22, "patch_size": 5, "hidden_size": 40, "intermediate_size": 36, "num_attention_heads": 4}
TEXTS = {
    "end by id, gelu": dict(eos_token_id=59, hidden_act="gelu", layer_norm_eps=1e-2),
    "legacy end, one layer": dict(eos_token_id=2, num_hidden_layers=1, max_position_embeddings=20),
    "one head": dict(eos_token_id=30, num_attention_heads=1, hidden_size=20),
}


def awake(model):
    """Weights far from their initial values, and biases that are not 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def relative_error(value, wanted):
    wanted = wanted.detach().numpy()
    return np.abs(np.asarray(value) - wanted).max() / np.abs(wanted).max()


def token_ids(positions):
    ids = np.random.default_rng(0).integers(3, 59, (3, min(positions, 16)), np.int32)
    ids[[0, 1, 2], [15, 4, 9]] = 59  # the highest
    ids[:, 12] = 30
    ids[:, 13] = 2
    return ids


@pytest.mark.parametrize("kind", TEXTS)
def test_text_towers_agree(kind, tmp_path):
    config = transformers.CLIPTextConfig(**TEXT | TEXTS[kind])
    peer = awake(transformers.CLIPTextModel(config))
    peer.save_pretrained(tmp_path)
    module, params = clip.load_text_encoder(tmp_path)
    ids = token_ids(config.max_position_embeddings)
    with torch.no_grad():
        wanted = peer(torch.tensor(ids, dtype=torch.long))
    states, pooled = jax.jit(module.apply)({"params": params}, ids)
    assert relative_error(states, wanted.last_hidden_state) < 1e-5
    assert relative_error(pooled, wanted.pooler_output) < 1e-5


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_whole_clips_agree(activation, tmp_path):
    text, vision = (fields | {"hidden_act": activation} for fields in (TEXT | {"eos_token_id": 59}, VISION))
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=18)
    peer = awake(transformers.CLIPModel(config))
    peer.save_pretrained(tmp_path)
    module, params, _ = clip.load(tmp_path)
    ids, images = token_ids(77), np.random.default_rng(1).standard_normal((2, 22, 22, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = peer(torch.tensor(ids, dtype=torch.long), torch.tensor(images.transpose(0, 3, 1, 2)))
    logits = jax.jit(module.apply)({"params": params}, ids, images)
    assert relative_error(logits, wanted.logits_per_text) < 1e-5


def test_a_config_of_old_files_means_the_same(tmp_path):
    """text_config_dict counts where there is one; old files list every field that any model has."""
    peer = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION))
    peer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    fields = {"pruned_heads": {}, "top_p": 1.0, "tie_word_embeddings": True, "use_bfloat16": False, "typical_p": 1.0}
    old = TEXT | {"layer_norm_eps": 1e-3, "eos_token_id": 2} | fields
    vision = config["vision_config"] | fields
    path.write_text(json.dumps(config | {"text_config_dict": old, "vision_config": vision, "vision_config_dict": None}))
    theirs, (ours, _, _) = transformers.CLIPConfig.from_pretrained(tmp_path), clip.load(tmp_path)
    assert ours.text.epsilon == theirs.text_config.layer_norm_eps == 1e-3
    assert (ours.text.end_token, theirs.text_config.eos_token_id) == (None, 2)


def test_every_field_that_transformers_writes_is_known():
    for defaults, peer in ((clip.TEXT, transformers.CLIPTextConfig()), (clip.VISION, transformers.CLIPVisionConfig())):
        fields = peer.to_dict()
        assert {key for key, value in fields.items() if value and key not in defaults} <= clip.INERT
        assert {key: fields[key] for key in defaults} == defaults


def test_torch_s_own_files_are_read(tmp_path):
    peer = awake(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, eos_token_id=59)))
    peer.config.save_pretrained(tmp_path)
    state = {f"text_model.{name}": value for name, value in peer.state_dict().items()}
    buffer = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save(state | buffer, tmp_path / "pytorch_model.bin")
    _, params = clip.load_text_encoder(tmp_path)
    for name, value in clip.text_encoder_state(params).items():
        np.testing.assert_array_equal(value, state[name].numpy())


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sd21"])
def test_what_we_write_loads_there(name, tmp_path):
    folder = FIXTURES / name / "text_encoder"
    module, params = clip.load_text_encoder(folder)
    write_safetensors(tmp_path / "model.safetensors", clip.text_encoder_state(params), {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(clip.text_encoder_config(module)))
    peer, info = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with np.load(FIXTURES / name / "reference.npz") as reference:
        ids, wanted = reference["input_ids"], reference["text_hidden"]
    with torch.no_grad():
        states = peer(torch.tensor(ids)).last_hidden_state.numpy()
    assert np.abs(states - wanted).max() < 1e-5 * np.abs(wanted).max()


# Texts.


@functools.cache
def nasty_texts():
    """By category of characters, and mixtures of pieces that meet the rules of splitting."""
    rng = np.random.default_rng(0)
    pieces = [
        "a", "RED", "cat", "'s", "'", "''", "'LL", " ", "  ", "\t", "\n", "1", "٣", "²", ".", "...", "-", "_", "é",
    ]  # fmt: skip
    pieces += [
        "e\u0301", "\0", "\x85", "\u2028", "\u200d", "\u00ad", "😀", "🏳️‍🌈", "ß", "İ", "ﬁ", "ǅ", "قطة", "שלום", "猫",
        "แมว",
    ]  # fmt: skip
    pieces += ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|", "|>", "\ufeff", "\U0010ffff", "#", "\\", '"']
    mixed = ["".join(rng.choice(pieces, rng.integers(1, 30))) for _ in range(400)]
    planes = ["".join(map(chr, range(i, i + 16))) for i in range(0, 0x3000, 16)]
    planes += ["".join(map(chr, rng.choice(0x110000 - 0xE000, 20) + 0xE000)) for _ in range(100)]
    return mixed + planes + ["", " ", "\0", "redcat" * 2000, "a red cat, " * 1000, "x" * 10_000, "🐈" * 5000]


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sd21"])
def test_ids_are_those_of_transformers(name):
    folder = FIXTURES / name / "tokenizer"
    # An "!" is split off and made padding there if padding is called so; the recorded ids are not made so.
    texts = [text.replace("!", "") for text in nasty_texts()]
    peer = transformers.CLIPTokenizer.from_pretrained(folder)
    wanted = peer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np").input_ids
    for text, ids, other in zip(texts, Tokenizer(folder)(texts), wanted, strict=True):
        assert ids.tolist() == other.tolist(), ascii(text)


def test_exclamation_marks_are_those_of_transformers_where_they_are_no_padding():
    folder, texts = FIXTURES / "tiny-sd15" / "tokenizer", ["a! cat", "!", "!!! a!!b", "'!s !'s", "a<|endoftext|>!"]
    wanted = transformers.CLIPTokenizer.from_pretrained(folder)(texts, padding="max_length", return_tensors="np")
    np.testing.assert_array_equal(Tokenizer(folder)(texts), wanted.input_ids)


def test_a_tokenizer_that_transformers_saved_gives_the_same_ids(tmp_path):
    folder = FIXTURES / "tiny-sd21" / "tokenizer"
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()  # which is what this test is for
    texts = nasty_texts()
    np.testing.assert_array_equal(Tokenizer(tmp_path)(texts), Tokenizer(folder)(texts))


WORDS = ["<cat-toy>", "grün fox", "<Big Dog>", "ZED", "<|me|>", "it's"]
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
DECODER = {
    "0": FLAGS | {"content": "!", "special": True},  # as SD 2.1's own tokenizer lists it; it is no padding there
    "531": FLAGS | {"content": "<|startoftext|>", "special": True},
    "532": FLAGS | {"content": "<|endoftext|>", "special": True, "normalized": False},
    "533": FLAGS | {"content": "<cat-toy>"},
    "534": FLAGS | {"content": "ZED", "normalized": False},
    "535": FLAGS | {"content": "<Left>", "lstrip": True, "special": True, "normalized": False},
    "536": FLAGS | {"content": "<right>", "rstrip": True},
    "537": FLAGS | {"content": "word", "single_word": True},
}
ADDED = {
    "added_tokens.json": {"added_tokens": {word: 533 + i for i, word in enumerate(WORDS)}},
    "a padding token of one's own": {
        "added_tokens": {"<pad>": 534, "<cat-toy>": 533},
        "special_tokens_map": {"pad_token": "<pad>", "bos_token": FLAGS | {"content": "<|startoftext|>"}},
    },
    "special tokens of a list": {
        "added_tokens": {"<cat-toy>": 533, "ZED": 534},
        "special_tokens_map": {"additional_special_tokens": ["ZED", "<More>", "<|endoftext|>"]},
    },
    "and of transformers 5's": {"tokenizer_config": {"extra_special_tokens": ["<More>", "ZED"], "mask_token": "<msk>"}},
    "added_tokens_decoder": {"tokenizer_config": {"added_tokens_decoder": DECODER}},
    "the decoder alone counts": {
        "tokenizer_config": {"added_tokens_decoder": {"533": FLAGS | {"content": "ZED"}}},
        "added_tokens": {"<cat-toy>": 533},
        "special_tokens_map": {"additional_special_tokens": ["<More>"]},
    },
}


def texts_with(words, seed=0):
    """Sentences of the words in any place and case, glued to others or not."""
    rng = np.random.default_rng(seed)
    pieces = [
        *words, *map(str.upper, words), *map(str.lower, words), "a", "cat", " ", "  ", "\n", "'s", ".", "1", "é",
        "猫",
    ]  # fmt: skip
    pieces += ["<|endoftext|>", "gru\u0308n fox", "grün  fox", "<", ">"]
    return ["".join(rng.choice(pieces, rng.integers(1, 20))) for _ in range(300)]


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sd21"])
def test_added_tokens_have_the_ids_that_transformers_gives(name, kind, tmp_path):
    folder = copied(f"{name}/tokenizer", tmp_path / "x")
    for file, changes in ADDED[kind].items():
        change_json(folder / f"{file}.json", **changes)
    words = [*WORDS, "<pad>", "<More>", "<msk>", "<Left>", "<right>", "word", "sword"]
    for path in (folder, tmp_path / "saved by them", tmp_path / "saved by us"):
        peer = transformers.CLIPTokenizer.from_pretrained(folder)
        if path.name == "saved by them":
            peer.save_pretrained(path)
        elif path.name == "saved by us":
            Tokenizer(folder).save(path)
            peer = transformers.CLIPTokenizer.from_pretrained(path)
        wanted = peer(texts_with(words), padding="max_length", truncation=True, max_length=77).input_ids
        for text, ids, other in zip(texts_with(words), Tokenizer(path)(texts_with(words)), wanted, strict=True):
            assert ids.tolist() == other, f"{path.name}: {text!a}"


def test_a_tokenizer_that_we_saved_loads_there(tmp_path):
    Tokenizer(FIXTURES / "tiny-sd15" / "tokenizer").save(tmp_path)
    peer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    wanted = peer(["a red cat"], padding="max_length", return_tensors="np").input_ids
    np.testing.assert_array_equal(Tokenizer(tmp_path)(["a red cat"]), wanted)


# Images.


@pytest.mark.parametrize(("height", "width"), [(64, 48), (40, 90), (224, 224), (17, 16)])
def test_images_are_prepared_as_there(height, width):
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    size = 32
    peer = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    wanted = peer(list(frames), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(clip.preprocess(frames, size), wanted, atol=1e-5)
