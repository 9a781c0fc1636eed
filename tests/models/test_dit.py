import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models.dit import SIZES, DiT, sincos_table, timestep_features

CLASSES = 3
TRUNK = {"patch": 2, "width": 32, "depth": 2, "heads": 4, "classes": CLASSES}
SHAPES = {"content": (6, 8, 3), "motion": (4, 10, 5)}
MODELS = {
    "content": TRUNK | {"out_channels": 6},
    "motion": TRUNK | {"out_channels": 10, "content_patch": 4},
}
KINDS = list(MODELS)
RNG = np.random.default_rng(0)
X = {kind: RNG.standard_normal((2, *shape)).astype(np.float32) for kind, shape in SHAPES.items()}
FRAME = RNG.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
TIMES = np.array([7.0, 903.0], np.float32)
LABELS = np.array([0, 2])


def inputs(kind, **changes):
    given = {"x": X[kind], "timesteps": TIMES, "label": LABELS, "content": FRAME if kind == "motion" else None}
    return given | changes


@functools.cache
def initial_params(kind, position="sincos"):
    if position == "sincos":
        return {n: p for n, p in initial_params(kind, "table").items() if not n.endswith("positions")}
    module = DiT(**MODELS[kind], position=position)
    return nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), **inputs(kind))["params"])


@functools.cache
def awake_params(kind, position="sincos"):
    """Parameters moved off their initial values, the zeros of adaLN-zero too."""
    leaves, tree = jax.tree.flatten(initial_params(kind, position))
    rng = np.random.default_rng(1)
    return tree.unflatten([np.asarray(a + 0.1 * rng.standard_normal(a.shape), np.float32) for a in leaves])


@functools.cache
def compiled(kind, **changes):
    return jax.jit(DiT(**MODELS[kind] | changes).apply, static_argnames="keep")


def run(kind, params=None, model=(), **changes):
    given = inputs(kind, **changes)
    return jax.device_get(compiled(kind, **dict(model))({"params": params or awake_params(kind)}, **given))


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_predicts_zero_whatever_comes_in(kind):
    out = run(kind, initial_params(kind))
    assert np.array_equal(out, np.zeros((*X[kind].shape[:-1], 2 * X[kind].shape[-1])))


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_grid_with_twice_the_channels_in_float32(kind):
    out = run(kind)
    assert out.shape == (2, *SHAPES[kind][:2], 2 * SHAPES[kind][2]) and out.dtype == np.float32
    assert np.isfinite(out).all() and out.std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_counts(kind):
    out = run(kind)
    others = {
        "x": X[kind] + 0.5,
        "timesteps": TIMES + 30,
        "class": LABELS + 1 - 2 * LABELS // 2,
        "null class": np.full(2, CLASSES),
    }
    changed = [run(kind, **{"label" if "class" in n else n: v}) for n, v in others.items()]
    if kind == "motion":
        changed.append(run(kind, content=-FRAME))
    for name, other in zip([*others, "content"], changed, strict=False):
        assert (np.abs(other - out).max(axis=(1, 2, 3)) > 1e-2).all(), name
    assert np.abs(changed[2] - changed[3]).max() > 1e-2  # a class and no class


def test_items_of_a_batch_do_not_mix():
    out = run("motion")
    twins = {n: np.stack([v[1], v[1]]) for n, v in inputs("motion").items()}
    np.testing.assert_allclose(run("motion", **twins)[0], out[1], atol=1e-5)


def test_content_patches_have_places():
    """Without a table for them, exchanged content patches would give the same set of tokens."""
    out = run("motion")
    exchanged = np.concatenate([FRAME[:, :, 4:], FRAME[:, :, :4]], axis=2)
    assert np.abs(run("motion", content=exchanged) - out).max() > 1e-2


@pytest.mark.parametrize("kind, position", [("content", "sincos"), ("motion", "table")])
def test_a_gradient_reaches_every_parameter(kind, position):
    module = DiT(**MODELS[kind], position=position)

    def loss(params):
        return jnp.mean((module.apply({"params": params}, **inputs(kind)) - 1) ** 2)

    tree = jax.device_get(jax.jit(jax.grad(loss))(awake_params(kind, position)))
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): g for path, g in jax.tree.leaves_with_path(tree)}
    for name, gradient in found.items():
        assert np.isfinite(gradient).all(), name
        # A softmax doesn't see what a key's bias adds to all its logits.
        assert (np.abs(gradient).max() > 1e-6) == (name != "blocks/key/bias"), name
    assert (np.abs(found["label/embedding"]).max(axis=1) > 0).tolist() == [True, False, True, False]


def test_a_sincos_table_has_columns_then_rows_each_sines_then_cosines():
    rows, columns, width = 3, 5, 16
    table = sincos_table(rows, columns, width).reshape(rows, columns, width)
    assert table.dtype == np.float32
    assert (table[:, :, :8] == table[:1, :, :8]).all() and (table[:, :, 8:] == table[:, :1, 8:]).all()
    for i, frequency in enumerate([1, 0.1, 0.01, 0.001]):
        expected = [f(a * frequency) for a in (4, 2) for f in (math.sin, math.cos)]
        np.testing.assert_allclose(table[2, 4, i::4], expected, atol=1e-6)
    assert len(np.unique(table.reshape(15, width).round(4), axis=0)) == 15


def test_a_stored_table_starts_as_the_sincos_one():
    stored = awake_params("motion", "table") | {
        "positions": sincos_table(2, 5, 32),
        "content_positions": sincos_table(2, 3, 32),
    }
    initial = initial_params("motion", "table")
    np.testing.assert_array_equal(initial["positions"], stored["positions"])
    np.testing.assert_array_equal(initial["content_positions"], stored["content_positions"])
    sincos = jax.eval_shape(DiT(**MODELS["motion"]).init, jax.random.key(0), **inputs("motion"))["params"]
    assert initial.keys() - sincos.keys() == {"positions", "content_positions"}

    fixed = {n: p for n, p in stored.items() if "positions" not in n}
    out = run("motion", stored, model=[("position", "table")])
    np.testing.assert_allclose(out, run("motion", fixed), atol=1e-5)
    other = stored | {"positions": stored["positions"][::-1].copy()}
    assert np.abs(run("motion", other, model=[("position", "table")]) - out).max() > 1e-2


def test_timestep_features_are_cosines_then_sines():
    features = timestep_features(np.array([0, 2.5, 999]))
    assert features.shape == (3, 256) and features.dtype == jnp.float32
    np.testing.assert_array_equal(features[0], [1] * 128 + [0] * 128)
    for i in (0, 5, 127):
        angle = 2.5 * 10000 ** (-i / 128)
        np.testing.assert_allclose(features[1, [i, 128 + i]], [math.cos(angle), math.sin(angle)], atol=1e-5)
    np.testing.assert_allclose(features[2, [0, 128]], [math.cos(999), math.sin(999)], atol=1e-4)


def test_the_label_table_alone_starts_as_wide_as_asked():
    module = DiT(**MODELS["content"], position="table", label_init=1.0)
    wide = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), **inputs("content"))["params"])
    narrow = initial_params("content", "table")
    assert np.std(wide["label"]["embedding"]) == pytest.approx(1.0, abs=0.2)
    assert np.std(narrow["label"]["embedding"]) == pytest.approx(0.02, abs=0.004)
    jax.tree.map(np.testing.assert_array_equal, *({**p, "label": None} for p in (wide, narrow)))


def test_without_classes_there_is_no_table_and_no_label():
    changes = {"classes": None}
    params = {n: p for n, p in awake_params("content").items() if n != "label"}
    out = run("content", params, model=changes.items(), label=None)
    np.testing.assert_array_equal(out, run("content", params, model=changes.items()))
    shapes = jax.eval_shape(DiT(**MODELS["content"] | changes).init, jax.random.key(0), X["content"], TIMES)
    assert "label" not in shapes["params"]


def test_bfloat16_agrees_with_float32():
    out = run("motion")
    rounded = run("motion", model=[("dtype", jnp.bfloat16)])
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - out).max() < 0.05 * np.abs(out).max()


@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_the_named_sizes_have_the_published_numbers_of_parameters(size, millions):
    """DiT-*/2 on 4x32x32 latents with 1000 classes: 33, 130, 458 and 675 million."""
    depth, width, heads = SIZES[size]
    module = DiT(out_channels=8, patch=2, width=width, depth=depth, heads=heads, classes=1000)
    x = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x, one, one))
    assert round(sum(math.prod(a.shape) for a in jax.tree.leaves(shapes)) / 1e6) == millions


@pytest.mark.parametrize("kind", KINDS)
def test_what_blocks_added_stands_in_for_them(kind):
    """At the same timestep it is the whole model; then neither the blocks nor the content frame are asked."""
    whole = run(kind)
    out, kept = run(kind, keep=True)
    assert np.array_equal(out, whole) and kept.shape == (2, math.prod(SHAPES[kind][:2]) // 4, TRUNK["width"])
    again = run(kind, reuse=kept)
    np.testing.assert_allclose(again, whole, atol=1e-5 * np.abs(whole).max())
    without = {name: values for name, values in awake_params(kind).items() if name != "blocks"}
    assert np.array_equal(run(kind, without, reuse=kept, content=None), again)
    assert np.abs(run(kind, reuse=kept, x=X[kind] + 1) - again).max() > 1e-3
    assert np.abs(run(kind, reuse=kept, timesteps=TIMES + 50) - again).max() > 1e-3
    assert np.array_equal(run(kind, reuse=kept, keep=True)[0], again)
