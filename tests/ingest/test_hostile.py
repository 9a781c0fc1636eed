"""200 clips, 20 of them hostile, through every engine and many kills; 2,000 damaged files. Minutes."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data.test_fuzz_video import PATIENCE, samples, timed, write_damaged
from ingest.datasets import config, digests, records_of
from ingest.hostile import NEEDED, tree
from processes import environment

from cmd_jax.ingest import engines
from cmd_jax.ingest.finish import finish
from cmd_jax.ingest.plan import make_plan, read_plan, version_folder
from cmd_jax.ingest.shard import Limits, finished

BEAM = ["--beam=FnApiRunner", "--beam.direct_num_workers=2", "--beam.direct_running_mode=multi_processing"]
ENGINES = {
    "one": [["--workers=1"]],
    "two": [["--workers=2"]],
    "parts": [["--part=1/2", "--workers=1"], ["--part=2/2", "--workers=1"]],
    "beam": [["--beam=FnApiRunner"]],
    "processes": [BEAM],
}
KILLS = 20
COUNT = 2000  # damaged files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """(folder, names of the hostile files with parts of the reasons)."""
    folder = tmp_path_factory.mktemp("hostile")
    return folder, tree(folder)[1]


def start(folder: Path, out: Path, flags: list[str]) -> subprocess.Popen:
    environ = environment(1)
    environ["PYTHONPATH"] = os.pathsep.join([str(folder / "site"), environ["PYTHONPATH"]])
    values = {"data.frames": NEEDED, "data.probe_timeout": 2, "data.max_bad_fraction": 0.2, "ingest.shard_clips": 2}
    command = [sys.executable, "-m", "cmd_jax.main", "ingest", "--config=ucf101:autoencoder", f"--source={folder}/ucf"]
    command += [f"--out={out}", *flags, *(f"--config.{key}={value}" for key, value in values.items())]
    with open(folder / f"{out.name}.log", "a") as log:
        return subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)


def decoders(folder: Path) -> list[int]:
    """The processes of children, and of Beam's workers, that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environ, words = (path / "environ").read_bytes(), (path / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder / "site").encode() in environ and (b"ingest.decoder" in words or b"sdk_worker" in words):
            found.append(int(path.name))
    return found


def wanted(folder: Path) -> dict[str, str]:
    """The digests of one worker, without a kill."""
    out = folder / "one"
    if not digests(out):
        assert start(folder, out, ["--workers=1"]).wait(600) == 0, (folder / "one.log").read_text()
    return digests(out)


def test_hostile_files_are_left_out_by_their_reasons(hostile):
    folder, reasons = hostile
    assert len(wanted(folder)) == 100
    summary = json.loads((folder / "one/ingest-train.json").read_text())
    assert (summary["clips"], summary["listed"], len(summary["quarantined"])) == (180, 200, 20)
    assert summary["quarantined"].keys() == reasons.keys()
    wrong = {name: why for name, why in summary["quarantined"].items() if reasons[name] not in why}
    assert not wrong
    print(json.dumps(summary["quarantined"], indent=1))


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "one"])
def test_every_engine_writes_the_same(hostile, engine):
    folder, _ = hostile
    for flags in ENGINES[engine]:
        assert start(folder, folder / engine, flags).wait(600) == 0, (folder / f"{engine}.log").read_text()
    assert digests(folder / engine) == wanted(folder)
    one, other = (version_folder(folder / name) for name in ("one", engine))
    assert (one / "index-train.npz").read_bytes() == (other / "index-train.npz").read_bytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_kills_change_nothing(hostile, engine):
    folder, _ = hostile
    target, out, rng = wanted(folder), folder / f"killed-{engine}", random.Random(engine)
    kept, kills = {}, 0
    while kills < KILLS:
        flags = ENGINES[engine][kills % len(ENGINES[engine])]
        before, process = len(digests(out)), start(folder, out, flags)
        end, more = time.monotonic() + 120, rng.choice((0, 1, 1, 3))
        while len(digests(out)) < before + more and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        killed = process.poll() is None
        process.kill()
        process.wait()
        if not killed and len(digests(out)) == len(target):
            break
        kills += killed
        plan = read_plan(version_folder(out), "train")
        for k in range(plan.shards.count) if plan else ():
            if finished(plan, k):
                status = plan.shards.path(k).stat()
                assert kept.setdefault(k, (status.st_ino, status.st_mtime_ns)) == (status.st_ino, status.st_mtime_ns)
    print(f"{engine}: {kills} kills, {len(kept)} of {len(target)} shards finished meanwhile")
    assert kills == KILLS
    for flags in ENGINES[engine]:
        assert start(folder, out, flags).wait(600) == 0, (folder / f"{out.name}.log").read_text()
    assert digests(out) == target
    stats = {k: plan.shards.path(k).stat() for k in kept}
    assert {k: (status.st_ino, status.st_mtime_ns) for k, status in stats.items()} == kept
    end = time.monotonic() + 60
    while decoders(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert not decoders(folder)
    left = {path.name for path in version_folder(out).iterdir() if path.name.startswith(".")} - {".ingest"}
    assert not left


def test_damaged_files_are_ingested_or_named(tmp_path, monkeypatch):
    root, seconds = tmp_path / "clips", timed(monkeypatch)
    sound = [one for one in samples(tmp_path / "sound") if one[0] in ("mp4", "avi")]
    write_damaged(root, COUNT, random.Random(1), sound)
    plan = make_plan(config(root, data__max_bad_fraction=1.0, ingest__codec="jpeg"), tmp_path / "out")
    engines.run_pool(plan, range(plan.shards.count), 2, Limits(20.0, PATIENCE))
    facts = finish(plan, 1.0)
    bad = {name: reason for fact in facts for name, reason in fact["bad"].items()}
    rows = records_of(plan, facts)
    assert len(rows) + len(bad) == COUNT == len(plan.entries)
    assert max(seconds) < PATIENCE
    assert all(reason and reason.isprintable() and "Traceback" not in reason for reason in bad.values())
    assert len(rows) > COUNT / 10 and len(bad) > COUNT / 10  # neither door is shut
    assert all(len(row["video"]) >= 4 and np.isfinite(row["fps"]).all() for row in rows)
    hung, crashed = (sum(word in reason for reason in bad.values()) for word in ("hangs", "crash"))
    print(f"{len(rows)} in, {len(bad)} left out, {crashed} by a crash, {hung} by a hang, slowest {max(seconds):.1f} s")
    assert hung == 0
