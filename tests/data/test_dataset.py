"""A run over a dataset is the run over the folder that it was made of; what is no whole dataset is refused."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from data.clip_files import numbered, numbers, write_clip
from data.datasets import write_records
from data.folders import SIZE, manifest, names, probed, texts
from ingest.datasets import config, ingested

from cmd_jax import defaults
from cmd_jax.data.dataset import DatasetSource
from cmd_jax.data.pipeline import BatchPlan, batches, video_reader
from cmd_jax.data.sources import open_source
from cmd_jax.errors import UserError
from cmd_jax.sharding import make_mesh


def opened(out, **settings):
    return DatasetSource(out, **{**SIZE, "max_bad_fraction": 0.9, **settings})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of clips, some unusable and some short, with captions and labels, and a dataset of all good ones."""
    root, out = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    for i, count in enumerate((20, 14, 9, 20, 31, 8)):
        write_clip(root / f"{i}.avi", rng.integers(0, 256, (count, 48, 64, 3), np.uint8), "ffv1", "bgr0")
    (root / "broken.avi").write_bytes(b"x")
    lines = ["0,a dog,dog", "0,a red dog,dog", "1,a cat,cat", "broken,no ape,ape", "2,a cow,cow", "3,a fox,"]
    lines = [line.replace(",", ".avi,", 1) for line in [*lines, "4,two dogs,dog", "4,dogs,dog", "5,an owl,owl"]]
    manifest(root, "\n".join(["file_name,text,label", *lines]))
    ingested(config(root), out)
    return root, out


@pytest.mark.parametrize("settings", [{}, {"frames": 3, "stride": 4}, {"frames": 14}, {"random_start": False}])
def test_batches_are_those_of_the_folder(made, settings):
    root, out = made
    folder, dataset = probed(root, **settings), opened(out, **settings)
    assert (names(dataset), texts(dataset)) == (names(folder), texts(folder))
    assert dataset.class_names == folder.class_names and dataset.has_texts
    assert dataset.labels.tolist() == folder.labels.tolist() and dataset.lengths.tolist() == folder.lengths.tolist()
    assert dataset.fingerprint not in (folder.fingerprint, opened(out, frames=2).fingerprint)
    tokenizer, mesh = lambda said: np.array([[*said[0].encode()[:4]]]), make_mesh(defaults.stage("content").mesh)
    plan, drawn = BatchPlan(len(folder), len(folder), seed=0), set()
    got = [
        batches(video_reader(source, tokenizer), plan, mesh, start=0, stop=6, threads=2, prefetch=2)
        for source in (folder, dataset)
    ]
    for theirs, ours in zip(*got, strict=True):
        jax.tree.map(np.testing.assert_array_equal, theirs, ours)
        drawn.add(np.asarray(ours["ids"]).tobytes())
    assert len(drawn) > 3


def test_mixed_rates_come_out_as_from_the_folder(tmp_path):
    root, out = tmp_path / "clips", tmp_path / "out"
    write_clip(root / "a25.mp4", numbered(20))
    write_clip(root / "b10.mp4", numbered(20), times=[100 * k for k in range(20)])
    write_clip(root / "c.mkv", numbered(20), times=[*range(0, 400, 40), *range(500, 1500, 100)])
    ingested(config(root, data__fps=12.5), out)
    settings = {"fps": 12.5, "frames": 4, "stride": 2}
    folder, dataset = probed(root, **settings), opened(out, **settings)
    assert dataset.lengths.tolist() == folder.lengths.tolist() == [10, 24, 18]
    for index in range(3):
        for seed in range(5):
            theirs, ours = (source.clip(index, np.random.default_rng(seed))[0] for source in (folder, dataset))
            np.testing.assert_array_equal(theirs, ours)
    refused("data.fps", r"=10: the dataset in .* has fps=12.5; use 12.5", out, fps=10)
    assert len(opened(out)) == 3


def test_a_window_does_not_keep_its_record_in_memory(made):
    video, *_ = opened(made[1]).clip(0, np.random.default_rng(0))
    assert video.base is None and video.flags.c_contiguous


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_only_the_images_of_the_window_are_decoded(tmp_path, monkeypatch, codec):
    from PIL import Image

    frames = numbered(20)
    write_records(tmp_path, [(frames, -1, "a.avi", ())], codec=codec)
    source = opened(tmp_path, frames=3, stride=2, height=48, width=64)
    seen, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: seen.append(1) or real(*a, **k))
    video, label, text = source.clip(0, np.random.default_rng(0))
    start = int(np.random.default_rng(0).integers(0, 20 - 4))
    assert numbers(video) == [start, start + 2, start + 4] and len(seen) == 3
    assert (label, text, source.has_texts, source.class_names) == (0, None, False, ())
    assert codec != "png" or np.array_equal(video, frames[start : start + 5 : 2])


def test_reading_needs_neither_a_decoder_nor_tensorflow(made):
    code = (
        "import sys, numpy as np; from cmd_jax.data.dataset import DatasetSource; "
        f"source = DatasetSource({str(made[1])!r}, frames=4, height=24, width=32, max_bad_fraction=0.5); "
        "source.clip(0, np.random.default_rng(0)); "
        "print([m for m in ('av', 'tensorflow', 'tensorflow_datasets', 'google.protobuf', 'jax') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def refused(field, match, out, **settings):
    with pytest.raises(UserError, match=match) as error:
        opened(out, **settings)
    assert error.value.field == field and "\n" not in str(error.value)


def test_other_frames_than_the_dataset_s_are_refused(made):
    for name, value in (("height", 48), ("width", 64)):
        refused(f"data.{name}", rf"={value}: the dataset in .* has {name}={SIZE[name]}", made[1], **{name: value})
    refused("data.fps", r"=10: the dataset in .* has its clips' own", made[1], fps=10)


def test_clips_left_out_count_here_and_at_ingest(made):
    out = made[1]
    assert len(opened(out, max_bad_fraction=1 / 7)) == 6
    refused("data.root", "1 of 7 clips cannot be used, more than", out, max_bad_fraction=0.1)
    refused("data.root", "3 of 7 .*: 2 have fewer than 13 frames, 1 were", out, frames=13, max_bad_fraction=0.4)
    refused("data.root", "7 of 7 clips cannot be used: 6 have", out, frames=40, max_bad_fraction=1)


def test_what_is_no_whole_dataset_is_refused(tmp_path):
    clips = [(np.full((9, 24, 32, 3), i, np.uint8), -1, str(i), ()) for i in range(4)]
    out = tmp_path / "out"
    folder = write_records(out, clips, finished=False)
    refused("data.root", "missing", "")
    refused("data.root", "no such folder", tmp_path / "gone")
    refused("data.root", "holds no dataset; .*data.source=folder", tmp_path)
    refused("data.root", "split train is not finished", out)
    (folder / "dataset_info.json").write_text("{}")
    assert len(opened(out)) == 4
    refused("data.root", f"inside of a dataset; give data.root={out}$", folder)
    refused("data.root", f"inside of a dataset; give data.root={out}$", folder.parent)
    refused("data.split", "no such split; use train", out, split="test")
    (folder / ".ingest" / "test").mkdir(parents=True)
    refused("data.root", "split test is not finished", out, split="test")
    (tmp_path / "latents/cmd/1.0.0").mkdir(parents=True)
    (tmp_path / "latents/cmd/1.0.0/dataset_info.json").write_text("{}")
    refused("data.root", "perhaps latents; give it as latents.store", tmp_path / "latents")


@pytest.mark.parametrize("harm", ["cut", "gone", "index cut", "column", "plan", "counts"])
def test_damage_is_found_when_it_is_opened(tmp_path, harm):
    clips = [(np.full((9, 24, 32, 3), i, np.uint8), -1, str(i), ()) for i in range(4)]
    folder = write_records(tmp_path, clips)
    shard, index = sorted(folder.glob("*array_record*"))[1], folder / "index-train.npz"
    columns = dict(np.load(index))
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "gone":
        shard.unlink()
    elif harm == "index cut":
        index.write_bytes(index.read_bytes()[:700])
    else:
        columns |= {
            "column": {"length": columns["length"].astype(np.float32)},
            "plan": {"plan": np.frombuffer(b"[]", np.uint8)},
            "counts": {"counts": columns["counts"] + 1},
        }[harm]
        np.savez(index, **columns)
    path = shard if harm in ("cut", "gone") else index
    refused("shard" if path is shard else "data.root", path.name, tmp_path)


def test_a_record_that_is_not_as_its_index_says(tmp_path):
    clips = [(np.full((9, 24, 32, 3), i, np.uint8), -1, str(i), ()) for i in range(4)]
    index = write_records(tmp_path, clips, shards=2) / "index-train.npz"
    columns = dict(np.load(index))
    columns["length"][3] = 12
    np.savez(index, **columns)
    with pytest.raises(UserError, match="clips-train.array_record-00001-of-00002: record 1 is not what its index says"):
        for seed in range(20):
            opened(tmp_path).clip(3, np.random.default_rng(seed))


def test_another_s_shard_of_the_same_size_is_refused(tmp_path):
    clips = [(np.full((9, 24, 32, 3), i, np.uint8), -1, str(i), ()) for i in range(4)]
    first, second = sorted(write_records(tmp_path, clips, shards=2).glob("*array_record*"))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert first.stat().st_size == second.stat().st_size
    source = opened(tmp_path)
    for index, path in ((1, first), (3, second), (1, first)):  # not by the first record alone, and not only once
        with pytest.raises(UserError, match="another's: it begins with") as error:
            source.clip(index, np.random.default_rng(0))
        assert (error.value.field, error.value.value) == ("shard", path)


def test_a_config_names_it(made):
    options = defaults.stage("autoencoder").data
    options.update({**SIZE, "source": "dataset", "root": str(made[1]), "max_bad_fraction": 0.5})
    source = open_source(options)
    assert isinstance(source, DatasetSource) and len(source) == 6
    assert source.keys().dtype == np.uint64 and source.keys().tolist() == probed(made[0]).keys().tolist()
