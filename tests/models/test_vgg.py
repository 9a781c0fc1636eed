from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.formula import draw, state_dict

from cmd_jax.errors import UserError
from cmd_jax.interop.lpips import lpips_params
from cmd_jax.models.vgg import LPIPS, VGG16Features

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lpips.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURE) as npz:
        npz = dict(npz)
    weights = state_dict(npz)
    channels_last = {name: npz[name].transpose(0, 2, 3, 1) for name in ("a", "b")}
    return weights, lpips_params(weights), channels_last["a"], channels_last["b"], npz["distance"]


@pytest.fixture(scope="module")
def distance(reference):
    apply = jax.jit(LPIPS().apply)  # the weights as an argument: XLA folds constants for seconds
    return lambda a, b: apply({"params": reference[1]}, a, b)


def test_distance_equals_the_recorded_one(reference, distance):
    _, _, a, b, expected = reference
    ours = distance(a, b)
    assert a.shape[1] != a.shape[2] and ours.dtype == jnp.float32
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_distance_is_symmetric_zero_for_equals_and_per_pair(reference, distance):
    _, _, a, b, _ = reference
    assert np.array_equal(distance(a, a), np.zeros(2))
    np.testing.assert_allclose(distance(a, b), distance(b, a), rtol=1e-6)
    np.testing.assert_allclose(distance(a[::-1], b[::-1]), distance(a, b)[::-1], rtol=1e-5)


def test_odd_sides_are_floored_by_the_pools(reference):
    # 17x33 pools to 8x16, 4x8, 2x4, 1x2: torch floors, so must we.
    _, params, _, _, _ = reference
    image = draw("odd", (1, 17, 33, 3), 0)
    features = jax.eval_shape(VGG16Features("highest").apply, {"params": params["vgg"]}, image)
    shapes = [f.shape[1:3] for f in features]
    assert shapes == [(17, 33), (8, 16), (4, 8), (2, 4), (1, 2)]


def test_gradient_is_finite_where_features_are_dead(reference):
    _, params, _, _, _ = reference
    dead = jax.tree.map(np.array, params)
    dead["vgg"]["conv1_1"]["bias"][:] = -100
    dead["vgg"]["conv1_2"]["bias"][:] = -1
    a, b = (np.tanh(draw(name, (1, 16, 16, 3), 0)) for name in "ab")
    gradient = jax.jit(jax.grad(lambda a, p: LPIPS().apply({"params": p}, a, b).sum()))
    assert np.isfinite(gradient(a, dead)).all()
    alive = gradient(a, params)
    assert np.isfinite(alive).all() and np.abs(alive).max() > 0


def test_loaded_parameters_are_those_of_the_module(reference):
    _, params, _, _, _ = reference
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    boxed = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]
    ours = jax.tree.map(lambda x: x.shape, params)
    assert jax.tree.map(lambda p: p.value.shape, boxed, is_leaf=lambda p: hasattr(p, "names")) == ours
    assert boxed["vgg"]["conv3_2"]["kernel"].names == ("conv_height", "conv_width", "conv_in", "conv_out")


@pytest.mark.parametrize(
    "a, b", [((1, 8, 32, 3), (1, 8, 32, 3)), ((1, 32, 32, 3), (1, 32, 16, 3)), ((1, 3, 32, 32),) * 2]
)
def test_wrong_images_are_refused(reference, a, b):
    with pytest.raises(UserError, match="lpips="):
        LPIPS().apply({"params": reference[1]}, jnp.zeros(a), jnp.zeros(b))
