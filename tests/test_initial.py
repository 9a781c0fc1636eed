"""Warm starts: what a run takes over from another one's weights, what it leaves out, and what it refuses."""

import json
import shutil
from types import SimpleNamespace

import flax.linen as nn
import jax
import lowered
import numpy as np
import pytest
import tiny

from cmd_jax.config import check
from cmd_jax.errors import UserError
from cmd_jax.initial import LABEL_TABLE, given_params
from cmd_jax.interop.weights import flatten, unflatten
from cmd_jax.models.conditions import Classes
from cmd_jax.sharding import abstract, make_mesh
from cmd_jax.stages import AutoencoderStage, ContentStage, FrozenAutoencoder
from cmd_jax.state import init_state, make_optimizer
from cmd_jax.train import train
from cmd_jax.trained import AutoencoderMetadata, Trained, export, load_trained

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture(scope="module")
def run():
    return tiny.trained()


@pytest.fixture(scope="module")
def content(run):
    """The trained content stage."""
    return load_trained(run / "content", "content")


def stage_of(config, classes=48):
    if config.stage == "autoencoder":
        return AutoencoderStage(config)
    return ContentStage(config, FrozenAutoencoder(tiny.config_of("autoencoder"), None), Classes(classes))


def given(config, stage, metadata=None):
    """-> ({name: array} that a run gets, the lines it prints)."""
    told, mesh = [], make_mesh(config.mesh)

    def shardings(init):
        return abstract(init, mesh, config.rules)

    console = SimpleNamespace(print=told.append)
    params = given_params(check(config), stage, metadata, shardings, console)
    return None if params is None else flatten(params), told


def state_of(config, stage, params):
    return init_state(stage, make_optimizer(config.optimizer), config.seed, make_mesh(config.mesh), config.rules,
                      None if params is None else unflatten(params))  # fmt: skip


def same(x, y):
    return x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x)


def test_a_fresh_state_of_given_weights(run, content, s3):
    """From a folder, from a file, of a bucket too, and from none; Adam's moments and the step are a beginner's."""
    there = f"{s3}/content.safetensors"
    export(there, content)
    for path in (run / "content", run / "content" / "ema.safetensors", there):
        config = tiny.config_of("content", init=path)
        stage = stage_of(config)
        params, told = given(config, stage, content.metadata)
        assert same(params, flatten(content.params))
        assert told == [f"starting from {path}: {len(params)} of {len(params)} arrays"]
    state = state_of(config, stage, params)
    assert same(flatten(state.params), params) and same(flatten(state.ema), params) and int(state.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
    assert given(tiny.config_of("content"), stage) == (None, [])
    with pytest.raises(UserError, match=f"^init={s3}/none.safetensors: no such file; "):
        given(tiny.config_of("content", init=f"{s3}/none.safetensors"), stage, content.metadata)


def test_what_is_left_out_is_drawn_as_without_it(run, content):
    config = tiny.config_of("content", init=run / "content", init_skip="blocks.mlp*, time_out/bias")
    stage = stage_of(config)
    params, (told,) = given(config, stage, content.metadata)
    everything, out = flatten(content.params), {"time_out/bias"}
    out |= {name for name in everything if name.startswith("blocks/mlp")}
    assert len(out) == 5 and params.keys() == everything.keys() - out
    assert told.endswith(f"{len(params)} of {len(everything)} arrays; not {', '.join(sorted(out)[:4])} and 1 more")
    fresh, state = (state_of(config, stage, given) for given in (None, params))
    mixed = flatten(content.params) | {name: x for name, x in flatten(fresh.params).items() if name in out}
    assert same(flatten(state.params), mixed) and same(flatten(state.ema), mixed)


@pytest.mark.parametrize(
    ("names", "why"), [("bacd", "other classes"), ("abc", "other classes"), ("ba", "in another order")]
)
def test_the_label_table_belongs_to_its_classes(run, content, tmp_path, names, why):
    metadata = tiny.metadata(*"ab")
    shapes = flatten(nn.unbox(jax.eval_shape(stage_of(content.config, 2).init, jax.random.key(0))))
    saved = {name: np.full(x.shape, 0.5, np.float32) for name, x in shapes.items()}
    export(tmp_path / "two.safetensors", Trained(content.config, unflatten(saved), metadata))
    config = tiny.config_of("content", init=tmp_path / "two.safetensors")
    same_names, _ = given(config, stage_of(config, 2), metadata)
    assert LABEL_TABLE in same_names
    stage = stage_of(config, len(names))
    params, (told, _) = given(config, stage, tiny.metadata(*names))
    assert why in told and LABEL_TABLE in told
    assert params.keys() == saved.keys() - {LABEL_TABLE}
    table = state_of(config, stage, params).params["label"]["embedding"]
    assert table.shape == (len(names) + 1, 16) and not np.any(table == 0.5)


def refused(config, stage, metadata=None) -> UserError:
    with pytest.raises(UserError) as error:
        given(config, stage, metadata)
    return error.value


def test_what_does_not_fit_is_named_with_both_shapes(run, content):
    wide = tiny.config_of("content", init=run / "content", model__width=32)
    error = refused(wide, stage_of(wide), content.metadata)
    assert error.field == "init" and "blocks/key/bias is [1, 16] there and [1, 32] in this model" in error.problem
    assert "init_skip" in error.remedy
    patch = tiny.config_of("content", init=run / "content", model__patch=8)
    error = refused(patch, stage_of(patch), content.metadata)
    (suggested,) = [word for word in error.remedy.split() if word.startswith("init_skip=")]
    skipped = tiny.config_of("content", init=run / "content", model__patch=8, init_skip=suggested.partition("=")[2])
    params, _ = given(skipped, stage_of(skipped), content.metadata)
    assert 0 < len(params) < len(flatten(content.params))


def test_an_autoencoder_without_discriminators_starts_one_with_them(run):
    """As those of the release are. The other way round they are too many."""
    adversarial = {"loss__adversarial": 0.5, "loss__discriminator_channels": 4, "loss__discriminator_layers": 1}
    config = tiny.config_of("autoencoder", init=run / "autoencoder", **adversarial)
    error = refused(config, stage_of(config))
    assert "2d/" in error.problem and " is absent there" in error.problem
    assert error.remedy.endswith("init_skip=2d/*,3d/*")
    config.init_skip = "2d/*,3d/*"
    params, _ = given(config, stage_of(config))
    assert {name.partition("/")[0] for name in params} == {"autoencoder"}


def test_a_file_with_more_than_the_model_has(run, tmp_path):
    trained = load_trained(run / "autoencoder", "autoencoder")
    more = trained._replace(params=trained.params | {"2d": {"kernel": np.zeros(3, np.float32)}})
    export(tmp_path / "more.safetensors", more)
    config = tiny.config_of("autoencoder", init=tmp_path / "more.safetensors")
    error = refused(config, stage_of(config))
    assert "2d/kernel is [3] there and absent in this model" in error.problem
    config.init_skip = "2d.*"
    params, _ = given(config, stage_of(config))
    assert same(params, flatten(trained.params))


def test_patterns_and_paths_that_mean_nothing(run, content, tmp_path):
    for pattern, meant in (("blocks/mpl_in/*", "blocks/mlp_in"), ("label", "label/*")):
        config = tiny.config_of("content", init=run / "content", init_skip=f"time_out/*,{pattern}")
        error = refused(config, stage_of(config), content.metadata)
        assert (error.field, error.value) == ("init_skip", pattern) and meant in error.remedy
    config = tiny.config_of("content", init=run / "content", init_skip="*")
    assert refused(config, stage_of(config), content.metadata).field == "init_skip"
    with pytest.raises(UserError, match="^init_skip=label/"):
        tiny.config_of("content", init_skip="label/*")
    for path, remedy in ((run / "motion", ""), (run, f"give {run / 'content'}"), (tmp_path / "none.safetensors", "")):
        config = tiny.config_of("content", init=path)
        error = refused(config, stage_of(config), content.metadata)
        assert error.field == "init" and remedy in error.remedy


def test_what_no_shape_shows_is_told(run, content):
    config = tiny.config_of("content", init=run / "content", diffusion__time_mean=1.5)
    other = AutoencoderMetadata("digest", "another")
    _, told = given(config, stage_of(config), tiny.metadata(*content.metadata.class_names, autoencoder=other))
    assert told[1:] == [
        "init: diffusion.time_mean=0.0 there and 1.5 here",
        "init: trained on the latents of another autoencoder",
    ]


def test_a_fine_tuned_unet_goes_on_from_its_own_weights(tmp_path):
    """What is left out is that of the image model, not random."""
    stage, metadata = lowered.stage_of("content", "text"), lowered.metadata_of("text")
    config = tiny.config_of("content,kind=text")
    mesh = make_mesh(config.mesh)
    image = flatten(stage.pretrained(lambda init: abstract(init, mesh, config.rules)))
    export(tmp_path / "unet.safetensors", Trained(config, unflatten({k: x + 1 for k, x in image.items()}), metadata))
    config = tiny.config_of("content,kind=text", init=tmp_path / "unet.safetensors", init_skip="conv_out/*")
    params, _ = given(config, stage, metadata)
    assert params.keys() == image.keys()
    for name, x in params.items():
        np.testing.assert_array_equal(x, image[name] + (not name.startswith("conv_out/")))


def test_training_from_weights_begins_where_these_ended(run, tmp_path, capsys):
    """And a resumed run does not look at them again."""
    weights = tmp_path / "weights.safetensors"
    shutil.copy(run / "autoencoder" / "ema.safetensors", weights)
    options = {"optimizer__decay": "constant", "optimizer__warmup_steps": 0, "optimizer__learning_rate": 1e-4}
    train(tiny.config_of("autoencoder", init=weights, train__steps=1, **options), tmp_path)
    assert f"starting from {weights}: " in capsys.readouterr().out
    losses = [
        json.loads((folder / "autoencoder/metrics.jsonl").read_text().splitlines()[0])["loss"]
        for folder in (run, tmp_path)
    ]
    assert losses[1] < 0.6 * losses[0]  # of the same batch
    weights.unlink()
    train(tiny.config_of("autoencoder", init="moved.safetensors", train__steps=2, **options), tmp_path)
    assert "resuming autoencoder at step 1 of 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="^init=: the run in .* was started with moved.safetensors"):
        train(tiny.config_of("autoencoder", train__steps=2, **options), tmp_path)
