import gc
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from samplers import LABELS, SETTINGS, difference, request_of, stirred, together

from cmd_jax.data.shapes import CLASS_NAMES, ShapesSource
from cmd_jax.errors import UserError
from cmd_jax.loading import load_sampler
from cmd_jax.sampling.sampler import drawn as columns_of
from cmd_jax.sharding import BATCH_AXES, partitioning

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture(scope="module")
def sampler():
    return stirred()


@pytest.fixture(scope="module")
def drawn(sampler):
    """Five samples in batches of two."""
    return together(sampler.generate(request_of(), SETTINGS))


# The programs.


def test_samples_have_the_shapes_of_the_clips_and_differ(drawn):
    assert drawn["video"].shape == (5, 4, 16, 24, 3)
    assert drawn["content"].shape == drawn["image"].shape == (5, 16, 24, 3)
    assert drawn["motion"].shape == (5, 4, 10, 4)
    assert all(np.isfinite(x).all() for x in drawn.values())
    assert np.abs(drawn["video"]).max() <= 1
    for name in drawn:
        assert all(difference(drawn[name][i], drawn[name][j]) > 1e-2 for i in range(5) for j in range(i))


def test_a_sample_does_not_depend_on_its_batch(sampler, drawn):
    """Neither on the batch size (1, 2 or 4, the last batch filled up or not) nor on the other samples."""
    for size in (1, 4):
        other = together(sampler.generate(request_of(), replace(SETTINGS, batch_size=size)))
        assert all(difference(other[name], drawn[name]) <= 1e-4 for name in drawn)
    labels = LABELS.copy()
    labels[[0, 1, 3]] = 7
    other = together(sampler.generate(request_of(labels), SETTINGS))
    assert difference(other["video"][[2, 4]], drawn["video"][[2, 4]]) <= 1e-4
    assert all(difference(other["video"][i], drawn["video"][i]) > 1e-2 for i in (0, 1, 3))


def test_seed_decides(sampler, drawn):
    again = together(sampler.generate(request_of(), SETTINGS))
    assert all(np.array_equal(again[name], drawn[name]) for name in drawn)
    other = together(sampler.generate(request_of(), replace(SETTINGS, seed=1)))
    assert all(difference(other["video"][i], drawn["video"][i]) > 1e-2 for i in range(5))


def test_generating_is_one_program_with_both_samplers_inside(sampler):
    batch = {name: values[:1] for name, values in columns_of(request_of()).items()}
    settings = sampler.resolve(SETTINGS)
    with partitioning(sampler.mesh, sampler.rules):
        program = jax.make_jaxpr(sampler.program("generate", settings, sampler.layout(1, settings)).__wrapped__)(
            sampler.params, batch, jax.random.key(0), jnp.float32(2)
        )
    scans = [e.params["length"] for e in program.eqns if e.primitive.name == "scan"]
    assert scans[:2] == [3, 4]  # steps of content and motion; what follows are blocks of the decoder
    content, image, motion, video = (v.aval.shape for v in program.jaxpr.outvars)
    assert (content, motion, video) == ((1, 16, 24, 3), (1, 4, 10, 4), (1, 4, 16, 24, 3)) and image == content


def test_a_program_is_compiled_for_what_is_static_and_the_batch_size(sampler, drawn):
    """Seed, guidance, number and classes are its arguments; an empty solver is the stage's own."""

    def program_of(settings):
        settings = sampler.resolve(settings)
        return sampler.program("generate", settings, sampler.layout(2, settings))

    program = program_of(SETTINGS)
    compiled = program._cache_size()
    for changes in ({"seed": 5}, {"guidance": 3.0}, {"content_solver": "euler"}):
        again = replace(SETTINGS, **changes)
        assert program_of(again) is program
        together(sampler.generate(request_of(LABELS[:3]), again))
    assert program._cache_size() == compiled
    for changes in ({"motion_steps": 2}, {"motion_solver": "heun"}, {"dtype": "bfloat16"}):
        assert program_of(replace(SETTINGS, **changes)) is not program


def test_results_are_laid_out_over_the_batch_axes(sampler, drawn, monkeypatch):
    launched, launch = [], sampler._launch
    monkeypatch.setattr(sampler, "_launch", lambda *a: launched.append(launch(*a)) or launched[-1])
    next(sampler.generate(request_of(), SETTINGS))
    assert {x.sharding.spec for x in launched[0].values()} == {PartitionSpec(BATCH_AXES)}


def test_guidance_of_one_is_none(sampler, drawn):
    plain = together(sampler.generate(request_of(), replace(SETTINGS, guidance=None)))
    one = together(sampler.generate(request_of(), replace(SETTINGS, guidance=1.0)))
    assert all(np.array_equal(plain[name], one[name]) for name in plain)
    near = together(sampler.generate(request_of(), replace(SETTINGS, guidance=1.0 + 1e-6)))
    assert all(difference(plain[name], near[name]) <= 1e-3 for name in plain)
    assert all(difference(plain[name], drawn[name]) > 1e-2 for name in plain)


def test_gaussian_models_of_half_precision_sample():
    """eps with a learned range; content clipped to [-1, 1]. With eta = 1 noise is added, from keys of the sample."""
    sampler = load_sampler(tiny.gaussian_weights())
    ddim = together(sampler.generate(request_of(), SETTINGS))
    assert all(np.isfinite(x).all() for x in ddim.values())
    assert np.abs(ddim["content"]).max() <= 1
    eta = replace(SETTINGS, eta=1.0)
    noisy, alone = (together(sampler.generate(request_of(), replace(eta, batch_size=size))) for size in (2, 1))
    assert all(difference(noisy[name], ddim[name]) > 1e-2 for name in ddim)
    assert all(difference(noisy[name], alone[name]) <= 1e-4 for name in ddim)
    with pytest.raises(UserError, match="sampling.content_steps=21: more than the 20 training steps"):
        sampler.generate(request_of(), replace(SETTINGS, content_steps=21))
    with pytest.raises(UserError, match="sampling.motion_solver=heun: not one of the choices; use one of ddim, ddpm"):
        sampler.generate(request_of(), replace(SETTINGS, motion_solver="heun"))


def test_dtype_is_that_of_the_matrix_products(sampler):
    """What comes out, and what the solver adds up, stays float32, and near what float32 gives."""
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 24, 3), np.uint8)
    half = replace(SETTINGS, dtype="bfloat16")
    whole, rounded = (together(sampler.reconstruct(clips, settings))["video"] for settings in (SETTINGS, half))
    assert rounded.dtype == np.float32 and 1e-5 < difference(whole, rounded) < 0.1
    batch = {name: values[:2] for name, values in columns_of(request_of()).items()}
    with partitioning(sampler.mesh, sampler.rules):
        program = sampler.program("generate", sampler.resolve(half), sampler.layout(2, half))
        lowered = program.trace(sampler.params, batch, jax.random.key(0), jnp.float32(2))
    assert {x.dtype for x in jax.tree.leaves(lowered.out_info)} == {np.dtype("float32")}
    products = [line for line in str(lowered.jaxpr).splitlines() if " dot_general[" in line]
    assert products and sum(":bf16[" in line for line in products) > len(products) / 2


# The stream.


def test_the_next_batch_is_launched_before_the_last_is_fetched_and_none_is_kept(sampler, drawn, monkeypatch):
    events, held, launch = [], [], sampler._launch

    def launched(*arguments):
        events.append("launch")
        return launch(*arguments)

    monkeypatch.setattr(sampler, "_launch", launched)
    for samples in sampler.generate(request_of(), SETTINGS):
        events.append(samples.index.tolist())
        held.append(weakref.ref(samples.video))
        del samples
        gc.collect()
        assert not any(video() is not None for video in held)
    assert events == ["launch", "launch", [0, 1], "launch", [2, 3], [4]]


class Lazy:
    """Clips that tell which of them were read."""

    def __init__(self, clips):
        self.clips, self.read = clips, []

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        self.read.append(i)
        return self.clips[i]


def test_clips_are_read_as_they_are_needed_each_once(sampler):
    source = ShapesSource(clips=5, frames=4, height=16, width=24)
    clips = np.stack([source.clip(i)[0] for i in range(5)])
    videos = Lazy(clips)
    stream = sampler.reconstruct(videos, SETTINGS)
    assert videos.read == []
    first = next(stream)
    assert videos.read == [0, 1, 2, 3]
    out = together([first, *stream])
    assert videos.read == [0, 1, 2, 3, 4]
    assert np.array_equal(np.round((out["original"] + 1) * 127.5), clips)
    given = together(sampler.animate(request_of(), {"video": clips}, SETTINGS))
    assert difference(given["content"], out["content"]) <= 1e-5
    assert all(difference(given["motion"][i], given["motion"][j]) > 1e-2 for i in range(5) for j in range(i))


def test_each_motion_is_one_of_its_content_frame_whatever_the_batch(sampler, drawn):
    """Five content frames with three motions each, in batches of two and of four."""
    two, four = (together(sampler.vary_motion(request_of(), 3, replace(SETTINGS, batch_size=size))) for size in (2, 4))
    assert all(difference(two[name], four[name]) <= 1e-4 for name in two)
    content = two["content"].reshape(5, 3, 16, 24, 3)
    assert (content == content[:, :1]).all() and difference(content[:, 0], drawn["content"]) <= 1e-4
    for name in ("motion", "video"):
        assert difference(two[name][::3], drawn[name]) <= 1e-4  # the first motion is that of `generate`
        assert all(difference(two[name][i], two[name][j]) > 1e-2 for i in range(15) for j in range(i))


# What is refused, before anything is compiled.


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"guidance": "much"}, "sampling.guidance=much: not a finite number >= 0"),
        ({"guidance": float("inf")}, "sampling.guidance=inf: not a finite number >= 0"),
        ({"eta": 0.5}, "sampling.eta=0.5: the content solver is euler, not ddim; set it to 0.0"),
        ({"eta": 2.0}, "sampling.eta=2.0: outside 0 to 1"),
        ({"batch_size": 0}, "sampling.batch_size=0: must be a positive whole number"),
        ({"content_steps": 0}, "sampling.content_steps=0: must be a positive whole number"),
        ({"motion_steps": 1.5}, "sampling.motion_steps=1.5: not a whole number"),
        ({"motion_solver": "ddim"}, "sampling.motion_solver=ddim: not one of the choices; use one of euler, heun"),
        ({"dtype": "float16"}, "sampling.dtype=float16: not one of the choices"),
        ({"seed": -1}, "seed=-1: "),
        ({"negative": "rain"}, "sampling.negative=rain: the model was trained on classes, not on texts; name sampling"),
    ],
)
def test_settings_are_checked_at_the_call(sampler, monkeypatch, changes, said):
    monkeypatch.setattr(sampler, "_launch", None)
    settings, given = replace(SETTINGS, **changes), {"image": np.zeros((5, 16, 24, 3))}
    for call in (
        lambda: sampler.generate(request_of(), settings),
        lambda: sampler.vary_motion(request_of(), 2, settings),
        lambda: sampler.animate(request_of(), given, settings),
        lambda: sampler.reconstruct(np.zeros((2, 4, 16, 24, 3), np.uint8), settings),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).startswith(said)


def test_requests_are_of_the_model_s_classes(sampler):
    request = sampler.request(["red circle moving right", 5, "7"])
    assert request.conditions["label"].tolist() == [1, 5, 7] and request.captions[0] == CLASS_NAMES[1]
    assert sampler.request("red circle moving right").conditions["label"].tolist() == [1]
    assert sampler.request(count=50).conditions["label"].tolist() == [*range(48), 0, 1]
    with pytest.raises(UserError, match="^sampling.prompt=a cat: the model was trained on classes, not on texts"):
        sampler.request(prompts=["a cat"])
    with pytest.raises(UserError, match="^sampling.motions=0: must be a positive whole number"):
        sampler.vary_motion(request, 0, SETTINGS)
