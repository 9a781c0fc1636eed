"""Batches laid out by their size on eight fake devices. Run as a script, it draws on one and on eight of them."""

import json
import subprocess
import sys
from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest
from bench import toy
from bench.test_bench import SMALL
from processes import ROOT, environment
from samplers import difference, together

from cmd_jax.bench.parts import Random
from cmd_jax.bench.spread import Shapes, shares
from cmd_jax.config import load
from cmd_jax.interop import sd_known
from cmd_jax.performance.flops import count as count_of
from cmd_jax.sampling.layouts import Layouts, sizes_of
from cmd_jax.sampling.sampler import Sampler
from cmd_jax.sampling.settings import SamplingSettings
from cmd_jax.sharding import SAMPLING_AXES, mesh_over

SETTINGS = SamplingSettings(batch_size=4, guidance=3.0, content_steps=2, motion_steps=2)
ROUNDING = 2e-4  # largest difference of a value, of videos in [-1, 1] and of latents of unit variance


@pytest.mark.parametrize(
    ("devices", "rows", "guided", "sizes"),
    [
        (8, 1, True, (1, 1, 2, 4)), (8, 1, False, (1, 1, 1, 8)), (8, 2, True, (2, 1, 2, 2)), (8, 4, True, (4, 1, 2, 1)),
        (8, 8, True, (8, 1, 1, 1)), (8, 16, False, (8, 1, 1, 1)), (8, 12, True, (4, 1, 2, 1)),
        (1, 4, True, (1, 1, 1, 1)), (6, 8, True, (3, 1, 2, 1)), (3, 8, True, (3, 1, 1, 1)), (2, 1, True, (1, 1, 2, 1)),
    ],
)  # fmt: skip
def test_the_batch_is_split_first_then_guidance_then_tokens(devices, rows, guided, sizes):
    assert sizes_of(devices, rows, guided) == sizes


def test_few_programs_do_for_all_counts():
    layouts = Layouts(mesh_over(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), SAMPLING_AXES), (), by_size=True)
    assert [layouts.of(n, 6, False).rows for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def run(*names: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, *names], cwd=ROOT, env=environment(8), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return run("class", "shares")


MESHES = {  # what is drawn -> (data, fsdp, guidance, tensor) of each batch
    "class": [[1, 1, 2, 4]],
    "classes": [[4, 1, 2, 1], [1, 1, 2, 4]],
    "text": [[1, 1, 2, 4]],
    "varied": [[1, 1, 2, 4], [2, 1, 2, 2], [1, 1, 2, 4]],
    "animated": [[1, 1, 2, 4]],
    "reconstructed": [[2, 1, 1, 4]],
}


def check(drawn: dict, name: str):
    assert drawn["meshes"] == MESHES[name]
    assert drawn["difference"] <= ROUNDING and drawn["apart"] > 0.1


def test_a_sample_does_not_depend_on_how_its_batch_lies(found):
    check(found["class"], "class")


@pytest.mark.slow
def test_no_sample_of_any_kind_does():
    for name, drawn in run(*list(MESHES)[1:]).items():
        check(drawn, name)


PARTS = {  # all-gathers of a clip on eight devices: keys and values of each attention, and results over both axes
    "content denoiser": 2 + 2, "motion denoiser": 2 + 2, "CMD decoder": 0, "VAE, frames": 0, "VAE, content frame": 2,
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_eight_devices_share_the_work_of_one_clip(found, part):
    """A sixth of the work at most, and nothing whole is sent but keys, values and results."""
    one, many = found["shares"]["1"][part], found["shares"]["8"][part]
    assert many["flops"] <= one["flops"] / 6
    assert not one["calls"] and many["calls"].get("all-gather", 0) == PARTS[part]
    if part == "VAE, frames":
        assert not many["calls"]


def test_shares_are_counted_as_often_as_loops_run(found):
    """Against a count of the traced program; the 16 frames are a loop."""
    assert found["shares"]["1"]["VAE, frames"]["flops"] == pytest.approx(found["traced"], rel=0.02)


# What follows runs in the process with fake devices.


def samplers(argument: str):
    """-> (a sampler of eight devices, one of a single device with the same parameters)."""
    config = load(f"{toy.__file__}:sample{argument}", shapes_only=True)
    many = Random(f"{toy.__file__}:sample{argument}", {}, config).sampler()
    params, statistics = jax.device_put(jax.device_get((many.params, many.statistics)), jax.devices()[0])
    mesh = mesh_over(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), SAMPLING_AXES)
    one = Sampler(
        many.autoencoder, many.denoisers, statistics, params, many.conditions, many.class_names, many.tokenizer, mesh,
        config.rules, by_size=True,
    )  # fmt: skip
    return many, one


def compare(many, one, call) -> dict:
    meshes, launch = [], many._launch

    def launched(name, batch, layout, *arguments):
        meshes.append([*layout.mesh.shape.values()])
        return launch(name, batch, layout, *arguments)

    many._launch = launched
    spread, alone = together(call(many)), together(call(one))
    many._launch = launch
    values = alone["video"]
    return {
        "difference": float(max(difference(spread[name], alone[name]) for name in alone)),
        "apart": float(values.std()), "meshes": meshes,
    }  # fmt: skip


def compare_all(names) -> dict:
    few = replace(SETTINGS, batch_size=2)
    kinds = {
        "": {
            "class": lambda s: s.generate(s.request(count=1), SETTINGS),
            "classes": lambda s: s.generate(s.request(count=5), SETTINGS),
        },
        ",sd=15": {
            "text": lambda s: s.generate(s.request(prompts="x"), SETTINGS),
            "varied": lambda s: s.vary_motion(s.request(prompts="x"), 3, few),
            "animated": lambda s: s.animate(s.request(prompts="x"), {"video": clips_of(s)[:1]}, SETTINGS),
            "reconstructed": lambda s: s.reconstruct(clips_of(s), few),
        },
    }  # fmt: skip
    found = {}
    for argument, calls in kinds.items():
        if wanted := [name for name in calls if name in names]:
            many, one = samplers(argument)
            found |= {name: compare(many, one, calls[name]) for name in wanted}
    return found


def clips_of(sampler) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, *sampler.autoencoder.clip_shape), np.uint8)


def share_all() -> dict:
    """{devices: {part: work}} of one clip of 16 frames."""
    name, sizes = f"{toy.__file__}:sample,sd=15", {"data.frames": "16", "data.height": "32", "data.width": "64"}
    stages = Shapes(name, sizes, load(name, sizes, shapes_only=True))
    found = {}
    for count in (1, 8):
        made = shares(stages, jax.devices()[:count], 1)
        found[count] = {share.part: {"flops": share.work.flops, "calls": share.work.calls} for share in made}
    decode, params = stages.space.decode, nn.unbox(stages.space.params)
    frames = jax.ShapeDtypeStruct((1, *stages.autoencoder.resized(32, 64).video_shape), np.float32)
    return {"shares": found, "traced": count_of(decode, params, frames).total}


if __name__ == "__main__":
    sd_known.ARCHITECTURES["sd15"] = SMALL
    print(json.dumps(compare_all(sys.argv[1:]) | (share_all() if "shares" in sys.argv else {})))
