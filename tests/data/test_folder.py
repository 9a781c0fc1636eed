"""Clips of a folder's videos: which, how they are cut, and what is refused."""

import logging
import os
import pickle
import shutil

import numpy as np
import pytest
from data.clip_files import numbered, numbers, write_clip, write_huge_header, write_sound
from data.folders import manifest, names, probed, source, texts

from cmd_jax.errors import UserError

# Clips


def test_clip_is_determined_by_the_generator(put):
    got = source(put("c/a.avi"), stride=2)
    starts = set()
    for seed in range(30):
        clip, *_ = got.clip(0, np.random.default_rng(seed))
        again, *_ = got.clip(0, np.random.default_rng(seed))
        assert clip.shape == (8, 24, 32, 3)
        assert clip.dtype == np.uint8
        np.testing.assert_array_equal(clip, again)
        shown = numbers(clip)
        assert shown == list(range(shown[0], shown[0] + 16, 2))
        starts.add(shown[0])
    assert starts == {0, 1, 2, 3, 4, 5}  # 20 frames, a span of 15
    fixed = source(put("c/a.avi"), random_start=False)
    assert all(numbers(fixed.clip(0, np.random.default_rng(s))[0])[0] == 0 for s in range(4))


def test_clip_is_cropped_about_the_centre(tmp_path):
    frames = numbered(height=48, width=96)
    frames[:, :, :30] = frames[:, :, 66:] = 255
    write_clip(tmp_path / "c/a.mp4", frames, pix_fmt="yuv444p")
    got = source(tmp_path, frames=20, height=48, width=32)
    assert numbers(got.clip(0, np.random.default_rng(0))[0]) == list(range(20))


def test_source_can_be_sent_to_a_loader_process(put):
    got = pickle.loads(pickle.dumps(source(put("c/a.avi"))))
    assert numbers(got.clip(0, np.random.default_rng(0))[0])[0] in range(13)


# Bad files


def test_bad_files_are_named_and_skipped(put, tmp_path, caplog):
    root = put("c/good.avi", "c/good too.avi")
    (root / "c/empty.avi").write_bytes(b"")
    (root / "c/text.mp4").write_text("hello\n" * 50)
    write_sound(root / "c/sound.mp4")
    write_clip(root / "c/one.avi", numbered(1))
    write_clip(root / "c/short.webm", numbered(7))
    write_huge_header(root / "c/huge.avi", 100_000, 100_000)
    data = (root / "c/good.avi").read_bytes()
    (root / "c/cut.avi").write_bytes(data[: data.index(b"movi") + (len(data) - data.index(b"movi")) // 4])
    (tmp_path / "outside.avi").write_bytes(data)
    (root / "c/link.avi").symlink_to(tmp_path / "outside.avi")
    (root / "c/inner link.avi").symlink_to(root / "c/good.avi")
    (root / "c/dangling.avi").symlink_to(root / "c/nothing.avi")
    os.mkfifo(root / "c/pipe.avi")
    (root / "linked class").symlink_to(root / "c")
    with caplog.at_level(logging.WARNING):
        got = probed(root)
    assert names(got) == ["c/good too.avi", "c/good.avi", "c/inner link.avi"]
    expected = {
        "c/empty.avi": "zero bytes",
        "c/text.mp4": "not a video",
        "c/sound.mp4": "audio only",
        "c/one.avi": "has only 1 frame; 8 are needed",
        "c/short.webm": "has only 7 frames; 8 are needed",
        "c/huge.avi": "impossible",
        "c/cut.avi": "of 20 frames decode; 8 are needed",
        "c/link.avi": "leaves the data root",
        "c/dangling.avi": "missing",
        "c/pipe.avi": "not a regular file",
        "linked class": "not followed",
    }
    assert got.bad.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in got.bad[name]
    (warning,) = caplog.messages
    assert warning.startswith("11 of 14 files")
    assert "c/empty.avi is empty (zero bytes)" in warning
    assert "and 1 more" in warning


def test_stride_counts_in_the_length_needed(put):
    assert len(probed(put("c/a.avi"), frames=10, stride=2)) == 1  # 19 of 20 frames
    with pytest.raises(UserError, match=r"1 of 1 clips.*has only 20 frames; 21 are needed"):
        probed(put("c/a.avi"), frames=6, stride=4)


def test_all_bad_is_an_error_whatever_the_fraction(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.avi").write_bytes(b"")
    with pytest.raises(UserError, match=r"^data\.root=.*2 of 2 clips cannot be used.*a\.avi is empty"):
        probed(tmp_path, max_bad_fraction=1.0)


def test_more_bad_than_allowed_is_an_error(put):
    root = put(*(f"c/{i}.avi" for i in range(3)))
    (root / "c/bad.avi").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 4 clips .* data\.max_bad_fraction=0\.2, the first: c/bad\.avi is empty"):
        probed(root, max_bad_fraction=0.2)
    assert len(probed(root, max_bad_fraction=0.25)) == 3


def test_missing_files_of_a_manifest_are_bad_files(put):
    got = source(manifest(put("a.avi"), "file_name,text\na.avi,x\ngone.avi,y\n"))
    assert names(got) == ["a.avi"]
    assert texts(got) == ("x",)
    assert "missing" in got.bad["gone.avi"]


# Fingerprint


def test_fingerprint_is_of_the_data_set_not_of_its_place(put, tmp_path, clip_bytes):
    root = put("c/a.avi", "d/b.avi")
    first = source(root).fingerprint
    assert len(first) == 64
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert source(copy).fingerprint == first
    (copy / "c/a.avi").write_bytes(clip_bytes + b"\0")
    changed = source(copy).fingerprint
    assert changed != first
    (copy / "c/a.avi").rename(copy / "c/z.avi")
    assert source(copy).fingerprint not in (first, changed)
    shutil.move(root / "d", root / "e")
    assert source(root).fingerprint != first


def test_fingerprint_is_of_the_clips_that_are_drawn(put):
    root = put("c/a.avi", "d/b.avi")
    changes = ({}, {"stride": 2}, {"frames": 7}, {"height": 32}, {"width": 24}, {"random_start": False})
    assert len({source(root, **change).fingerprint for change in changes}) == len(changes)


def test_fingerprint_covers_texts_and_labels(put):
    root = put("a.avi", "b.avi")
    prints = {
        source(manifest(root, f"file_name,text,label\na.avi,{text},{label}\nb.avi,x,u\n")).fingerprint
        for text, label in (("red", "u"), ("blue", "u"), ("red", "w"))
    }
    assert len(prints) == 3


def test_a_file_that_changes_under_the_run_is_named(put):
    got = source(put("c/a.avi"))
    (put() / "c/a.avi").write_bytes(b"")
    with pytest.raises(UserError, match=r"c/a\.avi: the file is empty"):
        got.clip(0, np.random.default_rng(0))
