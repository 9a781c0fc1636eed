import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_parts import (
    BATCH,
    CLASSES,
    KEY,
    LATENTS,
    PATHS,
    RNG,
    B,
    C,
    H,
    K,
    T,
    W,
    autoencoder_config,
    awake,
    denoiser_config,
    names,
)

from cmd_jax.builders import build_process, check_fits, check_patches
from cmd_jax.data.latents import LatentStatistics, Sums
from cmd_jax.defaults import CLIP_BY_SPACE
from cmd_jax.errors import UserError
from cmd_jax.keys import derive
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Classes
from cmd_jax.models.frames import Pixels, pixels
from cmd_jax.stages import (
    AutoencoderStage,
    ContentStage,
    FrozenAutoencoder,
    MotionStage,
    denormalize,
    diffusion_stage,
    normalize,
)


@pytest.fixture(scope="module")
def autoencoder():
    stage = AutoencoderStage(autoencoder_config())
    return FrozenAutoencoder(autoencoder_config(), awake(stage))


@pytest.fixture(scope="module")
def latents(autoencoder):
    return jax.tree.map(np.asarray, jax.jit(autoencoder.encode)(autoencoder.params, {"video": BATCH["video"]}))


@pytest.fixture(scope="module")
def statistics(latents):
    sums = {"content": Sums(), "motion": Sums()}
    for name, part in sums.items():
        part.add(getattr(latents, name))
    return LatentStatistics.of([{name: part.as_json() for name, part in sums.items()}])


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


def test_pixels_are_scaled_to_plus_minus_one():
    scaled = pixels(jnp.array([0, 51, 255], jnp.uint8))
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, [-1, -0.6, 1], atol=1e-6)


def test_the_frozen_autoencoder_knows_its_shapes(autoencoder, latents):
    assert latents.content.shape == (B, *autoencoder.content_shape) == (B, H, W, C)
    assert latents.motion.shape == (B, *autoencoder.motion_shape) == (B, T, H // 4 + W // 4, K)
    video = jax.eval_shape(autoencoder.decode, autoencoder.params, Latents(*latents))
    assert video.shape == (B, *autoencoder.video_shape) == (B, T, H, W, C)


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

    def apply(params, x, timesteps, label, condition):
        given.append((label, condition))
        return oracle(stage.process, x0)(x, timesteps)

    stage.apply, stage.content_features = apply, lambda _, content: content
    content = latents.content if name == "motion" else None
    solver = solver and {"content": "ddpm", "motion": "heun"}[name]
    keys = jax.random.split(KEY, B)
    found = stage.sample(
        None, constants, BATCH["label"], content, keys, guidance=None, steps=12, solver=solver
    )  # fmt: skip
    np.testing.assert_allclose(found, getattr(latents, name), atol=2e-3)
    label, shown = given[0]
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
    stage.apply = lambda params, x, timesteps, *_: oracle(stage.process, jnp.full((B, *stage.shape), 5.0))(x, timesteps)
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


@pytest.mark.parametrize("name, solvers", [("content", "ddim, ddpm, dpmpp"), ("motion", "euler, heun, ab2")])
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
