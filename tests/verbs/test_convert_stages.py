from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from fixtures.formula import draw, state_dict

from cmd_jax.data.latents import LatentStatistics
from cmd_jax.errors import UserError
from cmd_jax.interop.cmd_release import UNUSED, load
from cmd_jax.loading import denoiser_stage as stage_of
from cmd_jax.loading import load_sampler
from cmd_jax.pretrained import VAEMetadata, describe, stated_space
from cmd_jax.sampling.settings import SamplingSettings
from cmd_jax.stages import AutoencoderStage
from cmd_jax.trained import AutoencoderMetadata, Metadata, Trained, export, load_trained
from cmd_jax.verbs.convert_stages import autoencoder_stage, denoiser_stage, release_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = [f"class {i}" for i in "abcdefg"]
CLIP = {"heads": 8, "mode": "pixel", "frames": 4, "image_size": 16}  # what autoencoder_pixel's tensors don't tell


def fixture(name):
    with np.load(FIXTURES / f"{name}.npz") as npz:
        npz = dict(npz)
    return state_dict(npz), npz


def tables(npz):
    return {name: npz[name] for name in ("pos_embed", "content_pos_embed")}


@pytest.fixture(scope="module")
def released():
    """The three models of the fixtures, which belong together, as stages."""
    autoencoder = autoencoder_stage(CLIP, fixture("autoencoder_pixel")[0])
    content = denoiser_stage("content", {"heads": 4}, fixture("content_dit")[0], autoencoder, NAMES)
    weights, npz = fixture("motion_dit")
    motion = denoiser_stage("motion", {"heads": 4}, weights | tables(npz), autoencoder, NAMES)
    return {"autoencoder": autoencoder, "content": content, "motion": motion}


@pytest.fixture(scope="module")
def folder(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    for name, stage in released.items():
        export(folder / f"{name}.safetensors", stage)
    return folder


def assert_close(ours, reference):
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()


def assert_same(found, expected):
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}
    assert all(np.array_equal(found[n], expected[n]) for n in expected)


def swap(motion):
    """Exchange the halves of [B, T, 16, K]."""
    return np.concatenate([motion[:, :, 8:], motion[:, :, :8]], axis=2)


def test_stages_compute_the_recorded_numbers(released):
    autoencoder, content, motion = (released[name] for name in ("autoencoder", "content", "motion"))
    _, npz = fixture("autoencoder_pixel")
    module, params = AutoencoderStage(autoencoder.config).module, autoencoder.params["autoencoder"]
    recon, latents = jax.jit(module.apply)({"params": params}, np.moveaxis(npz["x"], 1, -1))
    assert_close(np.moveaxis(recon, -1, 2), npz["recon"])
    assert_close(np.moveaxis(swap(latents.motion), -1, 1), npz["z_m"])

    _, npz = fixture("content_dit")
    apply = jax.jit(stage_of(content.config, content.metadata, autoencoder).apply)
    out = apply(content.params, np.moveaxis(npz["x"], 1, -1), npz["t"], npz["y"], None)
    assert_close(np.moveaxis(out, -1, 1), npz["out"])

    _, npz = fixture("motion_dit")
    apply = jax.jit(stage_of(motion.config, motion.metadata, autoencoder).apply)
    x, frame = swap(np.moveaxis(npz["x"], 1, -1)), np.moveaxis(npz["content"], 1, -1)
    out = apply(motion.params, x, npz["t"], np.array([0, 3, 7]), frame)  # any class: the release has none here
    assert_close(np.moveaxis(swap(out), -1, 1), npz["out"])


def test_sampling_takes_them(folder):
    sampler = load_sampler(folder)
    assert sampler.class_names == tuple(NAMES)
    settings = SamplingSettings(batch_size=2, content_steps=2, motion_steps=2)
    (samples,) = sampler.generate(sampler.request([0, 6]), settings)
    assert samples.video.shape == (2, 4, 16, 16, 3) and np.isfinite(samples.video).all()
    assert not np.allclose(samples.content[0], samples.content[1])


def test_what_is_converted_comes_back_bit_for_bit(folder):
    """And with it all that the release's strict loading wants."""
    for name, recorded, more in (
        ("autoencoder", "autoencoder_pixel", UNUSED.keys()),
        ("content", "content_dit", {"pos_embed"}),
        ("motion", "motion_dit", {"pos_embed", "keyframe_pos_embed"}),
    ):
        weights, npz = fixture(recorded)
        back = release_weights(load_trained(folder / f"{name}.safetensors", name))
        assert back.keys() == weights.keys() | more
        assert_same({n: back[n] for n in weights}, weights)
    assert np.array_equal(back["pos_embed"], npz["pos_embed"])
    assert np.array_equal(back["keyframe_pos_embed"], npz["content_pos_embed"])


def test_tables_that_were_not_stored_are_the_releases(released):
    weights, npz = fixture("motion_dit")
    stage = denoiser_stage("motion", {"heads": 4}, weights, released["autoencoder"], NAMES)
    back = release_weights(stage)
    np.testing.assert_allclose(back["pos_embed"], npz["pos_embed"], atol=1e-6)
    np.testing.assert_allclose(back["keyframe_pos_embed"], npz["content_pos_embed"], atol=1e-6)


def test_a_stage_does_not_compute_as_diffusers_does(released):
    """Its config has no place for that, so that it would be forgotten in silence."""
    weights, config = fixture("content_dit")[0], {"heads": 4, "frequency_shift": 1}
    with pytest.raises(UserError, match=r"^config\.frequency_shift=1: "):
        denoiser_stage("content", config, weights, released["autoencoder"], NAMES)


def test_a_latent_autoencoder_belongs_to_a_vae(tmp_path):
    weights, npz = fixture("autoencoder_latent")
    config = {"heads": 8, "mode": "latent", "frames": 6, "image_size": [8, 8]}
    stage = autoencoder_stage(config, weights, describe(FIXTURES / "tiny-sd15", VAEMetadata))
    export(tmp_path / "autoencoder.safetensors", stage)
    stage = load_trained(tmp_path / "autoencoder.safetensors", "autoencoder")
    data = stage.config.data
    factor = AutoencoderStage(stage.config, space=stated_space(stage.metadata.vae)).space.factor
    assert (data.frames, data.height, data.width) == (6, 8 * factor, 8 * factor) and factor > 1
    assert_same(release_weights(stage), weights | UNUSED)
    with pytest.raises(UserError, match="config.mode=latent: needs the VAE"):
        autoencoder_stage(config, weights)


# Stages that were trained here.


@pytest.fixture(scope="module")
def own():
    """An autoencoder without positions at 4x16x24, and denoisers on it, of random weights."""
    config = tiny.config_of("autoencoder", model__position="none")
    autoencoder = random_stage(config, AutoencoderStage(config), Metadata(digest="of the autoencoder"))
    stages = {"autoencoder": autoencoder}
    for name, classes in (("content", ("run", "jump")), ("motion", ())):
        config = tiny.config_of(f"{name},kind=gaussian", diffusion__timesteps=1000)
        metadata = Metadata(
            classes, autoencoder=AutoencoderMetadata("of the autoencoder"), statistics=LatentStatistics.unit(3, 4)
        )
        stages[name] = random_stage(config, stage_of(config, metadata, autoencoder), metadata)
    return stages


def random_stage(config, stage, metadata):
    shapes = nn.unbox(jax.eval_shape(stage.init, jax.random.key(0)))
    path = jax.tree_util.keystr
    params = jax.tree_util.tree_map_with_path(lambda p, x: draw(path(p), x.shape, 7, 0.2), shapes)
    return Trained(config, params, metadata)


def test_an_autoencoder_trained_here_goes_to_the_release(own):
    weights = release_weights(own["autoencoder"])
    model = own["autoencoder"].config.model
    config = {"heads": model.heads, "head_dim": model.head_dim, "mode": "pixel", "frames": 4, "image_size": [16, 24]}
    again = autoencoder_stage(config, weights)
    jax.tree.map(np.testing.assert_array_equal, again.params, own["autoencoder"].params)
    rotary = own["autoencoder"].config.copy_and_resolve_references()
    rotary.model.position = "rotary"
    with pytest.raises(UserError, match="model.position=rotary: the release's code knows none only"):
        release_weights(own["autoencoder"]._replace(config=rotary))


@pytest.mark.parametrize("name", ["content", "motion"])
def test_a_denoiser_trained_here_computes_the_same_there(own, name):
    stage, autoencoder = own[name], own["autoencoder"]
    weights = release_weights(stage, autoencoder)
    assert "pos_embed" in weights and ("keyframe_pos_embed" in weights) == (name == "motion")
    assert ("y_embedder.embedding_table.weight" in weights) == (name == "content")
    model, shape = stage.config.model, {"content": (16, 24, 3), "motion": (4, 10, 4)}[name]
    config = {"input_size": shape[:2], "patch_size": model.patch, "in_channels": shape[2], "heads": model.heads}
    config |= {"hidden_size": model.width, "depth": model.depth}
    if name == "content":
        config["num_classes"] = 2
    else:
        config |= {"content_size": [16, 24], "content_channels": 3, "content_patch_size": 4}
        config["motion_order"] = "rows_first"
    module, params = load(f"{name}_dit", config, weights)
    x, frame = draw("x", (2, *shape), 1), draw("content", (2, 16, 24, 3), 1)
    label, t = np.array([0, 2]) if name == "content" else np.zeros(2, int), np.array([3.0, 700.0])
    ours = stage_of(stage.config, stage.metadata, autoencoder)
    expected = jax.jit(ours.apply)(stage.params, x, t, label, frame)
    found = jax.jit(module.apply)({"params": params}, x, t, label, frame)
    assert_close(np.asarray(found), np.asarray(expected))


def test_what_the_release_cannot_compute_is_refused(own):
    motion, autoencoder = own["motion"], own["autoencoder"]
    two = {"label": {"embedding": draw("label", (3, 16), 0)}}
    metadata = replace(motion.metadata, class_names=("run", "jump"))
    with pytest.raises(UserError, match="its motion depends on the class"):
        release_weights(motion._replace(params=motion.params | two, metadata=metadata), autoencoder)
    with pytest.raises(UserError, match="does not tell its grid; give its autoencoder too"):
        release_weights(motion)
    with pytest.raises(UserError, match="was trained with another one"):
        release_weights(motion, autoencoder._replace(metadata=Metadata(digest="other")))
    flow = motion.config.copy_and_resolve_references()
    flow.diffusion.kind = "flow"
    with pytest.raises(UserError, match="diffusion.kind=flow: the release's code knows gaussian only"):
        release_weights(motion._replace(config=flow), autoencoder)
    texts = motion.config.copy_and_resolve_references()
    texts.model.condition = "text"
    with pytest.raises(UserError, match="reads texts"):
        release_weights(motion._replace(config=texts), autoencoder)


# Errors.


@pytest.mark.parametrize("changes, message", [
    ({"heads": None}, "config=heads: missing"),
    ({"frames": None}, "config=frames: missing from the config; give what the model was trained with"),
    ({"image_size": [16, 0]}, r"config.image_size=\[16, 0\]: not a positive whole number"),
    ({"image_size": 15}, "config.image_size=15: not a multiple of patch_size=2; use 16"),
    ({"mode": "latent"}, "config.mode=latent: needs the VAE"),
    ({"depth": 3}, "config.depth=3: 36 of 124 tensors are missing: encoder.layers.2"),
])  # fmt: skip
def test_a_clip_that_does_not_fit_is_named(changes, message):
    config = {key: value for key, value in (CLIP | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        autoencoder_stage(config, fixture("autoencoder_pixel")[0])


def test_models_that_do_not_belong_together_are_refused(released):
    weights, _ = fixture("motion_dit")
    wrong = weights | {"x_embedder.proj.weight": np.zeros((48, 6, 2, 2), np.float32)}
    with pytest.raises(UserError, match="the motion model has in_channels=6, with this autoencoder it would be 5"):
        denoiser_stage("motion", {"heads": 4}, wrong, released["autoencoder"], NAMES)
    weights, _ = fixture("content_dit")
    with pytest.raises(UserError, match=r"has input_size=\[32, 32\], with this autoencoder it would be \[16, 16\]"):
        denoiser_stage("content", {"heads": 4, "input_size": 32}, weights, released["autoencoder"])
    with pytest.raises(UserError, match="classes=6 names: but the model has 7"):
        denoiser_stage("content", {"heads": 4}, weights, released["autoencoder"], NAMES[:6])
    numbered = denoiser_stage("content", {"heads": 4}, weights, released["autoencoder"])
    assert numbered.metadata.class_names == tuple("0123456")
