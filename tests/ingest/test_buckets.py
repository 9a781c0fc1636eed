"""Ingest into buckets: the objects are the files that it writes on a disk, whatever stopped it in between."""

import json
import subprocess
import sys
import time

import pytest

from cmd_jax.main import main

FLAGS = ["ingest", "--config=quickstart:autoencoder", "--config.data.clips=7", "--config.ingest.shard_clips=2"]
FLAGS += ["--config.data.frames=4", "--config.data.height=16", "--config.data.width=24"]
FOLDER = "data/clips/1.0.0"


def ingest(out, *flags) -> int:
    return main([*FLAGS, f"--out={out}", *flags])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, bytes]:
    """Of a disk."""
    out = tmp_path_factory.mktemp("out") / "data"
    assert ingest(out) == 0
    return {str(path.relative_to(out.parent)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def timeless(objects: dict[str, bytes]) -> dict:
    """The objects but reports, without what was measured."""
    found = {name: data for name, data in objects.items() if not name.startswith("data/ingest-train.")}
    for name in found:
        if name.startswith(f"{FOLDER}/.ingest/train/0"):
            found[name] = {key: x for key, x in json.loads(found[name]).items() if key not in ("wall", "cpu")}
    return found


def shard(k: int, count: int = 4) -> str:
    return f"{FOLDER}/clips-train.array_record-{k:05d}-of-{count:05d}"


def facts(k: int) -> str:
    return f"{FOLDER}/.ingest/train/{k:05d}.json"


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_objects_are_the_files_of_a_disk(kind, made, request):
    bucket = request.getfixturevalue(kind)
    assert ingest(f"{bucket}/data") == 0
    assert bucket.names() == sorted(made)
    assert timeless(bucket.objects()) == timeless(made)
    told = json.loads(bucket.get("data/ingest-train.json"))
    assert (told["clips"], told["shards"]) == (7, 4)


def test_what_has_no_facts_is_written_anew_and_the_rest_stays(made, gcs, capsys):
    for name, data in made.items():
        gcs.put(name, data)
    for k in (1, 2):
        gcs.delete(facts(k))
    gcs.put(shard(1), b"cut")
    gcs.put(shard(2), made[shard(2)][:-1] + b"x")
    for name in ("dataset_info.json", "index-train.npz"):
        gcs.delete(f"{FOLDER}/{name}")
    kept = {k: gcs.get(facts(k)) for k in (0, 3)}
    assert ingest(f"{gcs}/data", "--part=1/2") == 0
    assert "1 of 4 shards are left to others" in capsys.readouterr().out
    assert f"{FOLDER}/dataset_info.json" not in gcs.names()
    assert ingest(f"{gcs}/data", "--part=2/2") == 0
    assert timeless(gcs.objects()) == timeless(made)
    assert {k: gcs.get(facts(k)) for k in (0, 3)} == kept
    gcs.put(shard(0), b"cut")
    assert ingest(f"{gcs}/data") == 2
    assert f"shard={gcs}/{shard(0)}: has 3 bytes" in capsys.readouterr().err


def test_faults_on_the_way_change_nothing(made, gcs_stub):
    gcs_stub.server.order(share=0.1, seed=1)
    assert ingest(f"{gcs_stub}/data") == 0
    gcs_stub.server.order()
    assert timeless(gcs_stub.objects()) == timeless(made)


def test_a_killed_one_goes_on(gcs, tmp_path):
    more = ["--config.data.clips=30", "--config.ingest.shard_clips=1"]
    command = [sys.executable, "-m", "cmd_jax.main", *FLAGS, *more, f"--out={gcs}/data", "--workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while facts(1) not in gcs.names(facts(1)):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = gcs.objects(f"{FOLDER}/.ingest/train/0")
    assert 2 <= len(before) < 30 and f"{FOLDER}/dataset_info.json" not in gcs.names()
    assert ingest(f"{gcs}/data", *more) == ingest(tmp_path / "data", *more) == 0
    ours = gcs.objects("data/clips")
    assert {name: ours[name] for name in before} == before
    theirs = {name: (tmp_path / name).read_bytes() for name in ours}
    assert timeless(ours) == timeless(theirs) and len(ours) == sum(x.is_file() for x in tmp_path.rglob("clips/**/*"))
