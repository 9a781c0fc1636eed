import json
import math
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cmd_jax import defaults
from cmd_jax.config import coerce, from_dict, keys, load, parse_argument, to_json
from cmd_jax.data.layouts import LAYOUTS, SPLITS
from cmd_jax.declare import walk
from cmd_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.py")


def changed(stage="autoencoder", **overrides):
    return load(f"{QUICKSTART}:{stage}", {k.replace("__", "."): v for k, v in overrides.items()})


def refused(stage="autoencoder", **overrides) -> str:
    with pytest.raises(UserError) as error:
        changed(stage, **overrides)
    return str(error.value)


def test_an_argument_is_a_stage_and_values_of_the_declared_types():
    assert parse_argument("", size="small", steps=3, fast=False) == (
        "autoencoder",
        {"size": "small", "steps": 3, "fast": False},
    )
    assert parse_argument("motion, size=long,steps=5,fast=True", size="small", steps=3, fast=False) == (
        "motion",
        {"size": "long", "steps": 5, "fast": True},
    )
    for argument, problem in {
        "contents": "config=contents: not one of the choices; use one of autoencoder, content, motion, sample",
        "content,sise=long": "config=sise=long: no such key; this file takes size=small, steps=3",
        "content,long": "config=long: no such key; this file takes size=small, steps=3",
        "content,steps=x": "config:steps=x: not of type int; write it like 3",
    }.items():
        with pytest.raises(UserError) as error:
            parse_argument(argument, size="small", steps=3)
        assert str(error.value) == problem


@pytest.mark.parametrize(
    "text, like, value",
    [
        ("3", 1, 3),
        ("-3", 1, -3),
        ("3", 1.0, 3.0),
        ("1e-4", 1.0, 1e-4),
        ("True", False, True),
        ("false", True, False),
        ("3", "x", "3"),
        ("", "x", ""),
        ("a=b,c", "x", "a=b,c"),
    ],
)
def test_text_becomes_the_declared_type(text, like, value):
    ours = coerce("f", text, like)
    assert ours == value and type(ours) is type(like)


@pytest.mark.parametrize(
    "text, like", [("3.0", 1), ("1e3", 1), ("True", 1), ("", 1), ("x", 1.0), ("1", True), ("yes", True), ("[1]", 1)]
)
def test_text_of_another_type_is_refused(text, like):
    with pytest.raises(UserError, match=re.escape(f"f={text}: not of type {type(like).__name__}; ")):
        coerce("f", text, like)


def test_overrides_reach_their_keys():
    config = changed(
        train__steps="300", optimizer__learning_rate="2", data__root="/x=y", loss__vgg="", mesh__data="1", seed="7"
    )
    assert (config.train.steps, config.data.root, config.mesh.data, config.seed) == (300, "/x=y", 1, 7)
    assert config.optimizer.learning_rate == 2.0 and type(config.optimizer.learning_rate) is float
    assert changed("content", latents__normalize="False").latents.normalize is False


@pytest.mark.parametrize("stage", ["autoencoder", "content", "motion"])
def test_the_optimiser_follows_the_number_of_steps(stage):
    assert changed(stage).optimizer.steps == changed(stage).train.steps != 333
    assert changed(stage, train__steps="333").optimizer.steps == 333


def test_a_config_is_locked_and_plain_after_loading():
    config = changed()
    for node in (config, config.train, config.optimizer):
        with pytest.raises((KeyError, AttributeError)):
            node.nonsense = 1
    assert from_dict(json.loads(to_json(config)), "config", "x").optimizer.to_dict() == config.optimizer.to_dict()


@pytest.mark.parametrize(
    "name, meant",
    [
        ("trian.steps", "train.steps"),
        ("train.step", "train.steps"),
        ("batch_size", "train.batch_size"),
        ("model.widht", "model.width"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("train.steps.more", "train.steps"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(name, meant):
    assert refused(**{name: "3"}) == f"config.{name}=3: no such key; did you mean config.{meant}"


def test_groups_tables_and_the_stage_cannot_be_overridden():
    assert refused(mesh="8").startswith(
        "config.mesh=8: is a group of keys; set one of mesh.data, mesh.fsdp, mesh.preset"
    )
    assert refused(rules="()") == "config.rules=(): is a table; set it in the config file"
    with pytest.raises(UserError, match="config.stage=motion: the config file sets it; use --config=FILE:motion"):
        load(QUICKSTART, {"stage": "motion"})


@pytest.mark.parametrize(
    "stage, field, value, problem",
    [
        ("autoencoder", "train.batch_size", "0", "must be positive"),
        ("autoencoder", "train.steps", "-5", "must be positive"),
        ("autoencoder", "data.frames", "0", "must be positive"),
        ("autoencoder", "data.height", "-32", "must be positive"),
        ("autoencoder", "model.motion_channels", "0", "must be positive"),
        ("autoencoder", "optimizer.learning_rate", "0", "must be positive"),
        ("autoencoder", "optimizer.eps", "0", "must be positive"),
        ("motion", "model.content_patch", "0", "must be positive"),
        ("motion", "diffusion.timesteps", "0", "must be positive"),
        ("sample", "sampling.num", "0", "must be positive"),
        ("sample", "sampling.content_steps", "0", "must be positive"),
        ("autoencoder", "seed", "-1", "must not be negative"),
        ("sample", "sampling.guidance", "-1", "must not be negative"),
        ("content", "diffusion.clip", "-2", "must not be negative"),
        ("autoencoder", "optimizer.learning_rate", "nan", "not a finite number"),
        ("autoencoder", "optimizer.learning_rate", "inf", "not a finite number"),
        ("autoencoder", "loss.l1", "nan", "not a finite number"),
        ("autoencoder", "train.ema_decay", "nan", "not a finite number"),
        ("sample", "sampling.guidance", "nan", "not a finite number"),
        ("autoencoder", "train.ema_decay", "1.5", "outside 0 to 1"),
        ("autoencoder", "train.profile", "3:1", "it ends before it begins"),
        ("content", "train.profile", "9000000:9000001", "not below train.steps="),
        ("autoencoder", "optimizer.b2", "-0.1", "outside 0 to 1"),
        ("autoencoder", "optimizer.b1", "1.0", "outside 0 to 1"),
        ("content", "guidance.label_dropout", "2.0", "outside 0 to 1"),
        ("autoencoder", "train.steps", "many", "not of type int"),
        ("autoencoder", "train.steps", "10.5", "not of type int"),
        ("autoencoder", "seed", str(2**32), "too large"),
        ("autoencoder", "model.channels", "4", "clips have 3 channels"),
        ("motion", "model.width", str(2**62), "too large"),
        ("sample", "mesh.fsdp", "0", "must be positive"),
    ],
)
def test_numbers_out_of_range_are_refused(stage, field, value, problem):
    message = refused(stage, **{field: value})
    shown, said = message.removeprefix("config.").split(": ", 1)
    name, _, given = shown.partition("=")
    assert name == field and said.startswith(f"{problem}") and "; " in said
    assert given == value or float(given) == float(value) or value == "nan"


@pytest.mark.parametrize(
    "stage, field, choices",
    [
        ("autoencoder", "model.mode", "pixel, latent"),
        ("autoencoder", "model.position", "rotary, none"),
        ("autoencoder", "model.content", "weighted, mean, first"),
        ("autoencoder", "model.dtype", "float32, bfloat16"),
        ("motion", "model.remat", "none, full, dots"),
        ("motion", "model.position", "sincos, table"),
        ("content", "diffusion.kind", "gaussian, flow"),
        ("content", "optimizer.decay", "constant, cosine"),
        ("content", "mesh.preset", "dp, fsdp, tp, fsdp_tp"),
        ("content", "pretrained.dtype", "float32, bfloat16"),
        ("sample", "data.source", "shapes, folder, dataset"),
        ("sample", "sampling.motion_solver", "ddim, ddpm, dpmpp, euler, heun, ab2"),
    ],
)
def test_unknown_choices_are_answered_with_all_there_are(stage, field, choices):
    assert refused(stage, **{field: "nope"}) == f"{field}=nope: not one of the choices; use one of {choices}"


def test_unknown_choices_of_gaussian_diffusion():
    gaussian = {"diffusion.kind": "gaussian"}
    assert "schedule=nope: not one of the choices; use one of linear, scaled_linear" in refused(
        "content", **gaussian, **{"diffusion.schedule": "nope"}
    )
    assert "prediction=nope: not one of the choices; use one of eps, v, x0" in refused(
        "content", **gaussian, **{"diffusion.prediction": "nope"}
    )


def test_sizes_that_do_not_fit_name_both_fields():
    assert refused(data__height="30") == "data.height=30: not a multiple of model.patch=4; use 32"
    assert refused(data__width="2") == "data.width=2: not a multiple of model.patch=4; use 4"
    assert "model.head_dim=18: not a multiple of" in refused(model__head_dim="18")
    assert changed(model__head_dim="18", model__position="none").model.head_dim == 18
    assert (
        refused("content", model__width="128", model__heads="5")
        == "model.width=128: not a multiple of model.heads=5; use 130"
    )
    assert "model.width=126: not a multiple of" in refused("content", model__width="126", model__heads="2")
    assert refused(train__accumulate="3") == "train.batch_size=16: not a multiple of train.accumulate=3; use 15"
    steps = refused(train__steps="50")
    assert steps == "optimizer.warmup_steps=100: not below train.steps=50; use at most 49"
    assert refused(loss__vgg="vgg.pt") == "loss.lpips=0.0: loss.vgg is given but would not be used; set loss.lpips=4.0"
    assert refused(optimizer__steps="3") == "config.optimizer.steps=3: follows train.steps; set config.train.steps"
    assert refused("content", diffusion__learned_range="True").startswith("diffusion.learned_range=True: flow matching")
    clip = refused("content", diffusion__clip="1.0")
    assert clip.startswith("diffusion.clip=1.0: clips pixels, but latents.normalize=True")


def test_files_that_are_no_configs(tmp_path):
    def message(text, name="config.py"):
        file = tmp_path / name
        file.write_text(text)
        with pytest.raises(UserError) as error:
            load(f"{file}:content", {})
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        return str(error.value).replace(str(file), "FILE")

    for absent in (tmp_path / "absent.py", tmp_path, "quickstarts", "configs/quickstart"):
        with pytest.raises(UserError, match=f"config={absent}: no such file; .* folder, quickstart, ucf101, webvid$"):
            load(f"{absent}:content", {})
    assert message("hello", "readme.md").startswith("config=FILE: not a Python file; ")
    assert (
        message("x = 1 / 0")
        == "config=FILE: ZeroDivisionError in line 1: division by zero; mend the file; --debug shows more"
    )
    assert message("def get_config(:").startswith("config=FILE: SyntaxError")
    assert "no attribute 'get_config'" in message("y = 1")
    assert message("def get_config(argument):\n  raise ValueError('so\\nso')").startswith(
        "config=FILE: ValueError in line 2: so so"
    )
    assert "in line 4: " in message(
        "from cmd_jax import defaults\ndef get_config(argument):\n  config = defaults.stage(argument)\n"
        "  config.nonsense = 1"
    )
    assert message("def get_config(argument):\n  return None").startswith("config=FILE: AttributeError")
    assert "its keys are not those of cmd_jax.defaults.stage('content', 'dit'): extra; " in message(
        "from cmd_jax import defaults\ndef get_config(argument):\n  config = defaults.stage(argument).unlock()\n"
        "  config.extra = 1\n  return config"
    )


def test_a_shipped_config_has_a_name_and_a_path(tmp_path, monkeypatch):
    by_path = load(f"{QUICKSTART}:sample,size=long", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # is no config
    assert load("quickstart:sample,size=long", {}).to_dict() == by_path.to_dict()
    assert (Path(by_path.weights) / "content.safetensors").is_file()


TEXTS = ("sampling.classes", "sampling.prompt", "sampling.negative", "sampling.title")
TEXTS += ("sampling.content_reuse", "sampling.motion_reuse")
TEXTS += ("data.buckets", "init_skip", "ingest.description", "ingest.citation")
KINDS = [(stage, denoiser) for stage, kinds in defaults.DECLARED.items() for denoiser in kinds]


@pytest.mark.parametrize("stage, denoiser", KINDS)
def test_every_key_has_a_meaning_and_a_range_that_holds_its_default(stage, denoiser):
    declared = dict(walk(defaults.declared(stage, denoiser or None)))
    assert declared.keys() == keys(defaults.stage(stage, denoiser or None))
    rows = {name: row for name, *row in defaults.table(stage, denoiser or None)}
    assert rows.keys() == declared.keys()
    for name, key in declared.items():
        assert key.meaning and key.range and rows[name][1:] == [key.range, key.meaning]
        key.check(name, key.default)
        # A text that may be empty is a path, a choice, a span, or one of the words of a user.
        free = key.default == "" and not key.path and not key.choices and not key.span
        assert not free or name in TEXTS


@pytest.mark.parametrize("stage, denoiser", KINDS)
def test_bounds_are_where_they_are_declared(stage, denoiser):
    for name, key in walk(defaults.declared(stage, denoiser or None)):
        step = 1 if isinstance(key.default, int) else 1e-3
        inside = [key.at_least, key.at_most, key.above + step, key.below - step, key.besides]
        outside = [key.at_least - step, key.at_most + step, key.above, key.below]
        for value in inside if not key.follows else ():
            if value is not None and math.isfinite(value):
                key.check(name, value)
        for value in outside:
            if math.isfinite(value) and value != key.besides:
                with pytest.raises(UserError, match=re.escape(f"{name}={value}: ")):
                    key.check(name, value)


def test_the_choices_of_data_are_those_that_its_readers_take():
    """Which the declarations only repeat: to import the readers would load the video decoder."""
    assert defaults.DATA["layout"].choices == ("auto", *LAYOUTS)
    assert defaults.DATA["split"].choices == (*SPLITS, "all")


def test_a_denoiser_is_a_dit_or_the_unet_by_its_key():
    assert [load(f"{file}:{stage}", {"pretrained.path": "x"} if file == "webvid" else {}).denoiser for file, stage in (
        ("quickstart", "content"), ("quickstart", "motion"), ("webvid", "content"), ("webvid", "motion"))
    ] == ["dit", "dit", "unet", "dit"]  # fmt: skip
    assert "denoiser" not in changed() and "denoiser" not in changed("sample")
    assert refused("content", denoiser="unet").startswith("config.denoiser=unet: the config file sets it; ")
    with pytest.raises(UserError, match="denoiser=unet: not one of the choices; use one of dit"):
        defaults.stage("motion", denoiser="unet")


@pytest.mark.parametrize("specification", ["quickstart:content", "quickstart:motion", "webvid:content,size=tiny"])
def test_a_config_that_is_older_than_its_denoiser_is_read(specification):
    config = load(specification, {})
    values = json.loads(to_json(config))
    del values["denoiser"], values["model"]["condition"]
    read = from_dict(values, "config", "x")
    assert to_json(read) == to_json(config) and read.denoiser == config.denoiser


def test_keys_are_dotted_names():
    assert keys(ConfigDict({"a": 1, "b": {"c": 2, "d": {"e": (1, 2)}}})) == {"a", "b.c", "b.d.e"}
    assert {"train.steps", "mesh.data", "rules"} < keys(defaults.stage("motion"))
