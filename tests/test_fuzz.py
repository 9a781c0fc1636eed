"""Files that somebody damaged on purpose: every reader returns or answers in one line, and nothing in them runs."""

import contextlib
import io
import pickle
import time

import fuzz
import fuzz_weights
import numpy as np
import pytest


def test_the_harness_sees_what_must_not_be():
    verdicts = fuzz.run("fuzz_toys:TOYS", 8, seconds=5)
    outcomes = ["read", "refused", "traceback", "died", "hung", "traceback", "executed", "read"]
    assert [v.outcome for v in verdicts] == outcomes and [v.index for v in verdicts] == list(range(8))
    assert [v.index for v in fuzz.faults(verdicts)] == [2, 3, 4, 5, 6] and "memory" in verdicts[5].text.lower()


def test_mutations_are_repeatable_and_change_files():
    seed, rng = bytes(range(256)) * 4, np.random.default_rng
    for mutate in fuzz.BYTES:
        made = {mutate(seed, b"other", rng(i)) for i in range(20)}
        assert len(made) > 10 and made == {mutate(seed, b"other", rng(i)) for i in range(20)}
    value = {"a": [1, {"b": "c"}], "d": 2.0}
    assert len({fuzz.dump_json(fuzz.mutate_json(value, rng(i))) for i in range(200)}) > 50
    assert value == {"a": [1, {"b": "c"}], "d": 2.0}


def test_the_attacks_run_where_pickles_are_run(tmp_path, monkeypatch):
    """Else it would show nothing that they do not run in ours."""
    marker, ran = tmp_path / "marker", []
    monkeypatch.setenv(fuzz.MARKER, str(marker))
    for attack in fuzz_weights.attacks():
        unpickler = pickle.Unpickler(io.BytesIO(b"\x80\x04" + attack + b"."))
        unpickler.persistent_load = lambda pid: pid
        with contextlib.suppress(Exception):
            unpickler.load()
        deadline = time.monotonic() + (5 if b"Popen" in attack else 0)
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        ran.append(marker.exists())
        marker.unlink(missing_ok=True)
    assert all(ran) and len(ran) == 16, ran


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind, count", [
    ("fuzz_weights:SAFETENSORS", 10_000), ("fuzz_weights:PICKLES", 2_000), ("fuzz_json:JSON", 2_000),
])  # fmt: skip
def test_mutated_files_are_read_or_refused_in_one_line(kind, count):
    verdicts = fuzz.run(kind, count)
    assert fuzz.faults(verdicts) == []
    outcomes = [verdict.outcome for verdict in verdicts]
    assert len(outcomes) == count and min(outcomes.count("read"), outcomes.count("refused")) > count // 100
