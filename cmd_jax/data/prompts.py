"""Prompts to draw: what may be one, and files of many (paper section 4: WebVid, MSR-VTT, zero-shot UCF-101)."""

import collections
import os
import unicodedata
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cmd_jax.data.tables import csv_columns, csv_rows, json_rows, lines, read_text
from cmd_jax.data.webvid import untitled
from cmd_jax.errors import UserError
from cmd_jax.files import parse_json

FIELD = "sampling.prompts_file"
TEXT_COLUMNS = ("prompt", "text", "caption", "sentence", "name")  # the first that is there; WebVid's is `name`
NAME_COLUMNS = ("class", "id", "video_id", "videoid", "file_name", "name")
MSRVTT = "MSR-VTT's videos (video_id, split) and sentences (video_id, caption)"
MSRVTT_LIKE = {
    "videos": [{"video_id": str, "split": str, ...: object}],
    "sentences": [{"video_id": str, "caption": str, ...: object}],
    ...: object,
}


class Prompt(NamedTuple):
    """A text to draw, and what its file calls it: a class, a video, or nothing ("")."""

    text: str
    name: str = ""


def check_prompt(text: str, field: str = "sampling.prompt", where: str = "") -> str:
    """The prompt without white space at its ends; UserError for what cannot be drawn or is no text.

    Any script, emoji, joiners and marks of direction may be in it, and it may have any length: the tokenizer cuts it.
    Control characters may not, but for tabs and line ends. `where` names the line of a file.
    """
    for position, character in enumerate(text, 1):
        kind = unicodedata.category(character)
        if kind == "Cs" or (kind == "Cc" and character not in "\t\n\r"):
            what = "half a character (a lone surrogate)" if kind == "Cs" else "a control character"
            problem = f"character {position} is U+{ord(character):04X}, {what}"
            raise UserError(field, where or text, problem, "remove it")
    if all(character.isspace() or unicodedata.category(character) == "Cf" for character in text):
        raise UserError(field, where or text, "empty", "say what to draw")
    return text.strip()


def read_prompts(path: str | os.PathLike, seed: int = 0) -> list[Prompt]:
    """The prompts of a file in its order, at least one; `seed` is for MSR-VTT alone.

    .txt    one a line; blank lines and lines that begin with # are passed over
    .csv    the first column there is of TEXT_COLUMNS, and perhaps a name, the first other one of NAME_COLUMNS: so
            configs/prompts/ucf101.csv, WebVid's lists and metadata.csv are read as they are
    .jsonl  objects with keys like those columns
    .json   MSR-VTT's videodatainfo: its test videos with one of their captions each, which `seed` and the video's id
            choose, whatever else is in the file

    Raises UserError, naming the line, on anything else and on texts that `check_prompt` refuses.
    """
    path = str(path)
    readers = {".txt": _read_text, ".csv": _read_csv, ".jsonl": _read_json_lines, ".json": _read_msrvtt}
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in readers:
        raise UserError(FIELD, path, "not a kind of file that is read", f"use one of {', '.join(readers)}")
    rows = readers[suffix](path, seed)
    prompts = [Prompt(check_prompt(text, FIELD, f"{path} {where}"), name) for where, text, name in rows]
    if not prompts:
        raise UserError(FIELD, path, "it holds no prompts", "write at least one")
    return prompts


# Each reader yields (where in the file, text, name).


def _read_text(path: str, seed: int) -> Iterator[tuple[str, str, str]]:
    for line, text in lines(path, FIELD):
        if not text.startswith("#"):
            yield f"line {line}", text, ""


def _read_csv(path: str, seed: int) -> Iterator[tuple[str, str, str]]:
    columns = csv_columns(path, FIELD, "prompt", untitled)
    text, name = _columns(columns)
    if text is None:
        problem = f"its columns are {', '.join(columns)}, none of them {', '.join(TEXT_COLUMNS)}"
        raise UserError(FIELD, path, problem, "name the column of the texts prompt")
    for line, (prompt, *names) in csv_rows(path, FIELD, [text, name] if name else [text], "prompt", untitled):
        yield f"line {line}", prompt, "".join(names).strip()


def _read_json_lines(path: str, seed: int) -> Iterator[tuple[str, str, str]]:
    for line, row in json_rows(path, FIELD):
        text, name = _columns(row)
        if text is None or not isinstance(row[text], str):
            problem = f"no {' or '.join(TEXT_COLUMNS)}" if text is None else f"{text} is no string"
            raise UserError(FIELD, f"{path} line {line}", problem, 'write lines like {"prompt": "a dog runs"}')
        if name and type(row[name]) not in (str, int):
            raise UserError(FIELD, f"{path} line {line}", f"{name} is neither a string nor an integer", "mend the row")
        yield f"line {line}", row[text], str(row[name]).strip() if name else ""


def _columns(given) -> tuple[str | None, str | None]:
    """Which of the given names stand for the text and for its name."""
    text = next((column for column in TEXT_COLUMNS if column in given), None)
    return text, next((column for column in NAME_COLUMNS if column in given and column != text), None)


def _read_msrvtt(path: str, seed: int) -> Iterator[tuple[str, str, str]]:
    content = parse_json(read_text(path, FIELD), FIELD, path, f"give {MSRVTT}", MSRVTT_LIKE)
    captions = collections.defaultdict(list)
    for row in content["sentences"]:
        captions[row["video_id"]].append(row["caption"])
    videos = [video["video_id"] for video in content["videos"] if video["split"] == "test"]
    if not videos:
        counts = collections.Counter(video["split"] for video in content["videos"])
        held = ", ".join(f"{count} of {split}" for split, count in counts.items()) or "none at all"
        problem = f"it has no videos of the split test ({held})"
        raise UserError(FIELD, path, problem, "give the file of the test part")
    for video, count in collections.Counter(videos).items():
        if count > 1 or video not in captions:
            problem = f"lists {video} more than once" if count > 1 else f"has no captions of {video}"
            raise UserError(FIELD, path, problem, "fetch the file again")
        generator = np.random.default_rng((seed, zlib.crc32(video.encode(errors="replace"))))
        yield f"video {video}", sorted(captions[video])[generator.integers(len(captions[video]))], video
