import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cmd_jax import main as command
from cmd_jax.config import load
from cmd_jax.errors import UserError
from cmd_jax.files import write_json
from cmd_jax.main import main
from cmd_jax.running import runtime
from cmd_jax.stages import AutoencoderStage
from cmd_jax.trained import Metadata, Trained, export
from cmd_jax.verbs import flags as flags_of
from cmd_jax.verbs.resume_trainings import ask

ROOT = Path(__file__).parents[1]
QUICKSTART, UCF101 = (str(ROOT / "configs" / f"{name}.py") for name in ("quickstart", "ucf101"))


@pytest.fixture
def fails(capsys):
    """Run the command; it must end with 2 and one line on stderr, which is returned."""

    def run(*arguments):
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"[^=\n]+=[^\n]*: [^\n]+; [^\n]+\n", error), error
        return error.strip()

    return run


@pytest.fixture
def train_fails(fails, tmp_path):
    def run(stage, **overrides):
        flags = [f"--config.{key}={value}" for key, value in overrides.items()]
        return fails("train", f"--config={QUICKSTART}:{stage}", f"--workdir={tmp_path / 'run'}", *flags)

    return run


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], r"command=cmd-jax: .*VERB; see cmd-jax --help"),
        (["trian"], r"command=cmd-jax: .*'trian' \(choose from .*train.*sample.*evaluate.*\); see cmd-jax --help"),
        (["train", "--config"], r"command=cmd-jax train: argument --config: expected one argument; see .*"),
        (["train", "--config=x"], r"--workdir=: missing; see cmd-jax train --help"),
        (["sample", "--workdir=x"], r"--config=: missing; see cmd-jax sample --help"),
        (["train", "--config=x", "--workdir="], r"--workdir=: missing; see cmd-jax train --help"),
        (["train", "--config=x", "--wrokdir=y"], r"flag=--wrokdir=y: not a flag of train; did you mean --workdir=DIR"),
        (["train", "--config=x", "--work=y"], r"flag=--work=y: not a flag of train; did you mean --workdir=DIR"),
        (["train", "--config=x", "--workdir=y", "--config.seed", "3"], r".*blank.*; write --config.seed=3"),
        (["train", "--config=x", "--config.seed", "-3", "--workdir=y"], r".*blank.*; write --config.seed=-3"),
        (["train", "--config=x", "--config.seed", "--workdir=y"], r"--config.seed=: .*; write --config.seed=VALUE"),
        (["train", "--config=x", "--config.seed"], r"--config.seed=: has no value; write --config.seed=VALUE"),
        (["train", "--config=x", "--config.seed=", "3"], r"flag=3: .*blank.*; write --config.seed=3"),
        (["train", "--config=x", "--workdir=", "here"], r"flag=here: .*blank.*; write --workdir=here"),
        (["sample", "--config=x", "--prompt=a", "boat"], r"flag=boat: .*blank.* in quotes"),
        (["train", "--config=x", "--workdir=y", "z"], r"flag=z: .*belongs to no flag; .*"),
        (["train", "--debug=1"], r"command=cmd-jax train: argument --debug: ignored explicit argument '1'; see .*"),
        (["train", "--config=absent.py:content", "--workdir=y"], r"config=absent.py: no such file; .*"),
        (["train", f"--config={QUICKSTART}:contents", "--workdir=y"], r"config=contents: not one of the choices; .*"),
        (["train", f"--config={QUICKSTART}:content,size=huge", "--workdir=y"], r"config:size=huge: .*small, long"),
        (["train", f"--config={UCF101}:content,size=XXL", "--workdir=y"], r"config:size=XXL: .*paper.*S, B, L, XL"),
        (["train", f"--config={QUICKSTART}:content,nonsense=1", "--workdir=y"], r"config=nonsense=1: no such key; .*"),
        (["train", f"--config={QUICKSTART}:sample", "--workdir=y"], r"config=sample: .*; use FILE:autoencoder, .*"),
        (["sample", f"--config={QUICKSTART}:content", "--workdir=y"], r"config=content: .*; use FILE:sample"),
        (["evaluate", f"--config={QUICKSTART}:motion", "--workdir=y"], r"config=motion: .*; use FILE:sample"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(fails, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    line = fails(*arguments)
    assert re.fullmatch(message, line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["gs://bucket/run", "hdfs:///r", "file:///r", "s3:/b/r"])
@pytest.mark.parametrize(
    "field, arguments",
    [
        ("--workdir", ("train", f"--config={QUICKSTART}", "--workdir=PLACE")),
        ("--workdir", ("doctor", f"--config={QUICKSTART}", "--workdir=PLACE")),
        ("--config", ("train", "--config=PLACE", "--workdir=x")),
        ("data.root", ("train", f"--config={QUICKSTART}", "--workdir=x", "--config.data.root=PLACE")),
        ("loss.vgg", ("train", f"--config={QUICKSTART}", "--workdir=x", "--config.loss.vgg=PLACE")),
        ("pretrained.path", ("train", f"--config={QUICKSTART}", "--workdir=x", "--config.pretrained.path=PLACE")),
        (
            "latents.autoencoder",
            ("train", f"--config={QUICKSTART}:content", "--workdir=x", "--config.latents.autoencoder=PLACE"),
        ),
        ("weights", ("sample", f"--config={QUICKSTART}:sample", "--workdir=x", "--config.weights=PLACE")),
        ("sampling.image", ("sample", f"--config={QUICKSTART}:sample", "--workdir=x", "--config.sampling.image=PLACE")),
        ("--prompts-file", ("sample", f"--config={QUICKSTART}:sample", "--workdir=x", "--prompts-file=PLACE")),
        ("INPUT", ("convert", "dit", "PLACE", "x.safetensors")),
        ("OUTPUT", ("convert", "dit", "x.pt", "PLACE")),
        ("--unet", ("convert", "stable-diffusion", "x", "y", "--unet=PLACE")),
        ("--heads", ("convert", "lpips", "x", "y", "--heads=PLACE")),
    ],
)
def test_a_path_with_a_scheme_is_no_local_folder(fails, tmp_path, monkeypatch, place, field, arguments):
    """gs:// is known, but what reaches it is not installed."""
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gcsfs" else find(name, *a))
    line = fails(*(argument.replace("PLACE", place) for argument in arguments))
    assert line.startswith(f"{field}={place}: ") and not list(tmp_path.iterdir())
    assert field == "--config" or ("cmd-jax[gcs]" in line) == place.startswith("gs://")


@pytest.mark.parametrize(
    "stage, key, value, message",
    [
        ("autoencoder", "trian.steps", "3", "config.trian.steps=3: no such key; did you mean config.train.steps"),
        ("autoencoder", "train.steps", "ten", "config.train.steps=ten: not of type int; "),
        ("autoencoder", "train.batch_size", "0", "train.batch_size=0: must be positive; "),
        ("autoencoder", "optimizer.learning_rate", "nan", "optimizer.learning_rate=nan: not a finite number; "),
        (
            "autoencoder",
            "model.dtype",
            "float16",
            "model.dtype=float16: not one of the choices; use one of float32, bfl",
        ),
        ("autoencoder", "data.width", "31", "data.width=31: not a multiple of model.patch=4; use 32"),
        ("autoencoder", "mesh.data", "3", "mesh=3x1x1: does not make the 1 devices here; use for example 1x1x1"),
        ("autoencoder", "mesh.fsdp", "0", "mesh.fsdp=0: must be positive; give a whole number from 1, or -1"),
        ("autoencoder", "data.source", "shape", "data.source=shape: not one of the choices; use one of shapes, folder"),
        (
            "autoencoder",
            "data.clips",
            "7",
            "train.batch_size=16: more than the 7 usable clips: no batch per epoch; use ",
        ),
        ("content", "model.dtype", "int8", "model.dtype=int8: not one of the choices; "),
    ],
)
def test_a_wrong_config_is_one_line_and_2(train_fails, stage, key, value, message):
    assert train_fails(stage, **{key: value}).startswith(message)


def test_an_unknown_sampling_mode_lists_the_modes(fails, tmp_path):
    line = fails("sample", f"--config={QUICKSTART}:sample", f"--workdir={tmp_path}", "--config.sampling.mode=dream")
    assert line == (
        "sampling.mode=dream: not one of the choices; use one of generate, reconstruct, vary-motion, animate"
    )


@pytest.fixture(scope="module")
def narrow_autoencoder(tmp_path_factory):
    """Weights of an untrained 6x32x28 autoencoder with patch 4: h + w = 15."""
    config = load(f"{QUICKSTART}:autoencoder", {"data.width": "28", "data.frames": "6"})
    shapes = jax.eval_shape(AutoencoderStage(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), jax.tree.map(lambda x: x, shapes))
    path = tmp_path_factory.mktemp("weights") / "autoencoder.safetensors"
    export(path, Trained(config, {"autoencoder": _unboxed(params["autoencoder"])}, Metadata(digest="0")))
    return path


def _unboxed(tree):
    return jax.tree.map(lambda x: x.value, tree, is_leaf=lambda x: hasattr(x, "names"))


@pytest.mark.parametrize(
    "stage, changes, message",
    [
        ("content", {"data.width": 32}, "data.width=32: the autoencoder was trained at 28; "),
        ("content", {"model.patch": 8}, "data.width=28: not a multiple of content model.patch=8; change model.patch"),
        ("motion", {"model.patch": 2}, "h+w=15: not a multiple of motion model.patch=2; change model.patch"),
        ("motion", {"model.patch": 4}, "data.frames=6: not a multiple of motion model.patch=4; change model.patch"),
        (
            "motion",
            {"model.patch": 3, "model.content_patch": 8},
            "data.width=28: not a multiple of motion model.content_patch=8; change model.content_patch",
        ),
    ],
)
def test_grids_that_patches_do_not_divide(train_fails, narrow_autoencoder, stage, changes, message):
    shape = {"data.frames": 6, "data.width": 28, "latents.autoencoder": narrow_autoencoder}
    assert train_fails(stage, **shape | changes).startswith(message)


def test_a_stage_without_its_autoencoder(train_fails, tmp_path):
    assert "autoencoder: holds no trained autoencoder stage; " in train_fails("content")
    absent = train_fails("motion", **{"latents.autoencoder": tmp_path / "absent.safetensors"})
    assert "absent.safetensors: no such file; " in absent


def test_debug_shows_where_and_still_ends_with_2(capsys):
    assert main(["train", "--config=absent.py", "--workdir=x", "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.splitlines()[-1].startswith("config=absent.py: no such file; ")


@pytest.mark.parametrize("verb", [verb for verb in flags_of.VERBS if verb != "convert"])
def test_help_shows_an_example_that_is_a_command(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    example = next(line for line in shown.splitlines() if line.startswith(f"example: cmd-jax {verb} "))
    flags, overrides = flags_of.parse(example.split()[2:])
    assert flags.verb == verb and "--config.KEY=VALUE" in shown
    assert bool(overrides) == (verb == "verify-resume")
    sampling = ("sample", "evaluate", "bench", "calibrate")
    assert ("--distributed" in shown) == (verb in ("train", "ingest", *sampling))
    assert (load(flags.config, {}).stage == "sample") == (verb in sampling)


def test_the_verb_gets_the_config_and_an_absolute_workdir(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("cmd_jax.verbs.train.train", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"--config={QUICKSTART}:motion", "--workdir=here", "--config.seed=3"]) == 0
    [(config, workdir, end_process)] = calls
    assert (config.stage, config.seed, workdir) == ("motion", 3, tmp_path / "here")
    assert end_process is command.end_process  # which only the command has


def test_out_of_memory_says_what_to_lower(monkeypatch, fails):
    def run(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating\n 123 bytes")

    monkeypatch.setattr(command, "run", run)
    line = fails("train", f"--config={QUICKSTART}", "--workdir=x")
    assert "123 bytes" in line and all(word in line for word in ("batch_size", "remat", "fsdp"))


def test_a_file_that_finds_no_room_is_named(monkeypatch, fails, tmp_path):
    """The errors of writes name none."""

    def write_text(path, *_):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr(command, "run", lambda *_: write_json(tmp_path / "facts.json", {}))
    line = fails("train", f"--config={QUICKSTART}", "--workdir=x")
    assert line.startswith(f"file={tmp_path / 'facts.json'}: No space left on device; free space")
    assert not list(tmp_path.iterdir())


VERBS = {
    "train": (f"--config={QUICKSTART}", "--workdir=x"),
    "sample": (f"--config={QUICKSTART}:sample", "--workdir=x"),
    "evaluate": (f"--config={QUICKSTART}:sample", "--workdir=x"),
    "doctor": (f"--config={QUICKSTART}",),
    "convert": ("dit", "absent.pt", "x.safetensors"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_devices_that_are_not_here_are_one_line(monkeypatch, fails, tmp_path, verb):
    """For cuda, JAX built for CPUs raises an AssertionError without a word."""

    def devices(*_):
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(runtime, "other_platform", lambda: "cpu")
    monkeypatch.chdir(tmp_path)
    line = fails(verb, *VERBS[verb])
    assert re.match(r"JAX_PLATFORMS=.*: JAX cannot start it here \(.+\); use cpu", line)
    assert not list(tmp_path.iterdir())


def test_a_process_without_the_device_that_it_is_told_to_use():
    """verify-resume asks such a one; what would be there is found out."""
    with pytest.raises(UserError, match="libtpu|list of known backends.*; use cpu") as error:
        ask(os.environ | {"JAX_PLATFORMS": "tpu,rocm"}, QUICKSTART, {}, None)
    assert (error.value.field, error.value.value) == ("JAX_PLATFORMS", "tpu,rocm")


def test_other_exceptions_are_not_hidden(monkeypatch):
    def run(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(command, "run", run)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train", f"--config={QUICKSTART}", "--workdir=x"])


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "cmd_jax.main", "train", f"--config={QUICKSTART}", "--workdir=x", "--config.sede=1"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "config.sede=1: no such key; did you mean config.seed\n"


def test_errors_stay_one_short_line():
    text = str(UserError("a", "x\n\ty\0" + "z" * 1000 + "/name", "two\nlines", "do\nthis"))
    assert text.startswith("a=x y\\x00zzz") and text.endswith("zzz/name: two lines; do this") and len(text) < 160
    assert json.dumps(text).count("\\n") == 0
