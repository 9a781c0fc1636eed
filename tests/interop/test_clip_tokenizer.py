"""CLIP's tokenizer: ids as recorded, any text, changed and damaged folders."""

import functools
import json
import logging

import numpy as np
import pytest
from interop.clip_folders import FIXTURES, change_json, copied, message

from cmd_jax.interop.clip import load_text_encoder
from cmd_jax.interop.clip_tokenizer import Tokenizer, check_tokenizer
from cmd_jax.interop.diffusers import load_pipeline, save_pipeline

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
def tokenizer(name):
    return Tokenizer(FIXTURES / name / "tokenizer")


@pytest.mark.parametrize("name", SD)
def test_token_ids_are_the_recorded_ones(name):
    reference = np.load(FIXTURES / name / "reference.npz")
    ids = tokenizer(name)(reference["prompts"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, reference["input_ids"])


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
    encode = Tokenizer(FIXTURES / "tiny-sd15" / "tokenizer")
    fits, longer = "a " * 75, "a " * 76
    with caplog.at_level(logging.WARNING):
        assert (encode([fits])[0] == encode([longer])[0]).all()
        encode([fits, longer, longer])
    (record,) = caplog.records
    assert record.getMessage() == (
        "1 of 1 texts are longer than 75 tokens and lose their ends (counted from 0: 0); told once"
    )


def test_lengths_are_those_of_whole_texts():
    encode, counts = tokenizer("tiny-sd15"), [0, 1, 75, 76, 150, 151, 1000]
    assert encode.lengths(["a " * count for count in counts]).tolist() == [count + 2 for count in counts]
    texts = [text for text in NASTY.values() if "<|" not in text]
    for ids, length in zip(encode(texts), encode.lengths(texts), strict=True):
        assert length > 77 or length == 1 + np.flatnonzero(ids == encode.end)[0]


def special(content):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def test_special_tokens_come_from_the_map_then_the_config_then_clip(tmp_path):
    folder = copied("tiny-sd21/tokenizer", tmp_path / "x")
    change_json(folder / "tokenizer_config.json", pad_token="<|endoftext|>")
    assert Tokenizer(folder).pad == 0
    change_json(folder / "special_tokens_map.json", pad_token=special("#"), bos_token=special("<|startoftext|>"))
    assert (Tokenizer(folder).pad, Tokenizer(folder).start) == (2, 531)
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer(folder).pad == 532
    (folder / "tokenizer_config.json").unlink()
    assert (Tokenizer(folder).pad, Tokenizer(folder).max_length) == (532, 77)


def test_the_length_is_the_folder_s(tmp_path):
    folder = copied("tiny-sd15/tokenizer", tmp_path / "x")
    change_json(folder / "tokenizer_config.json", model_max_length=12)
    assert Tokenizer(folder)(["a cat"]).shape == (1, 12)
    change_json(folder / "tokenizer_config.json", model_max_length=10**30)
    assert Tokenizer(folder).max_length == 77


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
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": [special("!") | {"id": 0}]}))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    texts = list(NASTY.values())
    np.testing.assert_array_equal(Tokenizer(folder)(texts), tokenizer("tiny-sd21")(texts))


WORDS = {"<cat-toy>": 533, "grün fox": 534}


def with_added(folder):
    change_json(copied("tiny-sd21/tokenizer", folder) / "added_tokens.json", **WORDS)
    return folder


def test_added_tokens_are_found_in_texts(tmp_path):
    """What transformers gives is compared with its own answers in test_clip_peer.py; these are the plain cases."""
    encode, plain = Tokenizer(with_added(tmp_path / "x")), tokenizer("tiny-sd21")
    start, end = plain.start, plain.end

    def ids(encoder, text):
        found = encoder([text])[0].tolist()
        return found[1 : found.index(end)]

    assert ids(encode, "<cat-toy>") == ids(encode, "<CAT-toy>") == [533]
    assert ids(encode, "a red<cat-toy>cat") == [*ids(plain, "a red"), 533, *ids(plain, "cat")]
    assert ids(encode, "the gru\u0308n \n fox<cat-toy>") == [*ids(plain, "the"), 534, 533]
    assert encode.vocabulary == 535 and (encode.start, encode.end, encode.pad) == (start, end, plain.pad)
    texts = list(NASTY.values())
    np.testing.assert_array_equal(encode(texts), plain(texts))


def test_added_tokens_are_kept_when_saved(tmp_path):
    encode = Tokenizer(with_added(tmp_path / "x"))
    encode.save(tmp_path / "y")
    assert json.loads((tmp_path / "y" / "added_tokens.json").read_text()) == WORDS
    assert (Tokenizer(tmp_path / "y")(["a <cat-toy>"]) == encode(["a <cat-toy>"])).all()
    save_pipeline(tmp_path / "sd", load_pipeline(FIXTURES / "tiny-sd21")._replace(tokenizer=encode))
    assert (tmp_path / "sd" / "tokenizer" / "added_tokens.json").exists()


def test_added_tokens_without_embeddings_are_refused(tmp_path):
    """The table of the text encoder has 533 rows: what was added to it may have been left behind."""
    encode = Tokenizer(with_added(tmp_path / "x"))
    module, _ = load_text_encoder(FIXTURES / "tiny-sd21" / "text_encoder")
    assert "tokenizer vocabulary=535: the text tower has embeddings for 533 tokens; " in message(
        check_tokenizer, encode, module
    )
    check_tokenizer(encode, module.clone(vocabulary=535))


def test_the_same_tokens_are_the_same_identity_however_they_are_written(tmp_path):
    folder = with_added(tmp_path / "x")
    identity = Tokenizer(folder).identity
    assert json.loads(json.dumps(identity)) == identity
    (folder / "added_tokens.json").unlink()
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
    listed = {str(number): flags | {"content": name} for name, number in WORDS.items()}
    change_json(folder / "tokenizer_config.json", added_tokens_decoder=listed, name_or_path="elsewhere")
    assert Tokenizer(folder).identity == identity
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(dict(sorted(vocabulary.items())), indent=1))
    assert Tokenizer(folder).identity == identity
    (folder / "tokenizer_config.json").unlink()
    assert {k for k, v in Tokenizer(folder).identity.items() if v != identity[k]} == {"added_tokens"}


CHANGES = {
    "merges": lambda f: spoil(f, "merges.txt", (f / "merges.txt").read_bytes().rsplit(b"\n", 2)[0] + b"\n"),
    "vocabulary": lambda f: change_json(f / "vocab.json", more=533),
    "pad": lambda f: change_json(f / "special_tokens_map.json", pad_token="<|endoftext|>"),
    "max_length": lambda f: change_json(f / "tokenizer_config.json", model_max_length=70),
    "added_tokens": lambda f: change_json(f / "added_tokens.json", **{"<me>": 533}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_ids_changes_the_identity(name, tmp_path):
    folder = copied("tiny-sd21/tokenizer", tmp_path / "x")
    CHANGES[name](folder)
    identity, plain = Tokenizer(folder).identity, tokenizer("tiny-sd21").identity
    assert name in {key for key in identity if identity[key] != plain[key]}


def spoil(folder, name, content):
    (folder / name).write_bytes(content)


BAD_TOKENIZERS = {
    "no merges": (lambda f: (f / "merges.txt").unlink(), "holds no merges.txt; give a folder with vocab.json"),
    "torn vocabulary": (lambda f: spoil(f, "vocab.json", b'{"a": 1,'), "not readable as JSON"),
    "vocabulary of words": (lambda f: spoil(f, "vocab.json", b'{"a": "b"}'), "special token '<|startoftext|>' is not"),
    "ids that are none": (lambda f: change_json(f / "vocab.json", a="b"), "damaged (TypeError"),
    "merges of no tokens": (lambda f: spoil(f, "merges.txt", b"#version: 0.2\nq q\n"), "damaged (Exception: "),
    "merges of three": (lambda f: spoil(f, "merges.txt", b"#version: 0.2\nr e d\n"), "damaged ("),
    "merges in Latin-1": (lambda f: spoil(f, "merges.txt", b"\xff \xfe\n"), "damaged (UnicodeDecodeError"),
    "lost padding": (
        lambda f: change_json(f / "special_tokens_map.json", pad_token="<pad>"), "special token '<pad>' is not"
    ),
    "an added token out of turn": (
        lambda f: change_json(f / "added_tokens.json", **{"<me>": 535}),
        "added token '<me>' is said to be 535, but transformers makes it 533; give it that id",
    ),
    "an added token in another's place": (
        lambda f: change_json(f / "tokenizer_config.json", added_tokens_decoder={"533": special("cat</w>")}),
        "added token 'cat</w>' is said to be 533, but transformers makes it 515",
    ),
    "ids of added tokens that are none": (
        lambda f: change_json(f / "added_tokens.json", **{"<me>": "533"}), "added token '<me>' is said to be 533, but"
    ),
    "added tokens that are none": (
        lambda f: change_json(f / "tokenizer_config.json", added_tokens_decoder={"533": None}), "damaged (ValueError"
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
    assert said in message(Tokenizer, folder)
