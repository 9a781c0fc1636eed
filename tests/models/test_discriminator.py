import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmd_jax.errors import UserError
from cmd_jax.models.discriminator import (
    PatchDiscriminator,
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)

IMAGES, CLIPS = (2, 16, 24, 3), (2, 8, 16, 24, 3)


def noise(shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def initialise(model, x):
    # XLA:CPU compiles rbg's draws in a tenth of the time that threefry's take.
    return jax.jit(model.init)(jax.random.key(0, impl="rbg"), x)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((2, 64, 32, 3), [(32, 16), (16, 8), (8, 4), (8, 4), (8, 4)]),
        ((2, 16, 24, 3), [(8, 12), (4, 6), (4, 6), (4, 6), (4, 6)]),
        ((1, 4, 16, 32, 3), [(4, 8, 16), (4, 4, 8), (4, 4, 4), (4, 4, 4), (4, 4, 4)]),
        ((1, 16, 64, 32, 4), [(8, 32, 16), (4, 16, 8), (4, 8, 4), (4, 8, 4), (4, 8, 4)]),
    ],
)
def test_shapes(shape, expected):
    model = PatchDiscriminator(dimensions=len(shape) - 2, base_channels=8)
    (logits, features), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros(shape))
    assert [f.shape[1:-1] for f in features] == expected[:-1]
    assert [f.shape[-1] for f in features] == [8, 16, 32, 64]
    assert logits.shape == (shape[0], *expected[-1], 1)


@pytest.mark.parametrize("shape", [IMAGES, CLIPS])
def test_gradients_reach_every_parameter(shape):
    model = PatchDiscriminator(dimensions=len(shape) - 2, base_channels=4)
    x = noise(shape)
    params = initialise(model, x)["params"]
    assert params["conv0"]["kernel"].names[-4:] == ("conv_height", "conv_width", "conv_in", "conv_out")
    params = nn.meta.unbox(params)
    gradients = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, x)[0] ** 2).mean()))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        assert (np.abs(g) > 0).all(), jax.tree_util.keystr(path)  # each tap of each kernel, too


def test_items_of_a_batch_do_not_meet():
    model = PatchDiscriminator(dimensions=2, base_channels=8)
    x = noise(IMAGES)
    variables = initialise(model, x)
    assert set(variables) == {"params"}  # no statistics to carry
    apply = jax.jit(model.apply)
    whole, _ = apply(variables, x)
    alone, _ = apply(variables, x[1:])
    np.testing.assert_allclose(whole[1:], alone, atol=1e-5)


def test_it_computes_in_the_given_dtype_and_judges_in_float32():
    model = PatchDiscriminator(dimensions=2, base_channels=8, dtype=jnp.bfloat16)
    (logits, features), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones(IMAGES))
    assert logits.dtype == jnp.float32
    assert {f.dtype for f in features} == {jnp.dtype(jnp.bfloat16)}
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_hinge_losses_have_their_known_values():
    real, fake = jnp.array([2.0, 1.0, 0.0, -1.0]), jnp.array([-2.0, -1.0, 0.5])
    assert hinge_discriminator_loss(real, fake) == pytest.approx((0 + 0 + 1 + 2) / 4 + (0 + 0 + 1.5) / 3)
    assert hinge_discriminator_loss(jnp.zeros(5), jnp.zeros(3)) == 2
    assert hinge_generator_loss(fake) == pytest.approx(2.5 / 3)
    satisfied = jax.grad(hinge_discriminator_loss, argnums=(0, 1))(jnp.full(3, 1.5), jnp.full(3, -1.5))
    assert not np.any(satisfied)


def test_feature_matching_is_the_mean_over_layers_and_detaches_the_real_side():
    real, fake = [jnp.zeros((2, 3)), jnp.ones((4,))], [jnp.full((2, 3), 2.0), jnp.full((4,), 0.5)]
    assert feature_matching_loss(real, fake) == pytest.approx((2 + 0.5) / 2)
    to_real, to_fake = jax.grad(feature_matching_loss, argnums=(0, 1))(real, fake)
    assert not any(np.any(g) for g in to_real)
    np.testing.assert_allclose(to_fake[1], -1 / 8)


@pytest.mark.parametrize("shape", [(4, 16, 24, 3), (4, 4, 8, 12, 3)])
def test_it_learns_to_tell_ramps_from_noise(shape):
    model = PatchDiscriminator(dimensions=len(shape) - 2, base_channels=4, layers=2)
    optimizer = optax.adam(3e-3, b1=0.5)
    steps = 40
    fakes = 0.6 * noise((steps + 1, *shape), seed=1)
    reals = np.linspace(-1, 1, shape[-2])[:, None] + 0.1 * noise((steps + 1, *shape), seed=2)

    def loss(params, real, fake):
        return hinge_discriminator_loss(*(model.apply({"params": params}, x)[0] for x in (real, fake)))

    @jax.jit
    def train(params, reals, fakes):
        def step(carry, batch):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, *batch), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), (reals, fakes))[0][0]

    params = train(nn.meta.unbox(initialise(model, reals[0])["params"]), reals[:-1], fakes[:-1])
    real, fake = (model.apply({"params": params}, x[-1])[0] for x in (reals, fakes))
    assert (real > 0).mean() > 0.95 and (fake < 0).mean() > 0.95


def test_wrong_input_is_refused():
    with pytest.raises(UserError, match="dimensions=3: the input has shape"):
        PatchDiscriminator(dimensions=3).init(jax.random.key(0), jnp.zeros(IMAGES))
    with pytest.raises(UserError, match="dimensions=1"):
        PatchDiscriminator(dimensions=1).init(jax.random.key(0), jnp.zeros((2, 8, 3)))
