"""What a training writes of itself: rates, shares of its time, and what it came to over several runs."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import tiny

from cmd_jax.performance import goodput
from cmd_jax.performance.goodput import Clock, fed
from cmd_jax.report import training
from cmd_jax.report.console import make_console
from cmd_jax.running.flight import FlightRecord


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: its `now`, in seconds."""
    fake = SimpleNamespace(now=0.0)
    for module in (goodput, training):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


def test_data_wait_is_the_share_of_time_in_which_devices_waited_for_the_next_batch(tmp_path, clock, capsys):
    """Batches that take 4 s, except for the first one's 30; steps of 1 s go on while the next is waited for."""
    devices = SimpleNamespace(done=0.0)
    devices.busy_until = lambda: min(devices.done, clock.now)

    def slow():
        for seconds in (30, 4, 4, 4, 4, 4):
            clock.now += seconds
            yield seconds

    options = tiny.config_of("content", train__log_every=2, train__batch_size=3).train
    spent, console = Clock("steps"), make_console()
    rates = lambda operations, seconds: {"tflops_per_device": operations / seconds, "mfu": 0.125}  # noqa: E731
    with contextlib.closing(training.Metrics(tmp_path, 0)) as metrics:
        log = training.StepLog("content", options, 0, str, metrics, FlightRecord(tmp_path), console, spent, rates)
        for step, _ in enumerate(fed(slow(), spent, devices)):
            devices.done = clock.now + 1
            log(step, {"loss": 1.0, "gradient_norm": 1.0, "applied": True, "ids": [step]}, 7 * (step + 1))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert "data_wait" not in lines[0]  # as steps_per_second: the first stretch is that of a compilation
    for line in lines[1:]:
        assert (line["data_wait"], line["clips_per_second"]) == pytest.approx((0.75, 0.75))
        assert (line["tflops_per_device"], line["mfu"]) == pytest.approx((14 / 8, 0.125))
    assert capsys.readouterr().out.count("0.25 steps/s  0.75 clips/s  data 75%  1.75 TFLOP/s  MFU 12.5%") == 2
    assert spent.seconds() == pytest.approx({"steps": 5.0, "data_wait": 45.0})
    times = [json.loads(line) for line in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    assert times[0] == {"start": 0} and times[-1] == {"step": 6, "seconds": spent.seconds()}


def test_each_moment_goes_to_one_purpose(clock):
    spent = Clock()
    clock.now = 3.0
    with spent.spent("compile"):
        clock.now = 10.0
        with spent.spent("data_wait"):
            clock.now = 12.0
        clock.now = 13.0
    spent.turn("steps")
    clock.now = 63.0
    assert spent.seconds() == {"steps": 50.0, "start_up": 3.0, "compile": 8.0, "data_wait": 2.0}
    told = goodput.goodput(spent.seconds())
    assert told["share"] == round(50 / 63, 4) and told["wall_seconds"] == sum(told["seconds"].values()) == 63.0
    assert goodput.in_words(told) == "79.4% of 63.0 s (compile 8.0 s, start up 3.0 s, data wait 2.0 s)"


def test_steps_that_were_done_again_are_not_useful():
    """Killed after 7, from 4 on, killed after 5 before it saved, and again from 4 on to 9; then the run at hand."""
    told = lambda step, steps, **others: {"step": step, "seconds": {"steps": steps, **others}}  # noqa: E731
    first = [{"start": 0}, told(2, 20.0), told(4, 40.0, compile=5.0), told(7, 70.0, compile=5.0)]
    second = [{"start": 4}, told(5, 10.0, compile=6.0)]
    third = [{"start": 4}, told(8, 40.0, compile=7.0), told(9, 50.0, compile=7.0)]
    runs, seconds = goodput.earlier_seconds([*first, *second, *third], start=8)
    assert (runs, seconds) == (3, {"steps": 40 + 0 + 40, "repeated": 30 + 10 + 10, "compile": 18})
    # A run that goes back further, to a checkpoint before the last, undoes what seemed done.
    assert goodput.earlier_seconds([*first, {"start": 4}, told(6, 20.0)], 2)[1] == {
        "steps": 20, "repeated": 50 + 20, "compile": 5.0,
    }  # fmt: skip
    # What a step that came to nothing took is no part of the one before, nor of none.
    assert goodput.earlier_seconds([*first[:3], told(5, 45.0), {"start": 4}, told(5, 5.0)], 4)[1] == {
        "steps": 40, "repeated": 5 + 5,
    }  # fmt: skip
    assert goodput.earlier_seconds([], 0) == (0, {})


def test_times_of_earlier_runs_are_read_past_a_torn_line(tmp_path):
    with contextlib.closing(training.Metrics(tmp_path, 0)) as metrics:
        assert metrics.earlier == (0, {})
        metrics.spent(4, {"steps": 8.0})
    with open(tmp_path / "goodput.jsonl", "a") as file:
        file.write('{"step": 6, "sec')
    for runs in (1, 2):
        with contextlib.closing(training.Metrics(tmp_path, 3)) as metrics:
            assert metrics.earlier == (runs, {"steps": 0.0, "repeated": 8.0})
