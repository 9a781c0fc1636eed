"""Runs that cannot be gone on with, and inputs that do not fit, are refused by name."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
import tiny

from cmd_jax import keys
from cmd_jax import prepare as preparing
from cmd_jax import train as training
from cmd_jax.config import to_json
from cmd_jax.data import shapes
from cmd_jax.errors import UserError
from cmd_jax.files import read_json, write_json
from cmd_jax.main import main
from cmd_jax.report.console import make_console
from cmd_jax.running import resume
from cmd_jax.running.lock import locked_run
from cmd_jax.sharding import make_mesh
from cmd_jax.trained import Trained, export, load_trained

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture(scope="module")
def run():
    return tiny.trained()


@pytest.fixture
def begun(tmp_path):
    """A stage folder that claims to hold a checkpoint of the tiny content stage."""
    (tmp_path / "content" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "content" / "config.json").write_text(to_json(tiny.config_of("content")))
    return tmp_path / "content"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model__width": 32, "train__batch_size": 8}, "train.batch_size"),
        ({"model__width": 32}, "model.width"),
        ({"seed": 1}, "seed"),
        ({"data__validation": 0.25}, "data.validation"),
        ({"data__validation_seed": 1}, "data.validation_seed"),
        ({"latents__normalize": False}, "latents.normalize"),
        ({"optimizer__decay": "cosine", "train__steps": 9}, "train.steps"),
        ({"optimizer__decay": "cosine"}, "optimizer.decay"),
    ],
)
def test_folder_of_another_run_is_refused(begun, changes, field):
    before = (begun / "config.json").read_text()
    with pytest.raises(UserError) as error:
        preparing.check_same_run(begun, tiny.config_of("content", **changes))
    assert error.value.field == field
    assert f"the run in {begun} was started with" in str(error.value)
    assert (begun / "config.json").read_text() == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__steps": 9},
        {"train__log_every": 5, "train__checkpoint_every": 7, "train__keep": 1, "train__preview_every": 2},
        {"train__validation_clips": 8},
        {"train__accumulate": 4, "model__remat": "dots", "attention": "blocked"},
        {"data__threads": 1, "data__prefetch": 1, "latents__autoencoder": "elsewhere"},
        {"latents__store": "elsewhere", "latents__store_shard": 7},
    ],
)
def test_folder_of_the_same_run_is_accepted(begun, changes):
    preparing.check_same_run(begun, tiny.config_of("content", **changes))


def test_folder_without_a_checkpoint_is_taken_over(begun, run):
    """And nothing of what the earlier attempt noted is believed."""
    shutil.rmtree(begun / "checkpoints")
    (begun / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    write_json(begun / "facts.json", {"fingerprint": "x", "autoencoder": "y", "statistics": "z"})
    config = tiny.config_of("content", model__width=32, latents__autoencoder=run / "autoencoder" / "ema.safetensors")
    with locked_run(begun) as (resuming, _):
        assert not resuming
        shutil.copytree(run / "latents", begun.parent / "latents")
        preparing.prepare(config, begun.parent, make_mesh(config.mesh), make_console(), resuming)
    assert read_json(begun / "facts.json")["statistics"] == read_json(run / "content" / "facts.json")["statistics"]


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "quick"])
def test_a_kernel_of_attention_that_there_is_not_here(tmp_path, capsys, kernel):
    config = f"--config={tiny.CONFIG_FILE}:autoencoder"
    assert main(["train", config, f"--workdir={tmp_path}", f"--config.attention={kernel}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"attention={kernel}: ") and "; use " in line
    assert not list(tmp_path.glob("*/config.json"))


def test_a_run_that_is_older_than_the_choice_of_attention_goes_on(begun):
    older = read_json(begun / "config.json")
    assert older.pop("attention") == "auto"
    write_json(begun / "config.json", older)
    preparing.check_same_run(begun, tiny.config_of("content"))


def test_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", f"--config={tiny.CONFIG_FILE}:autoencoder", f"--workdir={tmp_path / 'file'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("workdir=") and "cannot be written" in line


def test_dataset_that_changed_is_refused(run, monkeypatch):
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    with pytest.raises(UserError, match="data=shapes: the dataset changed since this run was started"):
        training.train(tiny.config_of("autoencoder"), run)


def test_other_random_keys_are_refused(run, monkeypatch):
    """The checkpoint is of a run whose draws this cmd_jax would go on with in another way."""
    before = read_json(run / "autoencoder" / "summary.json")
    monkeypatch.setattr(keys, "VERSION", keys.VERSION + 1)
    with pytest.raises(UserError) as error:
        training.train(tiny.config_of("autoencoder"), run)
    assert (error.value.field, error.value.value) == ("checkpoint.keys", keys.VERSION - 1)
    assert read_json(run / "autoencoder" / "summary.json") == before


def test_a_checkpoint_that_is_silent_about_its_keys_is_told_of():
    told, now = [], resume.position(tiny.config_of("content"), 3, "data")
    console = SimpleNamespace(print=told.append)
    resume.check_continues(now, now, console)
    assert not told
    resume.check_continues({name: value for name, value in now.items() if name != "keys"}, now, console)
    (line,) = told
    assert "random keys" in line


def test_another_autoencoder_is_refused(run, tmp_path):
    real = load_trained(run / "autoencoder" / "ema.safetensors", "autoencoder")
    other = Trained(real.config, jax.tree.map(lambda x: 2 * x, real.params), replace(real.metadata, digest="another"))
    export(tmp_path / "other.safetensors", other)
    before = (run / "content" / "config.json").read_text()
    with pytest.raises(UserError, match="is not the one this run was started with") as error:
        training.train(tiny.config_of("content", latents__autoencoder=tmp_path / "other.safetensors"), run)
    assert error.value.field == "latents.autoencoder"
    assert (run / "content" / "config.json").read_text() == before


def test_diffusion_stage_without_an_autoencoder_says_what_to_train(tmp_path):
    with pytest.raises(UserError, match="holds no trained autoencoder stage; train the autoencoder stage there first"):
        training.train(tiny.config_of("content"), tmp_path)


@pytest.mark.parametrize("side", [("frames", 6), ("height", 20), ("width", 28)])
def test_clips_of_another_shape_than_the_autoencoder_had(run, tmp_path, side):
    name, size = side
    changes = {f"data__{name}": size, "latents__autoencoder": run / "autoencoder" / "ema.safetensors"}
    with pytest.raises(UserError, match="the autoencoder was trained at") as error:
        training.train(tiny.config_of("content", **changes), tmp_path)
    assert (error.value.field, error.value.value) == (f"data.{name}", size)


def test_checkpoint_of_another_model_is_refused_even_without_its_config(run, tmp_path):
    folder = tmp_path / "autoencoder"
    shutil.copytree(run / "autoencoder", folder)
    (folder / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"checkpoint 6: params/.*this config wants \(\(.*use the config it was trained"
    ):
        training.train(tiny.config_of("autoencoder", model__width=24), tmp_path)
