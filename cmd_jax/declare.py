"""How a key of a config is declared, and its value checked."""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator

from ml_collections import ConfigDict

from cmd_jax.buckets import check_url
from cmd_jax.errors import UserError, choose

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a table"}


@dataclasses.dataclass(frozen=True)
class Key:
    """A value of a config. Its type is that of its default; a number is finite.

    at_least, at_most: bounds of a number; above, below: those that it must not reach. besides: a number out of them
    that says something else. choices: of a text; "" is one that no error line offers. path: of a file or folder.
    span: of whole numbers, as `span_of` reads it. follows: the key whose value this one is.
    """

    default: bool | int | float | str | tuple
    meaning: str
    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    besides: float | None = None
    choices: tuple[str, ...] = ()
    path: bool = False
    span: bool = False
    follows: str = ""

    @property
    def range(self) -> str:
        """What the value may be, in words."""
        if self.follows:
            return f"that of {self.follows}"
        if self.choices:
            return ", ".join(choice or "empty" for choice in self.choices)
        if self.span:
            return "START:STOP, or empty"
        words = ["a path, or empty" if self.path else KINDS[type(self.default)]]
        bounds = {"from": self.at_least, "above": self.above, "to": self.at_most, "below": self.below}
        words += [f"{word} {bound:.12g}" for word, bound in bounds.items() if math.isfinite(bound)]
        return " ".join(words) + (f", or {self.besides:g}" if self.besides is not None else "")

    def check(self, field: str, value):
        """UserError (field=value) for a value out of range."""
        if self.choices and value not in self.choices:
            choose(field, value, filter(None, self.choices))
        if self.path:
            check_url(field, value)
        if self.span:
            span_of(field, value)
        if type(self.default) not in (int, float) or self.follows:
            return
        if not abs(value) <= sys.float_info.max:  # true of integers that no float holds, and of nan
            raise UserError(field, value, "not a finite number", "give one")
        high = value > self.at_most or value >= self.below
        if value == self.besides or not (high or value < self.at_least or value <= self.above):
            return
        if self.at_least == 0 and 1 in (self.at_most, self.below):
            problem = "outside 0 to 1"
        elif high:
            problem = "too large"
        else:
            problem = "must not be negative" if self.at_least == 0 else "must be positive"
        raise UserError(field, value, problem, f"give {self.range}")


def span_of(field: str, text: str) -> range | None:
    """The whole numbers from START to before STOP, of "START:STOP"; None for "". UserError (field=text) for others."""
    if not text:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and len(text) < 40):
        raise UserError(field, text, "not START:STOP", "give two whole numbers, like 10:13 for 10, 11 and 12")
    if int(start) >= int(stop):
        raise UserError(field, text, "it ends before it begins", "STOP is the first that does not belong to it")
    return range(int(start), int(stop))


key = Key
fraction = functools.partial(Key, at_least=0, at_most=1)
path = functools.partial(Key, "", path=True)


def choice(default: str, meaning: str, choices) -> Key:
    return Key(default, meaning, choices=tuple(choices))


def changed(group: dict[str, Key], **defaults) -> dict[str, Key]:
    """A group with other defaults."""
    return group | {name: dataclasses.replace(group[name], default=value) for name, value in defaults.items()}


def walk(declarations: dict, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """(dotted name, declaration) of every key."""
    for name, x in declarations.items():
        yield from walk(x, f"{prefix}{name}.") if isinstance(x, dict) else [(prefix + name, x)]


def check_values(config: ConfigDict, declarations: dict, prefix: str = ""):
    """UserError for the first value of a config, or of one of its groups, that is out of its range."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            check_values(value, declarations[name], f"{prefix}{name}.")
        else:
            declarations[name].check(prefix + name, value)
