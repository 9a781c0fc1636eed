import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.formula import draw, state_dict

from cmd_jax.errors import UserError
from cmd_jax.interop import i3d
from cmd_jax.models.i3d import I3D, StoredNorm, max_pool

FIXTURE = Path(__file__).parents[1] / "fixtures" / "i3d.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(FIXTURE) as npz:
        npz = dict(npz)
    return state_dict(npz), json.loads(str(npz["config"])), npz["logits"]


def test_logits_equal_the_recorded_ones(reference):
    weights, config, logits = reference
    module, params = i3d.load(weights)
    video = np.tanh(draw("x", config["input_shape"], config["seed"]))[1:]  # one clip is slow enough
    ours = jax.jit(module.apply)({"params": params}, np.moveaxis(video, 1, -1))
    assert ours.shape == (1, 400) and ours.dtype == jnp.float32
    assert np.abs(ours - logits[1:]).max() <= 1e-4 * np.abs(logits).max()


def test_the_state_dict_comes_back_bit_for_bit_without_torchs_counters(reference):
    weights = reference[0]
    counters = {name.replace("running_var", "num_batches_tracked"): np.int64(7) for name in weights if "_var" in name}
    assert len(counters) == 57
    back = i3d.state_dict(i3d.load(weights | counters)[1])
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


def test_wrong_state_dicts_are_named(reference):
    weights = reference[0]
    for changed, words in (
        ({name: value for name, value in weights.items() if name != "Mixed_4c.b1a.bn.bias"}, "Mixed_4c.b1a.bn.bias"),
        (weights | {"Mixed_6a.b0.bn.bias": np.zeros(3)}, "no place for 1: Mixed_6a.b0.bn.bias"),
        (weights | {"blocks.0.bias": np.zeros(3)}, "no place for 1: blocks.0.bias"),
        (weights | {"logits.conv3d.bias": np.zeros(600)}, "logits.conv3d.bias [600], expected [400]"),
    ):
        with pytest.raises(UserError) as e:
            i3d.load(changed)
        assert words in e.value.problem


def test_a_pool_sees_the_zeros_of_its_padding():
    x = -jnp.ones((1, 1, 4, 4, 1))
    pooled = max_pool(x, (1, 3, 3), (1, 2, 2))[0, 0, :, :, 0]
    np.testing.assert_array_equal(pooled, [[-1, 0], [0, 0]])  # one row and column of zeros, at the end


def test_the_epsilon_and_every_statistic_are_used():
    x = draw("x", (2, 3), 0)
    params = {name: draw(name, (3,), 0) for name in ("scale", "bias", "mean")} | {"variance": np.full(3, 1e-3, "f")}
    for epsilon in (1e-5, 1e-3):
        ours = StoredNorm(epsilon).apply({"params": params}, x)
        plain = (x - params["mean"]) / np.sqrt(params["variance"] + epsilon)
        np.testing.assert_allclose(ours, plain * params["scale"] + params["bias"], rtol=1e-4, atol=1e-4)


def test_parameters_carry_logical_axes(reference):
    boxed = jax.eval_shape(I3D().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 224, 224, 3), np.float32))
    leaves = jax.tree.leaves(boxed["params"], is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
    assert sum(leaf.value.size for leaf in leaves) == sum(value.size for value in reference[0].values())


@pytest.mark.parametrize("shape", [(1, 8, 224, 224, 3), (1, 16, 192, 224, 3), (1, 3, 16, 224, 224), (16, 224, 224, 3)])
def test_videos_that_leave_nothing_to_average_are_refused(shape):
    with pytest.raises(UserError, match="i3d="):
        jax.eval_shape(I3D().init, jax.random.key(0), jax.ShapeDtypeStruct(shape, np.float32))
