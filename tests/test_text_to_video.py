"""Text to video at toy size: latents of a random VAE, captions of shapes; trained, resumed, drawn."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text
from flax.traverse_util import flatten_dict
from PIL import Image
from samplers import together
from tiny_text import PROMPTS, config_of, pipeline, settings, texts, trained

from cmd_jax.data.shapes import CLASS_NAMES, ShapesSource
from cmd_jax.data.store import folder_of, open_store
from cmd_jax.diffusion.guidance import guide
from cmd_jax.files import read_json
from cmd_jax.interop.schedulers import from_scheduler_config
from cmd_jax.keys import derive
from cmd_jax.models.clip import mean_pool
from cmd_jax.models.conditions import Text, drop
from cmd_jax.models.frames import VAELatents, pixels
from cmd_jax.performance.flops import count
from cmd_jax.prepare import prepare
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.runtime import StopRequest
from cmd_jax.sampling.sampler import drawn as columns_of
from cmd_jax.sampling.settings import SamplingSettings
from cmd_jax.sharding import abstract, make_mesh, partitioning
from cmd_jax.state import init_state, make_optimizer
from cmd_jax.trained import load_trained
from cmd_jax.verbs import sample as sampling

pytestmark = pytest.mark.xdist_group("text")


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


# Frames and conditions.


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_frames_pass_the_vae_in_chunks(at_once):
    module, params = pipeline().vae
    space = VAELatents(module, params, at_once)
    video = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 32, 3), np.uint8)
    latents = jax.jit(space.encode)(params, video)
    assert latents.shape == (2, 4, 8, 16, 4)  # H != W
    one = module.apply({"params": params}, pixels(video[1, 2])[None], method="latents")[0]
    np.testing.assert_allclose(latents[1, 2], one, atol=1e-5)
    decoded = jax.jit(space.decode)(params, latents)
    np.testing.assert_allclose(decoded[0, 3], space.decode_image(params, latents[0, 3:])[0], atol=1e-4)
    # What is alive at a time: one chunk of all clips.
    program = jax.make_jaxpr(space.decode)(params, latents)
    (loop,) = [e for e in program.eqns if e.primitive.name == "scan"]
    assert loop.params["length"] == 4 // at_once


def test_texts_are_encoded_pooled_and_dropped():
    conditions, tokenizer = texts()
    ids = jnp.asarray(tokenizer(PROMPTS))
    made = conditions.of(conditions.params, {"ids": ids})
    states = pipeline().text_encoder[0].apply({"params": conditions.params}, ids)[0]
    np.testing.assert_array_equal(made.states, states)
    length = int(np.argmax(np.asarray(ids[0]) == tokenizer.end)) + 1
    np.testing.assert_allclose(made.pooled[0], states[0, :length].mean(axis=0), atol=1e-5)
    assert relative(mean_pool(states, ids, tokenizer.end), made.pooled) == 0
    given = conditions.of(None, {"ids": ids, "states": made.states})  # encoded before: no encoder is needed
    assert all(np.array_equal(a, b) for a, b in zip(given, made, strict=True))

    null = conditions.null(conditions.params, 2)
    empty = conditions.of(conditions.params, {"ids": jnp.asarray(tokenizer(["", ""]))})
    np.testing.assert_allclose(null.states, empty.states, atol=1e-5)
    negative = conditions.null(conditions.params, 2, tokenizer(["ugly"])[0])
    assert relative(negative.states, null.states) > 1e-2
    mixed = drop(made, null, jnp.array([True, False]))
    assert isinstance(mixed, Text)
    np.testing.assert_array_equal(mixed.states, jnp.stack([null.states[0], made.states[1]]))
    np.testing.assert_array_equal(mixed.pooled, jnp.stack([null.pooled[0], made.pooled[1]]))


# Training.


def test_what_trains_and_what_does_not():
    folder = trained() / "content"
    facts, summary = read_json(folder / "facts.json"), read_json(folder / "summary.json")
    assert {"vae", "text_encoder", "image_model", "autoencoder"} <= facts.keys()
    unet = jax.tree.map(np.shape, pipeline().unet[1])
    state = Checkpoints(folder, read_only=True)
    assert jax.tree.map(lambda x: x.shape, state.shapes("params")) == unet
    assert summary["parameters"] == sum(np.size(x) for x in jax.tree.leaves(pipeline().unet[1]))
    # Adam keeps two moments of what trains, and of nothing else.
    moments = [x for x in jax.tree.leaves(state.restore_item("opt_state")) if np.ndim(x)]
    assert sum(x.size for x in moments) == 2 * summary["parameters"]
    ema = load_trained(folder, "content").params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ema, pipeline().unet[1])
    # Three steps and three more are as six: the resumed run went on from the trained weights.
    assert all(value > 0 for value in jax.tree.leaves(moved))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6] and summary["step"] == 6


def test_fine_tuning_starts_from_the_pretrained_function():
    config = config_of("content")
    stage, mesh = stage_of("content"), make_mesh(config.mesh)
    with partitioning(mesh, config.rules):
        given = stage.pretrained(partial(abstract, mesh=mesh, rules=config.rules))
        state = init_state(stage, make_optimizer(config.optimizer), 0, mesh, config.rules, given)
    for tree in (state.params, state.ema):
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), tree, pipeline().unet[1])
        assert all(jax.tree.leaves(same))
    assert stage.process.prediction == "v" and not stage.process.learned_range
    assert stage.process.schedule.betas[0] == pytest.approx(0.00085)


def stage_of(name):
    """The stage as training makes it, from the autoencoder trained here."""
    config = config_of(name)
    with StopRequest("stopped"):
        quiet = type("Quiet", (), {"print": lambda *_, **__: None})()
        return prepare(config, trained(), make_mesh(config.mesh), quiet, resuming=False).stage


def test_latents_and_tokens_are_made_once():
    folders = {path.name for path in (trained() / "latents").iterdir()}
    assert folders == {"vae", "cmd"}  # the autoencoder's, and one for both denoisers
    stores = [open_store(folder_of(trained() / "latents", kind)) for kind in sorted(folders)]
    assert all(store.complete and len(store) == 48 for store in stores)
    example = stores[0].read(5) | stores[1].read(5)
    assert {name: x.shape for name, x in example.items()} == {
        "frames": (4, 8, 16, 4), "content": (8, 16, 4), "motion": (4, 12, 4), "ids": (77,), "label": (),
    }  # fmt: skip
    source = ShapesSource(clips=48, frames=4, height=16, width=32)
    np.testing.assert_array_equal(example["ids"], pipeline().tokenizer([*source.texts(5)])[0])
    metrics = json.loads((trained() / "autoencoder" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"l2", "snr"} <= metrics.keys() and "psnr" not in metrics
    assert metrics["loss"] == pytest.approx(metrics["l2"])
    previews = {path.name for path in (trained() / "content" / "previews").iterdir()}
    assert previews == {"0000006_content.png", "0000006_samples.png"}
    with Image.open(trained() / "content" / "previews" / "0000006_samples.png") as grid:
        assert grid.size == (4 * 32 + 3 * 2, 16)  # pixels, not latents


@pytest.mark.parametrize("name", ["content", "motion"])
def test_cached_features_give_the_loss_of_videos_and_texts(name):
    stage = stage_of(name)
    conditions, tokenizer = texts()
    source = ShapesSource(clips=48, frames=4, height=16, width=32)
    video = np.stack([source.clip(i)[0] for i in (3, 20, 40)])
    batch = {"video": video, "ids": tokenizer([source.texts(i)[0] for i in (3, 20, 40)])}
    content, motion = stage.autoencoder.encode(stage.frozen["autoencoder"], batch)
    states = conditions.states(conditions.params, batch["ids"])
    cached = {"content": content, "motion": motion, "ids": batch["ids"], "states": states}
    shapes = nn.unbox(jax.eval_shape(stage.init, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)
    loss = jax.jit(lambda batch: stage.loss(params, stage.frozen, batch, jax.random.key(2))[0])
    value = float(loss(batch))
    assert value == pytest.approx(float(loss(cached)), rel=1e-4)
    other = batch | {"ids": tokenizer(["something else", "and this", "or that"])}
    assert abs(float(loss(other)) - value) > 1e-5
    if name == "content":  # that its six steps moved every parameter is asserted above
        return
    # Gradients reach everything that trains, the map of the text features too, and nothing that is frozen.
    gradients = jax.jit(jax.grad(lambda *both: stage.loss(*both, cached, jax.random.key(2))[0], argnums=(0, 1)))
    ours, frozen = gradients(params, stage.frozen)
    quiet = [k for k, g in flatten_dict(ours, sep="/").items() if not np.abs(g).max() > 0]
    assert all(k.endswith("key/bias") for k in quiet), quiet
    assert np.abs(ours["text"]["kernel"]).max() > 0
    for part in ("autoencoder", "conditions"):
        assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(frozen[part]))


@pytest.fixture(scope="module")
def sampler():
    return tiny_text.sampler()


def generate(sampler, prompts=PROMPTS, **changes):
    return together(sampler.generate(sampler.request(prompts=prompts), SamplingSettings.of(settings(**changes))))


def test_step_zero_samples_are_those_of_the_pretrained_pipeline(sampler):
    """Noise, text encoder, guidance with a negative prompt, DDIM, VAE decoder: as the folder itself says."""
    out = generate(sampler)
    unet, params = pipeline().unet

    def encode(prompts):
        module, params = pipeline().text_encoder
        return module.apply({"params": params}, pipeline().tokenizer(prompts))[0]

    states = jnp.stack([encode(PROMPTS), encode(["dim", "dim"])])
    process, options = from_scheduler_config(pipeline().scheduler)

    def denoise(x, t):
        return guide(*jax.vmap(lambda s: unet.apply({"params": params}, x, t, s))(states), 7.5, False)

    keys = [derive(derive(jax.random.key(0), "sample", i), "content") for i in range(2)]
    noise = jnp.stack([jax.random.normal(derive(key, "noise"), (8, 16, 4)) for key in keys])
    latents = jax.jit(partial(process.sample, denoise, keys=None, steps=3, **options))(noise)
    assert relative(out["content"], latents) <= 1e-4
    images = pipeline().vae[0].apply({"params": pipeline().vae[1]}, latents, method="decode")
    assert relative(out["image"], images) <= 1e-4
    assert out["video"].shape == (2, 4, 16, 32, 3) and np.isfinite(out["video"]).all()


def test_a_sample_does_not_depend_on_its_batch(sampler):
    out, other = generate(sampler, [*PROMPTS, "a cat"]), generate(sampler, [PROMPTS[0], "a dog"])
    for name in out:
        assert relative(other[name][0], out[name][0]) <= 1e-4, name
    assert relative(out["content"][0], out["content"][1]) > 1e-2
    assert relative(out["content"][1], other["content"][1]) > 1e-2


def test_texts_and_content_frames_are_read_once_a_call(sampler):
    """What another step adds to the program's work is both denoisers twice, and nothing else."""

    def work(content_steps, motion_steps):
        changes = {"sampling__content_steps": content_steps, "sampling__motion_steps": motion_steps}
        how, *arguments = sampler._arguments(SamplingSettings.of(settings(**changes)))
        with partitioning(sampler.mesh, sampler.rules):
            program = sampler.program("generate", how, sampler.layout(1, how)).__wrapped__
            return count(program, sampler.params, columns_of(sampler.request(prompts=PROMPTS)), *arguments)

    base, content, motion = work(1, 1), work(2, 1), work(1, 2)
    x, t = jnp.zeros((2, 8, 16, 4)), jnp.zeros(2)
    text = Text(jnp.zeros((2, 77, 8)), jnp.zeros((2, 8)))
    unet, dit = sampler.denoisers["content"], sampler.denoisers["motion"]
    step = count(lambda params: unet.guided_denoiser(params, text, None, 2.0, text)(x, t), sampler.params["content"])
    assert content == base + step and step.layers > 0
    tokens = dit.content_features(sampler.params["motion"], x)
    assert tokens.shape == (2, 8, 16)
    y = jnp.zeros((2, *dit.shape))
    step = count(lambda params: dit.guided_denoiser(params, text, tokens, 2.0, text)(y, t), sampler.params["motion"])
    assert motion == base + step and step.layers > 0


def test_my_own_image_as_content_frame(sampler, tmp_path):
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(tmp_path / "image.png")
    changes = {"sampling__mode": "animate", "sampling__image": tmp_path / "image.png", "sampling__prompt": "a sea"}
    captions, stream = sampling.make_samples(sampler, settings(**changes, sampling__num=2), trained())
    out = together(stream)
    module, params = pipeline().vae
    image = jnp.full((1, 16, 32, 3), 200 / 127.5 - 1)
    latents = module.apply({"params": params}, image, method="latents")
    np.testing.assert_allclose(out["content"][1], latents[0], atol=1e-4)
    assert captions == ["a sea", "a sea"] and relative(out["motion"][0], out["motion"][1]) > 1e-3


def test_same_content_new_motion_and_reconstruction(sampler):
    changes = {"sampling__mode": "vary-motion", "sampling__prompt": "a sea", "sampling__num": 1}
    captions, stream = sampling.make_samples(sampler, settings(**changes), trained())
    out = together(stream)
    assert captions == ["a sea, motion 1", "a sea, motion 2"] and np.array_equal(out["content"][0], out["content"][1])
    changes = {"sampling__mode": "reconstruct", "sampling__num": 2}
    captions, stream = sampling.make_samples(sampler, settings(**changes), trained())
    out = together(stream)
    assert out["original"].shape == out["video"].shape == (2, 4, 16, 32, 3)
    assert captions == [CLASS_NAMES[0], CLASS_NAMES[24]]
