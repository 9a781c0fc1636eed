import pytest

from cmd_jax.performance import timing
from cmd_jax.performance.timing import Times, in_turns, ratio, repeated


@pytest.fixture
def clock(monkeypatch):
    """Calls take what they give: of one that returns 2.0, `once` takes 2 seconds of a clock of its own."""
    now = [0.0]

    def once(call):
        seconds = call()
        now[0] += seconds
        return seconds

    monkeypatch.setattr(timing, "once", once)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])


def test_percentiles():
    times = Times(tuple(float(i) for i in range(1, 22)))
    assert (times.p50, times.p95) == (11.0, 20.0)
    assert Times((3.0,)).p50 == Times((3.0,)).p95 == 3.0


def test_the_first_calls_do_not_count_and_a_budget_ends_the_rounds(clock):
    answers = iter([100.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert repeated(lambda: next(answers), rounds=9, budget=9.5).seconds == (1.0, 2.0, 3.0, 4.0)
    assert len(repeated(lambda: 50.0, rounds=9, budget=1.0).seconds) == timing.LEAST_ROUNDS
    assert len(repeated(lambda: 50.0, rounds=2, budget=1.0).seconds) == 2


def test_calls_take_turns(clock):
    order = []
    calls = {name: lambda name=name: order.append(name) or {"a": 2.0, "b": 3.0}[name] for name in "ab"}
    times = in_turns(calls, rounds=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert times["a"].seconds == (2.0,) * 3 and ratio(times["a"], times["b"]) == 1.5


def test_a_machine_that_slows_down_does_not_change_a_ratio():
    ours, theirs = Times((1.0, 1.0, 10.0, 1.0, 1.0)), Times((2.0, 2.0, 20.0, 2.0, 9.0))
    assert ratio(ours, theirs) == 2.0


def test_a_time_is_that_of_the_arrays():
    import jax.numpy as jnp

    assert timing.once(lambda: jnp.ones(3) + 1) > 0
