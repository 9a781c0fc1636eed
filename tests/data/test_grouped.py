"""Rows of lists of clips become clips, each with its texts."""

import numpy as np
import pytest

from cmd_jax.data import grouped


def test_rows_of_different_names_with_one_hash_are_kept_apart(monkeypatch):
    monkeypatch.setattr(grouped, "hash", lambda text: len(text), raising=False)
    rows = grouped.Rows()
    told = [("b", "1"), ("a", "2"), ("b", "3"), ("ccc", "1"), ("b", "1"), ("a", "2"), ("a", "ü"), ("b", "3")]
    for line, (name, text) in enumerate(told):
        rows.add(line, name, text, "x")
    got = [(entry.name, entry.texts) for entry in rows.entries()]
    assert got == [("b", ("1", "3")), ("a", ("2", "ü")), ("ccc", ("1",))]


def test_rows_come_in_the_order_of_their_names_first_ones():
    rng, rows, expected = np.random.default_rng(0), grouped.Rows(), {}
    for line, (name, text) in enumerate(rng.integers(0, [300, 3], (1000, 2)).tolist()):
        rows.add(line, f"n{name}", f"t{text}", str(name % 5))
        expected.setdefault(f"n{name}", {})[f"t{text}"] = None
    got = list(rows.entries())
    assert [(e.name, e.texts) for e in got] == [(name, tuple(texts)) for name, texts in expected.items()]
    assert all(entry.label == str(int(entry.name[1:]) % 5) for entry in got)


def test_a_row_with_another_label_than_its_clip_s_first():
    rows = grouped.Rows()
    for line, (name, label) in enumerate([("a", "x"), ("b", None), ("a", "x"), ("b", "x"), ("a", None)], 2):
        rows.add(line, name, "text", label)
    with pytest.raises(grouped.Conflict) as conflict:
        rows.entries()
    assert conflict.value.args == (5, "b", None, "x")
