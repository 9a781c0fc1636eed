"""CLIP's byte-pair encoding from a `tokenizer` folder: vocab.json and merges.txt, or tokenizer.json."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder

from cmd_jax.errors import UserError, choose
from cmd_jax.files import check_content, read_json
from cmd_jax.models.clip import CLIPText

log = logging.getLogger(__name__)

VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json")  # the first two, or the last
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL = {  # and what they are where a folder doesn't say
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}
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
    lower-cased and runs of white space are one blank. Where they differ, special_tokens_map.json goes before
    tokenizer_config.json. Of special tokens only start and end are recognised in a text: the "!" that SD 2.1 pads with
    is an exclamation mark there, as it was in OpenCLIP's training; transformers makes a padding token of it.

    start, end, pad: ids. max_length: the folder's model_max_length, or 77. vocabulary: one more than the highest id.
    Raises UserError for a folder that lacks vocab.json and merges.txt (or tokenizer.json instead of both), for damaged
    files, and for settings that are not CLIP's.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        names = [name for name in VOCABULARIES + SETTINGS if (folder / name).is_file()]
        self._files = {name: (folder / name).read_bytes() for name in names}
        for name, content in self._files.items():
            check_content(content, "tokenizer", folder / name)
        config, special = (read_json(folder / name) if name in self._files else {} for name in SETTINGS)
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
            vocabulary, merges, added = self._read_vocabulary(folder)
            added += [token["content"] for token in config.get("added_tokens_decoder", {}).values()]
            if more := [token for token in added if token not in vocabulary]:
                problem = f"tokens added to the vocabulary are not supported ({', '.join(map(repr, more[:3]))})"
                raise UserError("tokenizer", folder, problem, "give the tokenizer as it was before")
            names = [special.get(key) or config.get(key) or name for key, name in SPECIAL.items()]
            names = [name["content"] if isinstance(name, dict) else name for name in names]
            if unknown := [name for name in names if name not in vocabulary]:
                problem = f"its special token {unknown[0]!r} is not in the vocabulary"
                raise UserError("tokenizer", folder, problem, "fetch the folder again")
            self.start, self.end, self.pad, _ = (vocabulary[name] for name in names)
            self.vocabulary = max(vocabulary.values()) + 1
            start, end, pad, unknown = names
            bpe = models.BPE(vocabulary, merges, unk_token=unknown, end_of_word_suffix="</w>")
        except UserError:
            raise
        except Exception as e:  # the library raises nothing narrower, and files can be wrong in any way
            problem = f"damaged ({type(e).__name__}: {str(e)[:200]})"
            raise UserError("tokenizer", folder, problem, "fetch the folder again") from e
        self._encoder, self._told = self._build(bpe, start, end, pad), False

    def _read_vocabulary(self, folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[str]]:
        """-> ids of the tokens, pairs to be merged, first ones first, and names of added tokens."""
        if {"vocab.json", "merges.txt"} <= self._files.keys():
            lines = self._files["merges.txt"].decode().replace("\r\n", "\n").split("\n")
            lines = [line for line in lines if line and not line.startswith("#version")]
            return read_json(folder / "vocab.json"), [tuple(line.split(" ")) for line in lines], []
        if "tokenizer.json" not in self._files:
            missing = ", ".join(name for name in VOCABULARIES[:2] if name not in self._files)
            raise UserError("tokenizer", folder, f"holds no {missing}", "give a folder with vocab.json and merges.txt")
        tree = read_json(folder / "tokenizer.json")
        model, added = tree["model"], tree.get("added_tokens", [])
        choose(f"{folder}/tokenizer.json: model.end_of_word_suffix", model.get("end_of_word_suffix"), ("</w>",))
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        return model["vocab"], merges, [token["content"] for token in added]

    def _build(self, bpe: models.BPE, start: str, end: str, pad: str) -> Encoder:
        encoder = Encoder(bpe)
        one_blank = normalizers.Replace(Regex(r"\s+"), " ")
        encoder.normalizer = normalizers.Sequence([normalizers.NFC(), one_blank, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
        encoder.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        encoder.post_processor = processors.BertProcessing((end, self.end), (start, self.start))
        encoder.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (start, end)])
        encoder.enable_truncation(self.max_length)
        encoder.enable_padding(pad_id=self.pad, pad_token=pad, length=self.max_length)
        return encoder

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Ids of the texts; the first time that texts are cut, one line of log says which.

        UserError for a text that is not valid Unicode: a lone surrogate, as broken bytes of a command line become.
        """
        texts = [str(text) for text in texts]
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as e:
                shown = text.encode(errors="backslashreplace").decode()
                problem = f"character {e.start + 1} is half of one, not valid Unicode"
                raise UserError("text", shown, problem, "write it in UTF-8") from None
        encoded = self._encoder.encode_batch(texts)
        cut = [i for i, encoding in enumerate(encoded) if encoding.overflowing]
        if cut and not self._told:
            self._told = True
            shown = ", ".join(map(str, cut[:5])) + (", ..." if len(cut) > 5 else "")
            log.warning(
                "%d of %d texts are longer than %d tokens and lose their ends (counted from 0: %s); told once",
                len(cut), len(texts), self.max_length - 2, shown,
            )  # fmt: skip
        return np.array([encoding.ids for encoding in encoded], np.int32).reshape(-1, self.max_length)

    def save(self, folder: str | Path):
        """Write the files it was read from, as they were, to a folder, made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)


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
