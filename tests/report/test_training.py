"""What a training writes of itself: shares of its time."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import tiny

from cmd_jax.data import pipeline
from cmd_jax.report import training
from cmd_jax.report.console import make_console
from cmd_jax.running.flight import FlightRecord


def test_data_wait_is_the_share_of_time_in_which_the_next_batch_was_waited_for(tmp_path, monkeypatch, capsys):
    """Steps of 1 s on batches that take 3 s, except for the first one's 30."""
    clock = SimpleNamespace(now=0.0)
    for module in (pipeline, training):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slow():
        for seconds in (30, 3, 3, 3, 3, 3):
            clock.now += seconds
            yield seconds

    options = tiny.config_of("content", train__log_every=2).train
    data, console = pipeline.Waited(slow()), make_console()
    with contextlib.closing(training.Metrics(tmp_path, 0)) as metrics:
        log = training.StepLog("content", options, 0, str, metrics, FlightRecord(tmp_path), console)
        for step, _ in enumerate(data):
            clock.now += 1
            log(step, {"loss": 1.0, "gradient_norm": 1.0, "applied": True, "ids": [step]}, data.seconds)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert "data_wait" not in lines[0]  # as steps_per_second: the first stretch is that of a compilation
    assert [line["data_wait"] for line in lines[1:]] == pytest.approx([0.75, 0.75])
    assert capsys.readouterr().out.count("data_wait 0.75") == 2
