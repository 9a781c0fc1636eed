"""Files that somebody damaged on purpose: every reader returns or answers in one line, and nothing in them runs."""

import fuzz
import numpy as np


def test_the_harness_sees_what_must_not_be():
    verdicts = fuzz.run("fuzz_toys:TOYS", 8, seconds=2)
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
