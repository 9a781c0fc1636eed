import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models.autoencoder import Autoencoder, Latents, TimeSformer

SIZES = {"channels": 3, "patch": 2, "width": 32, "depth": 2, "heads": 2, "head_dim": 12, "motion_channels": 5}
B, T, H, W = 2, 5, 8, 12
ROWS, COLUMNS = H // 2, W // 2
VIDEO = np.random.default_rng(0).uniform(-1, 1, (B, T, H, W, 3)).astype(np.float32)
# A softmax doesn't see what is added to all its logits: these biases are there because the published weights have them.
NO_GRADIENT = {"content_logits/bias"}
NO_GRADIENT_WITHOUT_POSITIONS = {
    f"{side}/blocks/{axis}/key/bias" for side in ("encoder", "decoder") for axis in ("time", "space")
}


@functools.cache
def initial_params():
    return nn.meta.unbox(jax.jit(Autoencoder(**SIZES).init)(jax.random.key(0), VIDEO)["params"])


def params_of(module):
    """The same initial values for every variant of the model."""
    return {n: p for n, p in initial_params().items() if n != "content_logits" or module.content == "weighted"}


@functools.cache
def compiled(**changes):
    """(module, function of (variables, video) -> (reconstruction, latents))."""
    module = Autoencoder(**SIZES | changes)
    return module, jax.jit(module.apply)


def run(video=VIDEO, params=None, **changes):
    module, function = compiled(**changes)
    return jax.device_get(function({"params": params or params_of(module)}, video))


@functools.cache
def content_weights(**changes):
    module = Autoencoder(**SIZES | changes)
    weigh = jax.jit(lambda p: module.apply({"params": p}, VIDEO, method="content_weights"))
    return jax.device_get(weigh(params_of(module)))


@functools.cache
def gradients(**changes):
    """{name: gradient} of a loss that reads the reconstruction and both latents."""
    module = Autoencoder(**SIZES | changes)

    def loss(params):
        recon, latents = module.apply({"params": params}, VIDEO)
        return jnp.mean((recon - VIDEO) ** 2) + jnp.mean(latents.content**2) + jnp.mean((latents.motion - 0.3) ** 2)

    tree = jax.device_get(jax.jit(jax.grad(loss))(params_of(module)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): g for path, g in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("shape", [(B, T, H, W, 3), (1, 3, 10, 4, 3)])  # the second: other than at initialisation
def test_shapes_follow_the_clip(shape):
    module, (b, t, h, w, c) = Autoencoder(**SIZES, dtype=jnp.bfloat16), shape
    variables = {"params": params_of(module)}
    recon, latents = jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert recon.shape == shape
    assert latents.content.shape == (b, h, w, c) and latents.motion.shape == (b, t, h // 2 + w // 2, 5)
    assert all(a.dtype == jnp.float32 for a in (recon, *latents))


def test_content_weights_are_shares_of_the_frames():
    weights = content_weights()
    assert weights.shape == VIDEO.shape and weights.min() > 0
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert weights.std(axis=1).max() > 0.01  # they depend on what is seen


def test_a_weighted_content_frame_is_a_mixture_of_frames():
    _, latents = run()
    weights = content_weights()
    assert (latents.content >= VIDEO.min(1) - 1e-6).all() and (latents.content <= VIDEO.max(1) + 1e-6).all()
    np.testing.assert_allclose(latents.content, (weights * VIDEO).sum(1), atol=1e-6)


@pytest.mark.parametrize("content, frame", [("mean", VIDEO.mean(1)), ("first", VIDEO[:, 0])])
def test_the_ablations_of_the_content_frame_are_what_they_say(content, frame):
    recon, latents = run(content=content)
    weights = content_weights(content=content)
    np.testing.assert_allclose(latents.content, frame, atol=1e-6)
    np.testing.assert_allclose((weights * VIDEO).sum(1), frame, atol=1e-6)
    assert recon.shape == VIDEO.shape


def test_a_still_clip_is_its_own_content_frame():
    still = np.repeat(VIDEO[:, :1], T, axis=1)
    np.testing.assert_allclose(run(still)[1].content, VIDEO[:, 0], atol=1e-6)


def test_pixels_are_squashed_and_latents_are_not():
    pixels, latents = run()
    module = Autoencoder(**SIZES, mode="latent")
    linear = jax.device_get(
        jax.jit(functools.partial(module.apply, method="decode"))({"params": initial_params()}, latents)
    )
    assert np.abs(pixels).max() < 1 < np.abs(linear).max()
    np.testing.assert_allclose(pixels, np.tanh(linear / 2), atol=1e-5)


ORDER = np.array([3, 0, 4, 1, 2])


def test_with_rotary_the_order_of_frames_matters():
    _, latents = run()
    _, shuffled = run(VIDEO[:, ORDER])
    assert np.abs(shuffled.motion - latents.motion[:, ORDER]).max() > 1e-2
    assert np.abs(shuffled.content - latents.content).max() > 1e-2


def test_without_positions_shuffled_frames_only_shuffle_the_output():
    recon, latents = run(position="none")
    for ours, expected in zip(
        jax.tree.leaves(run(VIDEO[:, ORDER], position="none")),
        (recon[:, ORDER], latents.content, latents.motion[:, ORDER]),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_with_rotary_the_place_in_the_frame_matters():
    """Cells exchanged: without positions the features only move along; rotary knows."""
    rows = np.arange(H).reshape(ROWS, 2)[[2, 0, 3, 1]].ravel()
    for position, equal in (("none", True), ("rotary", False)):
        moved = run(VIDEO[:, :, rows], position=position)[1].motion[:, :, ROWS:]
        distance = np.abs(moved - run(position=position)[1].motion[:, :, ROWS:]).max()  # columns average over rows
        assert distance < 1e-5 if equal else distance > 1e-3


def test_motion_has_rows_first():
    """Without positions, and with patch weights symmetric in row and column, a transposed clip exchanges the halves."""
    params = params_of(Autoencoder(**SIZES))
    kernel = params["embed_video"]["kernel"].reshape(2, 2, 3, -1)
    kernel = ((kernel + kernel.transpose(1, 0, 2, 3)) / 2).reshape(12, -1)
    params |= {"embed_video": params["embed_video"] | {"kernel": kernel}, "rows_to_motion": params["columns_to_motion"]}
    motion = run(params=params, position="none")[1].motion
    transposed = run(VIDEO.swapaxes(2, 3), params=params, position="none")[1].motion
    np.testing.assert_allclose(
        transposed, np.concatenate([motion[:, :, ROWS:], motion[:, :, :ROWS]], axis=2), atol=1e-5
    )
    assert np.abs(motion[:, :, ROWS:].mean(2) - motion[:, :, :ROWS].mean(2)).max() > 0


def test_a_cell_of_motion_is_decoded_into_its_row_or_column():
    params = params_of(Autoencoder(**SIZES))
    blocks = params["decoder"]["blocks"]
    for name in ("time", "space", "mlp"):  # residual branches off: the decoder acts on each cell alone
        blocks = blocks | {name: blocks[name] | {"out": jax.tree.map(jnp.zeros_like, blocks[name]["out"])}}
    module = Autoencoder(**SIZES)
    decode = jax.jit(lambda z: module.apply({"params": params | {"decoder": {"blocks": blocks}}}, z, method="decode"))
    latents = Latents(VIDEO[:, 0], np.zeros((B, T, ROWS + COLUMNS, 5), np.float32))
    before = decode(latents)
    for cell, rows, columns in ((1, slice(2, 4), slice(None)), (ROWS + 4, slice(None), slice(8, 10))):
        motion = latents.motion.copy()
        motion[1, 3, cell] = 0.7
        changed = np.any(decode(latents._replace(motion=motion)) != before, axis=-1)
        expected = np.zeros_like(changed)
        expected[1, 3, rows, columns] = True
        assert np.array_equal(changed, expected)


def test_motion_is_not_saturated_at_the_start():
    motion = run()[1].motion
    assert motion.std() > 0.01 and np.abs(motion).max() < 0.9


def test_every_block_starts_from_its_own_draw():
    kernel = initial_params()["encoder"]["blocks"]["time"]["query"]["kernel"]
    assert kernel.shape == (2, 32, 24) and not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("content, position", [("weighted", "rotary"), ("first", "none")])
def test_a_gradient_reaches_every_parameter(content, position):
    none = NO_GRADIENT | (NO_GRADIENT_WITHOUT_POSITIONS if position == "none" else set())
    found = gradients(content=content, position=position)
    for name, gradient in found.items():
        assert np.isfinite(gradient).all(), name
        size = np.abs(gradient).max()
        assert size < 1e-6 if name in none else size > 1e-6, (name, size)


def test_recomputing_changes_no_gradient():
    params = {"params": initial_params()["encoder"]}
    x = np.random.default_rng(1).standard_normal((1, 3, 2, 4, 32)).astype(np.float32)

    def gradient(remat):
        trunk = TimeSformer(SIZES["depth"], SIZES["heads"], SIZES["head_dim"], remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.mean(trunk.apply(p, x) ** 3)))(params)

    expected = gradient("none")
    for remat in ("full", "dots"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), gradient(remat), expected)


def test_bfloat16_agrees_with_float32():
    recon, latents = run()
    rounded, rounded_latents = run(dtype=jnp.bfloat16)
    assert rounded.dtype == rounded_latents.content.dtype == rounded_latents.motion.dtype == np.float32
    assert 0 < np.abs(rounded - recon).mean() < 0.01 and np.abs(rounded - recon).max() < 0.2
    assert np.abs(rounded_latents.content - latents.content).max() < 0.05
    assert np.abs(rounded_latents.motion - latents.motion).max() < 0.05
