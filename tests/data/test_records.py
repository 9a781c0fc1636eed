"""Shards appear whole, open in TFDS, give single records, and are found out when they are damaged."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from cmd_jax.data import records
from cmd_jax.data.examples import example, parse
from cmd_jax.data.packed import Entries, Packed
from cmd_jax.data.records import VERSION, Records, Shards, finished, write_dataset, write_shard
from cmd_jax.data.roots import Entry
from cmd_jax.errors import UserError
from cmd_jax.files import temporary_prefix

COUNTS = (2, 0, 3)


def rows(k: int) -> list[dict]:
    return [{"id": 10 * k + i - 1, "video": bytes([k, i]) * 300, "texts": ["a", "ü"]} for i in range(COUNTS[k])]


@pytest.fixture
def shards(tmp_path) -> Shards:
    shards = Shards(tmp_path / "clips" / VERSION, "train", len(COUNTS))
    for k in range(len(COUNTS)):
        write_shard(shards, k, map(example, rows(k)), lambda: {"bad": {}})
    return shards


def opened(shards: Shards) -> Records:
    facts = [finished(shards, k) for k in range(shards.count)]
    return Records([shards.path(k) for k in range(shards.count)], [f["bytes"] for f in facts], COUNTS)


def test_records_come_back_by_place(shards):
    read = opened(shards)
    found = [parse(read[place]) for place in (4, 0, 3, 1, 2)]
    wanted = [row for k in range(3) for row in rows(k)]
    assert len(read) == 5
    for parsed, row in zip(found, [wanted[i] for i in (4, 0, 3, 1, 2)], strict=True):
        assert parsed["id"] == [row["id"]]
        assert bytes(parsed["video"][0]) == row["video"]
        assert [bytes(text).decode() for text in parsed["texts"]] == row["texts"]


def test_an_example_is_read_as_protobuf_reads_it():
    message = tf_example_pb2.Example()
    features = message.features.feature
    features["empty"].SetInParent()
    features["none"].bytes_list.SetInParent()
    features["no numbers"].int64_list.SetInParent()
    features["numbers"].int64_list.value.extend([0, 127, 128, 300, 2**63 - 1, -1, -(2**63)])
    features["floats"].float_list.value.extend([0.5, -1e30])
    features["bytes"].bytes_list.value.extend([b"", b"x" * 127, b"y" * 128, b"z" * 70_000])
    found = parse(record := message.SerializeToString(deterministic=True))
    kinds = {"numbers": "int64_list", "no numbers": "int64_list", "floats": "float_list"}
    expected = {n: list(getattr(f, kinds.get(n, "bytes_list")).value) for n, f in features.items()}
    assert found == expected and found["floats"] == [0.5, float(np.float32(-1e30))]
    for end in (0, 1, 3, 20, 500, len(record) - 1):
        with pytest.raises(ValueError, match="."):
            parse(record[:end])
    with pytest.raises(ValueError, match="tag"):
        parse(b"\n\x02\x0b\x00")


@pytest.mark.parametrize(
    "row",
    [
        {"z": b"", "a": [b"x" * 300, b""], "text": "ü", "texts": ["a", "b"], "no": []},
        {"one": -1, "large": [2**63 - 1, 0, 127, 128, -(2**63)], "x": 0.1, "some": [1.5, -2.0]},
    ],
)
def test_examples_are_what_protobuf_reads(row):
    message = tf_example_pb2.Example()
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        kind = {int: "int64_list", float: "float_list"}.get(type(values[0]) if values else None, "bytes_list")
        values = [v.encode() if isinstance(v, str) else v for v in values]
        getattr(message.features.feature[name], kind).value.extend(values)
        getattr(message.features.feature[name], kind).SetInParent()
    assert tf_example_pb2.Example.FromString(example(row)) == message
    assert example(dict(reversed(row.items()))) == example(row)
    assert example({"a": bytearray(b"xy")}) == example({"a": [memoryview(b"xy")]}) == example({"a": b"xy"})


def test_tfds_opens_them_without_our_code(shards, tmp_path):
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({"id": np.int64, "video": text, "texts": tfds.features.Sequence(text)})
    write_dataset(shards.folder, features, {"train": (COUNTS, 3 << 17)}, description="d", metadata={"made": "here"})
    source = tfds.data_source("clips", split="train", data_dir=tmp_path)
    assert [int(x["id"]) for x in source] == [-1, 0, 19, 20, 21]
    assert source[3]["video"] == bytes([2, 1]) * 300
    assert tfds.builder("clips", data_dir=tmp_path).info.metadata["made"] == "here"


def test_a_finished_shard_is_not_written_again(shards):
    before = shards.path(0).stat()
    facts = write_shard(shards, 0, iter([b"other"]), dict)
    after = shards.path(0).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert facts == finished(shards, 0)


def test_what_a_dead_process_left_is_removed_and_a_living_one_s_stays(shards):
    shards.facts_path(0).unlink()
    dead, alive = (shards.folder / f"{temporary_prefix(pid)}{shards.path(0).name}" for pid in (2**22 + 1, 1))
    dead.touch(), alive.touch()
    write_shard(shards, 0, map(example, rows(0)), dict)
    assert not dead.exists() and alive.exists()


def test_a_shard_cut_off_or_damaged_is_found_out(shards):
    path = shards.path(2)
    content = bytearray(path.read_bytes())
    content[content.index(bytes([2, 1]) * 300) + 100] ^= 1
    path.write_bytes(content)
    read = opened(shards)
    with pytest.raises(UserError, match="record 1"):
        read[3]
    path.write_bytes(content[:-65536])
    with pytest.raises(UserError, match=path.name):
        opened(shards)


def test_more_shards_than_files_that_may_be_open(shards, monkeypatch):
    monkeypatch.setattr(records, "most_open", lambda: 2)

    def open_shards():
        links = (path for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
        return sum(os.readlink(link).startswith(f"{shards.folder}/") for link in links)

    several, wanted = [opened(shards) for _ in range(3)], [row["id"] for k in range(3) for row in rows(k)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            order = np.random.default_rng(0).permutation(5).tolist()
            read = [pool.submit(lambda r, place: parse(r[place])["id"], r, p) for p in order for r in several]
            assert [future.result() for future in read] == [[wanted[p]] for p in order for _ in several]
    assert len(records._opened) == 2 and (not Path("/proc/self/fd").exists() or open_shards() == 2)


def test_a_shard_of_other_records_than_its_facts_say(shards):
    paths = [shards.path(k) for k in range(3)]
    wrong = Records(paths, [path.stat().st_size for path in paths], [2, 1, 3])
    with pytest.raises(UserError, match="00001-of-00003: 0 records can be read, where 1 should be"):
        wrong[2]


def test_entries_are_what_went_in(tmp_path):
    entries = [Entry("ü/b.mp4", "two", ("x", "")), Entry("a.mp4"), Entry("c.mp4", "one", ("y",))]
    packed = Entries.of(entries, ("one", "two"))
    packed.save(tmp_path)
    loaded = Entries.load(tmp_path)
    assert list(loaded) == entries
    assert loaded.digest() == packed.digest() != Entries.of(entries[:2], ("one", "two")).digest()
    assert list(packed.take(np.array([2, 0]))) == [entries[2], entries[0]]
    assert list(Entries.of([])) == []
    assert Packed.of(["a", "bc"])[-1] == "bc"
