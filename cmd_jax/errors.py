"""The one kind of error a user is shown, `field=value: what is wrong; what to do`, and what a stopped run raises."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Sequence

LONGEST_VALUE, LONGEST_PROBLEM, LONGEST_BRIEF = 120, 600, 40


class UserError(Exception):
    """Something the user can mend. `main` prints it as one line and exits with code 2."""

    def __init__(self, field: str, value, problem: str, remedy: str):
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        field, value, problem = _short(field), _short(str(value)), _short(problem, LONGEST_PROBLEM)
        super().__init__(f"{field}={value}: {problem}; {printable(remedy)}")


class Unavailable(OSError):
    """A store that could not be reached for as long as it is tried: another try later may do. Exit code 3."""

    remedy = "run the same command again when the store answers"


class Stopped(KeyboardInterrupt):
    """A request to stop was followed: what there was to save is saved, and nothing else goes on."""


def _short(text: str, length: int = LONGEST_VALUE) -> str:
    """Without its middle, if it is long: the end of a path says most."""
    shown = printable(text if len(text) <= 2 * length else f"{text[:length]}...{text[-length:]}")
    half = length // 2
    return shown if len(shown) <= length else f"{shown[:half]}...{shown[-half:]}"


def printable(text: str) -> str:
    """One line, and nothing that a terminal would obey: names and values may come from any file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def some(names: Sequence[str], most: int = 10) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "") or "none"


def brief(value) -> str:
    """A value, or of a long one, like a digest, how it begins."""
    text = str(value)
    return text if len(text) <= LONGEST_BRIEF else f"{text[:12]}..."


def of_file(error: OSError) -> UserError:
    """What a file system refused, as the user is shown it; its cause is the error."""
    remedy = "free space or mend its rights, or give another folder"
    told = UserError("file", error.filename or "?", error.strerror or str(error), remedy)
    told.__cause__ = error
    return with_remedy(told)


def with_remedy(error: UserError) -> UserError:
    """The error with the remedy of its cause, where that is the fault of a store, which knows one."""
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, OSError) and hasattr(cause, "remedy"):
            told = UserError(error.field, error.value, error.problem, cause.remedy)
            told.__cause__ = error.__cause__
            return told
        cause = cause.__cause__
    return error


def exit_code(error: BaseException | None) -> int:
    """2 for what the user must mend, 3 where a store that could not be reached is the error or its cause."""
    while error is not None:
        if isinstance(error, Unavailable):
            return 3
        error = error.__cause__
    return 2


def tell(text):
    """A line on stderr, if there still is someone who reads: a closed terminal must not stop what comes after it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def nearest(word: str, choices: Iterable[str], count: int = 1) -> list[str]:
    """The `count` choices that look most like `word`, best first (every choice may be the answer to a typo)."""
    ranked = sorted(choices, key=lambda c: -difflib.SequenceMatcher(None, str(word)[:100].lower(), c.lower()).ratio())
    return ranked[:count]


def choose(field: str, value, choices: Iterable[str]):
    """`value` if it is one of `choices`, else a UserError that lists them."""
    choices = list(choices)
    if value not in choices:
        raise UserError(field, value, "not one of the choices", f"use one of {', '.join(map(str, choices))}")
    return value


def divisible(field: str, size: int, by_field: str, by: int):
    """`size` must be a multiple of `by`; both fields are named otherwise."""
    if size % by:
        raise UserError(field, size, f"not a multiple of {by_field}={by}", f"use {max(by, round(size / by) * by)}")
