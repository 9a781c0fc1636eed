"""The known architectures: those that planning counts, which have the parameters of the published weights."""

import pytest

from cmd_jax.config import check, load
from cmd_jax.errors import UserError
from cmd_jax.interop.clip import text_from_config
from cmd_jax.interop.schedulers import from_scheduler_config
from cmd_jax.interop.sd_config import unet_from_config, vae_from_config
from cmd_jax.interop.sd_known import ARCHITECTURES
from cmd_jax.models.clip import CLIPText
from cmd_jax.models.unet import UNet
from cmd_jax.models.vae import VAE
from cmd_jax.pretrained import ImageModelMetadata, TextEncoderMetadata, VAEMetadata, stated


@pytest.mark.parametrize("name, heads, text_width", [("sd15", (8,) * 4, 768), ("sd21", (5, 10, 20, 20), 1024)])
def test_their_modules(name, heads, text_width):
    """Levels, layers, heads and widths as the model cards say; what the converter makes of the files is these."""
    known = ARCHITECTURES[name]
    unet = unet_from_config(known.unet)
    levels = dict(down_attention=(True, True, True, False), up_attention=(False, True, True, True))
    assert unet == UNet(4, 4, (320, 640, 1280, 1280), 2, heads=heads, text_width=text_width, dtype="float32", **levels)
    assert vae_from_config(known.vae) == VAE(3, 4, (128, 256, 512, 512), 2, dtype="float32")
    text = text_from_config(known.text)
    depth, activation = {"sd15": (12, "quick_gelu"), "sd21": (23, "gelu")}[name]
    assert isinstance(text, CLIPText) and (text.width, text.depth, text.activation) == (text_width, depth, activation)
    assert (text.vocabulary, text.length, text.heads * 64) == (49408, 77, text_width)
    process, options = from_scheduler_config(known.scheduler)
    assert options["solver"] == "ddim" and process.prediction == "eps" and len(process.schedule.betas) == 1000


def test_a_folder_comes_before_a_known_architecture(tmp_path):
    for kind in (VAEMetadata, TextEncoderMetadata, ImageModelMetadata):
        assert stated("", kind, "sd21") == stated("", kind, "sd21") != stated("", kind, "sd15") or kind is VAEMetadata
        with pytest.raises(UserError, match="pretrained.path"):
            stated(tmp_path, kind, "sd21")


@pytest.mark.parametrize("stage", ["autoencoder", "content", "motion"])
def test_an_architecture_is_enough_for_shapes_only(stage):
    config = load(f"webvid:{stage},sd=15", shapes_only=True)
    assert config.pretrained.architecture == "sd15"
    for load_again in (lambda: check(config), lambda: load(f"webvid:{stage},sd=15")):
        with pytest.raises(UserError, match="pretrained.path=: missing"):
            load_again()
    with pytest.raises(UserError, match="pretrained.architecture=sd3"):
        load(f"webvid:{stage}", {"pretrained.architecture": "sd3"})
