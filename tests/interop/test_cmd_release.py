import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from fixtures.formula import draw, state_dict
from interop.release_models import (
    autoencoder,
    autoencoder_shapes,
    dit,
    dit_shapes,
    grid_table,
    weights,
)

from cmd_jax.errors import UserError
from cmd_jax.interop.cmd_config import complete
from cmd_jax.interop.cmd_release import UNUSED, load, model
from cmd_jax.interop.cmd_release import state_dict as torch_weights
from cmd_jax.models.autoencoder import Latents

FIXTURES = Path(__file__).parents[1] / "fixtures"
ONE_IN_TEN_THOUSAND = 1e-4

# Sizes that share no number with the fixtures, and H != W.
AUTOENCODER = {
    "hidden_dim": 20, "patch_size": 3, "channels": 2, "motion_channels": 7, "depth": 3, "heads": 2, "head_dim": 5,
    "mode": "pixel",
}  # fmt: skip
CONTENT_DIT = {
    "input_size": [6, 9], "patch_size": 3, "in_channels": 2, "hidden_size": 24, "depth": 3, "heads": 3,
    "num_classes": 4, "learn_sigma": True,
}  # fmt: skip
MOTION_DIT = {
    "input_size": [4, 10], "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 1, "heads": 2,
    "content_size": [8, 12], "content_channels": 2, "content_patch_size": 4, "learn_sigma": False,
}  # fmt: skip


def fixture(name):
    with np.load(FIXTURES / f"{name}.npz") as npz:
        npz = dict(npz)
    return json.loads(str(npz["config"])), state_dict(npz), npz


def apply(module, params, *inputs):
    return jax.device_get(jax.jit(module.apply)({"params": params}, *inputs))


def assert_close(ours, reference):
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= ONE_IN_TEN_THOUSAND * np.abs(reference).max()


def swap(motion, first):
    """Exchange the halves of [B, T, N, K], the first of which has `first` cells."""
    return np.concatenate([motion[:, :, first:], motion[:, :, :first]], axis=2)


# Recorded numbers of the original code.


@pytest.mark.parametrize("name", ["autoencoder_pixel", "autoencoder_latent"])
def test_the_autoencoder_gives_the_recorded_numbers(name):
    """Whole, and from the recorded latents, whose columns come first."""
    config, sd, npz = fixture(name)
    assert autoencoder_shapes(config) == {n: v.shape for n, v in sd.items()}
    module, params = load("autoencoder", config, sd)
    rows, columns = (side // config["patch_size"] for side in config["image_size"])
    content, motion = (np.moveaxis(npz[key], 1, -1) for key in ("z_c", "z_m"))
    recon, latents = apply(module, params, np.moveaxis(npz["x"], 1, -1))
    assert_close(np.moveaxis(recon, -1, 2), npz["recon"])
    assert_close(latents.content, content)
    assert_close(swap(latents.motion, rows), motion)
    decode = jax.jit(lambda p, *z: module.apply({"params": p}, Latents(*z), method="decode"))
    assert_close(np.moveaxis(decode(params, content, swap(motion, columns)), -1, 2), npz["recon"])


def test_the_content_dit_gives_the_recorded_numbers():
    config, sd, npz = fixture("content_dit")
    assert dit_shapes(config) == {n: v.shape for n, v in sd.items()}
    module, params = load("content_dit", config, sd)
    assert_close(
        np.moveaxis(apply(module, params, np.moveaxis(npz["x"], 1, -1), npz["t"], npz["y"]), -1, 1), npz["out"]
    )


@pytest.mark.parametrize("stored", [True, False])
def test_the_motion_dit_gives_the_recorded_numbers(stored):
    config, sd, npz = fixture("motion_dit")
    assert dit_shapes(config) == {n: v.shape for n, v in sd.items()}
    if stored:
        sd |= {n: npz[n] for n in ("pos_embed", "content_pos_embed")}
    module, params = load("motion_dit", config, sd)
    # 2x8 motion tokens, and still the table of a 4x4 grid.
    np.testing.assert_allclose(params["positions"], npz["pos_embed"][0], atol=1e-6)
    np.testing.assert_allclose(params["content_positions"], npz["content_pos_embed"][0], atol=1e-6)
    inputs = np.moveaxis(npz["x"], 1, -1), npz["t"], None, np.moveaxis(npz["content"], 1, -1)
    assert_close(np.moveaxis(apply(module, params, *inputs), -1, 1), npz["out"])


# Other sizes, against the models above.


@pytest.mark.parametrize("mode", ["pixel", "latent"])
def test_an_autoencoder_of_another_size_computes_the_same_function(mode):
    config = AUTOENCODER | {"mode": mode}
    sd = weights(autoencoder_shapes(config), seed=11)
    video = draw("video", (2, 3, 6, 9, 2), 11)  # B T H W C
    module, params = load("autoencoder", config, sd)
    recon, latents = apply(module, params, video)
    for b in range(2):
        content, motion, reference = autoencoder(sd, np.moveaxis(video[b], -1, 0), config)
        assert_close(np.moveaxis(latents.content[b], -1, 0), content)
        assert_close(np.moveaxis(swap(latents.motion, 2)[b], -1, 0), motion)
        assert_close(np.moveaxis(recon[b], -1, 1), reference)


@pytest.mark.parametrize(
    "changes, stored",
    [({}, False), ({"learn_sigma": False, "num_classes": None, "input_size": [9, 3], "depth": 1}, True)],
)
def test_a_content_dit_of_another_size_computes_the_same_function(changes, stored):
    config = CONTENT_DIT | changes
    grid = [n // config["patch_size"] for n in config["input_size"]]
    sd = weights(dit_shapes(config), seed=12)
    table = {"pos_embed": draw("table", (1, math.prod(grid), 24), 12) if stored else grid_table(*grid, 24)}
    module, params = load("content_dit", config, sd | table if stored else sd)
    x, t = draw("x", (2, *config["input_size"], 2), 12), np.array([0, 731])
    label = None if config["num_classes"] is None else np.array([4, 1])
    out = apply(module, params, x, t, label)
    for b in range(2):
        reference = dit(sd | table, np.moveaxis(x[b], -1, 0), t[b], config, None if label is None else label[b])
        assert_close(np.moveaxis(out[b], -1, 0), reference)


@pytest.fixture(scope="module")
def motion_dit():
    tables = {"pos_embed": draw("a", (1, 10, 24), 13), "content_pos_embed": draw("b", (1, 6, 24), 13)}
    sd = weights(dit_shapes(MOTION_DIT), seed=13) | tables
    x, t, content = draw("x", (2, 4, 10, 3), 13), np.array([999, 20]), draw("content", (2, 8, 12, 2), 13)
    return sd, x, t, content, apply(*load("motion_dit", MOTION_DIT, sd), x, t, None, content)


def test_a_motion_dit_of_another_size_computes_the_same_function(motion_dit):
    sd, x, t, content, out = motion_dit
    for b in range(2):
        reference = dit(sd, np.moveaxis(x[b], -1, 0), t[b], MOTION_DIT, content=np.moveaxis(content[b], -1, 0))
        assert_close(np.moveaxis(out[b], -1, 0), reference)


def test_rows_first_is_the_same_function_of_swapped_latents(motion_dit):
    sd, x, t, content, out = motion_dit
    module, params = load("motion_dit", MOTION_DIT | {"motion_order": "rows_first"}, sd)
    assert_close(apply(module, params, swap(x, 6), t, None, content), swap(out, 6))  # 6 columns, 4 rows
    assert np.abs(apply(module, params, x, t, None, content) - out).max() > 0.1


def test_without_a_stored_table_rows_first_swaps_the_reference_one():
    config, sd, npz = fixture("motion_dit")
    _, params = load("motion_dit", config | {"motion_order": "rows_first"}, sd)
    table = npz["pos_embed"][0].reshape(2, 8, 48)
    swapped = np.concatenate([table[:, 4:], table[:, :4]], axis=1).reshape(16, 48)
    np.testing.assert_allclose(params["positions"], swapped, atol=1e-6)


# And back.


@pytest.mark.parametrize("kind, config", [
    ("autoencoder", AUTOENCODER), ("content_dit", CONTENT_DIT), ("motion_dit", MOTION_DIT),
    ("motion_dit", MOTION_DIT | {"motion_order": "rows_first", "num_classes": 2}),
])  # fmt: skip
def test_what_was_loaded_is_what_the_module_asks_for_and_is_written_again_bit_for_bit(kind, config):
    if kind == "autoencoder":
        sd = weights(autoencoder_shapes(config), seed=17) | UNUSED
        inputs = (np.zeros((1, 2, 6, 9, 2), np.float32),)
    else:
        sd = weights(dit_shapes(config), seed=17)
        sd["pos_embed"] = draw("pos_embed", (1, 6 if kind == "content_dit" else 10, 24), 17)
        x = np.zeros((1, *config["input_size"], config["in_channels"]), np.float32)
        inputs = (x, np.zeros(1), np.zeros(1, int), np.zeros((1, 8, 12, 2), np.float32))
    if kind == "motion_dit":
        sd["keyframe_pos_embed"] = draw("keyframe_pos_embed", (1, 6, 24), 17)
    module, params = load(kind, config, sd)
    asked = jax.eval_shape(lambda: nn.meta.unbox(module.init(jax.random.key(0), *inputs)["params"]))
    same, described = model(kind, config)
    assert same == module
    found, asked, described = (
        jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), tree) for tree in (params, asked, described)
    )
    assert found == asked == described
    back = torch_weights(kind, config, params)
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in sd.items()}
    assert all(np.array_equal(back[n], sd[n]) for n in sd)


def test_the_autoencoders_unused_tables_are_read_past(caplog):
    """inv_freqs are 1/10000^(2i/64), scales from 1 to 5; where a file has other numbers that is said."""
    sd = weights(autoencoder_shapes(AUTOENCODER), seed=17)
    assert sorted({(name.split(".", 1)[1], table.shape) for name, table in UNUSED.items()}) == [
        ("frame_rot_emb.inv_freqs", (32,)), ("image_rot_emb.scales", (16,)),
    ]  # fmt: skip
    frequencies, scales = UNUSED["decoder.frame_rot_emb.inv_freqs"], UNUSED["encoder.image_rot_emb.scales"]
    np.testing.assert_allclose(frequencies[[0, 1, 16, 31]], [1, 0.749894, 0.01, 1.333521e-4], rtol=1e-6)
    np.testing.assert_allclose(scales[[0, 1, 15]], [1, 5 ** (1 / 15), 5], rtol=1e-6)
    plain = load("autoencoder", AUTOENCODER, sd)[1]
    halves = {name: table.astype(np.float16) for name, table in UNUSED.items()}
    jax.tree.map(np.testing.assert_array_equal, load("autoencoder", AUTOENCODER, sd | halves)[1], plain)
    assert not caplog.records
    other = UNUSED | {"encoder.image_rot_emb.scales": 2 * scales}
    jax.tree.map(np.testing.assert_array_equal, load("autoencoder", AUTOENCODER, sd | other)[1], plain)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["encoder.image_rot_emb.scales"]


def test_the_motion_table_has_two_names():
    sd = weights(dit_shapes(MOTION_DIT), seed=17) | {"pos_embed": draw("pos_embed", (1, 10, 24), 17)}
    table = draw("keyframe_pos_embed", (1, 6, 24), 17)
    params = [
        load("motion_dit", MOTION_DIT, sd | {name: table})[1] for name in ("keyframe_pos_embed", "content_pos_embed")
    ]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert np.array_equal(params[0]["content_positions"], table[0])
    with pytest.raises(UserError, match="no place for 1: content_pos_embed"):
        load("motion_dit", MOTION_DIT, sd | {"keyframe_pos_embed": table, "content_pos_embed": table})


@pytest.mark.parametrize("field, value", [
    ("frequency_shift", 128), ("frequency_shift", "1"), ("mlp_epsilon", -1e-6), ("mlp_epsilon", float("nan")),
    ("mlp_epsilon", True), ("hidden_size", 2**40), ("input_size", [3 * 2**20, 3 * 2**20]),
])  # fmt: skip
def test_numbers_that_no_dit_has_are_named(field, value):
    with pytest.raises(UserError) as e:
        model("content_dit", CONTENT_DIT | {field: value})
    assert e.value.field in (f"config.{field}", "config.input_size")


def test_empty_tensors_tell_no_sizes():
    sd = {"x_embedder.proj.weight": np.zeros((2**40, 4, 0, 0), np.float32)}
    assert complete("content_dit", {}, sd) == {}


@pytest.mark.parametrize(
    "kind, config, given",
    [
        ("autoencoder", AUTOENCODER, ("heads", "mode")),
        ("content_dit", CONTENT_DIT, ("heads", "input_size")),
        ("content_dit", CONTENT_DIT | {"num_classes": None, "learn_sigma": False}, ("heads", "input_size")),
        ("motion_dit", MOTION_DIT, ("heads", "input_size", "content_size")),
    ],
)
def test_tensors_tell_the_rest_of_a_config(kind, config, given):
    sd = weights(autoencoder_shapes(config) if kind == "autoencoder" else dit_shapes(config), seed=18)
    told = complete(kind, {key: config[key] for key in given}, sd)
    assert told == {key: value for key, value in config.items() if value is not None}
    assert complete(kind, {"depth": 77}, sd)["depth"] == 77  # what is given counts
    assert complete(kind, {}, {}) == {}


def test_the_tensors_of_a_published_dit_tell_everything():
    large = {"hidden_size": 1152, "depth": 28, "heads": 16, "input_size": [32, 32], "patch_size": 2, "in_channels": 4}
    large |= {"num_classes": 1000, "learn_sigma": True}
    sd = {name: np.broadcast_to(np.float32(0), shape) for name, shape in dit_shapes(large).items()}
    assert complete("content_dit", {}, sd | {"pos_embed": np.broadcast_to(np.float32(0), (1, 256, 1152))}) == large


# Errors.


def drop(name):
    return lambda sd: {n: v for n, v in sd.items() if n != name}


def add(name, *shape):
    return lambda sd: sd | {name: np.zeros(shape, np.float32)}


def same(sd):
    return sd


@pytest.mark.parametrize(
    "changes, spoil, field, words",
    [
        ({"depth": 2}, same, "config.depth", ["blocks.2.", "no place", "7 more"]),
        ({"depth": 4}, same, "config.depth", ["blocks.3.", "missing"]),
        ({"hidden_size": 48}, same, "config.hidden_size", ["x_embedder.proj.weight", "[24, 2, 3, 3]", "[48, 2, 3, 3]"]),
        ({"in_channels": 3}, same, "config.in_channels", ["x_embedder.proj.weight", "[24, 2, 3, 3]", "[24, 3, 3, 3]"]),
        ({"patch_size": 1}, same, "config.patch_size", ["x_embedder.proj.weight", "[24, 2, 1, 1]"]),
        ({"learn_sigma": False}, same, "config.learn_sigma", ["final_layer.linear.weight", "[36, 24]", "[18, 24]"]),
        ({"num_classes": 5}, same, "config.num_classes", ["y_embedder.embedding_table.weight", "[5, 24]", "[6, 24]"]),
        ({"num_classes": None}, same, "config.num_classes", ["y_embedder.embedding_table.weight"]),
        ({}, drop("y_embedder.embedding_table.weight"), "config.num_classes", ["missing"]),
        ({}, drop("blocks.1.attn.qkv.bias"), "kind", ["content_dit", "blocks.1.attn.qkv.bias"]),
        ({}, drop("t_embedder.mlp.2.weight"), "kind", ["t_embedder.mlp.2.weight"]),
        ({}, add("keyframe_embedder.proj.bias", 24), "kind", ["keyframe_embedder.proj.bias"]),
        ({}, add("blocks.1.attn.qkv.bias", 71), "config.hidden_size", ["blocks.1.attn.qkv.bias", "[71]", "[72]"]),
        ({}, add("blocks.1.mlp.fc1.bias", 24), "kind", ["blocks.1.mlp.fc1.bias", "[24]", "[96]"]),
        ({}, add("t_embedder.mlp.2.bias", 24, 1), "kind", ["[24, 1]", "[24]"]),
        ({}, add("pos_embed", 1, 9, 24), "config.input_size", ["[6, 9]", "pos_embed", "[1, 9, 24]", "[1, 6, 24]"]),
        ({"input_size": [6, 8]}, same, "config.input_size", ["patch_size=3"]),
        ({"input_size": [6, 9, 3]}, same, "config.input_size", ["whole number"]),
        ({"hidden_size": 26}, same, "config.hidden_size", ["by 4"]),
        ({"heads": 5}, same, "config.heads", ["hidden_size=24"]),
        ({"heads": 0}, same, "config.heads", ["positive"]),
        ({"depth": True}, same, "config.depth", ["positive"]),
        ({"num_classes": -1}, same, "config.num_classes", ["whole number"]),
        ({"learn_sigma": "yes"}, same, "config.learn_sigma", ["True, False"]),
        ({"hiden_size": 24}, same, "config", ["hiden_size", "hidden_size?"]),
        ({"model": "motion_dit"}, same, "config.model", ["content_dit"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_the_field_to_blame(changes, spoil, field, words):
    sd = spoil(weights(dit_shapes(CONTENT_DIT), seed=15))
    with pytest.raises(UserError) as e:
        load("content_dit", CONTENT_DIT | changes, sd)
    assert e.value.field == field
    assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize(
    "changes, field, words",
    [
        ({"hidden_dim": 24}, "config.hidden_dim", ["to_output.1.weight", "[20, 2, 3, 3]", "[24, 2, 3, 3]"]),
        ({"channels": 3}, "config.channels", ["to_output.1.weight", "[20, 3, 3, 3]"]),
        ({"motion_channels": 8}, "config.motion_channels", ["pre_yt.weight", "[7, 20, 1, 1]", "[8, 20, 1, 1]"]),
        ({"head_dim": 10}, "config.head_dim", ["encoder.layers.0.0.fn.qkv.weight", "[30, 20]", "[60, 20]"]),
        ({"depth": 1}, "config.depth", ["layers.1."]),
        ({"mode": "pixels"}, "config.mode", ["pixels", "pixel, latent"]),
    ],
)
def test_an_autoencoder_that_does_not_fit_names_the_field_to_blame(changes, field, words):
    with pytest.raises(UserError) as e:
        load("autoencoder", AUTOENCODER | changes, weights(autoencoder_shapes(AUTOENCODER), seed=16))
    assert e.value.field == field
    assert all(word in str(e.value) for word in words), str(e.value)


def test_a_motion_dit_without_a_table_needs_square_numbers_of_tokens(motion_dit):
    sd = motion_dit[0]
    with pytest.raises(UserError, match=r"2x5 tokens.*pos_embed \[1,10,24\]") as e:
        load("motion_dit", MOTION_DIT, drop("pos_embed")(sd))
    assert e.value.field == "config.input_size"
    with pytest.raises(UserError, match=r"2x3 tokens.*keyframe_pos_embed"):
        load("motion_dit", MOTION_DIT, drop("content_pos_embed")(sd))


def test_rows_first_needs_halves_of_whole_patches(motion_dit):
    changes = {"content_size": [12, 8], "input_size": [4, 8], "motion_order": "rows_first"}
    with pytest.raises(UserError, match="rows_first: 4 patches"):
        load("motion_dit", MOTION_DIT | changes, motion_dit[0] | {"pos_embed": np.zeros((1, 8, 24), np.float32)})
    with pytest.raises(UserError, match="as_stored, rows_first"):
        load("motion_dit", MOTION_DIT | {"motion_order": "columns_first"}, motion_dit[0])


def test_an_unknown_kind_and_a_missing_key_are_refused():
    with pytest.raises(UserError, match="autoencoder, motion_dit, content_dit"):
        load("dit", CONTENT_DIT, {})
    with pytest.raises(UserError, match="config=depth: missing"):
        load("content_dit", drop("depth")(CONTENT_DIT), {})
