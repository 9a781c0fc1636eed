from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmd_jax import defaults
from cmd_jax.keys import derive
from cmd_jax.sharding import make_mesh
from cmd_jax.state import _split, abstract_state, init_state, make_optimizer, make_step, train_step

KEY = jax.random.key(5)
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((8, 4)).astype(np.float32), RNG.standard_normal((8, 6)).astype(np.float32)
DECAY = 0.9


class LinearStage:
    """Least squares. A batch's "root" of 0 makes the gradient NaN at a finite loss; 1 leaves it alone."""

    def init(self, key):
        w = jax.random.normal(key, (4, 6))
        return {
            "w": nn.LogicallyPartitioned(w, ("embed", "mlp")),
            "b": nn.LogicallyPartitioned(jnp.zeros(6), ("mlp",)),
        }

    @staticmethod
    def loss(params, frozen, batch, key):
        error = batch["x"] @ params["w"] + params["b"] - batch["y"]
        broken = jnp.sqrt(jnp.sum(params["w"] ** 2) * batch["root"].min())
        draw = jax.random.uniform(key)
        return jnp.mean(error**2) + broken - jax.lax.stop_gradient(broken), {"draw": draw}


def batch(**changes):
    return {"x": jnp.asarray(X), "y": jnp.asarray(Y), "root": jnp.ones(8)} | changes


def optimizer_of(**changes):
    config = defaults.stage("autoencoder")
    config.optimizer.update(learning_rate=0.01, b1=0.9, b2=0.99)
    config.optimizer.update(changes)
    return make_optimizer(config.optimizer)


ADAM = optimizer_of(clip_norm=1.0)
STEP = jax.jit(partial(train_step, loss_fn=LinearStage.loss, optimizer=ADAM, ema_decay=DECAY))


def fresh(optimizer=ADAM, seed=0):
    config = defaults.stage("content")
    return init_state(LinearStage(), optimizer, seed, make_mesh(config.mesh), config.rules)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_initial_state():
    state = fresh()
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert_same(state.params, state.ema)
    # Donation needs buffers of their own.
    assert state.params["w"].unsafe_buffer_pointer() != state.ema["w"].unsafe_buffer_pointer()
    assert tuple(state.params["w"].sharding.spec) == ("fsdp", "tensor")
    assert tuple(state.params["b"].sharding.spec) == ("tensor",)
    moments = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for tree in (state.ema, moments.mu, moments.nu):
        assert jax.tree.map(lambda x: (x.shape, x.sharding), tree) == jax.tree.map(
            lambda x: (x.shape, x.sharding), state.params
        )
    assert_same(fresh(), state)
    assert not np.array_equal(fresh(seed=1).params["w"], state.params["w"])


def test_an_update_lowers_the_loss_and_moves_the_ema():
    state, losses = fresh(), []
    for step in range(3):
        before = state
        state, metrics = STEP(state, {}, batch(), jnp.int32(step), KEY)
        losses.append(float(metrics["loss"]))
        assert bool(metrics["applied"]) and int(state.step) == step + 1
        for name in ("w", "b"):
            expected = DECAY * before.ema[name] + (1 - DECAY) * state.params[name]
            np.testing.assert_allclose(state.ema[name], expected, atol=1e-7)
    assert losses == sorted(losses, reverse=True) and losses[2] < losses[0]
    gradient = jax.grad(lambda p: LinearStage.loss(p, {}, batch(), KEY)[0])(fresh().params)
    _, first = STEP(fresh(), {}, batch(), jnp.int32(0), KEY)
    np.testing.assert_allclose(first["gradient_norm"], optax.tree.norm(gradient), rtol=1e-6)


def test_every_step_draws_anew_and_alike():
    state, draws = fresh(), []
    for step in range(3):
        repeated = STEP(state, {}, batch(), jnp.int32(step), KEY)
        state, metrics = STEP(state, {}, batch(), jnp.int32(step), KEY)
        assert_same((state, metrics), repeated)
        draws.append(float(metrics["draw"]))
    assert len(set(draws)) == 3
    assert draws[1] == float(jax.random.uniform(derive(KEY, "step", 1)))


@pytest.mark.parametrize(
    "bad, finite_loss",
    [
        ({"x": jnp.asarray(X).at[3, 1].set(jnp.nan)}, False),
        ({"y": jnp.asarray(Y).at[0, 0].set(jnp.inf)}, False),
        ({"x": jnp.asarray(X).at[2, 2].set(-jnp.inf)}, False),
        ({"y": jnp.full((8, 6), 1e30)}, False),  # overflows when squared
        ({"root": jnp.zeros(8)}, True),
    ],
    ids=["NaN", "Inf", "-Inf", "overflow", "gradient only"],
)
def test_a_bad_batch_changes_nothing_and_nothing_follows_it(bad, finite_loss):
    state, _ = STEP(fresh(), {}, batch(), jnp.int32(0), KEY)
    refused, metrics = STEP(state, {}, batch(**bad), jnp.int32(1), KEY)
    assert not bool(metrics["applied"])
    assert bool(jnp.isfinite(metrics["loss"])) == finite_loss
    assert not bool(jnp.isfinite(metrics["gradient_norm"]))
    assert_same(refused, state)
    # The loop learns of it one step late: the batch of the next step must not slip in.
    later, metrics = STEP(refused, {}, batch(), jnp.int32(2), KEY)
    assert not bool(metrics["applied"])
    assert_same(later, state)
    again, metrics = STEP(later, {}, batch(), jnp.int32(1), KEY)
    assert bool(metrics["applied"]) and int(again.step) == 2


def test_a_bad_microbatch_refuses_the_step():
    step = jax.jit(partial(train_step, loss_fn=LinearStage.loss, optimizer=ADAM, ema_decay=DECAY, accumulate=4))
    state = fresh()
    refused, metrics = step(state, {}, batch(x=jnp.asarray(X).at[7, 0].set(jnp.nan)), jnp.int32(0), KEY)
    assert not bool(metrics["applied"])
    assert_same(refused, state)


@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_add_up_to_the_batch(count):
    sgd = optax.sgd(0.1)  # Adam's normalisation would hide a wrong scale
    common = {"loss_fn": LinearStage.loss, "optimizer": sgd, "ema_decay": DECAY}
    whole, expected = jax.jit(partial(train_step, **common))(fresh(sgd), {}, batch(), jnp.int32(0), KEY)
    parts, metrics = jax.jit(partial(train_step, **common, accumulate=count))(
        fresh(sgd), {}, batch(), jnp.int32(0), KEY
    )
    for name in ("w", "b"):
        np.testing.assert_allclose(parts.params[name], whole.params[name], atol=1e-6)
        np.testing.assert_allclose(parts.ema[name], whole.ema[name], atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], atol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], expected["gradient_norm"], atol=1e-6)
    keys = [derive(derive(KEY, "step", 0), "microbatch", i) for i in range(count)]
    np.testing.assert_allclose(metrics["draw"], np.mean([jax.random.uniform(k) for k in keys]), atol=1e-6)


def test_microbatches_hold_every_clip_once():
    parts = [_split({"id": jnp.arange(12), "video": jnp.arange(24).reshape(12, 2)}, 3, i) for i in range(3)]
    assert sorted(np.concatenate([p["id"] for p in parts]).tolist()) == list(range(12))
    assert all(np.array_equal(p["video"][:, 0], 2 * p["id"]) for p in parts)


def rates(optimizer, steps):
    """Adam's steps for a constant gradient are the learning rate itself."""
    params, state, update = jnp.zeros(1), None, jax.jit(optimizer.update)
    state, found = optimizer.init(params), []
    for _ in range(steps):
        updates, state = update(jnp.full(1, 0.5), state, params)
        found.append(-float(updates[0]))
    return np.array(found)


def test_learning_rates():
    flat = {"learning_rate": 0.1, "eps": 1e-12}
    np.testing.assert_allclose(rates(optimizer_of(**flat), 4), 0.1, rtol=1e-4)
    warm = rates(optimizer_of(**flat, warmup_steps=4), 7)
    np.testing.assert_allclose(warm, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1], rtol=1e-4)
    cosine = rates(optimizer_of(**flat, warmup_steps=2, decay="cosine", steps=10), 11)
    expected = [0.05, 0.1, *(0.05 * (1 + np.cos(np.pi * np.arange(9) / 8)))]
    np.testing.assert_allclose(cosine, expected, rtol=1e-3, atol=1e-6)
    unwarmed = rates(optimizer_of(**flat, decay="cosine", steps=8), 9)
    np.testing.assert_allclose(unwarmed, 0.05 * (1 + np.cos(np.pi * np.arange(9) / 8)), rtol=1e-3, atol=1e-6)


def test_clipping_by_the_global_norm():
    gradient = {"a": jnp.full(4, 3.0), "b": jnp.full(4, 4.0)}  # norm 10

    def first_moment(clip_norm):
        optimizer = optimizer_of(clip_norm=clip_norm, b1=0.9)
        _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
        states = jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu"))
        return next(s.mu for s in states if hasattr(s, "mu"))

    np.testing.assert_allclose(first_moment(0.0)["b"], 0.1 * 4, rtol=1e-6)
    np.testing.assert_allclose(first_moment(20.0)["b"], 0.1 * 4, rtol=1e-6)
    np.testing.assert_allclose(first_moment(1.0)["a"], 0.1 * 0.3, rtol=1e-6)
    np.testing.assert_allclose(first_moment(1.0)["b"], 0.1 * 0.4, rtol=1e-6)


def test_adam_as_configured():
    settings = SimpleNamespace(
        learning_rate=0.1, b1=0.5, b2=0.75, eps=0.01, warmup_steps=0, decay="constant", clip_norm=0.0, steps=9
    )
    optimizer, gradients = make_optimizer(settings), [1.0, -3.0]
    state, m, v = optimizer.init(jnp.zeros(1)), 0.0, 0.0
    for n, g in enumerate(gradients, start=1):
        updates, state = optimizer.update(jnp.array([g]), state)
        m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g * g
        expected = -0.1 * (m / (1 - 0.5**n)) / (np.sqrt(v / (1 - 0.75**n)) + 0.01)
        np.testing.assert_allclose(updates[0], expected, rtol=1e-5)


def test_the_program_of_a_step_is_that_of_shapes():
    """What is planned without an array is what the loop compiles."""
    config = defaults.stage("content")
    mesh, stage = make_mesh(config.mesh), LinearStage()
    given, shapes = fresh(), abstract_state(stage, ADAM, mesh, config.rules)
    for x, y in zip(jax.tree.leaves(given), jax.tree.leaves(shapes), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding.is_equivalent_to(y.sharding, x.ndim)
    asked = jnp.ones(mesh.size, jnp.int32)
    lowered = [
        make_step(stage, ADAM, config.train, mesh, state).lower(state, {}, batch(), jnp.int32(0), KEY, asked)
        for state in (given, shapes)
    ]
    assert lowered[0].as_text() == lowered[1].as_text()
    update = make_step(stage, ADAM, config.train, mesh, shapes)
    for flag in (0, 1):
        state, metrics = update(fresh(), {}, batch(), jnp.int32(0), KEY, flag * asked)
        assert metrics["stop"] == flag and state.step == 1
    assert given.params["w"].sharding == state.params["w"].sharding
