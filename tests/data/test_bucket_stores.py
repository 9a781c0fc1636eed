"""Stores of latents in buckets: the objects are the files of a store on a disk; one process at a time fills it."""

import json
import threading

import numpy as np
import pytest
from data.test_store import KEYS, check, filled, values

from cmd_jax.data import claims
from cmd_jax.data.store import StoredClips, folder_of, open_store
from cmd_jax.errors import UserError
from cmd_jax.files import as_path


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(claims.OneLease, "poll", 0.02)
    monkeypatch.setattr(claims, "ASK_AGAIN", 0.0)


def folder(bucket):
    return folder_of(as_path(f"{bucket}/latents"), "cmd")


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_objects_are_the_files_of_a_disk(kind, request, tmp_path):
    bucket = request.getfixturevalue(kind)
    ours, theirs = filled(folder(bucket), 0), filled(folder_of(tmp_path / "latents", "cmd"), 0, 1)
    assert ours.missing() == [1] and ours.shelf is None
    ours = filled(folder(bucket), 0, 1)  # goes on
    for made in (ours, theirs):
        made.finish()
    found = {name: data for name, data in bucket.objects().items() if not name.endswith(".lock")}
    wanted = {path.relative_to(tmp_path): path for path in (tmp_path / "latents").rglob("*") if path.name != ".lock"}
    assert found == {str(name): path.read_bytes() for name, path in wanted.items() if path.is_file()}
    again = open_store(folder(bucket))
    for index in range(6):
        check(again.read(index), index)
    assert again.complete and again.statistics() == theirs.statistics()
    assert [again.shelf.shard_of(index) for index in (4, 5, 3, 2)] == [0, 0, 1, 1] and len(again.shelf.sizes()) == 2
    with again.shelf.fetch(1) as path:
        assert path.read_bytes() == theirs.shards.path(1).read_bytes()
    assert np.array_equal(StoredClips(again).keys(), KEYS)


def test_one_process_at_a_time_makes_shards_and_others_take_them(gcs_stub):
    ours, theirs = filled(folder(gcs_stub)), filled(folder(gcs_stub))
    held, done = ours.claim([0, 1], 2)
    assert list(held) == [0, 1] and done == []
    assert theirs.claim([0, 1], 2) == ({}, [])
    found = []
    reader = threading.Thread(target=lambda: found.append(theirs.read(0)))
    reader.start()
    ours.write(0, [values(ours.examples_of(0))], str)
    reader.join(10)
    check(*found, 0)
    assert theirs.claim([0, 1], 2) == ({}, [0])
    ours.abandon()
    held, done = theirs.claim([0, 1], 2)
    assert list(held) == [1] and done == [0]
    theirs.abandon()


def test_damage_is_found(gcs_stub):
    made = filled(folder(gcs_stub), 0, 1)
    name = str(made.shards.path(0)).removeprefix(f"{gcs_stub}/")
    gcs_stub.flip(name, 9000)
    with pytest.raises(UserError, match="SHA-256") as error:
        open_store(folder(gcs_stub)).read(4)
    assert (error.value.field, str(error.value.value)) == ("shard", f"{gcs_stub}/{name}")
    gcs_stub.put(name, b"cut")
    with pytest.raises(UserError, match="has 3 bytes"):
        open_store(folder(gcs_stub)).missing()
    facts = str(made.shards.facts_path(1)).removeprefix(f"{gcs_stub}/")
    gcs_stub.put(facts, json.dumps(made.facts(1) | {"plan": "another"}).encode())
    with pytest.raises(UserError, match="another store's shard"):
        open_store(folder(gcs_stub)).facts(1)


def test_faults_on_the_way_change_nothing(gcs_stub, tmp_path):
    gcs_stub.server.order(share=0.1, seed=2)
    made, wanted = filled(folder(gcs_stub), 0, 1), filled(folder_of(tmp_path, "cmd"), 0, 1)
    made.finish()
    assert [made.facts(k) for k in (0, 1)] == [wanted.facts(k) for k in (0, 1)]
    for index in range(6):
        check(open_store(folder(gcs_stub)).read(index), index)
