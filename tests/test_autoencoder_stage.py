import copy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.formula import state_dict
from stage_parts import (
    BATCH,
    KEY,
    RNG,
    B,
    C,
    H,
    T,
    W,
    autoencoder_config,
    awake,
    names,
)

from cmd_jax.builders import build_autoencoder
from cmd_jax.errors import UserError
from cmd_jax.interop.lpips import lpips_params
from cmd_jax.keys import derive
from cmd_jax.models.frames import pixels
from cmd_jax.models.vgg import LPIPS
from cmd_jax.stages import (
    AutoencoderStage,
)


class Weights(dict):
    __getattr__ = dict.__getitem__


@pytest.fixture(scope="module")
def players():
    """With discriminators: (l1, l2, adversarial weight) -> ((loss, metrics), gradient); and the parameters."""
    stage = AutoencoderStage(autoencoder_config(adversarial=1.0))
    params = awake(stage)

    def loss(params, l1, l2, adversarial):
        other = copy.copy(stage)
        other.loss_weights = Weights(l1=l1, l2=l2, lpips=0.0, adversarial=adversarial, feature_matching=4.0)
        return other.loss(params, {}, BATCH, KEY)

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda *weights: compiled(params, *weights), params


def test_the_autoencoders_loss_is_its_weighted_terms(players):
    play, params = players
    (loss, metrics), gradient = play(2.0, 3.0, 0.0)
    video = np.asarray(BATCH["video"], np.float32) / 127.5 - 1
    module = AutoencoderStage(autoencoder_config()).module
    reconstruction, found = jax.jit(module.apply)({"params": params["autoencoder"]}, video)
    error = np.asarray(reconstruction) - video
    np.testing.assert_allclose(metrics["l1"], np.abs(error).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["l2"], (error**2).mean(), rtol=1e-4)
    expected = 2 * np.abs(error).mean() + 3 * (error**2).mean() + metrics["discriminator"]
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    decibels = 10 * np.log10(4 / (error**2).mean((1, 2, 3, 4))).mean()
    np.testing.assert_allclose(metrics["psnr"], decibels, rtol=1e-4)
    np.testing.assert_allclose(metrics["motion_saturated"], (np.abs(found.motion) > 0.99).mean())
    for name, leaf in names(gradient["autoencoder"]).items():
        # A softmax over frames doesn't see a bias that all its logits share.
        reached = np.abs(leaf).max() > 1e-7
        assert np.isfinite(leaf).all() and reached == (name != "content_logits/bias"), name


def test_lpips_joins_with_its_weight_on_one_frame_of_each_clip():
    with np.load(Path(__file__).parent / "fixtures" / "lpips.npz") as npz:
        vgg = lpips_params(state_dict(dict(npz)))
    config = autoencoder_config(l1=1.0, lpips=4.0)
    config.data.update(height=16, width=32)
    stage = AutoencoderStage(config, vgg)
    assert stage.frozen["lpips"] is vgg
    batch = {"video": jnp.asarray(RNG.integers(0, 256, (2, T, 16, 32, C), np.uint8))}
    params = awake(stage)

    def loss(params, frozen, batch, key):
        total, metrics = stage.loss(params, frozen, batch, key)
        reconstruction, _ = stage.module.apply({"params": params["autoencoder"]}, pixels(batch["video"]))
        frames = jax.random.randint(derive(key, "frame"), (2,), 0, T)
        pick = lambda x: jnp.stack([x[i, frames[i]] for i in range(2)])  # noqa: E731
        distance = LPIPS().apply({"params": frozen["lpips"]}, pick(reconstruction), pick(pixels(batch["video"])))
        return total, metrics, distance.mean()

    total, metrics, expected = jax.jit(loss)(params, stage.frozen, batch, KEY)
    assert metrics["lpips"] > 0
    np.testing.assert_allclose(metrics["lpips"], expected, rtol=1e-4)
    np.testing.assert_allclose(total, metrics["l1"] + 4 * metrics["lpips"], rtol=1e-5)


def test_a_view_is_the_drawn_frame_of_each_clip_or_the_clip():
    stage = AutoencoderStage(autoencoder_config())
    video = jnp.arange(B * T * 2 * 3).reshape(B, T, 2, 3, 1)
    frames = jnp.array([2, 0, 3])
    assert np.array_equal(stage._view("2d", video, frames), np.stack([video[i, f] for i, f in enumerate(frames)]))
    assert stage._view("3d", video, frames) is video


def test_the_adversarial_players_train_on_their_own_loss_only(players):
    play, params = players
    assert set(params) == {"autoencoder", "2d", "3d"}
    (total, metrics), both = play(1.0, 0.0, 0.5)
    expected = metrics["l1"] + 0.5 * metrics["generator"] + metrics["discriminator"]
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    _, generator = play(0.0, 0.0, 1.0)
    _, discriminator = play(0.0, 0.0, 0.0)
    for name, leaf in names(both).items():
        only_generator, only_discriminator = names(generator)[name], names(discriminator)[name]
        if name.startswith("autoencoder"):
            assert np.abs(only_discriminator).max() == 0, name
            assert np.abs(only_generator).max() > 1e-7 or name.endswith("content_logits/bias"), name
        else:
            np.testing.assert_array_equal(only_generator, only_discriminator, err_msg=name)
            np.testing.assert_array_equal(leaf, only_discriminator, err_msg=name)
            # Real and fake pull the last bias equally as long as both lie within the hinge.
            assert np.abs(leaf).max() > 1e-7 or name.endswith("logits/bias"), name


def test_no_discriminators_unless_asked_for():
    stage = AutoencoderStage(autoencoder_config())
    assert set(jax.eval_shape(stage.init, KEY)) == {"autoencoder"} and stage.frozen == {}


@pytest.mark.parametrize("field", ["mode", "position", "content"])
def test_unknown_choices_of_the_autoencoder(field):
    config = autoencoder_config()
    config.model[field] = "nope"
    with pytest.raises(UserError, match=f"^model.{field}=nope: not one of the choices; use one of "):
        build_autoencoder(config.model)


def test_the_previews_of_the_autoencoder():
    stage = AutoencoderStage(autoencoder_config())
    shapes = {n: x.shape for n, x in jax.eval_shape(stage.preview, awake(stage), {}, BATCH, KEY).items()}
    clip = (B, T, H, W, C)
    wanted = {"clips": clip, "reconstructions": clip, "content": (B, H, W, C), "content_weights": clip}
    assert shapes == wanted
