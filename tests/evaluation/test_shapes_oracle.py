import json

import numpy as np
import pytest

from cmd_jax.data.shapes import ShapesSource
from cmd_jax.errors import UserError
from cmd_jax.evaluation.shapes_oracle import Reading, parse, read_clip, score

FIELDS = ("shape", "color", "direction")


def clips(count, frames=8, height=32, width=32, seed=0):
    source = ShapesSource(clips=count, frames=frames, height=height, width=width, seed=seed, split="test")
    videos, labels, _ = zip(*(source.clip(i, None) for i in range(count)), strict=True)
    return np.stack(videos), np.asarray(labels), source.class_names


def degrade(videos, sigma, noise, seed=0):
    """Gaussian blur of `sigma` pixels in each frame, then Gaussian noise of `noise`/255."""
    x = videos.astype(np.float32)
    for axis in (2, 3):
        offset = np.arange(x.shape[axis])
        kernel = np.exp(-0.5 * ((offset[:, None] - offset) / sigma) ** 2).astype(np.float32)
        x = np.moveaxis(np.moveaxis(x, axis, -1) @ (kernel / kernel.sum(0)), -1, axis)
    x = x + np.random.default_rng(seed).normal(0, noise, x.shape)
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


def test_reads_real_clips():
    videos, labels, names = clips(2000)
    result = score(videos, labels, names)
    assert result["count"] == 2000
    for field in FIELDS:
        assert result[field]["accuracy"] >= 0.99 and result[field]["correct"] == 2000 * result[field]["accuracy"]
    assert result["all"]["accuracy"] >= 0.98
    assert [round(1 / result[field]["chance"]) for field in (*FIELDS, "all")] == [3, 4, 4, 48]
    json.dumps(result)


@pytest.mark.parametrize("frames,height,width", [(16, 64, 64), (8, 32, 64), (8, 64, 32), (8, 24, 40), (2, 16, 16)])
def test_reads_other_sizes(frames, height, width):
    result = score(*clips(192, frames, height, width, seed=3))
    assert min(result[field]["accuracy"] for field in FIELDS) >= 0.99


@pytest.mark.parametrize("height,width", [(32, 32), (24, 40)])
def test_bears_blur_and_noise(height, width):
    videos, labels, names = clips(480, height=height, width=width, seed=4)
    result = score(degrade(videos, 1.0, 8), labels, names)
    assert result["shape"]["accuracy"] >= 0.9
    assert result["color"]["accuracy"] >= 0.98 and result["direction"]["accuracy"] >= 0.98


def test_random_labels_score_at_chance():
    videos, labels, names = clips(960, seed=5)
    result = score(videos, np.random.default_rng(0).permutation(labels), names)
    for field in (*FIELDS, "all"):
        assert abs(result[field]["accuracy"] - result[field]["chance"]) < 0.06


def test_confusion_counts_what_was_read():
    videos, labels, names = clips(48)
    red_circles = [i for i in range(48) if names[labels[i]].startswith("red circle")]
    claimed = np.full(4, names.index("blue square moving up"))
    result = score(videos[red_circles], claimed, names)
    assert result["shape"]["confusion"]["square"] == {"circle": 4, "square": 0, "triangle": 0, "none": 0}
    assert result["color"]["confusion"]["blue"]["red"] == 4 and result["color"]["correct"] == 0
    assert result["direction"]["confusion"]["up"] == {"left": 1, "right": 1, "up": 1, "down": 1, "none": 0}
    assert result["direction"]["correct"] == 1 and result["all"]["correct"] == 0


def test_time_reversed_clip_moves_the_other_way():
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for video in clips(96, seed=6)[0]:
        forward, backward = read_clip(video), read_clip(video[::-1])
        assert backward == forward._replace(direction=opposite[forward.direction])


def test_transposed_clip_moves_along_the_other_axis():
    turned = {"left": "up", "right": "down", "up": "left", "down": "right"}
    for video in clips(48, height=24, width=40, seed=7)[0][:32]:  # circles and squares: they stay what they are
        reading = read_clip(video)
        assert read_clip(video.swapaxes(1, 2)) == reading._replace(direction=turned[reading.direction])


def test_no_object_is_none():
    plain = np.full((8, 32, 32, 3), (20, 60, 0), np.uint8)
    noise = np.random.default_rng(0).normal(40, 8, plain.shape).clip(0, 255).astype(np.uint8)
    for video in (plain, noise, np.zeros_like(plain)):
        assert read_clip(video) == Reading("none", "none", "none")
    result = score(np.stack([plain] * 48), np.arange(48), clips(48)[2])
    assert [result[field]["correct"] for field in (*FIELDS, "all")] == [0, 0, 0, 0]
    assert result["shape"]["confusion"]["circle"]["none"] == 16


def test_still_and_grey_objects_earn_nothing():
    video = clips(1)[0][0]
    still = np.repeat(video[:1], 8, axis=0)
    assert read_clip(still) == read_clip(video)._replace(direction="none")
    grey = np.repeat(video.max(-1, keepdims=True), 3, axis=-1)
    assert read_clip(grey) == read_clip(video)._replace(color="none")


def test_object_seen_in_some_frames_only():
    video = clips(1, frames=12)[0][0].copy()
    reading = read_clip(video)
    video[[0, 5, 6]] = video[0, 0, 0]
    assert read_clip(video) == reading


def test_bad_input_is_named():
    videos, labels, names = clips(2)
    assert parse("red circle moving left") == Reading("circle", "red", "left")
    with pytest.raises(UserError, match="^class_names=a cat: "):
        score(videos, labels, ["a cat"] * 48)
    with pytest.raises(UserError, match="^videos=0: "):
        score(videos[:0], labels[:0], names)
