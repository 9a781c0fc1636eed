import asyncio
import contextlib
import gzip
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from processes import hidden

from cmd_jax import prepare as preparing
from cmd_jax import train as training
from cmd_jax.config import from_dict, to_json
from cmd_jax.data.encoding import Encoder
from cmd_jax.data.pipeline import BatchPlan
from cmd_jax.data.store import LatentStore
from cmd_jax.errors import Stopped, UserError
from cmd_jax.files import read_json
from cmd_jax.main import main
from cmd_jax.report.console import make_console
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.runtime import StopRequest
from cmd_jax.sharding import make_mesh
from cmd_jax.stages import ContentStage, MotionStage
from cmd_jax.trained import load_trained

pytestmark = pytest.mark.xdist_group("tiny")
TIMINGS = ("steps_per_second", "clips_per_second", "data_wait", "wall_seconds")
TIMINGS += ("tflops_per_device", "mfu", "process_memory_gib")


@pytest.fixture(scope="module")
def run():
    return tiny.trained()


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def steps_traced(folder: Path) -> list[list[int]]:
    """Of each trace of a run, which holds the step's program by its name, in the order of their making."""
    found = []
    for path in sorted((folder / "profile").rglob("*.trace.json.gz")):
        assert any(b"jit_step" in file.read_bytes() for file in path.parent.glob("*.xplane.pb"))
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert any(event.get("args", {}).get("hlo_module") == "jit_step" for event in events)
        found.append([int(event["args"]["step_num"]) for event in events if event.get("name") == "train"])
    return found


def latest(folder: Path) -> int:
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        return checkpoints.latest()


# What a finished run leaves.


@pytest.mark.parametrize("stage", ["autoencoder", "content", "motion"])
def test_files_of_a_finished_run(run, stage):
    folder = run / stage
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines)
    assert all(line["steps_per_second"] > 0 for line in lines[1:])
    assert all(0 <= line["data_wait"] <= 1 for line in lines[1:])
    assert lines[0]["wall_seconds"] <= lines[-1]["wall_seconds"]
    (events,) = folder.glob("events.out.tfevents*")
    assert events.stat().st_size > 200

    config = json.loads((folder / "config.json").read_text())
    wanted = json.loads(to_json(tiny.config_of(stage)))
    for changed in ("preview_every", "checkpoint_every"):
        config["train"].pop(changed), wanted["train"].pop(changed)
    assert config == wanted

    summary = read_json(folder / "summary.json")
    assert (summary["stage"], summary["step"], summary["examples"], summary["devices"]) == (stage, 6, 24, 1)
    assert set(summary["digests"]) == {"params", "ema", "opt_state"}
    assert len(set(summary["digests"].values())) == 3
    assert summary["versions"]["jax"] == jax.__version__
    params = load_trained(folder, stage).params
    assert summary["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    assert summary["wall_seconds"] > 0 and summary["compile_seconds"] > 0 and summary["peak_memory_gib"] > 0
    assert len(read_json(folder / "facts.json")["class_names"]) == 48


@pytest.mark.parametrize("stage", ["autoencoder", "content", "motion"])
def test_where_the_time_went(run, stage):
    folder = run / stage
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # A run as short as this is over before the peak is measured, and its share of it known.
    assert all(line["tflops_per_device"] > 0 and "mfu" not in line for line in lines[1:])
    assert all(line["process_memory_gib"] > 0.1 for line in lines[1:])
    summary = read_json(folder / "summary.json")
    told, seconds = summary["goodput"], summary["goodput"]["seconds"]
    assert sum(seconds.values()) == pytest.approx(told["wall_seconds"], abs=1e-6)
    # That of the log begins somewhere in the start-up.
    assert -0.2 < told["wall_seconds"] - summary["wall_seconds"] < seconds["start_up"] + 0.2
    assert told["share"] == round(seconds["steps"] / told["wall_seconds"], 4) and 0 < told["share"] < 1
    assert {"steps", "start_up", "compile", "save_wait", "finish"} <= set(seconds) and min(seconds.values()) >= 0
    assert ("previews" in seconds) == (stage != "content")
    assert summary["goodput_of_all_runs"] == told | {"runs": 1}


def test_previews_are_written(run):
    def names(stage):
        files = list((run / stage / "previews").iterdir())
        assert all(f.stat().st_size > 100 for f in files)
        return {f.name for f in files}

    kinds = ("clips.gif", "reconstructions.gif", "content.png", "content_weights.gif")
    assert names("autoencoder") == {f"{step:07d}_{kind}" for step in (3, 6) for kind in kinds}
    assert names("motion") == {"0000006_reconstructions.gif", "0000006_samples.gif"}
    assert not (run / "content" / "previews").exists()  # preview_every=0


def test_checkpoints_are_made_when_asked_and_at_the_end(run):
    assert {p.name for p in (run / "autoencoder" / "checkpoints").iterdir()} == {"3", "6"}
    assert {p.name for p in (run / "motion" / "checkpoints").iterdir()} == {"6"}


def test_latents_are_encoded_once_for_both_diffusion_stages(run, monkeypatch):
    """The motion stage was trained first, and encoded; the content stage found the store."""
    assert [path.name for path in (run / "latents").iterdir()] == ["cmd"]
    monkeypatch.setattr(Encoder, "__call__", None)
    for stage, kind in (("content", ContentStage), ("motion", MotionStage)):
        config = tiny.config_of(stage)
        prepared = preparing.prepare(config, run, make_mesh(config.mesh), make_console(), True)
        assert isinstance(prepared.stage, kind) and prepared.clips == 48
        assert not prepared.filler.missing and prepared.read(3)["content"].shape == (16, 24, 3)
        assert prepared.read(3)["motion"].shape == (4, 10, 4)
        assert prepared.name_of(17) == prepared.name_of(17 + 48) == "shapes-train-000017"
        autoencoder = prepared.metadata.autoencoder
        assert autoencoder.digest == load_trained(run / "autoencoder", "autoencoder").metadata.digest
        assert autoencoder.params == read_json(run / "autoencoder" / "summary.json")["digests"]["ema"]


def test_a_finished_run_is_left_as_it_is(run, capsys):
    def contents():
        files = [p for p in (run / "autoencoder").rglob("*") if p.is_file() and p.parent.name != "processes"]
        return {p: p.read_bytes() for p in files}

    before = contents()
    again = training.train(tiny.config_of("autoencoder", train__log_every=5), run)
    assert again == read_json(run / "autoencoder" / "summary.json")
    assert contents() == before
    assert "resuming autoencoder at step 6 of 6" in capsys.readouterr().out


# Stopping and resuming.


def test_stopped_in_an_event_loop_and_resumed_in_a_thread_bit_for_bit(run, tmp_path, monkeypatch, capsys):
    scalars = training.Metrics.scalars

    def interrupt(self, step, values):
        scalars(self, step, values)
        if step == 2:  # told of when step 3 is under way: step 4 brings the request, and step 5 is the last
            os.kill(os.getpid(), signal.SIGTERM)

    tmp_path /= "exp[lr=1e-2] [bold]x :smile:"
    handlers = [signal.getsignal(number) for number in StopRequest.SIGNALS]

    async def cell():  # the first trace is of two steps, the second of what is left when the run goes on
        training.train(tiny.config_of("autoencoder", train__profile="1:3"), str(tmp_path))

    monkeypatch.setattr(training.Metrics, "scalars", interrupt)
    with pytest.raises(Stopped, match="after step 5; saved"):
        asyncio.run(cell())
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == handlers
    folder = tmp_path / "autoencoder"
    assert latest(folder) == 5
    assert not (folder / "summary.json").exists()  # which says that a run is finished
    assert "stopped by signal 15 after step 5; saved; run the same command to resume" in capsys.readouterr().out
    # What a killed run would have written after its last checkpoint, the last line torn.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 9.0, "wall_seconds": 1e6}\n{"step": 7, "lo')

    monkeypatch.undo()
    monkeypatch.setattr(training, "init_state", None)  # of which a resumed run would have no use
    with ThreadPoolExecutor(1) as pool:
        config = tiny.config_of("autoencoder", train__profile="4:9")
        summary = pool.submit(training.train, config, tmp_path).result()
    assert summary == read_json(folder / "summary.json")
    out = capsys.readouterr().out
    assert "resuming autoencoder at step 5 of 6" in out and f"; wrote {folder}/summary.json\n" in out
    resumed, whole = (read_json(workdir / "autoencoder" / "summary.json") for workdir in (tmp_path, run))
    assert resumed["digests"] == whole["digests"]
    assert metrics_of(folder) == metrics_of(run / "autoencoder")
    walls = [json.loads(line)["wall_seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert walls == sorted(walls) and resumed["wall_seconds"] < 1e6  # adds up over the two runs
    assert steps_traced(folder) == [[1, 2], [5]]
    ours, all_runs = resumed["goodput"], resumed["goodput_of_all_runs"]
    assert "restore" in ours["seconds"] and "profile" in ours["seconds"] and all_runs["runs"] == 2
    assert all_runs["wall_seconds"] > ours["wall_seconds"] and not all_runs["seconds"].get("repeated")


def test_a_signal_in_the_middle_of_a_preview_saves_and_ends(run, tmp_path, monkeypatch):
    draw = MotionStage.preview

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, *arguments)

    monkeypatch.setattr(MotionStage, "preview", interrupted)
    config = tiny.config_of(
        "motion", train__preview_every=2, latents__autoencoder=run / "autoencoder" / "ema.safetensors"
    )
    begun = time.monotonic()
    with pytest.raises(Stopped):
        training.train(config, tmp_path)
    assert time.monotonic() - begun < 60
    assert latest(tmp_path / "motion") in (4, 5)
    assert {p.name[:7] for p in (tmp_path / "motion" / "previews").iterdir()} >= {"0000002"}


def test_loss_not_finite_stops_before_the_update_and_resumes_bit_for_bit(run, tmp_path, monkeypatch, capsys):
    bad = int(BatchPlan(48, 4, 0).ids(3)[1])  # a clip of the fourth batch
    read = LatentStore.read

    def poisoned(self, index, rng=None):
        example = read(self, index)
        return example | {"content": example["content"] * np.float32("nan" if index == bad else 1)}

    arguments = ["train", f"--config={tiny.CONFIG_FILE}:content", f"--workdir={tmp_path}"]
    arguments += [f"--config.latents.autoencoder={run / 'autoencoder'}", "--config.train.checkpoint_every=2"]
    monkeypatch.setattr(LatentStore, "read", poisoned)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("loss=nan: not finite at step 3 ")
    assert f"shapes-train-{bad:06d}" in line
    assert "nothing was updated" in line
    assert latest(tmp_path / "content") == 2
    (record,) = (tmp_path / "content" / "flight").glob("*-nan-process0.json")
    record = read_json(record)
    assert [step["step"] for step in record["steps"]] == [0, 1, 2, 3]
    assert record["steps"][-1]["ids"] == BatchPlan(48, 4, 0).ids(3).tolist()
    assert record["facts"]["batch"] == {str(bad): {"content": 16 * 24 * 3}}
    assert record["facts"]["gradients"] and not record["facts"]["parameters"]
    assert [m["step"] for m in metrics_of(tmp_path / "content")] == [1, 2, 3]

    monkeypatch.undo()
    assert main(arguments) == 0
    assert "resuming content at step 2 of 6" in capsys.readouterr().out
    resumed, whole = (read_json(workdir / "content" / "summary.json") for workdir in (tmp_path, run))
    assert resumed["digests"] == whole["digests"]
    assert metrics_of(tmp_path / "content") == metrics_of(run / "content")
    assert resumed["goodput_of_all_runs"]["runs"] == 2 and "repeated" not in resumed["goodput"]["seconds"]
    assert resumed["goodput_of_all_runs"]["seconds"]["repeated"] > 0  # the third step, which no checkpoint had


class BrokenWriter:
    def __init__(self, folder):
        self.calls = 0

    def write_scalars(self, step, values):
        raise OSError("disk full")


def test_longer_run_with_a_broken_metrics_writer_equals_one_run(run, tmp_path, monkeypatch, capsys, caplog):
    """train.steps may grow where no learning rate depends on it; a failing TensorBoard writer stops nothing."""
    from clu import metric_writers

    autoencoder = {"latents__autoencoder": run / "autoencoder" / "ema.safetensors"}
    monkeypatch.setattr(metric_writers, "SummaryWriter", BrokenWriter)
    with caplog.at_level(logging.WARNING, "cmd_jax.report.training"):
        summary = training.train(tiny.config_of("motion", train__steps=3, **autoencoder), tmp_path)
    assert [r.message for r in caplog.records if r.name == "cmd_jax.report.training"] == [
        "TensorBoard is no longer written: OSError: disk full"
    ]
    assert summary["step"] == 3 and len(metrics_of(tmp_path / "motion")) == 3
    monkeypatch.undo()

    summary = training.train(tiny.config_of("motion", train__log_every=2, **autoencoder), tmp_path)
    assert "resuming motion at step 3 of 6" in capsys.readouterr().out
    assert summary["digests"] == read_json(run / "motion" / "summary.json")["digests"]
    assert [m for m in metrics_of(run / "motion") if m["step"] != 5] == metrics_of(tmp_path / "motion")


@pytest.mark.parametrize("broken", ["TensorBoard", "metrics.jsonl"])
def test_each_metrics_writer_fails_alone(tmp_path, monkeypatch, caplog, broken):
    def fail(*_):
        raise OSError("disk full")

    class Events:
        def write_scalars(self, step, values):
            self.steps.append(step)

        def close(self):
            self.steps.append("closed")

    Events.steps = []
    monkeypatch.setattr(training.Metrics, "_open_events", lambda self: setattr(self, "events", Events()))
    monkeypatch.setattr(training.Metrics, {"TensorBoard": "_open_events", "metrics.jsonl": "_open_lines"}[broken], fail)
    with contextlib.closing(training.Metrics(tmp_path, 0)) as metrics:
        for step in (1, 2):
            metrics.scalars(step, {"loss": 1.0})
    assert [r.message for r in caplog.records] == [f"{broken} is no longer written: OSError: disk full"]
    assert Events.steps == ([] if broken == "TensorBoard" else [1, 2, "closed"])
    assert (tmp_path / "metrics.jsonl").exists() == (broken == "TensorBoard")


@pytest.mark.timeout(900)
def test_sigterm_ends_a_training_process_and_it_can_be_resumed(tmp_path, capsys):
    folder = tmp_path / "autoencoder"
    command = [sys.executable, "-m", "cmd_jax.main", "train", f"--config={tiny.CONFIG_FILE}:autoencoder"]
    command += [f"--workdir={tmp_path}", "--config.train.steps=1000000", "--config.optimizer.decay=constant"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            map(str, (hidden(), Path(training.__file__).parents[1], Path(tiny.__file__).parent))
        ),
    }
    with (
        open(tmp_path / "out", "w") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process,
    ):
        try:
            log = folder / "metrics.jsonl"
            while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
                time.sleep(0.2)
            config = from_dict(read_json(folder / "config.json"), "workdir", folder)
            with pytest.raises(UserError, match="another process trains in it"):
                training.train(config, tmp_path)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=300) == 0, (tmp_path / "out").read_text()
        finally:
            process.kill()
    step = latest(folder)
    assert f"stopped by signal 15 after step {step}; saved" in (tmp_path / "out").read_text()

    config.train.steps = config.optimizer.steps = step + 1
    config.train.accumulate, config.model.remat = 2, "full"  # as fewer devices may need it
    assert training.train(config, tmp_path)["step"] == step + 1
    out = capsys.readouterr().out
    assert f"resuming autoencoder at step {step} of {step + 1}" in out
    assert "saved with model.remat none, resumed with full: the last bits may differ from now on" in out
    assert "saved with train.accumulate 1, resumed with 2: microbatches draw other noise from now on" in out
    done = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    wanted = hashlib.sha256(BatchPlan(48, 4, 0).ids(step).astype(np.int64).tobytes()).hexdigest()[:16]
    assert [line["ids"] for line in done if line.get("step") == step] == [wanted]


def test_half_precision_autoencoder_serves_the_diffusion_stages(run):
    facts = read_json(tiny.gaussian_weights() / "content" / "facts.json")
    assert facts["autoencoder"]["digest"] == load_trained(run / "autoencoder", "autoencoder").metadata.digest
    assert facts["statistics"]["content"] == {"mean": [0.0] * 3, "std": [1.0] * 3}  # normalize=False
    assert not list(tiny.gaussian_weights().glob("latents*"))  # and starts=0: nothing to encode beforehand
    summary = read_json(tiny.gaussian_weights() / "content" / "summary.json")
    assert summary["step"] == 2
    assert {"mse", "vb"} <= set(metrics_of(tiny.gaussian_weights() / "content")[0])
