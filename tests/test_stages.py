import copy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.formula import state_dict

from cmd_jax import defaults
from cmd_jax.builders import build_autoencoder, build_process, check_fits, check_patches
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.defaults import CLIP_BY_SPACE
from cmd_jax.errors import UserError
from cmd_jax.interop.lpips import lpips_params
from cmd_jax.keys import derive
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Classes
from cmd_jax.models.frames import Pixels, VAELatents, pixels
from cmd_jax.models.vae import VAE
from cmd_jax.models.vgg import LPIPS
from cmd_jax.stages import (
    AutoencoderStage,
    ContentStage,
    FrozenAutoencoder,
    MotionStage,
    denormalize,
    diffusion_stage,
    normalize,
)

B, T, H, W, C, K, CLASSES = 3, 4, 8, 16, 3, 5, 7
RNG = np.random.default_rng(0)
BATCH = {
    "video": jnp.asarray(RNG.integers(0, 256, (B, T, H, W, C), np.uint8)),
    "label": jnp.asarray([0, 6, 2], jnp.int32),
}
KEY = jax.random.key(3)
LATENTS = VAELatents(VAE(3, 4, (8, 16), 1, groups=8))  # half as high and wide
PATHS = {"content": ContentStage, "motion": MotionStage}


def names(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def awake(stage, scale=0.1):
    """Parameters off their initial values, the zeros of adaLN-zero too; drawn on the host, which compiles nothing."""
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    shapes = jax.tree.map(lambda x: getattr(x, "value", x), shapes, is_leaf=lambda x: hasattr(x, "names"))
    rng = np.random.default_rng(1)

    def one(x):
        fan_in = x.shape[-2] if len(x.shape) > 1 else 1 / scale**2
        return jnp.asarray(rng.standard_normal(x.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map(one, shapes)


def autoencoder_config(**loss):
    config = defaults.stage("autoencoder")
    config.data.update(frames=T, height=H, width=W)
    config.model.update(patch=4, width=16, depth=1, heads=2, head_dim=8, motion_channels=K)
    config.loss.update(discriminator_channels=4, discriminator_layers=1)
    config.loss.update(loss)
    return config


def denoiser_config(name, kind="flow", **diffusion):
    config = defaults.stage(name)
    config.data.update(frames=T, height=H, width=W)
    config.model.update(patch=4 if name == "content" else 2, width=16, depth=1, heads=2)
    config.diffusion.update(kind=kind, learned_range=kind == "gaussian", clip=0.0)
    config.diffusion.update(diffusion)
    return config


@pytest.fixture(scope="module")
def autoencoder():
    stage = AutoencoderStage(autoencoder_config())
    return FrozenAutoencoder(autoencoder_config(), awake(stage))


@pytest.fixture(scope="module")
def latents(autoencoder):
    return jax.tree.map(np.asarray, jax.jit(autoencoder.encode)(autoencoder.params, {"video": BATCH["video"]}))


@pytest.fixture(scope="module")
def statistics(latents):
    return LatentStatistics.of(latents._asdict())


@pytest.fixture(scope="module")
def stages(autoencoder, statistics):
    """Content with a Gaussian process and a learned range, motion with flow matching."""
    return {
        "content": ContentStage(denoiser_config("content", "gaussian"), autoencoder, Classes(CLASSES), statistics),
        "motion": MotionStage(denoiser_config("motion", "flow"), autoencoder, Classes(CLASSES), statistics),
    }


@pytest.fixture(scope="module")
def gradients(stages):
    """name -> jitted (params, frozen, batch, key) -> ((loss, metrics), gradients of params and frozen)."""
    return {n: jax.jit(jax.value_and_grad(stage.loss, argnums=(0, 1), has_aux=True)) for n, stage in stages.items()}


@pytest.fixture(scope="module")
def losses(stages, latents):
    """name -> (labels, label dropout) -> loss of the encoded batch."""

    def of(stage):
        def loss(params, frozen, labels, dropout):
            other = copy.copy(stage)
            other.label_dropout = dropout
            batch = {"content": latents.content, "motion": latents.motion, "label": labels}
            return other.loss(params, frozen, batch, KEY)[0]

        compiled, params = jax.jit(loss), awake(stage)
        return lambda labels, dropout: float(compiled(params, stage.frozen, jnp.asarray(labels), dropout))

    return {name: of(stage) for name, stage in stages.items()}


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


def test_pixels_are_scaled_to_plus_minus_one():
    scaled = pixels(jnp.array([0, 51, 255], jnp.uint8))
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, [-1, -0.6, 1], atol=1e-6)


def test_the_frozen_autoencoder_knows_its_shapes(autoencoder, latents):
    assert latents.content.shape == (B, *autoencoder.content_shape) == (B, H, W, C)
    assert latents.motion.shape == (B, *autoencoder.motion_shape) == (B, T, H // 4 + W // 4, K)
    video = jax.eval_shape(autoencoder.decode, autoencoder.params, Latents(*latents))
    assert video.shape == (B, *autoencoder.video_shape) == (B, T, H, W, C)


# Stage 1.


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


# Stages 2 and 3.


@pytest.mark.parametrize("name", PATHS)
def test_a_gradient_reaches_every_parameter_and_nothing_frozen(stages, gradients, autoencoder, name):
    stage = stages[name]
    params = awake(stage)
    (loss, metrics), (ours, frozen) = gradients[name](params, stage.frozen, BATCH, KEY)
    assert np.isfinite(loss) and set(metrics) == ({"mse", "vb"} if name == "content" else {"mse"})
    dropped = jax.random.bernoulli(derive(KEY, "label"), stage.label_dropout, (B,))
    used = {CLASSES if drop else int(label) for drop, label in zip(dropped, BATCH["label"], strict=True)}
    for key, leaf in names(ours).items():
        if key != "blocks/key/bias":  # a softmax doesn't see what a key's bias adds to all its logits
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-8, key
    rows = np.abs(ours["label"]["embedding"]).max(axis=1)
    assert {row for row in range(CLASSES + 1) if rows[row] > 0} == used
    assert all(np.abs(leaf).max() == 0 for leaf in names(frozen["autoencoder"]).values())
    assert set(stage.frozen) == {"autoencoder", "conditions", "statistics"}
    assert stage.frozen["autoencoder"] is autoencoder.params and not stage.frozen["conditions"]
    assert not {"encoder", "decoder", "autoencoder"} & set(params)


@pytest.mark.parametrize("name", PATHS)
def test_encoded_batches_give_the_loss_of_their_videos(stages, gradients, losses, name):
    stage = stages[name]
    (from_video, _), _ = gradients[name](awake(stage), stage.frozen, BATCH, KEY)
    np.testing.assert_allclose(losses[name](BATCH["label"], stage.label_dropout), from_video, rtol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_dropping_every_label_hides_the_class(losses, name):
    labels = [[0, 6, 2], [1, 5, 3], [CLASSES] * 3]
    assert len({losses[name](label, 1.0) for label in labels}) == 1
    assert len({losses[name](label, 0.0) for label in labels}) == 3
    assert losses[name](labels[0], 1.0) == losses[name](labels[2], 0.0)


@pytest.mark.parametrize("name", PATHS)
def test_guidance_spans_from_the_null_class_over_the_condition(stages, latents, statistics, name):
    stage = stages[name]
    params = awake(stage)
    x, times = jnp.asarray(RNG.standard_normal((B, *stage.shape)), jnp.float32), jnp.array([10.0, 400.0, 990.0])
    condition = latents.content if name == "motion" else None

    @jax.jit
    def outputs(label, guidance):
        return [
            denoise(x, times)
            for denoise in (
                stage.denoiser(params, label, condition),
                stage.guided_denoiser(params, label, condition, guidance, jnp.full(B, CLASSES)),
            )
        ]

    null, _ = outputs(jnp.full(B, CLASSES), 1.0)
    conditional, three = outputs(BATCH["label"], 3.0)
    zero, one = (outputs(BATCH["label"], g)[1] for g in (0.0, 1.0))
    channels = stage.shape[-1]
    np.testing.assert_allclose(one[..., :channels], conditional[..., :channels], atol=1e-5)
    np.testing.assert_allclose(zero[..., :channels], null[..., :channels], atol=1e-5)
    expected = (null + 3 * (conditional - null))[..., :channels]
    np.testing.assert_allclose(three[..., :channels], expected, atol=1e-4)
    if stage.process.learned_range:
        np.testing.assert_allclose(zero[..., channels:], conditional[..., channels:], atol=1e-5)
    # The class itself matters, sample by sample.
    _, other = outputs(jnp.asarray([1, 6, 3]), 3.0)
    differences = np.abs(other - three)[..., :channels].max(axis=(1, 2, 3))
    assert differences[0] > 1e-2 and differences[2] > 1e-2 and differences[1] < 1e-5


def test_normalise_and_denormalise_are_inverse(statistics, latents, stages):
    for name in ("content", "motion"):
        constants, values = stages[name].frozen["statistics"][name], getattr(latents, name)
        scaled = normalize(values, constants)
        axes = tuple(range(values.ndim - 1))
        np.testing.assert_allclose(scaled.mean(axes), 0, atol=1e-4)
        np.testing.assert_allclose(scaled.std(axes), 1, atol=1e-4)
        np.testing.assert_allclose(denormalize(scaled, constants), values, atol=1e-5)


def test_what_is_diffused_and_what_is_given(stages, latents):
    def scaled(name):
        constants = stages["motion"].frozen["statistics"][name]
        return (getattr(latents, name) - constants["mean"]) / constants["std"]

    x0, condition = stages["content"].split(latents, stages["content"].frozen["statistics"])
    np.testing.assert_allclose(x0, scaled("content"), atol=1e-6)
    assert condition is None
    x0, condition = stages["motion"].split(latents, stages["motion"].frozen["statistics"])
    np.testing.assert_allclose(x0, scaled("motion"), atol=1e-6)
    np.testing.assert_allclose(condition, scaled("content"), atol=1e-6)


def oracle(process, x0):
    """The denoiser that knows the data."""

    def flow(x, timesteps):
        return (x - x0) / (timesteps / 1000)[:, None, None, None]

    def eps(x, timesteps):
        alpha_bar = jnp.asarray(process.schedule.alpha_bar, jnp.float32)[timesteps.astype(int)][:, None, None, None]
        noise = (x - jnp.sqrt(alpha_bar) * x0) / jnp.sqrt(1 - alpha_bar)
        return jnp.concatenate([noise, jnp.zeros_like(noise)], axis=-1)

    return eps if process.learned_range else flow


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", ["", "other"])
def test_sampling_with_an_oracle_recovers_the_latents(autoencoder, statistics, latents, name, solver):
    kind = "gaussian" if name == "content" else "flow"
    stage = PATHS[name](denoiser_config(name, kind), autoencoder, Classes(CLASSES), statistics)
    constants = stage.frozen["statistics"]
    x0, condition = stage.split(latents, constants)
    given = []

    def denoiser(params, label, condition):
        given.append((label, condition))
        return oracle(stage.process, x0)

    stage.denoiser, stage.content_features = denoiser, lambda _, content: content
    content = latents.content if name == "motion" else None
    solver = solver and {"content": "ddpm", "motion": "heun"}[name]
    keys = jax.random.split(KEY, B)
    found = stage.sample(
        None, constants, BATCH["label"], content, keys, guidance=None, steps=12, solver=solver
    )  # fmt: skip
    np.testing.assert_allclose(found, getattr(latents, name), atol=2e-3)
    [(label, shown)] = given
    assert label is BATCH["label"]
    if name == "motion":
        np.testing.assert_allclose(shown, condition, atol=1e-6)
    else:
        assert shown is None


@pytest.mark.parametrize(
    "kind, space, normalized, clip, largest",
    [
        ("gaussian", Pixels(), False, CLIP_BY_SPACE, 1.0),
        ("flow", Pixels(), False, CLIP_BY_SPACE, 1.0),
        ("gaussian", Pixels(), False, 2.0, 2.0),
        ("flow", Pixels(), False, 0.0, 5.0),
        ("gaussian", Pixels(), True, CLIP_BY_SPACE, 5.0),
        ("gaussian", LATENTS, False, CLIP_BY_SPACE, 5.0),
        ("flow", LATENTS, True, CLIP_BY_SPACE, 5.0),
        ("gaussian", LATENTS, False, 0.0, 5.0),
    ],
)
def test_content_is_held_within_the_range_of_pixels_and_latents_are_not(kind, space, normalized, clip, largest):
    """A denoiser that is sure of 5 everywhere: pixels are clipped at 1 unless the config says where, latents never."""
    config = autoencoder_config()
    if space is LATENTS:
        config.model.update(mode="latent", channels=4, patch=2)
    given = denoiser_config("content", kind, clip=clip)
    given.latents.normalize = normalized
    given.model.patch = 2
    frozen = FrozenAutoencoder(config, {"autoencoder": {}}, space)
    stage = diffusion_stage(given, frozen, Classes(CLASSES))
    stage.denoiser = lambda *_: oracle(stage.process, jnp.full((B, *stage.shape), 5.0))
    keys = jax.random.split(KEY, B)
    found = stage.sample(None, stage.frozen["statistics"], BATCH["label"], None, keys, steps=3, solver="")
    np.testing.assert_allclose(found, largest, atol=2e-3)


def test_a_clip_of_pixels_is_refused_for_latents():
    config = autoencoder_config()
    config.model.update(mode="latent", channels=4, patch=2)
    frozen = FrozenAutoencoder(config, {"autoencoder": {}}, LATENTS)
    for check in (check_fits, lambda *both: diffusion_stage(*both, Classes(CLASSES))):  # training, and sampling
        with pytest.raises(UserError, match="^diffusion.clip=1.0: content frames are latents of the VAE .*; use -1.0"):
            check(denoiser_config("content", "gaussian", clip=1.0), frozen)
    check_fits(denoiser_config("motion", "gaussian", clip=1.0), frozen)  # whose range is (-1, 1) all the same


@pytest.mark.parametrize("name, solvers", [("content", "ddim, ddpm, dpmpp"), ("motion", "euler, heun")])
def test_unknown_solvers_are_answered_with_those_of_the_process(stages, latents, name, solvers):
    stage = stages[name]
    content = latents.content if name == "motion" else None
    arguments = (awake(stage), stage.frozen["statistics"], BATCH["label"], content, jax.random.split(KEY, B))
    with pytest.raises(UserError) as error:
        stage.sample(*arguments, guidance=None, steps=2, solver="rk45")
    assert str(error.value) == f"sampling.solver=rk45: not one of the choices; use one of {solvers}"
    with pytest.raises(UserError, match="^sampling.steps=0: must be a positive whole number; "):
        stage.sample(*arguments, guidance=None, steps=0, solver="")


@pytest.mark.parametrize("name", PATHS)
def test_previews_are_videos_and_images(stages, name):
    stage = stages[name]
    params = jax.eval_shape(stage.init, KEY)
    params = jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "names"))
    shapes = {n: x.shape for n, x in jax.eval_shape(stage.preview, params, stage.frozen, BATCH, KEY).items()}
    if name == "content":
        assert shapes == {"content": (B, H, W, C), "samples": (B, H, W, C)}
    else:
        assert shapes == {"reconstructions": (B, T, H, W, C), "samples": (B, T, H, W, C)}


def test_the_previews_of_the_autoencoder():
    stage = AutoencoderStage(autoencoder_config())
    shapes = {n: x.shape for n, x in jax.eval_shape(stage.preview, awake(stage), {}, BATCH, KEY).items()}
    clip = (B, T, H, W, C)
    wanted = {"clips": clip, "reconstructions": clip, "content": (B, H, W, C), "content_weights": clip}
    assert shapes == wanted


def test_processes_are_built_as_configured():
    flow = build_process(denoiser_config("content", time_mean=0.5, time_std=2.0).diffusion)
    assert (flow.prediction, flow.time_mean, flow.time_std, flow.clip) == ("velocity", 0.5, 2.0, None)
    scaled = build_process(
        denoiser_config("content", "gaussian", schedule="scaled_linear", prediction="v", timesteps=500).diffusion,
        clip=2.0,
    )
    assert (len(scaled.schedule), scaled.prediction, scaled.clip) == (500, "v", 2.0)
    assert scaled.schedule.betas[0] == pytest.approx(0.00085) and scaled.schedule.betas[-1] == pytest.approx(0.012)
    for field in ("kind", "schedule", "prediction"):
        config = denoiser_config("content", "gaussian")
        config.diffusion[field] = "nope"
        with pytest.raises(UserError, match=f"diffusion.{field}=nope: not one of the choices; use one of "):
            build_process(config.diffusion)


def test_grids_that_patches_do_not_divide_are_named(autoencoder):
    for name, patch, extra, field in (
        ("content", 3, None, "data.height=8: not a multiple of content model.patch=3; change model.patch"),
        ("motion", 4, 4, "h+w=6: not a multiple of motion model.patch=4; change model.patch"),
        ("motion", 3, 4, "data.frames=4: not a multiple of motion model.patch=3; change model.patch"),
        ("motion", 2, 16, "data.height=8: not a multiple of motion model.content_patch=16; change model.content_patch"),
    ):
        config = denoiser_config(name)
        config.model.patch = patch
        if extra:
            config.model.content_patch = extra
        with pytest.raises(UserError) as error:
            check_patches(config, autoencoder)
        assert str(error.value) == field
