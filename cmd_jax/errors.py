"""The one kind of error a user is shown: `field=value: what is wrong; what to do`."""

import contextlib
import difflib
import sys
from collections.abc import Iterable

LONGEST_VALUE = 120


class UserError(Exception):
    """Something the user can mend. `main` prints it as one line and exits with code 2."""

    def __init__(self, field: str, value, problem: str, remedy: str):
        shown = " ".join(str(value).replace("\0", "\\0").split())
        if len(shown) > LONGEST_VALUE:
            shown = shown[:LONGEST_VALUE] + "..."
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(" ".join(f"{field}={shown}: {problem}; {remedy}".split()))


def tell(text):
    """A line on stderr, if there still is someone who reads: a closed terminal must not stop what comes after it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def nearest(word: str, choices: Iterable[str], count: int = 1) -> list[str]:
    """The `count` choices that look most like `word`, best first (every choice may be the answer to a typo)."""
    ranked = sorted(choices, key=lambda c: -difflib.SequenceMatcher(None, str(word).lower(), c.lower()).ratio())
    return ranked[:count]


def choose(field: str, value, choices: Iterable[str]):
    """`value` if it is one of `choices`, else a UserError that lists them."""
    choices = list(choices)
    if value not in choices:
        raise UserError(field, value, "not one of the choices", f"use one of {', '.join(map(str, choices))}")
    return value
