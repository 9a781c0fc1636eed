"""Random small models that diffusers builds and saves, loaded by us; and what we save, loaded by diffusers."""

import json
from pathlib import Path

import jax
import numpy as np
import peer as peers
import pytest
from peer import diffusers, torch, transformers

from cmd_jax.interop import folders, schedulers
from cmd_jax.interop.diffusers import load_pipeline, load_unet, load_vae, save_pipeline
from cmd_jax.interop.folders import DIFFUSERS, TRANSFORMERS, find_weights
from cmd_jax.interop.sd_config import unet_from_config, vae_from_config
from cmd_jax.interop.weights import open_weights

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


@pytest.mark.parametrize("shard", [None, "5KB"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_every_form_of_weights_that_the_libraries_write(library, variant, safe, shard, tmp_path):
    """Endings, variants and shards. transformers 5 writes safetensors whatever it is told, and its own shards."""
    torch.manual_seed(0)
    if library == "diffusers":
        peer, stems = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2), DIFFUSERS
    else:
        sizes = dict(vocab_size=60, hidden_size=24, intermediate_size=50, num_attention_heads=3, num_hidden_layers=2)
        peer, stems = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, eos_token_id=59)), TRANSFORMERS
    peer = peer.half() if variant == "fp16" else peer
    options = {"max_shard_size": shard} if shard else {}
    peer.save_pretrained(tmp_path, variant=variant, safe_serialization=safe, **options)
    files = find_weights(tmp_path, stems)
    assert (len(files.parts) > 1) == bool(shard)
    assert variant is None or all(f".{variant}" in path.name for path in (files.name, *files.parts))
    assert {part.suffix for part in files.parts} == {".safetensors" if safe or library == "transformers" else ".bin"}
    wanted = {name: value.numpy() for name, value in peer.state_dict().items()}
    with open_weights(files) as weights:
        assert weights.shapes == {name: value.shape for name, value in wanted.items()}
        for name, value in wanted.items():
            np.testing.assert_array_equal(weights.read(name, (slice(None),) * value.ndim), value, err_msg=name)


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


def test_every_field_that_diffusers_writes_is_known(tmp_path, caplog):
    """One that a later diffusers adds would be noted as unknown: here before a user meets it."""
    folders.note.cache_clear()
    unet_of(**UNETS["no attention but in the middle"][0]).save_config(tmp_path / "unet")
    diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_config(tmp_path / "vae")
    for part, from_config in (("unet", unet_from_config), ("vae", vae_from_config)):
        config = json.loads((tmp_path / part / "config.json").read_text())
        assert len(config) > 15
        from_config(config)
    for name in schedulers.CLASSES:
        getattr(diffusers, name)().save_config(tmp_path / name)
        schedulers.from_scheduler_config(json.loads((tmp_path / name / "scheduler_config.json").read_text()))
    assert not caplog.records
