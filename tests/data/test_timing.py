"""Clips of mixed and variable frame rates are brought to one by the time stamps of their frames."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
from data.clip_files import numbered, numbers, write_clip
from data.folders import probed

from cmd_jax.data import probe, timing, video


def runs_of(stamps, tick, rate=None):
    clock, steps = timing.Clock(Fraction(tick), rate), timing.Steps()
    for stamp in stamps:
        steps.add(clock.step(stamp))
    return steps.runs


def test_the_frame_of_a_moment_is_the_last_that_has_appeared():
    times = np.array([0, 0.04, 0.24, 0.26, 0.66])
    assert timing.length_at(times[-1], 10) == 7
    assert timing.frames_at(times, 10, range(7)).tolist() == [0, 1, 1, 3, 3, 3, 3]
    assert timing.frames_at(times, 25, [0, 1, 5, 6, 7, 16]).tolist() == [0, 1, 1, 2, 3, 3]
    assert timing.frames_at(times, 10, range(1, 7, 2)).tolist() == [1, 3, 3]


@pytest.mark.parametrize("fps", [10, 24, 25, 29.97, 30000 / 1001, 50, 60, 120])
@pytest.mark.parametrize("rounded", [np.round, np.floor])
def test_stamps_in_milliseconds_lose_no_frame_of_the_same_rate(fps, rounded):
    """Rounding at both ends of a duration must not show a frame one moment later."""
    for first in (0, 0.0004, 7.77):
        times = rounded((first + np.arange(3000) / fps) * 1000) / 1000
        times -= times[0]
        assert timing.length_at(times[-1], fps) == 3000
        assert timing.frames_at(times, fps, range(3000)).tolist() == list(range(3000))
        assert timing.frames_at(times, fps / 2, range(1500)).tolist() == list(range(0, 3000, 2))


def test_steps_that_cannot_be_are_those_before_them():
    assert runs_of([7, 9, 11, 15], "1/100") == [[0, 1], [2, 2], [4, 1]]
    assert runs_of([0, 2, None, 6, 8], "1/100") == [[0, 1], [2, 4]]  # a stamp is missing
    assert runs_of([0, 3, 3, 1, 4], "1/100") == [[0, 1], [3, 4]]  # it stands, goes back, and goes on
    assert runs_of([0, 2, 5000, 4, 6], "1/100") == [[0, 1], [2, 4]]  # one is wild
    assert runs_of([0, 1000, 2001], "1/100") == [[0, 1], [1000, 2]]  # ten seconds are a still, more are none
    for rate, step in ((Fraction(50), 2), (None, 4), (Fraction(0), 4), (Fraction(90000), 4)):
        assert runs_of([None] * 4, "1/100", rate) == [[0, 1], [step, 3]]  # no stamp at all
    assert runs_of([None] * 2, "1/10", Fraction(50)) == [[0, 1], [1, 1]]  # time never stands


def folder(tmp_path):
    """Frame k of each is grey of level STEP * k; they appear at 25, 10 and variable rates."""
    write_clip(tmp_path / "a25.mp4", numbered(20))
    write_clip(tmp_path / "b10.mp4", numbered(20), times=[100 * k for k in range(20)])
    write_clip(tmp_path / "c_variable.mkv", numbered(20), times=[*range(0, 400, 40), *range(500, 1500, 100)])
    return tmp_path


def test_mixed_rates_are_brought_to_one(tmp_path):
    """And the decoder of a whole file finds the same sequence as the reader of windows."""
    root = folder(tmp_path)
    expected = {
        5: [[0, 5, 10, 15], [*range(0, 20, 2)], [0, 5, 9, 11, 13, 15, 17, 19]],
        12.5: [[*range(0, 20, 2)], None, [0, 2, 4, 6, 8, 9, 9, 10, 11, 12, 13, 13, 14, 15, 16, 17, 17, 18]],
        20: [None, [k // 2 for k in range(39)], None],
    }
    for fps, sequences in expected.items():
        source = probed(root, fps=fps, frames=3, stride=1, random_start=False, cache=tmp_path / "cache")
        for index, sequence in enumerate(sequences):
            with video.open_video(str(root / source.name(index))) as (container, stream):
                decoded = [i for i, _ in timing.at_rate(video.decode(container, stream), stream, fps)]
            assert sequence is None or decoded == sequence
            assert source.lengths[index] == len(decoded)
            source.frames = len(decoded)
            assert numbers(source.clip(index, np.random.default_rng(0))[0]) == decoded
    assert numbers(probed(root, fps=5, frames=2, stride=2, random_start=False).clip(0, None)[0]) == [0, 10]


def test_a_window_at_a_rate_is_cut_from_the_sequence(tmp_path):
    source = probed(folder(tmp_path), fps=20, frames=6, stride=2)
    starts = set()
    for seed in range(20):
        start = int(np.random.default_rng(seed).integers(0, 39 - 10))
        starts.add(start)
        got = numbers(source.clip(1, np.random.default_rng(seed))[0])
        assert got == [k // 2 for k in range(start, start + 12, 2)]
    assert len(starts) > 8


def test_what_is_too_short_at_the_rate_is_left_out(tmp_path):
    source = probed(folder(tmp_path), fps=5, frames=5)
    assert list(source.bad) == ["a25.mp4"] and "4 frames at data.fps=5; 5 are needed" in source.bad["a25.mp4"]
    plain, slow = probed(tmp_path, frames=4), probed(tmp_path, fps=5, frames=4)
    assert len({plain.fingerprint, slow.fingerprint, probed(tmp_path, fps=6, frames=4).fingerprint}) == 3


def test_a_file_tested_without_times_is_tested_again_for_them_alone(tmp_path, monkeypatch):
    root, cache, asked = folder(tmp_path / "clips"), tmp_path / "cache", []
    real = probe.probe
    monkeypatch.setattr(probe, "probe", lambda paths, *a: asked.append(len(paths)) or real(paths, *a))
    (root / "broken.avi").write_bytes(b"x")
    for fps in (0, 5, 6, 0):
        probed(root, fps=fps, frames=2, cache=cache)
    assert asked == [4, 3]  # what is broken stays so, and times do for any rate
    facts = {fact["name"]: fact for fact in map(json.loads, cache.read_text().splitlines()[1:])}
    assert facts["b10.mp4"]["steps"] == [[0, 1], [facts["b10.mp4"]["tick"][1] // 10, 19]]


def test_a_sequence_holds_one_picture_for_as_long_as_it_is_shown(tmp_path):
    path = write_clip(tmp_path / "a.mp4", numbered(3), times=[0, 100, 1000])
    with video.open_video(str(path)) as (container, stream):
        shown = list(timing.at_rate(video.decode(container, stream), stream, 10))
    assert [index for index, _ in shown] == [0, *[1] * 9, 2] and all(isinstance(f, av.VideoFrame) for _, f in shown)
    assert len({id(frame) for _, frame in shown}) == 3
    assert list(timing.at_rate([], stream, 10)) == []
