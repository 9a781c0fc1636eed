"""Datasets in buckets: the batches and fingerprints of the local ones, what is damaged, what is fetched when."""

import contextlib
import json
import threading
import time

import jax
import numpy as np
import pytest
from data.datasets import write_records
from data.folders import ANSWER, names, source

from cmd_jax import cache, defaults
from cmd_jax.data.ahead import Ahead, Shelf
from cmd_jax.data.dataset import DatasetSource
from cmd_jax.data.outcomes import Outcomes
from cmd_jax.data.pipeline import BatchPlan, batches, video_reader
from cmd_jax.data.sources import open_source
from cmd_jax.errors import Unavailable, UserError, exit_code
from cmd_jax.files import as_path
from cmd_jax.ingest.plan import source_of
from cmd_jax.sharding import make_mesh
from cmd_jax.verbs.requests import open_clips

SIZE = {"frames": 4, "height": 24, "width": 32}
RNG = np.random.default_rng(0)
VIDEOS = [RNG.integers(0, 255, (6 + i % 3, 24, 32, 3), np.uint8) for i in range(12)]
CLIPS = [(video, i % 2, f"{i}.avi", ("a", "b")) for i, video in enumerate(VIDEOS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    write_records(out, CLIPS, ("x", "y"), shards=4)
    return out


@pytest.fixture(autouse=True)
def default_cache():
    yield
    cache.use("", 0)


def copied(made, bucket, at="data"):
    for path in made.rglob("*"):
        if path.is_file():
            bucket.put(f"{at}/{path.relative_to(made)}", path.read_bytes())
    return f"{bucket}/{at}"


def read(source, steps=6):
    plan, mesh = BatchPlan(len(source), 4, seed=0), make_mesh(defaults.stage("content").mesh)
    options = {"start": 0, "stop": steps, "threads": 2, "prefetch": 2, "shelf": source.shelf}
    return [jax.tree.map(np.asarray, batch) for batch in batches(video_reader(source), plan, mesh, **options)]


def check_equal(ours: list[dict], theirs: list[dict]):
    for a, b in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def shard(bucket, k: int) -> str:
    return f"data/clips/1.0.0/clips-train.array_record-{k:05d}-of-00004"


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_batches_are_those_of_the_disk(kind, made, request):
    url = copied(made, request.getfixturevalue(kind))
    ours, theirs = DatasetSource(url, **SIZE), DatasetSource(made, **SIZE)
    assert ours.fingerprint == theirs.fingerprint and theirs.shelf is None
    check_equal(read(ours), read(theirs))
    assert (ours.keys() == theirs.keys()).all()


def test_faults_on_the_way_change_nothing(made, gcs_stub, monkeypatch):
    url = copied(made, gcs_stub)
    monkeypatch.setattr(cache, "CHUNK", 2**14)
    gcs_stub.server.order(share=0.1, seed=3)
    check_equal(read(DatasetSource(url, **SIZE)), read(DatasetSource(made, **SIZE)))
    assert any(status != 200 and status != 206 for *_, status in gcs_stub.server.seen)


def test_a_cache_smaller_than_the_data_is_enough(made, gcs, tmp_path, monkeypatch):
    url, largest = copied(made, gcs), max(path.stat().st_size for path in made.rglob("*array_record*"))
    cache.use(str(tmp_path / "small"), 2.5 * largest / 2**30)
    found, made_room = [], cache.Cache._made_room

    def watched(self, *arguments):
        done = made_room(self, *arguments)
        found.append(0)
        with self._counting():
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found[-1] += path.stat().st_size
        return done

    monkeypatch.setattr(cache.Cache, "_made_room", watched)
    monkeypatch.setattr("cmd_jax.data.ahead.FETCHES", 1)
    check_equal(read(DatasetSource(url, **SIZE)), read(DatasetSource(made, **SIZE)))
    assert largest < max(found) <= 2.5 * largest and len(found) > 8  # each shard again and again


def test_damage_in_the_bucket_is_found(made, gcs):
    url = copied(made, gcs)
    gcs.flip(shard(gcs, 1), 9000)
    with pytest.raises(UserError, match="SHA-256") as error:
        read(DatasetSource(url, **SIZE))
    assert (error.value.field, str(error.value.value)) == ("shard", f"{gcs}/{shard(gcs, 1)}")
    gcs.put(shard(gcs, 1), b"short")
    with pytest.raises(UserError, match="has 5 bytes"):
        DatasetSource(url, **SIZE)
    gcs.delete(shard(gcs, 1))
    with pytest.raises(UserError, match="is missing"):
        DatasetSource(url, **SIZE)


def test_damage_of_the_copies_is_mended_while_they_are_read(made, gcs):
    url = copied(made, gcs)
    ours, theirs = DatasetSource(url, **SIZE), DatasetSource(made, **SIZE)
    check_equal(read(ours), read(theirs))
    for path in cache.current().folder.glob("*-*"):
        with open(path, "r+b") as file:  # as a disk would, behind the open reader
            file.seek(9000)
            file.write(b"damage" * 100)
    check_equal(read(ours), read(theirs))
    gcs.put("data/clips/1.0.0/index-train.npz", b"x")
    with pytest.raises(UserError, match="index-train.npz: cannot be read") as error:  # not the copy of the earlier one
        DatasetSource(url, **SIZE)
    assert error.value.field == "data.root"


def test_files_of_a_bucket_are_no_folder_of_videos(gcs):
    gcs.put("videos/a.mp4", b"x")
    config = defaults.stage("autoencoder").data
    config.update(source="folder", root=f"{gcs}/videos")
    with pytest.raises(UserError, match="cmd-jax ingest") as error:
        open_source(config)
    assert error.value.field == "data.root"
    with pytest.raises(UserError, match="not decoded") as error:
        source_of(f"{gcs}/videos", "train")
    assert error.value.field == "--source"
    config.update(source="dataset", root=f"{gcs}/none")
    with pytest.raises(UserError, match="no such folder"):
        open_source(config)


def test_a_store_that_fails_while_it_is_read(made, gcs_stub, monkeypatch):
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "0.2")
    url = copied(made, gcs_stub)
    for kind, faults in ((Unavailable, {"share": 1.0, "kinds": ("503",)}), (PermissionError, {"deny": "read"})):
        source = DatasetSource(url, **SIZE)
        gcs_stub.server.order(**faults)
        with pytest.raises(kind, match="array_record"):
            read(source)
        with pytest.raises((UserError, kind)) as error:
            DatasetSource(url, **SIZE)
        assert exit_code(error.value) == (3 if kind is Unavailable else 2)
        gcs_stub.server.order()
    check_equal(read(source), read(DatasetSource(made, **SIZE)))


def test_clips_to_start_from_are_read_from_a_bucket(made, gcs_stub, tmp_path):
    videos = []
    for root in (copied(made, gcs_stub), made):
        config = defaults.stage("sample")
        config.data.update(source="dataset", root=str(root), split="train", **SIZE)
        clips = open_clips(config, tmp_path, 5)
        videos.append(([*clips.videos], clips.labels.tolist(), clips.texts))
    jax.tree.map(np.testing.assert_array_equal, *videos)


def test_outcomes_of_testing_files_are_kept_in_a_bucket(gcs_stub):
    path, facts = as_path(f"{gcs_stub}/run/probe.jsonl"), json.loads(ANSWER)
    for name in "ab":
        with Outcomes(path).appending() as keep:
            keep(f"{name}.mp4", [1, 2], facts)
    found = Outcomes(path)
    assert [found.of(f"{name}.mp4", [1, 2]) for name in "abc"] == [facts, facts, None]
    assert gcs_stub.get("run/probe.jsonl").count(b"\n") == 3


def test_a_folder_of_videos_keeps_them_there(gcs_stub, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    cache = as_path(f"{gcs_stub}/run/probe.jsonl")
    assert names(source(tmp_path, cache=cache)) == ["a.mp4", "b.mp4"] and gcs_stub.names() == ["run/probe.jsonl"]
    source(tmp_path, cache=cache, probe_command=["no"])  # nothing is tested again


class Shelved:
    """A shelf of five shards of ten bytes with three examples each. fetched: those that were, in their order."""

    def __init__(self):
        self.fetched, self.lock = [], threading.Lock()
        self.shelf = Shelf(lambda: [10] * 5, lambda index: index // 3, self.fetch)

    def fetch(self, k: int):
        with self.lock:
            self.fetched.append(k)
        return self

    def close(self):
        pass

    def wait_for(self, count: int) -> list[int]:
        end = time.monotonic() + 5
        while len(self.fetched) < count and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(0.02)
        return self.fetched


ORDER = [4, 5, 12, 3, 0, 9, 1, 13, 6, 7]  # of shards 1 1 4 1 0 3 0 4 2 2


def test_shards_are_fetched_in_the_order_of_their_first_use(monkeypatch, tmp_path):
    monkeypatch.setattr("cmd_jax.data.ahead.FETCHES", 1)
    shelved = Shelved()
    Ahead(shelved.shelf, iter(ORDER))
    assert shelved.wait_for(5) == [1, 4, 0, 3, 2]
    shelved, examples = Shelved(), iter(ORDER * 100)
    Ahead(shelved.shelf.by(lambda number: 14 - number), examples)
    assert shelved.wait_for(5) == [3, 0, 4, 1, 2] and next(examples, None) is not None  # no more than there are


def test_what_half_of_the_cache_holds_is_fetched_behind_the_reader(monkeypatch, tmp_path):
    monkeypatch.setattr("cmd_jax.data.ahead.FETCHES", 1)
    cache.use(str(tmp_path), 45 / 2**30)
    shelved = Shelved()
    ahead = Ahead(shelved.shelf, iter(ORDER))
    for taken in (0, 3):  # the second half is read from the example 4 on
        ahead.taken = taken
        assert shelved.wait_for(4) == [1, 4, 0, 3]
    ahead.taken = 4
    assert shelved.wait_for(6) == [1, 4, 0, 3, 4, 2]
    ahead.close()


def test_the_first_batch_waits_for_its_own_shards_alone(made, gcs, monkeypatch):
    """However long the others take."""
    source, slow = DatasetSource(copied(made, gcs), **SIZE), threading.Event()
    plan, mesh = BatchPlan(len(source), 2, seed=0), make_mesh(defaults.stage("content").mesh)
    needed = {source.shelf.shard_of(int(index)) for index in plan.ids(0)}
    assert len(needed) < 4
    fetch, paths = type(cache.current()).fetch, [f"{gcs}/{shard(gcs, k)}" for k in range(4)]

    def waiting(self, path, *facts):
        if paths.index(str(path)) not in needed:
            slow.wait(10)
        return fetch(self, path, *facts)

    monkeypatch.setattr(type(cache.current()), "fetch", waiting)
    options = {"start": 0, "stop": 1, "threads": 2, "prefetch": 2, "shelf": source.shelf}
    (batch,) = batches(video_reader(source), plan, mesh, **options)
    assert np.asarray(batch["id"]).tolist() == plan.ids(0).tolist() and not slow.is_set()
    slow.set()
