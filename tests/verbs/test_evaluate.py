import signal
import time

import numpy as np
import pytest
import tiny
from processes import Job
from samplers import command, stirred

from cmd_jax.data.shapes import ShapesSource
from cmd_jax.files import read_json
from cmd_jax.sampling.sampler import Samples
from cmd_jax.verbs import evaluate as evaluating

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture
def sampler(monkeypatch):
    monkeypatch.setattr(evaluating, "open_sampler", lambda *_: stirred())
    return stirred()


def real_clips(labels):
    """Clips of the dataset itself, larger than the tiny stages make them so that the oracle can read them."""
    source = ShapesSource(clips=48 * 3, split="test")
    for start in range(0, len(labels), 32):
        index = np.arange(start, min(start + 32, len(labels)))
        clips = np.stack([source.clip(labels[i] + 48 * (i % 3))[0] for i in index]) / np.float32(127.5) - 1
        yield Samples(index, video=clips, image=clips[:, 0], content=clips[:, 0], motion=clips)


def test_evaluate_scores_real_clips_right(tmp_path, sampler, monkeypatch, capsys):
    monkeypatch.setattr(sampler, "generate", lambda request, _: real_clips(request.conditions["label"]))
    assert command("evaluate", tmp_path, evaluation__videos=96, title="real clips") == 0
    summary = read_json(tmp_path / "samples" / "summary.json")
    scores = summary["scores"]["attributes"]
    assert scores["count"] == summary["samples"] == 96
    out = capsys.readouterr().out
    for name, chance in (("color", 1 / 4), ("direction", 1 / 4), ("shape", 1 / 3), ("all", 1 / 48)):
        assert scores[name]["correct"] >= 0.99 * 96
        assert scores[name]["accuracy"] == scores[name]["correct"] / 96
        assert scores[name]["chance"] == pytest.approx(chance)
        assert f"{scores[name]['correct']}/96" in out and f"{chance:.1%}" in out
    reconstruction = summary["scores"]["reconstruction_psnr"]
    assert np.isfinite(reconstruction["mean"]) and reconstruction["clips"] == 3
    assert f"{reconstruction['mean']:.2f} dB PSNR over 3 clips" in out
    section = read_json(tmp_path / "samples" / "samples.json")
    assert len(section["items"]) == len(list((tmp_path / "samples").glob("*.mp4"))) == 2
    assert section["title"] == "real clips"
    assert section["table"][1][0] == "reconstruction PSNR" and len(section["table"]) == 6


def test_evaluate_scores_clips_of_other_classes_at_chance(tmp_path, sampler, monkeypatch):
    shuffled = np.random.default_rng(0).permutation(96)
    monkeypatch.setattr(sampler, "generate", lambda request, _: real_clips(request.conditions["label"][shuffled]))
    assert command("evaluate", tmp_path, evaluation__videos=96) == 0
    scores = read_json(tmp_path / "samples" / "summary.json")["scores"]["attributes"]
    assert scores["all"]["accuracy"] < 0.1
    for name in ("color", "direction", "shape"):
        assert abs(scores[name]["accuracy"] - scores[name]["chance"]) < 0.15


def test_evaluate_generates_as_many_as_asked(tmp_path, sampler):
    assert command("evaluate", tmp_path, evaluation__videos=3) == 0
    summary = read_json(tmp_path / "samples" / "summary.json")
    assert summary["scores"]["attributes"]["count"] == 3
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2


def test_evaluate_scores_generated_videos_only(tmp_path, sampler, capsys):
    assert command("evaluate", tmp_path, mode="reconstruct") == 2
    assert "evaluate scores generated videos; use sampling.mode=generate" in capsys.readouterr().err


def test_a_signal_in_the_middle_of_evaluate_leaves_nothing_half_done(tmp_path):
    """It has nothing to save; what it has written so far is removed."""
    run = tiny.trained()
    more = ["--config.evaluation.videos=100000", "--config.sampling.output=stopped"]
    arguments = ["evaluate", f"--config={tiny.CONFIG_FILE}:sample", f"--workdir={run}", *more]
    with Job(tmp_path, *arguments, count=1, devices=1) as job:
        job.until(lambda: list(run.glob(".tmp-*-stopped")))
        sent = time.monotonic()
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.wait(30) == [0], job.out()
        assert time.monotonic() - sent < 10
    assert job.out().splitlines()[-1] == "stopped by a signal; nothing was written"
    assert not list(run.glob("*stopped*")) and not list(run.glob(".tmp*"))
