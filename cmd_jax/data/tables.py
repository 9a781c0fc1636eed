"""Rows of the text, CSV and JSON-lines files that list clips or prompts; an error names the file and the line.

All are UTF-8, with or without a byte order mark. `field` is the config key that a UserError names.
"""

import contextlib
import csv
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence

from cmd_jax.errors import UserError
from cmd_jax.files import as_path

Untitled = Callable[[list[str]], Sequence[str] | None]

log = logging.getLogger(__name__)


def read_text(path: str, field: str) -> str:
    with _open(path, field, newline=None) as file:
        return file.read()


def lines(path: str, field: str) -> Iterator[tuple[int, str]]:
    """(line number, stripped line) of the lines that are not blank."""
    with _open(path, field, newline=None) as file:
        for number, line in enumerate(file, 1):
            if line := line.strip():
                yield number, line


def csv_columns(path: str, field: str, example: str, untitled: Untitled = lambda row: None) -> list[str]:
    """The names in a CSV file's first line. `example` is a header to show where there is none.

    untitled: tells the columns of a file without a title row from its first row; None for any other row.
    """
    return _title(path, field, example, untitled)[0]


def csv_rows(
    path: str, field: str, columns: Sequence[str], example: str, untitled: Untitled = lambda row: None
) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, the values of `columns`) of each row; blank lines are passed over."""
    header, titled = _title(path, field, example, untitled)
    for column in columns:
        if header.count(column) != 1:
            problem = f"its columns are {', '.join(header)}, where {column} is needed once"
            raise UserError(field, path, problem, f"name the columns {example}")
    if not titled:
        log.info("%s has no title row: its columns are taken for %s", path, ", ".join(header))
    places = [header.index(column) for column in columns]
    with _open(path, field, newline="") as file:
        reader, line = csv.reader(file, strict=True), 0
        try:
            for row in reader:
                if row and (line or not titled):
                    if len(row) != len(header):
                        problem = f"more or fewer fields than the {len(header)} columns"
                        remedy = "put texts with commas in double quotes"
                        raise UserError(field, f"{path} line {reader.line_num}", problem, remedy)
                    yield reader.line_num, [row[place] for place in places]
                line = reader.line_num
        except csv.Error as error:
            raise UserError(field, f"{path} after line {line}", str(error), "mend the row") from error


def _title(path: str, field: str, example: str, untitled: Untitled) -> tuple[list[str], bool]:
    """The names of the columns, and whether the file itself says them in its first line."""
    with _open(path, field, newline="") as file:
        try:
            first = [name.strip() for name in next(csv.reader(file, strict=True), ())]
        except csv.Error as error:
            raise UserError(field, f"{path} line 1", str(error), f"write a header {example}") from error
    if not any(first):
        raise UserError(field, path, "it is empty", f"write a header {example} and rows below it")
    columns = untitled(first)
    return (first, True) if columns is None else (list(columns), False)


def json_rows(path: str, field: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank."""
    for line, content in lines(path, field):
        try:
            row = json.loads(content)
            json.dumps(row, ensure_ascii=False).encode()  # an escape can write half a character, which no file can hold
        except UnicodeEncodeError as error:
            problem = "holds an escape of half a character (a lone surrogate)"
            raise UserError(field, f"{path} line {line}", problem, "save the text as UTF-8") from error
        except (ValueError, RecursionError) as error:
            remedy = "write one JSON object a line"
            raise UserError(field, f"{path} line {line}", f"not JSON ({error})", remedy) from error
        if not isinstance(row, dict):
            raise UserError(field, f"{path} line {line}", "not a JSON object", "write one JSON object a line")
        yield line, row


@contextlib.contextmanager
def _open(path: str, field: str, newline: str | None):
    """The open file; what goes wrong with reading it becomes a UserError."""
    if os.path.exists(path) and not os.path.isfile(path):  # to open a named pipe would wait for ever
        raise UserError(field, path, "not a regular file", "give a file with text")
    try:
        with as_path(path).open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        where = f"{path} line {_undecodable_line(path)}"
        raise UserError(field, where, f"not UTF-8 text ({error.reason})", "save the file as UTF-8") from error
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise UserError(field, path, problem, "give a file that is there and that you may read") from error


def _undecodable_line(path: str) -> int:
    number = 0
    with as_path(path).open("rb") as file:
        for number, line in enumerate(file, 1):  # noqa: B007  a character cut off by the end counts for the last line
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return number
