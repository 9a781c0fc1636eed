"""data.buckets, end to end: stages trained on clips of two sizes, and videos of either."""

import json

import numpy as np
import pytest
import tiny
from data.clip_files import quarters, write_clip

from cmd_jax.data.requests import class_request
from cmd_jax.errors import UserError
from cmd_jax.loading import open_sampler
from cmd_jax.sampling.settings import SamplingSettings
from cmd_jax.train import train

SIZES = ((16, 24), (24, 16))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for i in range(5):
        write_clip(root / f"a/wide{i}.mp4", quarters(4, 32, 48))
        write_clip(root / f"b/high{i}.mp4", quarters(4, 48, 32))
    return {"data__source": "folder", "data__root": root, "data__buckets": "24x16", "train__batch_size": 2}


@pytest.mark.slow
def test_stages_learn_from_two_sizes_and_sample_either(clips, tmp_path):
    held_out = {"data__validation": 0.2, "train__validate_every": 4, "train__steps": 4}
    train(tiny.config_of("autoencoder", **clips, **held_out, train__preview_every=4), tmp_path)
    for stage in ("content", "motion"):
        plain = {"latents__starts": 0, "latents__normalize": False, "train__preview_every": 4}
        train(tiny.config_of(stage, **clips, **held_out, **plain), tmp_path)
        lines = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
        assert [line["step"] for line in lines if "validation_loss" in line] == [4]
    sample = {key: value for key, value in clips.items() if key.startswith("data")}
    for height, width in SIZES:
        size = {"data__height": height, "data__width": width, "data__buckets": ""}
        config = tiny.config_of("sample", **sample | size)
        sampler = open_sampler(config, tmp_path)
        settings = SamplingSettings(batch_size=2, content_steps=2, motion_steps=2)
        (samples,) = sampler.generate(class_request(["a", "b"], sampler.class_names), settings)
        assert samples.video.shape == (2, 4, height, width, 3)
        assert np.isfinite(samples.video).all()
    with pytest.raises(UserError) as raised:
        open_sampler(tiny.config_of("sample", **sample | {"data__height": 24, "data__width": 24}), tmp_path)
    assert (raised.value.field, raised.value.value) == ("data.width", 24)
