"""`cmd-jax bench` at toy size: what it measures, what its records say, what it imports, and its exit codes."""

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from cmd_jax.bench import parts, quality, runs, sampling, training
from cmd_jax.bench.measure import Component, measure
from cmd_jax.bench.options import Options
from cmd_jax.bench.parts import sampler_of
from cmd_jax.bench.records import read
from cmd_jax.bench.weights import draw
from cmd_jax.config import load
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.defaults import RULES
from cmd_jax.evaluation.reconstruction import psnr
from cmd_jax.interop import sd_known
from cmd_jax.main import main
from cmd_jax.sharding import make_mesh, partitioning
from cmd_jax.stages import AutoencoderStage
from cmd_jax.state import abstract, abstract_state

TOY = str(Path(__file__).resolve().parent / "toy.py")
SMALL = sd_known.Architecture(
    sd_known.unet_config((16,), 1, 8, attention_head_dim=2, cross_attention_dim=8, norm_num_groups=8),
    sd_known.vae_config((8, 16), layers=1, groups=8, sample_size=16),
    sd_known.TEXT | {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
        "hidden_act": "gelu", "projection_dim": 8, "vocab_size": 60, "eos_token_id": 59,
    },
    sd_known.PUBLISHED,
)  # fmt: skip
REFUSED = ("tensorflow", "tensorflow_datasets", "av", "grain", "clu", "matplotlib", "PIL", "array_record", "torch",
           "diffusers", "transformers", "pandas")  # fmt: skip
WITHOUT = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {REFUSED}:
            raise ImportError(name + " is refused")

sys.meta_path.insert(0, Refuse())
from cmd_jax.main import main
import cmd_jax.bench.training

out, toy = sys.argv[1:]
code = main(["bench", f"--config={{toy}}:sample", "--rounds=1", f"--out={{out}}", "--debug"])
assert code == 0, code

import jax, numpy, os
from cmd_jax.bench.measure import Component, compiled

product = Component("product", lambda w, x: x @ w, (numpy.ones((4, 4)), numpy.ones((2, 4))), 2, "float32")
assert compiled(product)[1]["warm_compile_seconds"] is None
jax.config.update("jax_compilation_cache_dir", out + ".cache")
jax.config.update("jax_enable_compilation_cache", True)
executable, seconds = compiled(product)
assert seconds["warm_compile_seconds"] > 0 and jax.config.jax_compilation_cache_dir == out + ".cache"
assert numpy.array_equal(executable(*product.arguments), numpy.full((2, 4), 4.0)) and not os.path.exists(out + ".cache")
"""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(sd_known.ARCHITECTURES, "sd15", SMALL)


@functools.cache
def toys():
    """The sampler of random weights that `sampler_of` makes for toy.py:sample."""
    return sampler_of(f"{TOY}:sample", {}, load(f"{TOY}:sample"), None)


@pytest.fixture
def toy_sampler(monkeypatch):
    monkeypatch.setattr(runs, "sampler_of", lambda *_: toys())


@pytest.fixture
def undrawn(monkeypatch):
    """Random parameters are zeros, for which nothing is compiled."""

    def zeros(init, mesh, rules, **_):
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(init, mesh, rules))

    monkeypatch.setattr(parts, "draw", zeros)
    monkeypatch.setattr(
        training,
        "init_state",
        lambda stage, optimizer, _, mesh, rules, given: abstract_state(stage, optimizer, mesh, rules),
    )


@pytest.fixture
def timed(monkeypatch):
    """Nothing is compiled or measured: {component: seconds that it takes} may be changed; 1 without."""
    seconds = {}

    def measured(component: Component, rounds, budget):
        assert all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(component.arguments))
        return {"p50_seconds": seconds.get(component.name, 1.0)}, {}

    monkeypatch.setattr(runs, "measure", measured)
    return seconds


def bench(argument: str, *flags) -> int:
    return main(["bench", f"--config={TOY}:{argument}", "--debug", *map(str, flags)])


def test_it_needs_jax_and_its_family_only(tmp_path):
    """In a process that refuses all else, with all that is measured in earnest. Programs are compiled once more through
    the persistent cache where one is on, whose own files are left alone."""
    out, environment = tmp_path / "bench.jsonl", os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", WITHOUT, out, TOY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    records = read(out, "out")
    sampled = ["whole", "content_denoiser", "motion_denoiser", "cmd_decoder"]
    assert [(r["verb"], r["component"], r["batch"]) for r in records] == [("sample", name, 2) for name in sampled]
    for record in records:
        assert record["weights"] == "random" and record["clip"] == [4, 16, 24] and record["device"].endswith(" cores")
        assert 0 < record["p50_seconds"] <= record["p95_seconds"] and record["rounds"] == 1
        assert record["cold_compile_seconds"] > 0 and record["program_gib"] > 0 and record["peak_gib"] > 0.05
        assert record["operations"] > 2 * record["layers_macs"] > 0 and record["versions"]["jax"] == jax.__version__
        speed = record["operations"] / record["p50_seconds"] / 1e12
        assert record["tflops_per_device"] == pytest.approx(speed)
        assert record["mfu"] == pytest.approx(speed / record["peak_tflops"])
        assert record["clips_per_second"] == pytest.approx(record["batch"] / record["p50_seconds"])
    whole, content, motion, decoder = records
    parts = 3 * content["operations"] + 4 * motion["operations"] + decoder["operations"]
    # Of the motion denoiser's run the content tokens are made once.
    assert parts <= whole["operations"] < 1.2 * parts
    assert (whole["settings"]["content_evaluations"], whole["settings"]["motion_evaluations"]) == (6, 8)
    assert done.stdout.count("appended to") == 1 and "content_denoiser" in done.stdout


def test_a_text_models_components(small, undrawn, timed, capsys):
    """Of a known architecture, with token ids that no tokenizer made."""
    assert bench("sample,sd=15", "--batch=2", "--config.sampling.guidance=1", "--config.sampling.dtype=float32") == 0
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    names = ["whole", "text_encoder", "content_denoiser", "motion_denoiser", "cmd_decoder", "vae_decoder"]
    assert [(r["component"], r["batch"]) for r in records] == [(name, 2) for name in names]
    assert records[0]["settings"]["guidance"] is None and records[0]["settings"]["content_evaluations"] == 3
    assert [line.split()[0] for line in lines[6:13]] == ["component", *names]


@pytest.mark.parametrize("solver, evaluations", [("euler", (6, 8)), ("heun", (10, 14))])
def test_evaluations_are_counted(solver, evaluations):
    config = load(f"{TOY}:sample", {"sampling.content_solver": solver, "sampling.motion_solver": solver})
    sampler, origin = toys()
    assert origin == "random"
    settings = sampling.settings_of(sampler, config, 2)
    with sampler.layout(2, settings).partitioning():
        whole = next(sampling.components(sampler, settings))
    assert (whole.settings["content_evaluations"], whole.settings["motion_evaluations"]) == evaluations


def test_random_weights_are_of_the_stage_and_dtype():
    config = load(f"{TOY}:autoencoder")
    init, mesh = AutoencoderStage(config).init, make_mesh(config.mesh)
    params = {dtype: draw(init, mesh, RULES, 3, dtype) for dtype in ("float32", "bfloat16")}
    like = abstract(init, mesh, RULES)
    assert jax.tree.map(np.shape, params["float32"]) == jax.tree.map(np.shape, like)
    named = jax.tree_util.tree_leaves_with_path(params["float32"])
    for (path, full), half in zip(named, jax.tree.leaves(params["bfloat16"]), strict=True):
        vector = path[-1].key in ("bias", "scale")
        assert (full.dtype, half.dtype) == ("float32", "float32" if vector else "bfloat16")
        assert np.array_equal(full.astype(half.dtype), half)
    kernel = params["float32"]["autoencoder"]
    deviations = [x.std() * np.sqrt(np.prod(x.shape[-2])) for p, x in jax.tree_util.tree_leaves_with_path(kernel)
                  if p[-1].key == "kernel" and x.ndim == 2 and x.size > 200]  # fmt: skip
    assert deviations and all(0.8 < d < 1.2 for d in deviations)


def test_trained_weights_are_taken_where_they_are():
    config = load("quickstart:sample,size=long")
    sampler, origin = sampler_of("quickstart:sample,size=long", {}, config, None)
    assert origin == config.weights and len(sampler.class_names) == 48


def test_the_gate_ends_with_1_where_a_component_is_slower(timed, toy_sampler, tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    for _ in range(2):
        assert bench("sample", f"--workdir={tmp_path}", f"--gate={out}" if out.exists() else "--batch=2") == 0
    assert len(read(out, "out")) == 8 and capsys.readouterr().out.count("no earlier result") == 0
    timed["motion_denoiser"] = 1.3
    assert bench("sample", f"--gate={out}") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "the bound is" in line]
    assert len(lines) == 1 and "motion_denoiser" in lines[0] and "1.30 times" in lines[0]
    assert bench("sample", f"--gate={out}", "--bound=1.4") == 0
    assert bench("sample", f"--gate={out}", "--batch=1") == 0
    assert capsys.readouterr().out.count("no earlier result") == 4


@pytest.mark.parametrize(
    "flags, field",
    [
        (["--verb=trian"], "--verb"), (["--batch=1,x"], "--batch"), (["--batch=0"], "--batch"), (["--rounds=0"],
         "--rounds"), (["--bound=0.9"], "--bound"), (["--gate=nothing.jsonl"], "--gate"), (["--verb=train"], "config"),
        ([f"--gate={TOY}"], "--gate"), (["--gate=gs://"], "--gate"),
        (["--config.sampling.mode=animate"], "sampling.mode"), (["--verb=data", "--peers"], "--peers"),
        (["--only=unet"], "--only"), (["--peers", "--only=whole"], "--only"), (["--peers-size=large"], "--peers-size"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(flags, field, capsys):
    assert main(["bench", f"--config={TOY}:sample", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{field}=") and error.count("\n") == 1 and "; " in error


def test_reading_is_measured(tmp_path, monkeypatch):
    """Of a reader whose two threads give at most 200 clips a second."""
    drawn = ShapesSource.clip
    monkeypatch.setattr(ShapesSource, "clip", lambda *arguments: time.sleep(0.01) or drawn(*arguments))
    monkeypatch.setattr("cmd_jax.bench.reading.SECONDS", 0.3)
    assert bench("motion", "--verb=data", "--batch=4", "--rounds=4", f"--out={tmp_path / 'o'}") == 0
    (record,) = read(tmp_path / "o", "out")
    assert (record["component"], record["read"], record["batch"]) == ("motion_data", "clips", 4)
    assert 10 < record["clips_per_second"] < 240 and record["rounds"] >= 4  # the first batches were read ahead
    assert record["wait_shares"].keys() == {"0.5", "0.9"} and all(0 < x < 1 for x in record["wait_shares"].values())


def test_a_component_that_takes_its_arguments_is_given_new_ones():
    component = Component(
        "count", lambda x: x + 1, (jax.numpy.zeros((3,)),), 1, "float32", options={"donate_argnums": 0},
        again=lambda out, arguments: (out,),
    )  # fmt: skip
    record, out = measure(component, 3, 1.0)
    assert out[0] == 4 and record["rounds"] == 3 and record["operations"] == 0


@pytest.mark.parametrize("argument", ["content,sd=15", "autoencoder"])
def test_the_programs_of_training_steps(small, undrawn, argument):
    """Of each kind of stage: forward and backward counted, made-up batches of what training reads, the state kept."""
    config = load(f"{TOY}:{argument}", shapes_only=True)
    random = parts.Random(f"{TOY}:{argument}", {}, config)
    with partitioning(random.mesh, config.rules):
        (step,) = training.components(random, (2,))
        layers, operations = step.flops()
        out = jax.eval_shape(step.function, *step.arguments)
    state, _, batch = step.arguments[:3]
    assert step.name == f"{config.stage}_step" and step.clips == 2 and operations > 3 * 2 * layers > 0
    assert jax.tree.map(np.shape, out[0]) == jax.tree.map(np.shape, state) and "loss" in out[1]
    kept = {"content", "motion"} if config.stage != "autoencoder" else {"video"}
    assert batch.keys() - {"id", "label", "ids"} == kept and ("ids" in batch) == (argument == "content,sd=15")
    again = step.again((state, {}), step.arguments)
    assert int(again[3]) == 1 and again[2] is batch


@pytest.mark.slow
def test_a_training_step_is_measured(tmp_path):
    assert bench("motion", "--verb=train", "--rounds=2", f"--out={tmp_path / 'o'}") == 0
    (record,) = read(tmp_path / "o", "out")
    assert record["component"] == "motion_step" and record["rounds"] == 2 and record["p50_seconds"] > 0


@pytest.mark.slow
def test_full_size_weights_without_a_folder(tmp_path):
    """Stable Diffusion 2.1's parts by their shapes alone, at small clips and one step each."""
    out, steps = tmp_path / "o", ["--config.sampling.content_steps=1", "--config.sampling.motion_steps=1"]
    arguments = ["--config=webvid:sample,size=small", "--batch=1", "--rounds=1", f"--out={out}", *steps]
    assert main(["bench", *arguments]) == 0
    sizes = {record["component"]: record["parameters"] for record in read(out, "out")}
    assert sizes["content_denoiser"] == 865_910_724 and sizes["text_encoder"] == 340_387_840
    assert sizes["vae_decoder"] == 83_653_863
    assert sizes["whole"] == sum(size for name, size in sizes.items() if name != "whole")


def test_nearness_to_the_full_run():
    config = load(f"{TOY}:sample", {"sampling.dtype": "bfloat16"})
    assert quality.references(config, "bfloat16") == {"float32": {"sampling.dtype": "float32"}}
    assert quality.references(load(f"{TOY}:sample"), "float32") == {}
    mesh = make_mesh(config.mesh)
    video = np.zeros((2, 1, 2, 2, 3), np.float32)
    far = video + np.array([0.2, 0.02], np.float32).reshape(2, 1, 1, 1, 1)
    found = quality.psnr_to(video, far, mesh)
    assert found["db"] == pytest.approx(30, abs=1e-3) and found["least_db"] == pytest.approx(20, abs=1e-3)
    assert (
        quality.psnr_to(video, video, mesh)["db"] is None and quality.psnr_to(video + 9, video + 1, mesh)["db"] is None
    )


def test_a_rounded_run_is_compared_with_that_in_float32(toy_sampler):
    """Of the run's seed, guidance and steps: with the same program's videos, made a little darker."""
    whole, half = ({"sampling.dtype": dtype} for dtype in ("float32", "bfloat16"))
    sampler, _ = toys()
    settings = sampling.settings_of(sampler, load(f"{TOY}:sample", whole), 2)
    with sampler.layout(2, settings).partitioning():
        component = next(sampling.components(sampler, settings))
        video = component.jitted()(*component.arguments)["video"]
        run = runs.Run(load(f"{TOY}:sample", half), None, f"{TOY}:sample", half, Options())
        found = runs.near(run, replace(component, dtype="bfloat16"), {"video": 0.9 * video})
    expected = psnr(*(np.clip(np.asarray(x), -1, 1) for x in (0.9 * video, video)))
    assert found.keys() == {"psnr_to"} and found["psnr_to"].keys() == {"float32"}
    like = {"db": expected.mean(), "least_db": expected.min(), "clips": 2}
    assert found["psnr_to"]["float32"] == pytest.approx(like, abs=1e-3) and 5 < expected.min() < 60
