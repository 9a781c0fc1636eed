"""Trainings over stores of latents: filled while they run, taken over, without the data that they were made of."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from data.datasets import write_records
from processes import Job

from cmd_jax import prepare as preparing
from cmd_jax.config import to_json
from cmd_jax.data.encoding import Encoder
from cmd_jax.data.store import folder_of, open_store
from cmd_jax.errors import UserError
from cmd_jax.files import read_json, write_text
from cmd_jax.report.console import make_console
from cmd_jax.sharding import make_mesh
from cmd_jax.train import train

pytestmark = pytest.mark.xdist_group("tiny")  # where the run is made anyway


@pytest.fixture(scope="module")
def run() -> Path:
    """With a complete store, latents/cmd."""
    return tiny.trained()


def config_of(run, stage="content", **changes):
    return tiny.config_of(stage, latents__autoencoder=run / "autoencoder", **changes)


def losses(folder: Path) -> list[tuple]:
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return [(line["step"], line["ids"], line["loss"]) for line in lines if "step" in line]


def prepared(config, workdir):
    return preparing.prepare(config, workdir, make_mesh(config.mesh), make_console(quiet=True), False)


def test_a_store_that_a_run_fills_and_a_kept_one_train_alike_to_the_bit(run, tmp_path, capsys):
    """And a run that is broken off in between, while the store is not complete."""
    few = {"latents__normalize": False, "latents__store_shard": 5}
    train(config_of(run, train__steps=3, **few), tmp_path)
    store = open_store(folder_of(tmp_path / "latents", "cmd"))
    assert store.missing() == list(range(3, 10))  # three batches of four windows: three shards of five
    before = store.shards.path(1).stat()
    train(config_of(run, **few), tmp_path)
    assert store.missing() == list(range(5, 10)) and not store.complete
    after = store.shards.path(1).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert "of 10 shards" in capsys.readouterr().out

    whole = tmp_path / "whole"
    train(config_of(run, latents__normalize=False, latents__store=run / "latents"), whole)
    assert losses(tmp_path / "content") == losses(whole / "content")
    digests = [read_json(folder / "content" / "summary.json")["digests"] for folder in (tmp_path, whole)]
    assert digests[0] == digests[1]


def test_a_store_in_a_bucket_is_filled_in_two_parts_and_is_the_same(run, gcs_stub, tmp_path):
    changes = {"latents__normalize": False, "latents__store_shard": 5, "latents__store": f"{gcs_stub}/latents"}
    first = prepared(config_of(run, **changes), tmp_path).filler
    assert first.fill([0, 1, 2]) and first.store.missing() == list(range(3, 10))
    first.store.abandon()
    before = gcs_stub.objects("latents/cmd/1.0.0/.ingest/train/0")
    second = prepared(config_of(run, **changes), tmp_path)
    assert second.filler.missing == {*range(3, 10)} and second.filler.fill()
    again = gcs_stub.objects("latents/cmd/1.0.0/.ingest/train/0")
    assert len(before) == 3 and {name: again[name] for name in before} == before
    kept = open_store(folder_of(run / "latents", "cmd"))
    for index in range(48):
        for name, values in kept.read(index).items():
            np.testing.assert_array_equal(second.read(index, None)[name], values)
    gone = {"data__source": "folder", "data__root": tmp_path / "gone"}
    found = prepared(config_of(run, **changes, **gone), tmp_path)
    assert found.clips == 48 and len(found.shelf.sizes()) == 10 and found.name_of(3) == "shapes-train-000003"


def test_a_run_goes_on_over_a_copy_of_its_data_in_a_bucket_and_back(gcs_stub, tmp_path):
    rng = np.random.default_rng(0)
    clips = [(rng.integers(0, 255, (6, 16, 24, 3), np.uint8), i % 2, f"{i}.avi", ()) for i in range(8)]
    write_records(tmp_path / "disk", clips, ("a", "b"))
    for path in filter(Path.is_file, (tmp_path / "disk").rglob("*")):
        gcs_stub.put(str(path.relative_to(tmp_path)), path.read_bytes())
    folder, metadata = tmp_path / "autoencoder", []
    for step, root in enumerate([tmp_path / "disk", f"{gcs_stub}/disk", tmp_path / "disk"]):
        config = tiny.config_of("autoencoder", data__source="dataset", data__root=root)
        preparing.check_same_run(folder, config)
        found = preparing.prepare(config, tmp_path, make_mesh(config.mesh), make_console(quiet=True), step > 0)
        write_text(folder / "config.json", to_json(config))
        metadata.append(found.metadata)
    assert metadata[0] == metadata[1] == metadata[2] and metadata[0].data.fingerprint
    write_records(tmp_path / "other", clips[::-1], ("a", "b"))
    gcs_stub.put("disk/clips/1.0.0/index-train.npz", (tmp_path / "other/clips/1.0.0/index-train.npz").read_bytes())
    config = tiny.config_of("autoencoder", data__source="dataset", data__root=f"{gcs_stub}/disk")
    with pytest.raises(UserError, match="the dataset changed"):
        preparing.prepare(config, tmp_path, make_mesh(config.mesh), make_console(quiet=True), True)


def test_half_precision_trains_nearly_alike(run, tmp_path):
    train(config_of(run, latents__store_dtype="float16"), tmp_path)
    ours, theirs = losses(tmp_path / "content"), losses(run / "content")
    assert [line[1] for line in ours] == [line[1] for line in theirs]
    for (_, _, half), (_, _, single) in zip(ours, theirs, strict=True):
        assert float.fromhex(half) == pytest.approx(float.fromhex(single), rel=0.01) and half != single


def test_several_starts_make_a_longer_epoch(run, tmp_path):
    found = prepared(config_of(run, latents__starts=3, latents__normalize=False), tmp_path)
    assert found.clips == len(found.filler.store) == 3 * 48
    assert found.name_of(17) == found.name_of(17 + 48) == "shapes-train-000017"


def test_a_complete_store_needs_no_data(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "__call__", None)
    gone = {"data__source": "folder", "data__root": tmp_path / "gone", "latents__store": run / "latents"}
    found, wanted = prepared(config_of(run, **gone), tmp_path), prepared(config_of(run), run)
    assert found.clips == 48 and found.name_of(3) == "shapes-train-000003"
    assert found.metadata == wanted.metadata and len(found.metadata.class_names) == 48
    with pytest.raises(UserError, match="^data.root="):  # what is not complete does
        prepared(config_of(run, **gone | {"latents__store": tmp_path / "other"}), tmp_path)


@pytest.mark.parametrize(
    "name, change",
    [
        ("data", {"data__seed": 1}),
        ("latents.starts", {"latents__starts": 2}),
        ("latents.store_seed", {"latents__store_seed": 1}),
        ("autoencoder: parameters", {}),
    ],
)
def test_a_store_of_something_else_is_refused_by_name(name, change, run, tmp_path, monkeypatch):
    if not change:  # another autoencoder
        of = preparing.AutoencoderMetadata.of
        monkeypatch.setattr(
            preparing.AutoencoderMetadata, "of", lambda x: preparing.replace(of(x), params="of other weights")
        )
    with pytest.raises(UserError) as error:
        prepared(config_of(run, latents__store=run / "latents", **change), tmp_path)
    assert error.value.field == "latents.store" and error.value.value == folder_of(run / "latents", "cmd")
    assert error.value.problem.startswith(f"its {name} is ")


WRITES = """
from cmd_jax.data.store import LatentStore
whole = LatentStore.write
def write(self, k, *arguments):
    print("writes", k)
    return whole(self, k, *arguments)
LatentStore.write = write
"""


def test_two_processes_share_the_encoding(run, tmp_path):
    """Each makes every second shard; what comes out is what one process makes."""
    arguments = ["ingest", f"--config={tiny.CONFIG_FILE}:content", "--encode=cmd", f"--workdir={run}"]
    arguments += [f"--out={tmp_path}", "--config.latents.store_shard=5", "--config.train.batch_size=8"]
    with Job(tmp_path / "logs", *arguments, devices=1, before=dict.fromkeys(range(2), WRITES)) as job:
        assert job.wait() == [0, 0], job.out(0) + job.out(1)
        wrote = [[line for line in job.out(i).splitlines() if line.startswith("writes")] for i in (0, 1)]
    assert wrote == [[f"writes {k}" for k in range(first, 10, 2)] for first in (0, 1)]
    ours, theirs = (open_store(folder_of(folder, "cmd")) for folder in (tmp_path, run / "latents"))
    assert ours.complete
    for index in range(48):
        for name, values in theirs.read(index).items():
            np.testing.assert_allclose(ours.read(index)[name], values, atol=1e-6)
    means = [store.statistics().motion.mean for store in (ours, theirs)]
    np.testing.assert_allclose(*means, atol=1e-6)
