import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from cmd_jax import defaults
from cmd_jax.errors import UserError
from cmd_jax.models.clip import ACTIVATIONS, CLIP, CLIPText, CLIPVision, mean_pool
from cmd_jax.sharding import MESH_AXES, layout

END = 19
TEXT = {"vocabulary": 20, "width": 16, "depth": 3, "heads": 2, "mlp_width": 40, "length": 9, "end_token": END}
VISION = {"image_size": 14, "patch": 4, "width": 24, "depth": 2, "heads": 3, "mlp_width": 32}
IDS = np.array([[18, 3, 7, END, 0, 0, 0, 0], [18, 4, 4, 2, 5, 6, 1, END]], np.int32)
IMAGES = np.random.default_rng(0).standard_normal((2, 14, 14, 3)).astype(np.float32)
INPUTS = {"text": (IDS,), "vision": (IMAGES,), "clip": (IDS, IMAGES)}


def build(kind, **changes):
    if kind == "clip":
        return CLIP(build("text", **changes), build("vision", **changes), features=10)
    return CLIPText(**TEXT | changes) if kind == "text" else CLIPVision(**VISION | changes)


@functools.cache
def awake_params(kind):
    """Parameters moved off their initial values."""
    module = build(kind)
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), *INPUTS[kind])["params"])
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return tree.unflatten([np.asarray(a + 0.2 * rng.standard_normal(a.shape), np.float32) for a in leaves])


@functools.cache
def compiled(kind, **changes):
    return jax.jit(build(kind, **changes).apply)


def run(kind, *inputs, params=None, **changes):
    return jax.device_get(compiled(kind, **changes)({"params": params or awake_params(kind)}, *inputs or INPUTS[kind]))


def test_a_token_depends_on_itself_and_those_before_it_alone():
    params, block = awake_params("text"), build("text")

    def states(table):
        return block.apply({"params": params | {"positions": table}}, IDS[:1])[0][0]

    jacobian = jax.jit(jax.jacobian(states))(params["positions"])  # [token, channel, position, channel]
    reached = np.abs(jacobian).max(axis=(1, 3))
    assert (reached[np.triu_indices(8, 1, m=9)] == 0).all()
    assert (reached[np.tril_indices(8)] > 0).all()


def test_padding_changes_nothing_before_it():
    padded = np.where(np.arange(8) > 3, 11, IDS)[:1]
    (states, pooled), (others, same) = run("text"), run("text", padded)
    np.testing.assert_array_equal(states[0, :4], others[0, :4])
    np.testing.assert_array_equal(pooled[0], same[0])
    assert np.abs(states[0, 4:] - others[0, 4:]).max() > 0.1


def test_short_texts_need_no_padding():
    np.testing.assert_allclose(run("text", IDS[:, :5])[0], run("text")[0][:, :5], atol=1e-5)


def test_pooled_is_the_state_at_the_first_end_token():
    ids = np.array([[18, 3, END, END, END, END, END, END], [18, 4, 4, 2, 5, 6, 1, END]], np.int32)
    states, pooled = run("text", ids)
    np.testing.assert_array_equal(pooled, states[[0, 1], [2, 7]])
    _, highest = run("text", ids, end_token=None)
    np.testing.assert_array_equal(highest, pooled)
    states, elsewhere = run("text", ids, end_token=4)
    np.testing.assert_array_equal(elsewhere[1], states[1, 1])


def test_an_id_without_embedding_is_not_silent():
    assert np.isnan(run("text", np.array([[18, 20, END]], np.int32))[0][0, 1:]).all()


def test_the_vision_tower_leaves_out_a_border_and_knows_places():
    changed = IMAGES.copy()
    changed[:, 12:] = changed[:, :, 12:] = 9.0
    np.testing.assert_array_equal(run("vision", changed), run("vision"))
    assert np.abs(run("vision", IMAGES[:, ::-1].copy()) - run("vision")).max() > 0.01


def test_clip_gives_unit_vectors_and_scaled_cosines():
    params, module = awake_params("clip"), build("clip")

    @jax.jit
    def vectors(params):
        apply = partial(module.apply, {"params": params})
        return apply(IDS, method=module.embed_text), apply(IMAGES, method=module.embed_images)

    text, images = jax.device_get(vectors(params))
    assert text.shape == images.shape == (2, 10)
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(run("clip"), np.exp(params["logit_scale"]) * text @ images.T, rtol=1e-4)


def test_mean_pool_takes_the_text_and_one_end_token():
    states = np.random.default_rng(2).standard_normal((3, 8, 4)).astype(np.float32)
    ids = np.array([[18, 3, END, END, END, END, END, END], [18, END, 0, 0, 0, 0, 0, 0], [18, 1, 2, 3, 4, 5, 6, END]])
    means = np.stack([states[0, :3].mean(0), states[1, :2].mean(0), states[2].mean(0)])
    np.testing.assert_allclose(mean_pool(states, ids, END), means, rtol=1e-5)
    assert mean_pool(states.astype(jnp.bfloat16), ids, END).dtype == jnp.float32


@pytest.mark.parametrize("name", ["text", "vision"])
def test_the_activations_differ_and_are_what_they_say(name):
    x = np.linspace(-4, 4, 9)
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x), x / (1 + np.exp(-1.702 * x)), rtol=1e-5)
    exact = [float(jax.scipy.stats.norm.cdf(v)) * v for v in x]
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), exact, rtol=1e-4, atol=1e-6)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), run(name), run(name, activation="gelu"))
    assert max(jax.tree.leaves(difference)) > 1e-4


@functools.cache
def gradients(remat):
    def loss(params):
        return jnp.sum(build("clip", remat=remat).apply({"params": params}, *INPUTS["clip"]) ** 2)

    return jax.device_get(jax.jit(jax.grad(loss))(awake_params("clip")))


def test_gradients_reach_every_parameter():
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients("none"))[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = gradient if "/blocks/" in name else [gradient]
        if not name.endswith("key/bias"):  # which softmax takes out
            assert min(np.abs(layer).max() for layer in layers) > 1e-5, name


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients("none"), gradients(remat)
    )


@pytest.mark.parametrize("kind", INPUTS)
def test_bfloat16_stays_near_and_gives_float32(kind):
    for near, exact in zip(jax.tree.leaves(run(kind, dtype=jnp.bfloat16)), jax.tree.leaves(run(kind)), strict=True):
        assert near.dtype == np.float32
        error = np.abs(near - exact).max() / np.abs(exact).max()
        assert 1e-5 < error < 0.05


def test_every_large_parameter_is_split_over_fsdp_or_tensor():
    def init(key):
        return build("clip").init(key, *INPUTS["clip"])["params"]

    mesh = AbstractMesh((2, 2, 2), MESH_AXES)
    placed = layout(jax.eval_shape(init, jax.random.key(0)), mesh, defaults.RULES)
    assert all(p.axes for p in placed if p.name != "logit_scale")
    assert not [p.name for p in placed if p.whole and p.axes[-1:] != ("norm",) and p.size > 100]


@pytest.mark.parametrize(
    ("kind", "wrong"), [("text", np.zeros((1, 10), np.int32)), ("vision", np.zeros((1, 12, 14, 3), np.float32))]
)
def test_inputs_of_another_size_are_refused(kind, wrong):
    with pytest.raises(UserError, match="(9 positions|takes 14x14x3); "):
        run(kind, wrong)
