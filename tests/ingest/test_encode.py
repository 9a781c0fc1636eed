"""Stores of latents made ahead, of what a config reads and straight from clips that were only listed."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from data.clip_files import numbered, write_clip

from cmd_jax.data.draws import Draws
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.store import LEFT_OUT, folder_of, open_store
from cmd_jax.files import read_json
from cmd_jax.ingest.windows import ListedClips
from cmd_jax.main import main
from cmd_jax.train import train

pytestmark = pytest.mark.xdist_group("tiny")  # where the autoencoder is made anyway
CLIP = {"frames": 4, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def run():
    return tiny.trained()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six good clips of two classes, one that is none and one that is too short."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        write_clip(folder / "ab"[number % 2] / f"{number}.avi", numbered(9 + number))
    write_clip(folder / "a" / "short.avi", numbered(3))
    (folder / "b" / "broken.mp4").write_bytes(b"\0" * 999)
    return folder


def encode(*flags) -> int:
    return main(["ingest", *map(str, flags)])


def config_of(clips, **changes):
    folder = {"data__source": "folder", "data__root": clips}
    return tiny.config_of("content", **folder, **changes)


def test_windows_of_listed_clips_are_those_of_the_folder(clips):
    """To the bit, though no file was tested before."""
    folder = FolderSource(clips, **CLIP, stride=2, max_bad_fraction=1)
    listed = ListedClips(config_of(clips, data__stride=2))
    places = {listed.name(index): index for index in range(len(listed))}
    assert (len(folder), len(listed), listed.listed) == (6, 8, 8)
    for index in range(6):
        video, label, text = listed.clip(places[folder.name(index)], Draws((0, 2, index)))
        wanted, number, _ = folder.clip(index, np.random.default_rng((0, 2, index)))
        assert np.array_equal(video, wanted) and label == number and text is None
    for name in ("a/short.avi", "b/broken.mp4"):
        video, label, text = listed.clip(places[name], Draws((0, 2, 0)))
        assert video.shape == (4, 16, 24, 3) and not video.any() and (label, text) == (LEFT_OUT, "")
    assert listed.bad.keys() == {"a/short.avi", "b/broken.mp4"} and "frames" in listed.bad["a/short.avi"]
    listed.close()


def test_a_store_straight_from_clips_trains_without_them(run, clips, tmp_path, capsys):
    flags = [f"--config={tiny.CONFIG_FILE}:content", f"--source={clips}", "--encode=cmd", f"--workdir={run}"]
    flags += [f"--out={tmp_path / 'store'}", "--config.latents.starts=3", "--config.latents.store_shard=5"]
    flags += ["--config.data.max_bad_fraction=0.3", "--config.latents.store_dtype=float16"]
    assert encode(*flags) == 0
    store = open_store(folder_of(tmp_path / "store", "cmd"))
    assert store.complete and len(store) == 3 * 8 and store.shards.count == 5
    told = read_json(tmp_path / "store" / "cmd" / "ingest.json")
    assert (told["windows"], told["windows_left_out"], told["clips"]) == (18, 6, 8)
    assert told["quarantined"].keys() == {"a/short.avi", "b/broken.mp4"}
    assert "18 windows of 8 clips" in capsys.readouterr().out
    source = tfds.data_source("cmd", split="train", data_dir=tmp_path / "store")
    assert len(source) == 18 and {x["name"].decode()[0] for x in source} == {"a", "b"}
    before = [store.shards.path(k).stat() for k in range(5)]
    assert encode(*flags) == 0  # there is nothing left to do
    assert [(x.st_ino, x.st_mtime_ns) for x in before] == [
        (x.st_ino, x.st_mtime_ns) for x in (store.shards.path(k).stat() for k in range(5))
    ]

    changes = {"latents__starts": 3, "latents__store_dtype": "float16", "train__steps": 5}
    changes |= {"latents__store": tmp_path / "store", "latents__autoencoder": run / "autoencoder"}
    train(config_of("", **changes), tmp_path)
    assert read_json(tmp_path / "content" / "facts.json")["class_names"] == ["a", "b"]
    left_out = np.load(store.shards.folder / "left_out.npy")
    for index in np.setdiff1d(np.arange(24), left_out):  # all that is there is found, behind gaps too
        assert store.read(index)["label"] == "ab".index(store.name(index)[0])
    assert len(left_out) == 6


def test_a_store_made_ahead_is_the_one_that_a_training_fills(run, tmp_path):
    flags = [f"--config={tiny.CONFIG_FILE}:motion", "--encode=cmd", f"--workdir={run}", f"--out={tmp_path}"]
    assert encode(*flags) == 0
    ours, theirs = (open_store(folder_of(folder, "cmd")) for folder in (tmp_path, run / "latents"))
    assert ours.complete and ours.facts(0)["sha256"] == theirs.facts(0)["sha256"]
    assert ours.facts(0)["sums"] == theirs.facts(0)["sums"]
    assert dataclasses.asdict(ours.statistics()) == dataclasses.asdict(theirs.statistics())


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--encode=raw"], "--encode=raw: no such latents"),
        (["--encode=vae"], "--encode=vae: is not what the content stage is trained on"),
        (["--encode=cmd", "--workdir="], "--workdir=: missing"),
        (["--encode=cmd", "--part=1/2"], "--part=1/2: is not for --encode"),
        (["--encode=cmd", "--config.latents.starts=0"], "latents.starts=0: no latents are kept"),
        (["--encode=cmd", "--source=CLIPS", "--config.data.root=x"], "--config.data.root is given too"),
        (["--encode=cmd", "--out=x", "--config.latents.store=y"], "--out=x: --config.latents.store is given too"),
        (["--encode=cmd", "--source=CLIPS", "--out=STORE"], "2 of 8 clips cannot be used, more than data.max_bad_frac"),
        (["--out=x"], "--workdir=RUN: is for --encode"),
    ],
)
def test_faults_are_one_line_and_exit_code_2(flags, line, run, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"CLIPS": str(clips), "STORE": str(tmp_path / "store"), "RUN": str(run)}
    given = [f"--config={tiny.CONFIG_FILE}:content", f"--workdir={run}", *flags]
    for name, path in names.items():
        given, line = [flag.replace(name, path) for flag in given], line.replace(name, path)
    assert encode(*given) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
