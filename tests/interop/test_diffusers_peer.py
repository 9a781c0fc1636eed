"""Random small models that diffusers builds and saves, loaded by us; and what we save, loaded by diffusers."""

import json
from pathlib import Path

import jax
import numpy as np
import peer as peers
import pytest
from peer import diffusers, torch

from cmd_jax.interop.diffusers import STEM, load_pipeline, load_unet, load_vae, save_pipeline
from cmd_jax.interop.weights import flatten

pytestmark = peers.grouped
FIXTURES = Path(__file__).parents[1] / "fixtures"
DOWN, UP = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}, {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}


def unet_of(attention, seed, **settings):
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        **{
            "down_block_types": tuple(DOWN[a] for a in attention),
            "up_block_types": tuple(UP[a] for a in reversed(attention)),
            "norm_num_groups": 4,
            "cross_attention_dim": 10,
            "sample_size": 8,
        }
        | settings
    ).eval()


UNETS = {
    "four levels, a list of heads, linear projections": (
        dict(
            attention=(True, True, True, False),
            seed=0,
            block_out_channels=(8, 12, 16, 24),
            layers_per_block=1,
            attention_head_dim=(2, 3, 4, 6),
            use_linear_projection=True,
        ),
        (2, 8, 24),
    ),
    "four levels, one number of heads": (
        dict(
            attention=(True, True, True, False),
            seed=1,
            block_out_channels=(16, 24, 32, 32),
            layers_per_block=2,
            attention_head_dim=8,
            norm_num_groups=8,
            upcast_attention=True,
        ),
        (1, 16, 8),
    ),
    "two levels, attention in the last only, two blocks, sines first, v": (
        dict(
            attention=(False, True),
            seed=2,
            block_out_channels=(8, 20),
            layers_per_block=3,
            attention_head_dim=(1, 5),
            transformer_layers_per_block=2,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-3,
            in_channels=6,
            out_channels=5,
        ),
        (3, 6, 10),
    ),
    "no attention but in the middle": (
        dict(attention=(False, False, False), seed=3, block_out_channels=(8, 8, 8), attention_head_dim=2),
        (2, 4, 12),
    ),
}


def near(found, expected, tolerance=1e-4):
    """Channels last against torch's channels first."""
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def draw(seed, *shape):
    """-> torch's array, and ours with channels last."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.tensor(x), x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


@pytest.mark.parametrize("settings, size", UNETS.values(), ids=UNETS)
def test_unets_of_other_shapes(settings, size, tmp_path):
    peer = unet_of(**settings)
    peer.save_pretrained(tmp_path)
    module, params = load_unet(tmp_path)
    batch, rows, columns = size
    sample, ours = draw(0, batch, peer.config.in_channels, rows, columns)
    text, _ = draw(1, batch, 5, 10)
    times = np.linspace(0, 999, batch).astype(np.int64)
    with torch.no_grad():
        expected = peer(sample, torch.tensor(times), text).sample
    near(jax.jit(module.apply)({"params": params}, ours, times, text.numpy()), expected)


VAES = {
    "four levels": (dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4), (16, 24)),
    "three layers, other channels": (
        dict(block_out_channels=(12, 6), layers_per_block=3, norm_num_groups=6, latent_channels=3, scaling_factor=0.5),
        (6, 10),
    ),
}


@pytest.mark.parametrize("settings, size", VAES.values(), ids=VAES)
def test_vaes_of_other_shapes(settings, size, tmp_path):
    torch.manual_seed(0)
    levels = len(settings["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    peer = diffusers.AutoencoderKL(**types, **settings).eval()
    peer.save_pretrained(tmp_path)
    module, params = load_vae(tmp_path)
    images, ours = draw(0, 2, 3, *size)

    def run(params, images):
        moments = module.apply({"params": params}, images, method="encode")
        return moments, module.apply({"params": params}, moments.mean * module.scaling_factor, method="decode")

    moments, decoded = jax.jit(run)(params, ours)
    with torch.no_grad():
        expected = peer.encode(images).latent_dist
        near(moments.mean, expected.mean)
        near(moments.log_variance, expected.logvar)
        near(decoded, peer.decode(expected.mean).sample)


def test_files_of_other_kinds_that_diffusers_writes(tmp_path):
    """Shards with an index, torch's own format, half precision."""
    peer = unet_of(**UNETS["no attention but in the middle"][0])
    peer.save_pretrained(tmp_path / "whole")
    peer.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    peer.save_pretrained(tmp_path / "torch", safe_serialization=False)
    peer.half().save_pretrained(tmp_path / "half", variant="fp16")
    names = {folder: {p.name for p in (tmp_path / folder).iterdir()} for folder in ("shards", "torch", "half")}
    assert f"{STEM}.safetensors.index.json" in names["shards"] and len(names["shards"]) > 3
    assert f"{STEM}.bin" in names["torch"] and f"{STEM}.fp16.safetensors" in names["half"]
    whole = flatten(load_unet(tmp_path / "whole")[1])
    for folder, tolerance in (("shards", 0), ("torch", 0), ("half", 1e-3)):
        for name, array in flatten(load_unet(tmp_path / folder)[1]).items():
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, whole[name], atol=tolerance, err_msg=f"{folder} {name}")


@pytest.mark.parametrize("folder", ["tiny-sd15", "tiny-sd21"])
def test_diffusers_loads_what_we_save_and_draws_the_same_latents(folder, tmp_path):
    reference = np.load(FIXTURES / folder / "reference.npz")
    save_pipeline(tmp_path / "saved", load_pipeline(FIXTURES / folder))
    drawn = {}
    for name, path in (("original", FIXTURES / folder), ("saved", tmp_path / "saved")):
        peer = diffusers.StableDiffusionPipeline.from_pretrained(path, local_files_only=True)
        peer.set_progress_bar_config(disable=True)
        assert isinstance(peer.scheduler, diffusers.DDIMScheduler) and peer.safety_checker is None
        latents = torch.tensor(reference["latents"])
        rows, columns = (n * peer.vae_scale_factor for n in latents.shape[2:])
        drawn[name] = peer(
            [str(p) for p in reference["prompts"][:2]],
            height=rows, width=columns, num_inference_steps=10, guidance_scale=7.5, latents=latents,
            output_type="latent",
        ).images.numpy()  # fmt: skip
    np.testing.assert_array_equal(drawn["saved"], drawn["original"])
    # Of the first prompt only: in the second, transformers takes "!" for SD 2.1's padding, the reference for a word.
    expected = reference["ddim10_cfg7.5"][0]
    np.testing.assert_allclose(drawn["saved"][0], expected, atol=1e-3 * np.abs(expected).max())


def test_changed_parameters_are_what_diffusers_then_has(tmp_path):
    pipeline = load_pipeline(FIXTURES / "tiny-sd15")
    module, params = pipeline.unet
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(x.dtype), params)
    v = {"prediction_type": "v_prediction"}
    save_pipeline(tmp_path / "new", pipeline._replace(unet=(module, params), scheduler=pipeline.scheduler | v))
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "new", local_files_only=True)
    assert peer.scheduler.config.prediction_type == "v_prediction"
    sample, ours = draw(0, 2, 4, 4, 8)
    text, _ = draw(1, 2, 7, 32)
    times = np.array([1, 900])
    with torch.no_grad():
        expected = peer.unet(sample, torch.tensor(times), text).sample
    near(jax.jit(module.apply)({"params": params}, ours, times, text.numpy()), expected)


def test_every_field_that_diffusers_writes_is_known(tmp_path):
    """One that a later diffusers adds would be refused: here before a user meets it."""
    unet = unet_of(**UNETS["no attention but in the middle"][0])
    unet.save_pretrained(tmp_path / "unet")
    diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path / "vae")
    for part, load in (("unet", load_unet), ("vae", load_vae)):
        assert len(json.loads((tmp_path / part / "config.json").read_text())) > 15
        load(tmp_path / part)
