"""A folder of clips becomes a dataset: what it holds, what it leaves out, and what it refuses."""

import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data.clip_files import numbered, numbers, quarters, write_clip, write_sound
from data.folders import names
from ingest.datasets import LIMITS, config, digests, frames_of, ingested, records_of
from rich.console import Console

from cmd_jax.config import load
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.sources import open_source
from cmd_jax.data.splits import keys_of
from cmd_jax.errors import UserError
from cmd_jax.ingest import engines
from cmd_jax.ingest.decoder import middle
from cmd_jax.ingest.finish import finish
from cmd_jax.ingest.plan import make_plan, source_of
from cmd_jax.main import main
from cmd_jax.report import ingest as reporting
from cmd_jax.report.console import make_console
from cmd_jax.report.ingest import Note, report
from cmd_jax.verbs.ingest import source_overrides


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes and an empty one; clips of 20 and of 3 frames, an empty file, and a sound."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(5):
        write_clip(root / f"a/{i}.avi", numbered(20 + i))
    write_clip(root / "b/c.mp4", quarters(8, 60, 60), aspect=2)
    write_clip(root / "b/short.avi", numbered(3))
    (root / "b/empty.mp4").touch()
    write_sound(root / "b/sound.mp4")
    (root / "nothing").mkdir()
    return root


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """(out, plan, facts) of the folder."""
    out = tmp_path_factory.mktemp("made")
    return out, *ingested(config(folder), out, workers=2)


def opened(folder):
    return FolderSource(folder, frames=4, height=24, width=32, max_bad_fraction=0.9)


def test_records_are_the_clips_of_the_folder_in_its_order(folder, made):
    out, plan, facts = made
    source = opened(folder)
    rows = records_of(plan, facts)
    assert [bytes(row["name"][0]).decode() for row in rows] == [source.name(i) for i in range(len(source))]
    for i, row in enumerate(rows):
        video = frames_of(row)
        assert len(video) == source.lengths[i]
        first, last = (source.clip(i, np.random.default_rng(seed))[0] for seed in (0, 1))
        for window in (first, last):
            assert any(np.array_equal(video[s : s + 4], window) for s in range(len(video) - 3))
        assert [plan.class_names[row["label"][0]]] == [source.class_names[source.label(i)]]
        assert row["fps"] == [25.0]
    left_out = {name: reason for fact in facts for name, reason in fact["bad"].items()}
    assert left_out == source.bad and len(left_out) == 3


def test_the_index_has_a_row_for_each_clip(folder, made):
    out, plan, facts = made
    with np.load(plan.shards.index) as index:
        columns = dict(index)
    assert columns["length"].tolist() == [20, 21, 22, 23, 24, 8]
    assert columns["label"].tolist() == [0] * 5 + [1]
    assert columns["text_count"].tolist() == [0] * 6
    assert columns["key"].tolist() == keys_of(names(opened(folder))).tolist()
    assert columns["counts"].sum() == 6 and len(columns["counts"]) == plan.shards.count == 9
    assert columns["sha256"].tobytes().hex() == "".join(fact["sha256"] for fact in facts)
    assert columns["sizes"].tolist() == [plan.shards.path(k).stat().st_size for k in range(9)]
    assert json.loads(columns["plan"].tobytes())["id"] == plan.id


def test_tfds_opens_it_without_our_code(made):
    out, plan, _ = made
    source = tfds.data_source("clips", split="train", data_dir=out)
    assert len(source) == 6
    assert numbers(source[1]["video"]) == list(range(21))
    assert source[5]["name"] == b"b/c.mp4" and source[5]["video"].shape == (8, 24, 32, 3)
    info = tfds.builder("clips", data_dir=out).info
    assert info.features["label"].names == ["a", "b", "nothing"] == info.metadata["class_names"]


@pytest.mark.parametrize("codec", ["png", "jpeg"])
def test_pictures_are_the_frames_too(folder, made, tmp_path, codec):
    plan, facts = ingested(config(folder, ingest__codec=codec, ingest__shard_clips=9), tmp_path)
    exact = records_of(*made[1:])
    for row, raw in zip(records_of(plan, facts), exact, strict=True):
        video, wanted = (frames_of(row, codec), frames_of(raw))
        assert np.abs(video.astype(int) - wanted).max() <= (0 if codec == "png" else 12)
    shown = tfds.data_source("clips", split="train", data_dir=tmp_path)[5]["video"]
    assert np.array_equal(np.stack(shown), video)


def test_a_long_clip_gives_its_middle_whatever_its_header_promises(tmp_path):
    root, video = tmp_path / "videos", numbered(21)
    write_clip(root / "says.avi", video)
    write_clip(root / "silent.ts", video)
    lying = write_clip(root / "lies.avi", video, codec="ffv1")
    data = lying.read_bytes()
    assert data.count((21).to_bytes(4, "little")) >= 2  # in both headers
    lying.write_bytes(data.replace((21).to_bytes(4, "little"), (15).to_bytes(4, "little")))
    plan, facts = ingested(config(root, ingest__frames=6), tmp_path / "out")
    for row in records_of(plan, facts):
        assert numbers(frames_of(row)) == list(range(7, 13))
    assert [fact["whole"] for fact in facts] == [[21]] * 3 and [fact["lengths"] for fact in facts] == [[6]] * 3


def test_the_middle():
    assert [middle(*x) for x in ((10, 4), (11, 4), (3, 4), (10, 0))] == [range(3, 7), range(3, 7), range(3), range(10)]


def test_data_fps_goes_by_the_times_of_the_frames(tmp_path):
    root = tmp_path / "videos"
    write_clip(root / "uneven.mkv", numbered(8), times=[0, 40, 80, 400, 440, 480, 520, 560])
    plan, facts = ingested(config(root, data__fps=12.5), tmp_path / "out")
    (row,) = records_of(plan, facts)
    source = FolderSource(root, frames=8, height=24, width=32, fps=12.5)
    assert facts[0]["lengths"] == [8] and row["fps"] == [12.5]
    assert np.array_equal(frames_of(row), source.clip(0, np.random.default_rng(0))[0])


def test_frames_of_too_many_pixels_are_refused_from_their_first_or_on_the_way(tmp_path):
    root = tmp_path / "videos"
    small, large = (write_clip(root / f"{side}.m1v", numbered(10, side, side)) for side in (48, 480))
    write_clip(root / "large.mp4", numbered(10, 480, 480))
    grows = root / "grows.m1v"
    grows.write_bytes(small.read_bytes() + large.read_bytes())
    _, facts = ingested(config(root, ingest__pixels=10_000), tmp_path / "out")
    bad = {name: reason for fact in facts for name, reason in fact["bad"].items()}
    assert bad == {
        "large.mp4": "claims frames of 480x480; more than ingest.pixels=10000 are refused",
        large.name: "claims no frame size, or one of more than ingest.pixels=10000",
    }
    assert [fact["lengths"] for fact in facts] == [[10], [], [9], []]  # its last small frame was still to come
    _, facts = ingested(config(root), tmp_path / "others")
    assert facts[2]["bad"] == {grows.name: "changes its frame size on the way (48x48 to 480x480)"}


def test_another_plan_in_the_same_place_is_refused_by_the_field_that_differs(folder, made, tmp_path):
    out, plan, _ = made

    def refused(match, root=folder, **overrides):
        with pytest.raises(UserError, match=match) as error:
            make_plan(config(root, **overrides), out)
        assert error.value.field == "--out" and "\n" not in str(error.value)

    assert make_plan(config(folder), out).id == plan.id
    refused("height=24, and not 32", data__height=32)
    refused("codec=raw, and not jpeg", ingest__codec="jpeg", ingest__quality=90)
    refused("needed=4, and not 7", data__stride=2)
    refused("shard_clips=1, and not 2", ingest__shard_clips=2)
    refused("layout=auto, and not classes", data__layout="classes")
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert make_plan(config(copied), out).id == plan.id  # moved, but the same
    write_clip(copied / "b/more.avi")
    refused("clips", root=copied)


def test_a_damaged_index_is_told(folder, tmp_path):
    plan, _ = ingested(config(folder, ingest__shard_clips=9), tmp_path)
    plan.shards.index.write_bytes(plan.shards.index.read_bytes()[:700])
    with pytest.raises(UserError, match="index-train.npz: cannot be read"):
        make_plan(config(folder, ingest__shard_clips=9), tmp_path)


def test_splits_share_a_dataset_if_their_classes_are_the_same(tmp_path):
    root, out = tmp_path / "videos", tmp_path / "out"
    for name in ("train/a/1", "train/b/2", "test/a/3", "test/b/4", "val/a/5"):
        write_clip(root / f"{name}.avi")
    ingested(config(root), out)
    plan, _ = ingested(config(root, data__split="test"), out)
    infos = tfds.builder("clips", data_dir=out).info
    assert {name: split.num_examples for name, split in infos.splits.items()} == {"train": 2, "test": 2}
    with pytest.raises(UserError, match="class_names"):
        make_plan(config(root, data__split="val"), out)
    shutil.rmtree(plan.folder / ".ingest")  # is not needed any more, but by who makes further splits
    with pytest.raises(UserError, match="class_names"):
        make_plan(config(root, data__split="val"), out)
    with pytest.raises(UserError, match="codec=raw, and not png"):
        make_plan(config(root, ingest__codec="png"), out)


def test_progress_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(reporting, "NOTE_EVERY", 0)
    said = io.StringIO()
    with Note(Console(file=said), 4) as note:
        note.clip("")
        note.clip("is empty")
    first, second = said.getvalue().splitlines()
    assert first.startswith("1 of 4 clips, ") and "left out" not in first
    assert re.fullmatch(r"2 of 4 clips, [\d,.]+ clips/s, 1 left out, 0:00:00 left", second)


def test_a_list_is_a_source_by_its_folder(tmp_path):
    for name in ("metadata.csv", "results_train.csv", "results_val.csv"):
        (tmp_path / name).write_text("videoid,contentUrl,duration,page_dir,name\n")
    lists = {name: tmp_path / f"results_{name}.csv" for name in ("train", "val")}
    assert source_of(str(tmp_path), "train") == (str(tmp_path), None)
    assert source_of(str(tmp_path / "metadata.csv"), "train") == (str(tmp_path), "metadata")
    assert source_of(str(lists["val"]), "val") == (str(tmp_path), "webvid")
    for path, split in ((lists["val"], "train"), (lists["train"], "all"), (tmp_path / "results_train.csv", "val")):
        with pytest.raises(UserError, match="--source"):
            source_of(str(path), split)


def test_a_source_takes_settings_that_the_config_s_own_would_refuse(tmp_path):
    sizes = {"data.buckets": "64x32"}  # which generated clips cannot have
    found = source_overrides(str(tmp_path), "quickstart:autoencoder", sizes)
    assert load("quickstart:autoencoder", sizes | found).data.root == str(tmp_path)


def test_names_that_are_no_utf8_are_names_too(tmp_path):
    good, name = write_clip(tmp_path / "good.avi"), os.fsdecode(b"a/\xff.avi")
    (tmp_path / "videos/a").mkdir(parents=True)
    for path in (name, os.fsdecode(b"a/\xfe.avi")):
        shutil.copy(good, tmp_path / "videos" / path)
    (tmp_path / "videos" / path).write_bytes(b"")
    plan, facts = ingested(config(tmp_path / "videos"), tmp_path / "out")
    report(plan, facts, tmp_path / "out", make_console(quiet=True))
    (row,) = records_of(plan, facts)
    assert bytes(row["name"][0]) == b"a/\xff.avi" and facts[0]["bad"] == {path: "is empty (zero bytes)"}


def test_captions_and_labels_of_a_manifest_come_along(tmp_path):
    root, out = tmp_path / "videos", tmp_path / "out"
    for name in ("x", "y"):
        write_clip(root / f"{name}.avi")
    rows = ["file_name,text,label", "y.avi,a cat,pets", 'x.avi,"a dog, ü",', "y.avi,another cat,pets"]
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    plan, facts = ingested(config(root), out)
    first, second = tfds.data_source("clips", split="train", data_dir=out)
    assert (first["name"], first["texts"], first["label"]) == (b"y.avi", [b"a cat", b"another cat"], 0)
    assert (second["name"], [text.decode() for text in second["texts"]], second["label"]) == (
        b"x.avi",
        ["a dog, ü"],
        -1,
    )
    with np.load(plan.shards.index) as index:
        assert index["text_count"].tolist() == [2, 1] and index["label"].tolist() == [0, -1]


def test_too_many_bad_clips_are_an_error_in_the_end_and_the_shards_stay(folder, tmp_path):
    plan = make_plan(config(folder), tmp_path)
    engines.run_pool(plan, range(plan.shards.count), 1, LIMITS)
    with pytest.raises(UserError, match="3 of 9 clips cannot be used, more than data.max_bad_fraction=0.3") as error:
        finish(plan, 0.3)
    assert error.value.field == "data.root"
    assert not plan.shards.index.exists() and len(digests(tmp_path)) == 9
    assert sum(fact["records"] for fact in finish(plan, 0.4)) == 6


def test_generated_clips_are_ingested_too(tmp_path, capsys):
    flags = [f"--out={tmp_path}", "--config.data.clips=5", "--config.data.split=test", "--config.ingest.shard_clips=2"]
    assert main(["ingest", "--config=quickstart:autoencoder", *flags]) == 0
    source = tfds.data_source("clips", split="test", data_dir=tmp_path)
    assert len(source) == 5 and source[3]["texts"] == [b"a red circle moving down"]
    assert len(digests(tmp_path)) == 3
    assert "5 clips" in capsys.readouterr().out


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_clips_of_several_sizes(tmp_path, codec):
    shapes = {"a": (24, 32), "b": (40, 40), "c": (60, 30)}
    for name, (height, width) in shapes.items():
        write_clip(tmp_path / f"in/{name}.mp4", quarters(6, height, width))
    sizes = {"data__buckets": "24x24,32x16"}
    folder_config = config(tmp_path / "in", ingest__codec=codec, **sizes)
    ingested(folder_config, tmp_path / "out")
    of_dataset = config(tmp_path / "out", data__source="dataset", **sizes)
    source, dataset = open_source(folder_config.data), open_source(of_dataset.data)
    assert source.buckets.tolist() == dataset.buckets.tolist() == [0, 1, 2]
    example = tfds.data_source("clips", split="train", data_dir=tmp_path / "out")
    for i in range(3):
        video, *_ = source.clip(i, np.random.default_rng(i))
        read, *_ = dataset.clip(i, np.random.default_rng(i))
        assert video.shape == read.shape == (4, *((24, 32), (24, 24), (32, 16))[i], 3)
        assert np.abs(video.astype(int) - read).max() <= (0 if codec == "raw" else 60)
        assert np.stack(list(example[i]["video"])).shape == (6, *video.shape[1:])
    with pytest.raises(UserError) as raised:
        open_source(config(tmp_path / "out", data__source="dataset").data)
    assert raised.value.field == "data.buckets"
