"""The quickstart's stages with all they read and write in a bucket, against the same on a disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from buckets import Bucket, serving

from cmd_jax.data.shapes import ShapesSource
from cmd_jax.report.video import write_mp4

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.py"
STEPS, EVERY = 12, 4
STAGES = ("autoencoder", "content", "motion")
SMALL = ("model.width=16", "model.depth=1", "model.heads=2", "train.batch_size=4")
SHORT = (f"train.steps={STEPS}", "optimizer.warmup_steps=2", f"train.checkpoint_every={EVERY}")


class Machine:
    """A machine that runs commands: its home, its temporary and its working folder are watched for what they leave."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder = folder
        self.watched = {name: folder / name for name in ("home", "tmp", "cwd")}
        for path in self.watched.values():
            path.mkdir(parents=True)
        home = {"HOME": str(self.watched["home"]), "TMPDIR": str(self.watched["tmp"])}
        own = {"CMD_JAX_CACHE": str(folder / "cache"), "CMD_JAX_RETRY_SECONDS": "30", "JAX_PLATFORMS": "cpu"}
        source = {"PYTHONPATH": str(CONFIG.parents[1])}
        self.environment = {**os.environ, **environment, **home, **own, **source}

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "cmd_jax.main", *arguments],
            cwd=self.watched["cwd"], env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def left(self) -> list[str]:
        """The files in the watched folders, but for Keras' settings, which importing TensorFlow writes."""
        found = (path for root in self.watched.values() for path in root.rglob("*"))
        return [str(path) for path in found if path.is_file() and path.name != "keras.json"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    source = ShapesSource(clips=24, frames=8, height=32, width=32)
    for index in range(len(source)):
        clip, _, _ = source.clip(index)
        path = root / source.class_names[source.label(index)] / f"{index}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_mp4(path, clip, scale=1)
    return root


def train(machine: Machine, place: str, stage: str, kill: signal.Signals | None = None):
    """Train a stage in `place`; with `kill`, stop it so after a save and train it to its end."""
    shown = [*SMALL, *SHORT, "data.source=dataset", f"data.root={place}/clips"]
    if stage != "autoencoder":
        shown.append("latents.starts=1")
    command = ["train", f"--config={CONFIG}:{stage}", f"--workdir={place}/run", *(f"--config.{key}" for key in shown)]
    if kill:
        process = machine.start(*command)
        for line in process.stdout:
            if f"{stage} {EVERY + 1}/" in line or "/12" in line:
                break
        time.sleep(0.5)
        process.send_signal(kill)
        process.stdout.read()
        process.wait()
    return machine.run(*command)


def ledger(text: str) -> dict[int, dict]:
    """The last line of each step."""
    return {line["step"]: line for line in map(json.loads, text.splitlines()) if "step" in line}


@pytest.fixture(scope="module")
def on_disk(videos, tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("disk"), {})
    place = str(machine.folder / "place")
    ingest(machine, videos, place)
    for stage in STAGES:
        train(machine, place, stage)
    run = Path(place, "run")
    ledgers = {stage: ledger((run / stage / "ledger.jsonl").read_text()) for stage in STAGES}
    digests = {stage: json.loads((run / stage / "summary.json").read_text())["digests"] for stage in STAGES}
    return ledgers, digests


def ingest(machine: Machine, videos: Path, place: str):
    machine.run("ingest", f"--config={CONFIG}:autoencoder", f"--source={videos}", f"--out={place}/clips")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["gcs", "s3", "stub"])
def test_a_run_in_a_bucket_is_the_run_on_a_disk(kind, videos, on_disk, tmp_path):
    """stub: every tenth request is answered 503, or cut."""
    faults = {"share": 0.1} if kind == "stub" else {}
    with serving(kind, **faults) as server:
        bucket = Bucket.make(server)
        machine = Machine(tmp_path / "first", server.environment)
        ingest(machine, videos, bucket)
        for stage, kill in zip(STAGES, (signal.SIGTERM, signal.SIGKILL, None), strict=True):
            train(machine, bucket, stage, kill)
        ledgers = {stage: ledger(bucket.get(f"run/{stage}/ledger.jsonl").decode()) for stage in STAGES}
        digests = {stage: json.loads(bucket.get(f"run/{stage}/summary.json"))["digests"] for stage in STAGES}
        for stage in STAGES:
            assert ledgers[stage] == on_disk[0][stage]
            assert digests[stage] == on_disk[1][stage]
        steps = [json.loads(line)["step"] for line in bucket.get("run/motion/metrics.jsonl").decode().splitlines()]
        assert steps[-1] == STEPS
        # A machine that has never seen the run samples and scores it.
        other = Machine(tmp_path / "second", server.environment)
        few = ["--config.sampling.num=4", "--config.sampling.batch_size=4", "--config.sampling.content_steps=2"]
        few += ["--config.sampling.motion_steps=2"]
        other.run("sample", f"--config={CONFIG}:sample", f"--workdir={bucket}/run", *few)
        other.run("evaluate", f"--config={CONFIG}:sample", f"--workdir={bucket}/run", *few)
        names = bucket.names("run")
        assert sum(name.endswith(".mp4") for name in names) >= 4, names
        assert any(name.endswith(".html") for name in names), names
        assert not machine.left() and not other.left()
