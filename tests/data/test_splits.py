"""Clips held out of training: how many, whole scenes, and the same ones wherever their names are."""

import numpy as np
import pytest
from data.folders import names, source

from cmd_jax.data.shapes import ShapesSource
from cmd_jax.data.splits import Split, cut, keys_of
from cmd_jax.errors import UserError

UCF = [f"Jump/v_Jump_g{group:02d}_c{clip:02d}.avi" for group in range(1, 26) for clip in range(1, 5)]


def held(keys, fraction, seed=0):
    train, validation = cut(keys, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate([train, validation])), np.arange(len(keys)))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    return validation


@pytest.mark.parametrize(("fraction", "count"), [(1e-9, 1), (0.02, 20), (0.0201, 21), (0.5, 500), (0.9985, 999)])
def test_of_files_as_many_as_the_fraction_says(fraction, count):
    keys = keys_of(f"page/{i}.mp4" for i in range(1000))
    assert len(held(keys, fraction)) == count


def test_which_clips_depends_on_names_and_seed_alone():
    files = [f"page/{i}.mp4" for i in range(1000)]
    taken = {files[i] for i in held(keys_of(files), 0.1)}
    backwards = files[::-1]
    assert {backwards[i] for i in held(keys_of(backwards), 0.1)} == taken
    other = {files[i] for i in held(keys_of(files), 0.1, seed=1)}
    assert 0 < len(other & taken) < 40
    # Further clips: of those held out before, as many more as the fraction says stay.
    more = files + [f"new/{i}.mp4" for i in range(1000)]
    again = {more[i] for i in held(keys_of(more), 0.1)}
    old = {name for name in again if name.startswith("page/")}
    assert len(again) == 200 and (old <= taken or taken <= old)


def test_a_scene_of_ucf101_is_on_one_side():
    files = UCF + [name.replace("Jump", "Run") for name in UCF]
    validation = {files[i] for i in held(keys_of(files), 0.1)}
    scenes = {name.rpartition("_c")[0] for name in validation}
    assert len(validation) == 20 and len(scenes) == 5  # of four clips each
    assert validation == {name for name in files if name.rpartition("_c")[0] in scenes}
    # As the layout of one flat folder names them, and at another fold's root.
    assert np.array_equal(keys_of(name.rpartition("/")[2] for name in files), keys_of(files))
    assert len(set(keys_of(["a/v_1.avi", "a/v_2.avi", "a/v_g01.avi", "b/v_1.avi"]))) == 4


def test_that_large_scenes_hold_out_much_more_is_said(caplog):
    held(keys_of(UCF), 0.02)
    assert not caplog.records
    scenes = [f"Jump/v_Jump_g{group:02d}_c{clip:02d}.avi" for group in range(2) for clip in range(20)]
    assert len(held(keys_of(scenes), 0.02)) == 20
    assert "20 of 40" in caplog.records[0].getMessage()


def test_one_scene_cannot_be_cut():
    keys = keys_of(UCF[:4])
    with pytest.raises(UserError, match="^data.validation=0.1: all 4 clips would be held out"):
        cut(keys, 0.1, 0)
    assert len(held(keys_of(UCF[:8]), 0.1)) == 4


def test_keys_of_sources(tmp_path):
    for name in UCF[:8]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    clips = source(tmp_path)
    assert clips.keys().dtype == np.uint64 and np.array_equal(clips.keys(), keys_of(names(clips)))
    shapes = ShapesSource(clips=100, frames=4, height=16, width=24)
    assert len(set(shapes.keys().tolist())) == 100
    assert len(held(shapes.keys(), 0.1)) == 10


def test_examples_are_on_the_side_of_their_clips():
    split = Split(np.array([0, 2, 3]), np.array([1, 4]))
    train, validation = split.of_examples(12)
    assert train.tolist() == [0, 2, 3, 5, 7, 8, 10] and validation.tolist() == [1, 4, 6, 9, 11]
    assert [x.tolist() for x in split.of_examples(5)] == [x.tolist() for x in split]
    assert [x.tolist() for x in Split.whole(3).of_examples(4)] == [[0, 1, 2, 3], []]
