"""Stores of latents: what lies where, what is refused, and that TFDS opens them."""

import os
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cmd_jax.data import store as stores
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.data.store import StoredClips, begin_store, folder_of, open_store
from cmd_jax.errors import UserError
from cmd_jax.files import read_json

MADE_OF = {"data": "f", "autoencoder: parameters": "a", "latents.starts": 2}
CLIPS, STARTS, SHARD = 3, 2, 4  # shards of 4 and 2 windows
ORDER = np.array([4, 1, 0, 5, 3, 2])
KEYS = np.array([7, 2**64 - 1, 0], np.uint64)


def plan(dtype="float32", **changes):
    arrays = {"content": {"dtype": dtype, "shape": [2, 3]}, "motion": {"dtype": dtype, "shape": [2, 2, 1]}}
    plan = {
        "made_of": MADE_OF, "made_with": {}, "class_names": ["a", "b"], "has_texts": False, "clips": CLIPS,
        "examples": CLIPS * STARTS, "held_out": 0, "shard": SHARD, "arrays": arrays,
    }  # fmt: skip
    return plan | changes


def values(indices, scale=1.0):
    """Latents and labels of these windows: numbers that no two of them share."""
    count = len(indices)
    base = np.asarray(indices, np.float32)[:, None] * 100 + np.arange(6)
    content = (base * scale).reshape(count, 2, 3)
    return {"content": content, "motion": content.reshape(count, 2, 3, 1)[:, :, :2], "label": np.array(indices) % CLIPS}


def filled(folder, *shards, **changes):
    store = begin_store(folder, plan(**changes), lambda: (ORDER, KEYS))
    for k in shards:
        indices = store.examples_of(k)
        store.write(k, (values(part) for part in np.array_split(indices, 2)), "clip{}".format, {})
    return store


@pytest.fixture
def folder(tmp_path):
    return folder_of(tmp_path, "cmd")


def check(example, index):
    wanted = values([index])
    for name in ("content", "motion"):
        assert example[name].dtype == np.float32 and np.array_equal(example[name], wanted[name][0])
    assert example["label"] == index % CLIPS


def test_windows_lie_in_the_order_that_was_given(folder):
    store = filled(folder, 0, 1)
    assert [store.examples_of(k).tolist() for k in (0, 1)] == [[4, 1, 0, 5], [3, 2]]
    assert store.shards_of([5, 4]).tolist() == [0] and store.shards_of([2, 4]).tolist() == [0, 1]
    for index in range(6):
        check(store.read(index), index)
    again = open_store(folder)
    check(again.read(3), 3)
    assert again.read(3)["label"].dtype == np.int32
    assert [bytes(again.record(i)["name"][0]) for i in (1, 4)] == [b"clip1", b"clip1"]  # two windows of a clip


def test_tfds_opens_a_complete_store(folder, tmp_path):
    store = filled(folder, 0, 1)
    assert not store.complete and store.missing() == []
    store.finish()
    assert store.complete
    source = tfds.data_source("cmd", split="train", data_dir=tmp_path)
    for place, index in enumerate(ORDER):
        found = source[place]
        assert found["name"] == f"clip{index % CLIPS}".encode()
        check(found, index)
    builder = tfds.builder("cmd", data_dir=tmp_path)
    assert dict(builder.info.metadata["made_of"]) == MADE_OF and builder.info.metadata["class_names"] == ["a", "b"]


def test_a_complete_store_stands_for_its_clips(folder):
    clips = StoredClips(filled(folder, 0, 1))
    assert (len(clips), clips.fingerprint, clips.class_names, clips.has_texts) == (3, "f", ("a", "b"), False)
    assert np.array_equal(clips.keys(), KEYS)
    assert [clips.store.name(i) for i in range(3)] == ["clip0", "clip1", "clip2"]


def test_names_that_are_no_utf8_come_back(folder):
    store = begin_store(folder, plan(), lambda: (ORDER, KEYS))
    store.write(0, [values(store.examples_of(0))], lambda clip: os.fsdecode(b"\xff%d" % clip))
    assert store.name(4) == os.fsdecode(b"\xff1")


def test_a_shard_is_made_once(folder):
    store = filled(folder, 0)
    before = store.shards.path(0).stat()
    assert store.missing() == [1]
    filled(folder, 0)
    after = store.shards.path(0).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_what_is_not_there_yet_is_waited_for(folder):
    store, found = filled(folder), []
    reader = threading.Thread(target=lambda: found.append(store.read(0)))
    reader.start()
    filled(folder, 0)  # another opening of the store, as by another process
    reader.join(10)
    check(*found, 0)
    store.abandon()
    with pytest.raises(RuntimeError, match="nobody fills"):
        store.read(3)


def test_shards_are_claimed_by_one_of_those_that_fill(folder):
    ours, theirs = filled(folder), filled(folder)
    held, done = ours.claim([0, 1], 1)
    assert list(held) == [0] and done == []
    others, done = theirs.claim([0, 1], 2)
    assert list(others) == [1] and done == []
    held[0].close()
    others[1].close()
    filled(folder, 0)
    held, done = theirs.claim([0, 1], 2)
    assert list(held) == [1] and done == [0]
    held[1].close()


# Statistics.


def test_statistics_are_those_of_the_values_that_are_kept(folder):
    parts = values(range(6))
    wanted = LatentStatistics.of([{name: sums_of(parts[name]) for name in ("content", "motion")}])
    found = filled(folder, 0, 1).statistics()
    np.testing.assert_allclose(found.content.mean, parts["content"].reshape(-1, 3).mean(0))
    np.testing.assert_allclose(found.content.std, parts["content"].reshape(-1, 3).std(0))
    np.testing.assert_allclose(found.motion.mean, wanted.motion.mean)


def sums_of(x):
    sums = stores.Sums()
    sums.add(x)
    return sums.as_json()


def test_they_go_over_the_first_shards_without_what_is_held_out(folder, monkeypatch):
    store = filled(folder, 0, 1, held_out=3)
    assert list(store.measured()) == [0, 1]
    assert store.statistics().content.mean[0] == pytest.approx(np.mean([500, 503, 300, 303, 200, 203]))
    monkeypatch.setattr(stores, "STATISTICS_EXAMPLES", 1)
    assert list(store.measured()) == [0]
    assert store.statistics().content.mean[0] == pytest.approx(501.5)  # of window 5 alone


# Half precision.


def test_half_precision_is_kept_and_summed_as_such(folder):
    store = filled(folder, 0, 1, dtype="float16")
    example = store.read(4)
    assert example["content"].dtype == np.float16
    np.testing.assert_array_equal(example["content"], values([4])["content"][0].astype(np.float16))


def test_what_half_precision_cannot_hold_is_refused(folder):
    store = begin_store(folder, plan("float16"), lambda: (ORDER, KEYS))
    with pytest.raises(UserError) as error:
        store.write(0, [values(store.examples_of(0), scale=1e3)], str, {})
    assert (error.value.field, error.value.value) == ("latents.store_dtype", "float16")
    assert store.missing() == [0, 1] and not store.shards.path(0).exists()


# Refusals.


@pytest.mark.parametrize(
    "name, other", [("autoencoder: parameters", "b"), ("latents.starts", 3), ("tokenizer: pad", 0), ("data", None)]
)
def test_a_store_of_something_else_is_refused_by_name(name, other, folder):
    filled(folder)
    with pytest.raises(UserError) as error:
        begin_store(folder, plan(made_of=MADE_OF | {name: other}), lambda: (ORDER, KEYS))
    assert (error.value.field, error.value.value) == ("latents.store", folder)
    assert error.value.problem == f"its {name} is {MADE_OF.get(name)}, here {other}"


DAMAGES = {
    "the order": ("latents.store", lambda store: np.save(store.shards.folder / "order.npy", ORDER[::-1])),
    "no order": ("latents.store", lambda store: (store.shards.folder / "order.npy").unlink()),
    "the plan": ("latents.store", lambda store: (store.shards.folder / "plan.json").write_text("{}")),
    "a cut shard": ("shard", lambda store: store.shards.path(0).write_bytes(store.shards.path(0).read_bytes()[:-9])),
    "no shard": ("shard", lambda store: store.shards.path(0).unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_found(damage, folder):
    field, harm = DAMAGES[damage]
    harm(filled(folder, 0, 1))
    with pytest.raises(UserError) as error:
        open_store(folder).missing()
    assert error.value.field == field


def test_shards_that_an_earlier_store_left_are_not_taken_for_its_own(folder):
    filled(folder, 0, 1)
    (folder / "plan.json").unlink()
    store = filled(folder, made_of=MADE_OF | {"autoencoder: parameters": "b"})
    with pytest.raises(UserError, match="of another store") as error:
        store.missing()
    assert error.value.field == "latents.store"


def test_two_that_begin_a_store_get_the_same(folder):
    begun = []
    orders = [ORDER, ORDER[::-1]]
    threads = [
        threading.Thread(target=lambda o=o: begun.append(begin_store(folder, plan(), lambda: (o, KEYS))))
        for o in orders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert np.array_equal(begun[0].order, begun[1].order)
    assert read_json(folder / "plan.json")["order"] == begun[0].plan["order"]
