"""No two draws of a run share a key: read off the keys themselves, where training, previews and sampling draw."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from cmd_jax import defaults
from cmd_jax.keys import FIRST, NAMES, derive
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Classes
from cmd_jax.sampling.programs import sample_keys
from cmd_jax.sharding import make_mesh
from cmd_jax.stages import AutoencoderStage, FrozenAutoencoder, diffusion_stage
from cmd_jax.state import TrainState, init_state, train_step

SEED, B, STEPS, PARTS, VARIANTS, SOLVER_STEPS = 0, 4, 6, 2, 3, 5


@pytest.fixture
def drawn(monkeypatch):
    """The raw data of every key that was drawn from, or that parameters were made with, in no order."""
    seen = []

    def note(key):
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))

    def noted(real, key, *arguments, **options):
        note(key)
        return real(key, *arguments, **options)

    for name in ("normal", "uniform", "randint", "bernoulli"):
        monkeypatch.setattr(jax.random, name, partial(noted, getattr(jax.random, name)))

    def init(module, key, *inputs):
        note(key)
        return {"params": {"w": nn.LogicallyPartitioned(jnp.zeros(1), ("norm",))}}

    monkeypatch.setattr(nn.Module, "init", init)
    return seen


def stage_of(name):
    """A tiny stage whose networks give zeros: what it draws does not depend on them."""
    if name == "autoencoder":
        stage = AutoencoderStage(tiny.config_of(name))
        latents = Latents(None, jnp.zeros(1))
        stage.module.__dict__["apply"] = lambda variables, video: (video * variables["params"]["w"], latents)
        return stage
    autoencoder = FrozenAutoencoder(tiny.config_of("autoencoder"), {"autoencoder": {}})
    stage = diffusion_stage(tiny.config_of(f"{name},kind=gaussian"), autoencoder, Classes(7))
    stage.apply = lambda params, x, *_: jnp.repeat(x * params["w"], 2, axis=-1)
    stage.content_features = lambda params, content: content
    return stage


def test_a_name_has_a_number_that_no_index_reaches():
    assert len(set(NAMES)) == len(NAMES) and np.iinfo(np.int32).max < FIRST and FIRST + len(NAMES) < 2**32
    key = jax.random.key(SEED)
    named = [derive(key, name) for name in NAMES] + [derive(key, name, i) for name in NAMES for i in range(3)]
    numbered = [*jax.random.split(key, 50), *(jax.random.fold_in(key, i) for i in range(50, 100))]
    data = {tuple(jax.random.key_data(k).tolist()) for k in [*named, *numbered]}
    assert len(data) == 4 * len(NAMES) + 100
    with pytest.raises(ValueError):
        derive(key, "nosie")


def test_no_two_draws_share_a_key(drawn):
    """With one seed: the parameters of all modules, the steps of both kinds of stage, previews, and samples."""
    root, config = jax.random.key(SEED), tiny.config_of("autoencoder")
    mesh, rules = make_mesh(config.mesh), defaults.RULES
    discriminating = tiny.config_of("autoencoder", loss__adversarial=1.0)
    init_state(AutoencoderStage(discriminating), optax.sgd(0.0), SEED, mesh, rules)
    content, motion = stage_of("content"), stage_of("motion")
    init_state(content, optax.sgd(0.0), SEED, mesh, rules)
    expected = 3 + 1

    params, zeros = {"w": jnp.zeros(1)}, partial(np.zeros, dtype=np.float32)
    latents = {"content": zeros((B, 16, 24, 3)), "motion": zeros((B, 4, 10, 4)), "label": np.zeros(B, np.int32)}
    for stage, weights, batch, draws in (
        (content, params, latents, 3),  # timesteps, noise, dropped labels
        (stage_of("autoencoder"), {"autoencoder": params}, {"video": np.zeros((B, 4, 16, 24, 3), np.uint8)}, 1),
    ):
        step = jax.jit(
            partial(train_step, loss_fn=stage.loss, optimizer=optax.sgd(0.0), ema_decay=0.0, accumulate=PARTS)
        )
        state = TrainState(jnp.int32(0), weights, weights, optax.sgd(0.0).init(weights))
        for number in range(STEPS):
            state, _ = step(state, stage.frozen, batch, jnp.int32(number), root)
        assert int(state.step) == STEPS
        expected += draws * PARTS * STEPS

    preview = jax.jit(content.preview)
    for number in range(STEPS):
        preview(params, content.frozen, latents, derive(root, "preview", number))
    expected += B * STEPS

    index, variant = (x.ravel().astype(np.int32) for x in np.mgrid[:B, :VARIANTS])
    keys = sample_keys(root, {"index": index, "variant": variant})
    draw = partial(content.sample, params, content.frozen["statistics"], latents["label"], None)
    draw(keys[0][::VARIANTS], steps=SOLVER_STEPS, solver="ddpm")  # variants of a sample share its content frame
    draw = partial(motion.sample, params, motion.frozen["statistics"], np.zeros_like(index))
    draw(zeros((len(index), 16, 24, 3)), keys[1], steps=SOLVER_STEPS, solver="ddim", eta=1.0)
    expected += B * (1 + VARIANTS) * (1 + SOLVER_STEPS)

    jax.effects_barrier()
    assert len(drawn) == len(set(drawn)) == expected
