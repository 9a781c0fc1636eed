"""The same shards from every engine, whatever kills it; and what its command refuses."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from data.clip_files import numbered, write_clip
from ingest.datasets import LIMITS, config, digests, ingested

from cmd_jax import config as configs
from cmd_jax.data import records
from cmd_jax.ingest import engines, shard
from cmd_jax.ingest.beam import run_beam
from cmd_jax.ingest.finish import finish
from cmd_jax.ingest.plan import make_plan
from cmd_jax.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for i in range(7):
        write_clip(root / f"a/{i}.avi", numbered(5 + i))
    (root / "a/empty.avi").touch()
    return root


@pytest.fixture(scope="module")
def wanted(folder, tmp_path_factory):
    """Digests of the shards, of one worker."""
    out = tmp_path_factory.mktemp("one")
    ingested(config(folder, ingest__shard_clips=2), out)
    return digests(out)


def test_two_workers_and_two_parts_write_what_one_does(folder, wanted, tmp_path, capsys):
    ingested(config(folder, ingest__shard_clips=2), tmp_path / "two", workers=2)
    assert digests(tmp_path / "two") == wanted and len(wanted) == 4
    flags = [f"--source={folder}", f"--out={tmp_path}/parts", "--config.data.max_bad_fraction=0.2"]
    flags += ["--config.data.frames=4", "--config.data.height=24", "--config.data.width=32", "--config.model.patch=4"]
    for part in ("2/2", "1/2"):
        command = ["ingest", "--config=folder:autoencoder", *flags, f"--part={part}", "--config.ingest.shard_clips=2"]
        assert main(command) == 0
        done = (tmp_path / "parts/clips/1.0.0/dataset_info.json").exists()
        assert done == (part == "1/2")
        assert ("2 of 4 shards are left to others" in capsys.readouterr().out) != done
    assert digests(tmp_path / "parts") == wanted
    assert engines.part_of("2/3", 8) == range(1, 8, 3)


def test_beam_writes_the_same(folder, wanted, tmp_path):
    plan = make_plan(config(folder, ingest__shard_clips=2), tmp_path)
    run_beam(plan, range(plan.shards.count), LIMITS, "FnApiRunner", [])
    assert digests(tmp_path) == wanted
    assert sum(fact["records"] for fact in finish(plan, 0.2)) == 7


POOL = """
import sys
from pathlib import Path
from cmd_jax.ingest import engines, plan, shard
whole = plan.read_plan(Path(sys.argv[1]), "train")
engines.run_pool(whole, range(whole.shards.count), 2, shard.Limits(20.0, 0.0))
assert not {"jax", "tensorflow"} & set(sys.modules)
"""


def test_what_is_finished_survives_a_kill_as_it_is(folder, wanted, tmp_path):
    plan = make_plan(config(folder, ingest__shard_clips=2), tmp_path)
    command = [sys.executable, "-c", POOL, str(plan.folder)]
    kept = {}
    for count in (1, 2):  # shards that are there before the kill
        with subprocess.Popen(command) as process:
            while len(digests(tmp_path)) < count and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        stats = {k: plan.shards.path(k).stat() for k in range(4) if shard.finished(plan, k)}
        kept = {k: (status.st_ino, status.st_mtime_ns) for k, status in stats.items()} | kept
    subprocess.run(command, check=True)
    assert digests(tmp_path) == wanted and len(kept) >= 2
    stats = {k: plan.shards.path(k).stat() for k in kept}
    assert {k: (status.st_ino, status.st_mtime_ns) for k, status in stats.items()} == kept
    assert sorted(path.name for path in plan.folder.iterdir() if path.name.startswith(".")) == [".ingest"]


def test_a_failing_worker_stops_the_others_and_is_heard_of(folder, tmp_path, monkeypatch):
    plan = make_plan(config(folder, ingest__shard_clips=2), tmp_path)
    written, write = [], records.write_shard

    def failing(shards, k, *rest):
        if k == 1:
            raise OSError(28, "No space left on device", "there")
        written.append(k)
        return write(shards, k, *rest)

    monkeypatch.setattr(records, "write_shard", failing)
    with pytest.raises(OSError, match="No space"):
        engines.run_pool(plan, range(plan.shards.count), 1, LIMITS)
    assert written == [0] and list(digests(tmp_path)) == ["train/00000"]


def test_ctrl_c_ends_it_after_the_shards_under_way(tmp_path, monkeypatch):
    plan = make_plan(configs.load("quickstart:autoencoder", {"data.clips": 16, "ingest.shard_clips": 1}), tmp_path)
    written, write = [], records.write_shard

    def interrupted(shards, k, *rest):
        if not written:
            os.kill(os.getpid(), signal.SIGINT)
        written.append(k)
        time.sleep(0.1)
        return write(shards, k, *rest)

    monkeypatch.setattr(records, "write_shard", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            engines.run_pool(plan, range(plan.shards.count), 2, LIMITS)
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(0.3)
    assert len(written) <= 2


def test_a_full_disk_is_one_line_and_leaves_nothing_unfinished(folder, tmp_path, capsys):
    flags = ["--config=folder:autoencoder", f"--source={folder}", f"--out={tmp_path}", "--config.data.frames=4"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # stands for it
    try:
        assert main(["ingest", *flags]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("file=") and "too large" in line
    assert not digests(tmp_path) and not [*tmp_path.glob("clips/1.0.0/*clips-*")]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--part=0/2"], "--part=0/2: not a part"),
        (["--part=3/2"], "--part=3/2: not a part"),
        (["--part=one"], "--part=one: not a part"),
        (["--workers=-1"], "--workers=-1: not a number of decoders"),
        (["--beam=DirectRunner"], "--beam=DirectRunner: downloads a binary first"),
        (["--beam=NoRunner"], "--beam=NoRunner: Unexpected pipeline runner"),
        (["--beam=FnApiRunner", "--beam.no_flag=1"], "--beam.no_flag=1: not a flag of Beam's"),
        (["--beam=FnApiRunner", "--beam.direct_num_workers=x"], "argument --direct_num_workers: invalid int value"),
        (["--source="], "--source=: is empty"),
        (["--encode="], "--encode=: is empty"),
        (["--beam=FnApiRunner", "--part=1/2"], "--part=1/2: is not for --beam"),
        (["--beam.direct_num_workers=2"], "--beam=: missing"),
        (["--config.data.root=x"], "--config.data.root is given too"),
        (["--config.ingest.frames=3"], "ingest.frames=3: fewer than the 4 frames"),
        (["--config.ingest.codec=gif"], "ingest.codec=gif: not one of the choices"),
        (["--config.data.split=val"], "data.split=val: "),
        (["--source=nowhere"], "data.root=nowhere: no such folder"),
        (["--source=SOURCE/a/0.avi"], "neither a folder nor a list of clips"),
        (["--out="], "--out=: missing"),
        (["--out=hdfs://bucket/x"], "--out=hdfs://bucket/x: hdfs: is not a scheme"),
        (["--source=gs://bucket/x"], "--source=gs://bucket/x: files of a bucket are not decoded"),
    ],
)
def test_faults_are_one_line_and_exit_code_2(folder, tmp_path, capsys, flags, line):
    given = [f"--source={folder}", f"--out={tmp_path}/out", "--config.data.frames=4"]
    flags = [*given, *(flag.replace("SOURCE", str(folder)) for flag in flags)]
    assert main(["ingest", "--config=folder:autoencoder", *flags]) == 2
    error = capsys.readouterr().err
    assert line in error.splitlines()[-1]
    assert not (tmp_path / "out/clips/1.0.0/dataset_info.json").exists()
