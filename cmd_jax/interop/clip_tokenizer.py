"""CLIP's byte-pair encoding from a `tokenizer` folder: vocab.json and merges.txt, or tokenizer.json."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder

from cmd_jax.errors import UserError, choose
from cmd_jax.files import as_path, check_content, read_json
from cmd_jax.models.clip import CLIPText

log = logging.getLogger(__name__)

VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json")  # the first two, or the last
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL = {  # and what they are where a folder doesn't say
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
MORE_SPECIAL = ("sep_token", "cls_token", "mask_token")  # which CLIP has no use for, but texts may hold
EXTRA = ("additional_special_tokens", "extra_special_tokens")  # transformers 4's and 5's name of a list of more
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
ONLY = {  # settings of tokenizer_config.json that only have one value here
    "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "do_lower_case": (True,),
    "padding_side": ("right",),
    "truncation_side": ("right",),
}
LENGTH = 77  # of CLIP's own tokenizer, where a folder doesn't say
NO_LENGTH = 10**6  # transformers writes 1e30 for "any"


class Tokenizer:
    """CLIP's byte-pair encoding: tokenizer(texts) -> ids int32 [B, max_length].

    A text's ids stand between `start` and `end`, the rest is `pad`; of a text too long the first tokens are kept. It is
    lower-cased and runs of white space are one blank. Tokens that were added to the vocabulary, as textual inversion
    does, are found as transformers finds them. But the "!" that SD 2.1 pads with is an exclamation mark, as it was in
    OpenCLIP's training; transformers makes a padding token of it.

    start, end, pad: ids. max_length: the folder's model_max_length, or 77. vocabulary: one more than the highest id.
    identity: all that ids depend on, {name: JSON value}; the same for files that say the same otherwise.
    Raises UserError for a folder that lacks vocab.json and merges.txt (or tokenizer.json instead of both), for damaged
    files, for settings that are not CLIP's, and for added tokens whose ids are not the next ones.
    """

    def __init__(self, folder: str | Path):
        folder = as_path(folder)
        names = [name for name in VOCABULARIES + SETTINGS if (folder / name).is_file()]
        self._files = {name: (folder / name).read_bytes() for name in names}
        for name, content in self._files.items():
            check_content(content, "tokenizer", folder / name)
        config, special, numbers = (read_json(folder / name) if name in self._files else {} for name in SETTINGS)
        tree = read_json(folder / "tokenizer.json") if "tokenizer.json" in self._files else {}
        for key, only in ONLY.items():
            if config.get(key) is not None:
                choose(f"{folder}/tokenizer_config.json: {key}", config[key], only)
        self.max_length = config.get("model_max_length", LENGTH)
        if isinstance(self.max_length, int | float) and self.max_length > NO_LENGTH:
            self.max_length = LENGTH
        if type(self.max_length) is not int or self.max_length < 3:
            field = f"{folder}/tokenizer_config.json: model_max_length"
            raise UserError(field, self.max_length, "not a whole number from 3", f"{LENGTH} is CLIP's")
        try:
            vocabulary, merges = self._read_vocabulary(folder, tree)
            named, added, stated = _added_tokens(config, special, numbers, tree.get("added_tokens", []))
            if unknown := [name for name in named.values() if name not in vocabulary and name not in stated]:
                problem = f"its special token {unknown[0]!r} is not in the vocabulary"
                raise UserError("tokenizer", folder, problem, "fetch the folder again")
            start, end, unknown, pad = named.values()
            if pad not in (start, end) and pad in vocabulary:
                added = [token for token in added if token.content != pad]
            bpe = models.BPE(vocabulary, merges, unk_token=unknown, end_of_word_suffix="</w>")
            self._encoder, self._told = Encoder(bpe), False
            self._build(added)
            for name, number in stated.items():
                if (free := self._encoder.token_to_id(name)) != number:
                    problem = f"its added token {name!r} is said to be {number}, but transformers makes it {free}"
                    raise UserError("tokenizer", folder, problem, "give it that id, and its embedding that place")
            self.start, self.end, self.pad = map(self._encoder.token_to_id, (start, end, pad))
            self._frame(start, end, pad)
        except UserError:
            raise
        except Exception as e:  # the library raises nothing narrower, and files can be wrong in any way
            problem = f"damaged ({type(e).__name__}: {str(e)[:200]})"
            raise UserError("tokenizer", folder, problem, "fetch the folder again") from e
        numbers = self._encoder.get_vocab(with_added_tokens=True)
        self.vocabulary = max(numbers.values()) + 1
        self.identity = {
            "vocabulary": _digest(sorted(vocabulary.items())),
            "merges": _digest(merges),
            "added_tokens": [
                [numbers[t.content], t.content, t.special, *(getattr(t, flag) for flag in FLAGS)] for t in added
            ],
            **{name: getattr(self, name) for name in ("start", "end", "pad", "max_length")},
        }

    def _read_vocabulary(self, folder: Path, tree: dict) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """-> ids of the tokens, and pairs to be merged, first ones first."""
        if {"vocab.json", "merges.txt"} <= self._files.keys():
            lines = self._files["merges.txt"].decode().replace("\r\n", "\n").split("\n")
            lines = [line for line in lines if line and not line.startswith("#version")]
            return read_json(folder / "vocab.json"), [tuple(line.split(" ")) for line in lines]
        if not tree:
            missing = ", ".join(name for name in VOCABULARIES[:2] if name not in self._files)
            raise UserError("tokenizer", folder, f"holds no {missing}", "give a folder with vocab.json and merges.txt")
        model = tree["model"]
        choose(f"{folder}/tokenizer.json: model.end_of_word_suffix", model.get("end_of_word_suffix"), ("</w>",))
        return model["vocab"], [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]

    def _build(self, added: list[AddedToken]):
        one_blank = normalizers.Replace(Regex(r"\s+"), " ")
        self._encoder.normalizer = normalizers.Sequence([normalizers.NFC(), one_blank, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._encoder.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        self._encoder.add_tokens(added)

    def _frame(self, start: str, end: str, pad: str):
        """What stands around the tokens of a text."""
        self._encoder.post_processor = processors.BertProcessing((end, self.end), (start, self.start))
        self._encoder.enable_truncation(self.max_length)
        self._encoder.enable_padding(pad_id=self.pad, pad_token=pad, length=self.max_length)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Ids of the texts; the first time that texts are cut, one line of log says which.

        UserError for a text that is not valid Unicode: a lone surrogate, as broken bytes of a command line become.
        """
        encoded = self._encoded(texts)
        cut = [i for i, encoding in enumerate(encoded) if encoding.overflowing]
        if cut and not self._told:
            self._told = True
            shown = ", ".join(map(str, cut[:5])) + (", ..." if len(cut) > 5 else "")
            log.warning(
                "%d of %d texts are longer than %d tokens and lose their ends (counted from 0: %s); told once",
                len(cut), len(texts), self.max_length - 2, shown,
            )  # fmt: skip
        return np.array([encoding.ids for encoding in encoded], np.int32).reshape(-1, self.max_length)

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of each text, start and end counted, if it were not cut: int [N]. Errors as of the call."""

        def inner(encoding) -> int:
            return sum(encoding.attention_mask) - 2

        return np.array([2 + sum(map(inner, (e, *e.overflowing))) for e in self._encoded(texts)], int)

    def _encoded(self, texts: Sequence[str]) -> list:
        texts = [str(text) for text in texts]
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as e:
                shown = text.encode(errors="backslashreplace").decode()
                problem = f"character {e.start + 1} is half of one, not valid Unicode"
                raise UserError("text", shown, problem, "write it in UTF-8") from None
        return self._encoder.encode_batch(texts)

    def save(self, folder: str | Path):
        """Write the files it was read from, as they were, to a folder, made if need be."""
        as_path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (as_path(folder) / name).write_bytes(content)


def _added_tokens(config: dict, special: dict, numbers: dict, listed: list):
    """Tokens that are looked for in texts before the rest is split into words, as transformers collects them.

    config, special, numbers: the files of SETTINGS; the other two only count where the first, by its
    added_tokens_decoder, is not one of transformers 4.34 or later. listed: tokenizer.json's.
    -> (contents of the tokens of SPECIAL, all tokens in the order in which new ones get ids, {content: id} as stated).
    """
    if "added_tokens_decoder" in config:
        tokens = {int(number): _token(value) for number, value in config["added_tokens_decoder"].items()}
        settings = config
    else:
        settings = config | special
        known = {_content(settings[key]) for key in (*SPECIAL, *MORE_SPECIAL) if settings.get(key)}
        tokens = {number: _token(name, name in known) for name, number in numbers.items()}
        tokens |= {value["id"]: _token(value) for value in listed}
    stated = {token.content: number for number, token in tokens.items()}
    ordered = [tokens[number] for number in sorted(tokens)]
    values = SPECIAL | {key: settings[key] for key in (*SPECIAL, *MORE_SPECIAL) if settings.get(key)}
    named = {key: _content(values[key]) for key in SPECIAL}
    for value in (*values.values(), *(value for key in EXTRA for value in settings.get(key) or [])):
        if _content(value) not in {token.content for token in ordered}:
            ordered.append(_token(value, True))
    for token in ordered:
        token.special |= token.content in named.values()
    return named, ordered, stated


def _content(value) -> str:
    return value["content"] if isinstance(value, dict) else value


def _token(value, special: bool | None = None) -> AddedToken:
    """A token from its name, or from its flags; special ones are looked for in texts as they were written."""
    if not isinstance(_content(value), str) or not _content(value):
        raise ValueError(f"{value!r} as a token")
    if not isinstance(value, dict):
        return AddedToken(value, special=bool(special), normalized=not special)
    special = value.get("special", False) if special is None else special
    return AddedToken(value["content"], special=special, **{flag: value[flag] for flag in FLAGS if flag in value})


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_tokenizer(tokenizer: Tokenizer, module: CLIPText):
    """UserError if texts of the tokenizer are not what the text tower was made for."""
    remedy = "give the tokenizer that belongs to the text tower"
    if tokenizer.vocabulary > module.vocabulary:
        problem = f"the text tower has embeddings for {module.vocabulary} tokens"
        raise UserError("tokenizer vocabulary", tokenizer.vocabulary, problem, remedy)
    if tokenizer.max_length > module.length:
        problem = f"the text tower has {module.length} positions"
        raise UserError("tokenizer model_max_length", tokenizer.max_length, problem, remedy)
    if module.end_token not in (None, tokenizer.end):
        raise UserError("tokenizer eos_token", tokenizer.end, f"the text tower wants {module.end_token}", remedy)
