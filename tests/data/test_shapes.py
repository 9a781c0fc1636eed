import time

import numpy as np
import pytest

from cmd_jax.data.shapes import CLASS_NAMES, COLORS, ShapesSource
from cmd_jax.errors import UserError

SIZES = [(8, 32, 32), (2, 16, 16), (16, 16, 40), (5, 64, 24), (8, 33, 47)]


def object_mask(video):
    """[T,H,W] bool of what differs from the corner's colour: exact here, where the background is one colour."""
    return (video != video[0, 0, 0]).any(-1)


def test_classes_are_the_48_combinations_and_balanced():
    source = ShapesSource(clips=200)
    assert len(source) == 200 and source.bad == {}
    assert len(set(source.class_names)) == 48 and "red circle moving left" in source.class_names
    labels = [source.clip(i, None)[1] for i in range(37, 37 + 96)]
    assert (np.bincount(labels, minlength=48) == 2).all()


@pytest.mark.parametrize("frames,height,width", SIZES)
def test_object_is_whole_inside_and_moves_as_named(frames, height, width):
    source = ShapesSource(clips=192, frames=frames, height=height, width=width, seed=5)
    for index in range(192):
        video, label, _ = source.clip(index, None)
        assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8
        mask = object_mask(video)
        assert not (mask[:, [0, -1]].any() or mask[:, :, [0, -1]].any()), "touches the border"
        assert video[0, 0, 0].max() <= 60
        weight = np.abs(video.astype(float) - video[0, 0, 0]).sum(-1)
        total = weight.sum((1, 2))
        assert np.ptp(total) < 0.06 * total.mean(), "part of the object is hidden in some frame"
        x = (weight.sum(1) * np.arange(width)).sum(1) / total
        y = (weight.sum(2) * np.arange(height)).sum(1) / total
        way = CLASS_NAMES[label].split()[-1]
        moving, still, side = (x, y, width) if way in ("left", "right") else (y, x, height)
        moving = -moving if way in ("left", "up") else moving
        steps = np.diff(moving)
        assert moving[-1] - moving[0] >= 0.2 * side and moving[-1] - moving[0] >= 3
        assert np.ptp(steps) < 0.2 and np.ptp(still) < 0.1  # constant velocity, up to uint8 and pixel rounding


def test_colors_are_pure_inside_and_shapes_have_their_outlines():
    source = ShapesSource(clips=48, height=64, width=64)
    for index in range(48):
        video, label, _ = source.clip(index, None)
        color, shape, *_ = CLASS_NAMES[label].split()
        mask = object_mask(video)[0]
        rows, columns = np.nonzero(mask)
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        assert tuple(video[0, (top + bottom + 1) // 2, (left + right + 1) // 2]) == COLORS[color]
        fill = mask.sum() / ((bottom - top + 1) * (right - left + 1))
        low, high = {"circle": (0.74, 0.85), "square": (1.0, 1.0), "triangle": (0.45, 0.62)}[shape]
        assert low <= fill <= high, (shape, fill)
        if shape == "triangle":
            assert mask[top + 2].sum() < mask[bottom - 2].sum()  # it points up


def test_captions_are_the_class_names_as_texts():
    source = ShapesSource(clips=100)
    assert source.has_texts and source.texts(0) == ("a red circle moving left",)
    for i in (0, 17, 48, 99):
        _, label, text = source.clip(i, None)
        assert (text,) == source.texts(i) == ("a " + CLASS_NAMES[label],) and source.labels[i] == label


def test_edges_are_antialiased_and_clips_vary():
    source = ShapesSource(clips=480)
    first = [source.clip(i, None)[0] for i in range(0, 480, 48)]
    assert len({v.tobytes() for v in first}) == 10 and len({tuple(v[0, 0, 0]) for v in first}) == 10
    for video in first:
        assert len(np.unique(video[0].reshape(-1, 3), axis=0)) > 4


def test_deterministic_by_seed_split_index_alone():
    a, b = ShapesSource(clips=100), ShapesSource(clips=500)
    rng = np.random.default_rng(1)
    for index in (3, 99, 3, 50):
        assert np.array_equal(a.clip(index, rng)[0], b.clip(index, np.random.default_rng(7))[0])
    assert rng.bit_generator.state == np.random.default_rng(1).bit_generator.state
    assert a.fingerprint == ShapesSource(clips=100).fingerprint
    others = [
        b,
        *(ShapesSource(clips=100, **o) for o in ({"seed": 1}, {"split": "test"}, {"frames": 9}, {"height": 40})),
    ]
    assert len({s.fingerprint for s in (a, *others)}) == 6 and len(a.fingerprint) == 64


def test_splits_and_seeds_share_no_clip():
    seen = set()
    for options in ({}, {"split": "test"}, {"seed": 1}, {"seed": 1, "split": "test"}, {"seed": 2**32}):
        source = ShapesSource(clips=480, **options)
        seen |= {source.clip(i, None)[0].tobytes() for i in range(480)}
    assert len(seen) == 5 * 480


def test_pixels_are_those_of_this_version():
    """A run's fingerprint promises its pixels: a change here needs a new shapes.VERSION."""
    video, label, _ = ShapesSource(clips=1000, seed=3).clip(777, None)
    assert label == 777 % 48
    assert (int(video.astype(np.int64).sum()), video[0, 0, 0].tolist()) == (1399604, [57, 26, 39])


@pytest.mark.parametrize(
    "options",
    [
        {"clips": 0}, {"clips": -1}, {"frames": 1}, {"height": 15}, {"width": 0}, {"width": 32.0}, {"seed": -1},
        {"split": "val"},
    ],
)  # fmt: skip
def test_bad_values_are_named(options):
    with pytest.raises(UserError) as error:
        ShapesSource(**{"clips": 10, **options})
    assert str(error.value).startswith("data.{}={}:".format(*next(iter(options.items()))))


def test_index_outside_is_an_error():
    for index in (-1, 10):
        with pytest.raises(IndexError):
            ShapesSource(clips=10).clip(index, None)


def test_quick_enough_for_training():
    source = ShapesSource(clips=480)
    best = min(_seconds(source) for _ in range(5))
    assert best / 96 < 1e-3  # about 0.2 ms; the margin is for a busy machine


def _seconds(source):
    start = time.perf_counter()
    for index in range(96):
        source.clip(index, None)
    return time.perf_counter() - start
