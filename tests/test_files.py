import json
from dataclasses import dataclass
from typing import Annotated

import pytest

from cmd_jax.errors import UserError, printable
from cmd_jax.files import COUNT, as_json, as_path, check_like, from_json, like_of, parse_json, read_json, scratch_folder

LIKE = {
    "name": str,
    "sizes": [COUNT],
    "rate?": float,
    "kind?": ("a", {"x": bool}, None),
    "pair?": [str, [int]],
    "rest?": {...: int},
}
LIKE |= {"kind?": (str, {"x": bool}, None)}
GOOD = {"name": "n", "sizes": [1, 2]}


@pytest.mark.parametrize("more", [
    {}, {"rate": 1}, {"rate": 1e308}, {"kind": None}, {"kind": "a"}, {"kind": {"x": True}}, {"pair": ["a", []]},
    {"pair": ["a", [1, 2]]}, {"rest": {}}, {"rest": {"any": 1, "name": -3}}, {"sizes": []},
])  # fmt: skip
def test_what_is_like_it(more):
    assert check_like(GOOD | more, LIKE) == ""
    assert parse_json(json.dumps(GOOD | more), "f", "p", like=LIKE) == GOOD | more


@pytest.mark.parametrize("value, problem", [
    ({"name": "n"}, "it lacks sizes"),
    (GOOD | {"stray": 1}, 'it has "stray", which nothing here is called'),
    (GOOD | {"name": 1}, "name is 1, not a text"),
    (GOOD | {"sizes": {}}, "sizes is {}, not a list"),
    (GOOD | {"sizes": [1, True]}, f"sizes[1] is true, not a whole number from 0 to {2**63 - 1}"),
    (GOOD | {"sizes": [1, 2.0]}, f"sizes[1] is 2.0, not a whole number from 0 to {2**63 - 1}"),
    (GOOD | {"sizes": [-1]}, f"sizes[0] is -1, not a whole number from 0 to {2**63 - 1}"),
    (GOOD | {"sizes": [2**63]}, f"sizes[0] is {2**63}, not a whole number from 0 to {2**63 - 1}"),
    (GOOD | {"rate": float("nan")}, "rate is NaN, not a finite number"),
    (GOOD | {"rate": 10**400}, f"rate is 1{'0' * 59}..., not a finite number"),
    (GOOD | {"rate": False}, "rate is false, not a finite number"),
    (GOOD | {"kind": {"x": 1}}, 'kind is {"x": 1}, not a text'),
    (GOOD | {"pair": ["a"]}, "pair has 1 items, not 2"),
    (GOOD | {"pair": ["a", ["b"]]}, 'pair[1][0] is "b", not a whole number'),
    (GOOD | {"rest": {"a": None}}, "rest.a is null, not a whole number"),
    ([], "it is [], not an object"),
])  # fmt: skip
def test_what_is_not_is_named(value, problem):
    assert check_like(value, LIKE) == problem
    with pytest.raises(UserError) as e:
        parse_json(json.dumps(value), "f", "p", like=LIKE)
    assert (e.value.field, e.value.value, e.value.problem) == ("f", "p", problem)


@pytest.mark.parametrize("text", [
    b"", b"{", b"\xff", b"[]", b"5", b"null", b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 70 + b"1" + b"}" * 70,
    b'{"a": ' + b"1" * 5000 + b"}",
])  # fmt: skip
def test_what_is_no_object_or_too_deep(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as e:
        read_json(path, "workdir")
    assert e.value.field == "workdir" and str(e.value).startswith(f"workdir={path}: ") and len(str(e.value)) < 500


def test_a_terminal_is_not_commanded_by_a_file():
    assert printable("a\x1b[2J\nb \ud800\u202e é") == "a\\x1b[2J b \\ud800\\u202e é"
    line = str(UserError("f\x1b", "v\x07", "p" * 10_000 + "\x1b", "do\x00this"))
    assert line.isprintable() and len(line) < 800


@dataclass(frozen=True)
class Part:
    names: tuple[str, ...]
    rates: dict[str, int | float]


@dataclass(frozen=True)
class Whole:
    count: Annotated[int, COUNT]
    part: Part
    parts: tuple[Part, ...] = ()
    more: Part | None = None
    text: str | None = None


def test_a_dataclass_is_read_as_it_is_written():
    part = {"names": [str], "rates": {...: (int, float)}}
    like = {"count": COUNT, "part": part, "parts?": [part], "more?": (part,), "text?": (str,)}
    assert like_of(Whole) == like
    least, most = (
        Whole(1, Part((), {})),
        Whole(2, Part(("a",), {"x": 1}), (Part(("b",), {"y": 0.5}),), Part((), {}), "t"),
    )
    for whole in (least, most):
        value = json.loads(json.dumps(as_json(whole)))
        assert check_like(value, like) == "" and from_json(Whole, value) == whole
    assert as_json(least) == {"count": 1, "part": {"names": [], "rates": {}}, "parts": []}
    assert from_json(Whole, {"count": 1, "part": {"names": [], "rates": {}}}) == least
    assert check_like({"count": -1, "part": part}, like).startswith("count is -1")
    assert check_like(as_json(most) | {"more": None}, like) == "more is null, not an object"


@pytest.mark.parametrize("place, problem", [
    ("gs://bkt/x", "is itself in a bucket"), ("gs:bkt", "gs: is not a scheme"), ("~no-such-user/x", "nobody's home"),
])  # fmt: skip
def test_a_cache_that_can_be_nowhere(place, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMD_JAX_CACHE", place)
    with pytest.raises(UserError, match=problem):
        scratch_folder().__enter__()
    with pytest.raises(UserError, match="path=~no-such-user/run: "):
        as_path("~no-such-user/run")
    assert not list(tmp_path.iterdir())
