import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from data.clip_files import numbered, numbers, write_clip, write_huge_header, write_sound

from cmd_jax.data import outcomes, probe
from cmd_jax.data.folder import FolderSource
from cmd_jax.errors import UserError

SIZE = {"frames": 8, "height": 24, "width": 32}
ANSWER = '{"frames": 20, "declared": 20, "width": 64, "height": 48, "key_frames": []}'
TRUSTING = f"""
import sys
print('{{"ready": true}}', flush=True)
for line in sys.stdin:
    print('{ANSWER}', flush=True)
"""


@pytest.fixture(scope="module")
def clip_bytes(tmp_path_factory):
    """A good avi of 20 frames, to be copied."""
    return write_clip(tmp_path_factory.mktemp("clip") / "a.avi").read_bytes()


@pytest.fixture
def put(tmp_path, clip_bytes):
    """put("data/x.avi", ...): good clips at these places below tmp_path. Returns the root, tmp_path/data."""

    def put(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(clip_bytes)
        return tmp_path / "data"

    return put


def source(root, **settings):
    """With a child that takes every file for a good one, since it starts ten times as fast as the true one."""
    command = [sys.executable, "-I", "-S", "-c", TRUSTING]
    return FolderSource(root, **{**SIZE, "max_bad_fraction": 0.9, "probe_command": command, **settings})


def probed(root, **settings):
    return source(root, probe_command=probe.COMMAND, **settings)


def names(source):
    return [source.name(index) for index in range(len(source))]


def labels(source):
    return [source.clip(index, np.random.default_rng(0))[1] for index in range(len(source))]


def manifest(root, text, name="metadata.csv"):
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


# Layouts


def test_class_folders(put):
    got = probed(
        put("b dog/2.avi", "b dog/1.AVI", "a cat/deep/er/x.avi", ".hidden/x.avi", "a cat/._x.avi", "a cat/notes.txt")
    )
    assert got.class_names == ("a cat", "b dog")
    assert names(got) == ["a cat/deep/er/x.avi", "b dog/1.AVI", "b dog/2.avi"]
    assert labels(got) == [0, 1, 1]
    assert got.texts is None
    assert got.bad == {}


def test_loose_videos_have_no_class(put):
    got = source(put("x.avi", "y.avi"))
    assert got.class_names == ()
    assert labels(got) == [0, 0]
    mixed = source(put("cat/z.avi"))
    assert mixed.class_names == ("cat",)
    assert dict(zip(names(mixed), labels(mixed), strict=True)) == {"cat/z.avi": 0, "x.avi": 1, "y.avi": 1}


@pytest.fixture
def ucf(put, tmp_path):
    """Three classes, two folds, the lists beside the root; files by number, a class in the order of classInd."""
    root = put(*(f"{c}/v_{c}_g01_c0{i}.avi" for c in ("Apple", "Pear", "Fig") for i in (1, 2)))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"1 Pear\r\n2 Apple\r\n3 Fig\r\n")
    for fold, (train, test) in {1: (1, 2), 2: (2, 1)}.items():
        rows = [(c, n) for n, c in enumerate(("Pear", "Apple", "Fig"), 1)]
        (lists / f"trainlist0{fold}.txt").write_text("".join(f"{c}/v_{c}_g01_c0{train}.avi {n}\n" for c, n in rows))
        (lists / f"testlist0{fold}.txt").write_text("".join(f"{c}/v_{c}_g01_c0{test}.avi\n" for c, _ in rows))
    return root


def test_ucf101_folds_and_splits(ucf, tmp_path):
    train = source(ucf)
    assert train.class_names == ("Pear", "Apple", "Fig")
    assert names(train) == ["Pear/v_Pear_g01_c01.avi", "Apple/v_Apple_g01_c01.avi", "Fig/v_Fig_g01_c01.avi"]
    assert labels(train) == [0, 1, 2]
    test = source(ucf, split="test")
    assert names(test) == [name.replace("c01", "c02") for name in names(train)]
    assert labels(test) == [0, 1, 2]
    assert names(source(ucf, fold=2)) == names(test)
    assert sorted(names(source(ucf, split="all"))) == sorted(names(train) + names(test))
    shutil.move(tmp_path / "ucfTrainTestlist", ucf / "ucfTrainTestlist")
    assert source(ucf).fingerprint == train.fingerprint


def test_ucf101_without_class_index_sorts_the_classes(ucf, tmp_path):
    (tmp_path / "ucfTrainTestlist/classInd.txt").unlink()
    got = source(ucf)
    assert got.class_names == ("Apple", "Fig", "Pear")
    assert labels(got) == [2, 0, 1]


def test_lists_of_another_data_set_beside_the_root_do_not_count(ucf, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ucf / "Fig", other / "Cherry")
    assert source(other).class_names == ("Cherry",)
    assert source(ucf, layout="classes").class_names == ("Apple", "Fig", "Pear")


CSV = 'file_name,text,label\r\nsub/a.avi,"red, ""big""\r\nand round",apple\r\n./b.avi,grün,\r\nc.avi,,pear\r\n'


def test_metadata_csv_with_bom_crlf_and_quotes(put):
    got = source(manifest(put("sub/a.avi", "b.avi", "c.avi", "unlisted.avi"), b"\xef\xbb\xbf" + CSV.encode()))
    assert names(got) == ["sub/a.avi", "b.avi", "c.avi"]
    assert got.texts == ('red, "big"\r\nand round', "grün", "")
    assert got.class_names == ("apple", "pear")
    assert labels(got) == [0, 2, 1]


def test_metadata_jsonl(put):
    rows = [{"file_name": "a.avi", "text": "one\ntwo", "label": 10}, {"file_name": "b.avi", "text": "x", "label": 2}]
    root = manifest(put("a.avi", "b.avi"), "\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)), "metadata.jsonl")
    got = source(root)
    assert got.texts == ("one\ntwo", "x")
    assert got.class_names == ("2", "10")
    assert labels(got) == [1, 0]


def test_metadata_without_labels_is_unlabelled(put):
    got = source(manifest(put("a.avi"), "text,file_name\nhello,a.avi\n"))
    assert (got.class_names, labels(got), got.texts) == ((), [0], ("hello",))


def test_rows_of_one_file_are_captions_of_it(put, caplog):
    rows = "a.avi,one\nb.avi,x\n./a.avi,two\na.avi,one\na.avi,three\n"
    with caplog.at_level(logging.INFO):
        got = source(manifest(put("a.avi", "b.avi"), "file_name,text\n" + rows))
    assert (names(got), got.texts) == (["a.avi", "b.avi"], ("one", "x"))
    assert "4 captions of 2 files; 1 rows repeat another" in caplog.text
    drawn = [got.text(0, np.random.default_rng(seed)) for seed in range(30)]
    assert {*drawn} == {"one", "two", "three"}
    assert drawn == [got.text(0, np.random.default_rng(seed)) for seed in range(30)]
    # A single caption draws nothing, so that a clip has the start that it would have without captions.
    rng = np.random.default_rng(0)
    assert (got.text(1, rng), rng.random()) == ("x", np.random.default_rng(0).random())
    fewer = source(manifest(put(), "file_name,text\na.avi,one\nb.avi,x\n"))
    assert got.fingerprint != fewer.fingerprint


def test_a_manifest_without_a_title_row(put, caplog):
    root = manifest(put("a.avi", "b c.avi"), 'a.avi,"a dog, running",dog\nb c.avi,a cat,cat\n')
    with caplog.at_level(logging.INFO):
        got = source(root)
    assert (names(got), got.texts) == (["a.avi", "b c.avi"], ("a dog, running", "a cat"))
    assert (got.class_names, labels(got)) == (("cat", "dog"), [1, 0])
    assert "taken for file_name, text, label" in caplog.text
    assert source(manifest(root, "a.avi,a dog\n")).texts == ("a dog",)
    refused("data.root", "where file_name is needed", manifest(root, "gone.avi,a dog\n"))


# Folders of splits


def test_folders_of_splits_are_no_classes(put, caplog):
    folders = [f"{split}/{name}" for split in ("Training", "valid", "testing") for name in ("cat", "dog")]
    places = [f"{folder}/{i}.avi" for folder in folders for i in "12"]
    root = put(*places)
    (root / "annotations").mkdir()
    (root / "annotations/notes.txt").write_text("")
    with caplog.at_level(logging.INFO):
        got = source(root)
    assert names(got) == [name for name in places if name.startswith("Training")]
    assert (got.class_names, labels(got)) == (("cat", "dog"), [0, 0, 1, 1])
    assert "its folders are the splits Training, testing, valid; read: Training" in caplog.text
    assert names(source(root, split="val")) == [name for name in places if name.startswith("valid")]
    assert names(source(root, split="test", layout="classes")) == [n for n in places if n.startswith("testing")]
    assert labels(source(root, split="all")) == [0, 0, 1, 1] * 3
    shutil.rmtree(root / "valid")
    refused("data.split", "are the splits Training, testing; use test or train", root, split="val")


def test_metadata_below_folders_of_splits(put):
    root = put("train/a.avi", "train/sub/b.avi", "test/c.avi")
    manifest(root, "file_name,text,label\na.avi,a dog,10\nsub/b.avi,a cat,9\n", "train/metadata.csv")
    manifest(root, '{"file_name": "c.avi", "text": "a cow"}\n', "test/metadata.jsonl")
    for layout in ("auto", "metadata"):
        got = source(root, layout=layout)
        assert (names(got), got.texts) == (["train/a.avi", "train/sub/b.avi"], ("a dog", "a cat"))
        assert (got.class_names, labels(got)) == (("9", "10"), [1, 0])
        assert source(root, layout=layout, split="test").texts == ("a cow",)
        assert len(source(root, layout=layout, split="all").texts) == 3
        refused("data.split", "use test or train", root, layout=layout, split="val")
    assert source(root, layout="classes").class_names == ("sub",)
    (root / "train/link.avi").symlink_to(root / "test/c.avi")  # within the root, if not within the split
    assert len(source(manifest(root, "file_name,text\nlink.avi,x\n", "train/metadata.csv"))) == 1
    manifest(root, "file_name,text\n../test/c.avi,x\n", "train/metadata.csv")
    refused("data.root", "line 2: .* leaves the data root", root)
    manifest(root, "file_name,text\na.avi,x\n", "train/sub/metadata.csv")
    refused("data.root", "train/sub/metadata.csv is not read from here", root)


def test_one_manifest_over_folders_of_splits(put, caplog):
    root = manifest(put("train/a.avi", "val/b.avi"), "file_name,text\ntrain/a.avi,a dog\nval/b.avi,a cat\n")
    assert (source(root).texts, source(root, split="val").texts) == (("a dog",), ("a cat",))
    manifest(put("c.avi"), "file_name,text\ntrain/a.avi,a dog\nval/b.avi,a cat\nc.avi,a cow\n")
    with caplog.at_level(logging.INFO):
        assert len(source(root)) == 3
    assert "not taken for splits, since c.avi is there too: train, val" in caplog.text


def test_a_class_may_be_called_train(put, caplog):
    root = put("train/a.avi", "bus/a.avi", "car/a.avi")
    with caplog.at_level(logging.INFO):
        got = source(root)
    assert got.class_names == ("bus", "car", "train")
    assert "not taken for splits, since bus, car is there too: train" in caplog.text
    refused("data.split", "has no test part", root, split="test")


# Roots that are not the ones that were meant


def test_a_root_too_high_is_named_with_the_folder_to_give(put, tmp_path):
    root = put("deep/UCF/Apple/a.avi", "deep/UCF/Pear/b.avi")
    refused("data.root", f"the folders Apple, Pear of deep/UCF; give data.root={root}/deep/UCF,", root)
    refused("data.root", f"data.root={root}/deep/UCF,", root / "deep")
    assert source(root / "deep/UCF").class_names == ("Apple", "Pear")
    assert source(root, layout="classes").class_names == ("deep",)
    put("deep/UCF/Pear.avi")
    assert source(root).class_names == ("deep",)  # its one class has videos of its own


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\na.avi,x\n"),
        ("metadata.jsonl", '{"file_name": "a.avi", "text": "x"}'),
        ("results_2M_val.csv", "videoid,contentUrl,duration,page_dir,name\n1,u,d,p,x\n"),
        ("ucfTrainTestlist/trainlist01.txt", "Pear/a.avi 1\n"),
    ],
)
def test_a_root_above_lists_is_named_with_their_folder(put, name, content):
    root = put("other/a.avi", "mine/Pear/a.avi")
    (root / "mine" / name).parent.mkdir(exist_ok=True)
    manifest(root / "mine", content, name)
    refused("data.root", f"mine/{name.split('/')[0]} is not read from here; give data.root={root}/mine,", root)
    assert source(root, layout="classes").class_names == ("mine", "other")
    if name.startswith("metadata"):
        refused("data.layout", f"give data.root={root}/mine,", root, layout="metadata")
    if name.startswith("ucf"):
        refused("data.layout", f"give data.root={root}/mine,", root, layout="ucf101")
    if name.startswith("results"):
        refused("data.split", f"give data.root={root}/mine$", root, layout="webvid", split="test")


def test_a_root_beside_the_class_folders_of_ucf101_is_named(ucf, tmp_path):
    for layout in ("auto", "ucf101"):
        refused("data.root", f"its folder data; give data.root={ucf}$", tmp_path, layout=layout)


def test_ucf101_without_its_class_folders(ucf, tmp_path):
    """As `unrar e` leaves it."""
    before, lists = source(ucf), tmp_path / "ucfTrainTestlist"
    expected = before.class_names, labels(before)
    for path in [*ucf.glob("*/*.avi")]:
        path.rename(ucf / path.name)
    for folder in [*ucf.iterdir()]:
        if folder.is_dir():
            folder.rmdir()
    got = source(ucf)
    assert names(got) == [os.path.basename(name) for name in names(before)]
    assert (got.class_names, labels(got)) == expected
    refused("data.root", f"give data.root={ucf}", tmp_path)
    shutil.rmtree(lists)
    assert source(ucf).class_names == ("Apple", "Fig", "Pear")
    assert labels(source(ucf)) == [0, 0, 1, 1, 2, 2]
    (ucf / "other.avi").write_bytes(b"")
    assert source(ucf).class_names == ()


def test_classes_without_a_usable_clip_are_left_out(ucf, tmp_path, caplog):
    (ucf / "Apple/v_Apple_g01_c01.avi").write_bytes(b"")
    got = probed(ucf)
    assert (got.class_names, labels(got)) == (("Pear", "Fig"), [0, 1])  # in the order of classInd.txt
    assert "classes without a usable clip are left out: Apple" in caplog.messages
    assert source(ucf, split="test").class_names == ("Pear", "Apple", "Fig")
    (tmp_path / "ucfTrainTestlist").rename(tmp_path / "elsewhere")
    (ucf / "Apple/v_Apple_g01_c02.avi").unlink()
    (ucf / "Nothing").mkdir()
    caplog.clear()
    assert probed(ucf).class_names == ("Fig", "Pear")
    assert "classes without a usable clip are left out: Apple, Nothing" in caplog.messages


def test_classes_that_are_numbers_have_the_order_of_numbers(put):
    assert source(put("2/a.avi", "10/a.avi")).class_names == ("2", "10")


def test_files_passed_over_are_counted_by_kind(put, caplog):
    root = put("c/a.avi", "c/b.m2ts")
    for name in ("c/a.txt", "b.TXT", "c/x.jpg", "c/._a.avi", "README", "c/y.tar.gz", ".git/x.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    with caplog.at_level(logging.INFO):
        assert names(source(root)) == ["c/a.avi", "c/b.m2ts"]
    (line,) = [message for message in caplog.messages if "passed over" in message]
    assert {*line.partition("passed over: ")[2].split(", ")} == {
        "2 .txt", "1 .jpg", "1 hidden", "1 without an ending", "1 .gz",
    }  # fmt: skip
    (root / "c/a.avi").unlink()
    (root / "c/b.m2ts").unlink()
    refused("data.root", r"holds no videos \(.*, but files: 2 \.txt", root)


def test_links_of_the_hub_s_cache(tmp_path, clip_bytes):
    """A snapshot's files are links to CACHE/blobs. No other way leads out of the root."""
    cache = tmp_path / "datasets--a--b"
    for name in ("blobs", "refs", "snapshots/c0ffee/run", "snapshots/c0ffee/walk"):
        (cache / name).mkdir(parents=True)
    snapshot, outside = cache / "snapshots/c0ffee", tmp_path / "outside.avi"
    (cache / "blobs/0a1b").write_bytes(clip_bytes)
    outside.write_bytes(clip_bytes)
    (cache / "blobs/leaves").symlink_to(outside)
    (snapshot / "run/a.avi").symlink_to("../../../blobs/0a1b")
    (snapshot / "walk/b.avi").symlink_to("../../../blobs/0a1b")
    assert probed(snapshot).class_names == ("run", "walk")
    assert probed(snapshot / "run").bad == {}
    for name, target in (("c.avi", "../../../blobs/leaves"), ("d.avi", outside), ("e.avi", "../../../refs/main")):
        (snapshot / "run" / name).symlink_to(target)
    (cache / "refs/main").write_bytes(clip_bytes)
    bad = source(snapshot).bad
    assert bad.keys() == {"run/c.avi", "run/d.avi", "run/e.avi"}
    assert all("leaves the data root: copy what it leads to" in reason for reason in bad.values())
    refused("data.root", f"cache of Hugging Face's hub.*; give data.root={snapshot},", cache)
    (cache / "blobs").rename(tmp_path / "blobs")
    (cache / "blobs").symlink_to(tmp_path / "blobs")
    refused("data.root", "leaves the data root", snapshot)


# Clips


def test_clip_is_determined_by_the_generator(put):
    got = source(put("c/a.avi"), stride=2)
    starts = set()
    for seed in range(30):
        clip, _ = got.clip(0, np.random.default_rng(seed))
        again, _ = got.clip(0, np.random.default_rng(seed))
        assert clip.shape == (8, 24, 32, 3)
        assert clip.dtype == np.uint8
        np.testing.assert_array_equal(clip, again)
        shown = numbers(clip)
        assert shown == list(range(shown[0], shown[0] + 16, 2))
        starts.add(shown[0])
    assert starts == {0, 1, 2, 3, 4, 5}  # 20 frames, a span of 15
    fixed = source(put("c/a.avi"), random_start=False)
    assert all(numbers(fixed.clip(0, np.random.default_rng(s))[0])[0] == 0 for s in range(4))


def test_clip_is_cropped_about_the_centre(tmp_path):
    frames = numbered(height=48, width=96)
    frames[:, :, :30] = frames[:, :, 66:] = 255
    write_clip(tmp_path / "c/a.mp4", frames, pix_fmt="yuv444p")
    got = source(tmp_path, frames=20, height=48, width=32)
    assert numbers(got.clip(0, np.random.default_rng(0))[0]) == list(range(20))


def test_source_can_be_sent_to_a_loader_process(put):
    got = pickle.loads(pickle.dumps(source(put("c/a.avi"))))
    assert numbers(got.clip(0, np.random.default_rng(0))[0])[0] in range(13)


# Bad files


def test_bad_files_are_named_and_skipped(put, tmp_path, caplog):
    root = put("c/good.avi", "c/good too.avi")
    (root / "c/empty.avi").write_bytes(b"")
    (root / "c/text.mp4").write_text("hello\n" * 50)
    write_sound(root / "c/sound.mp4")
    write_clip(root / "c/one.avi", numbered(1))
    write_clip(root / "c/short.webm", numbered(7))
    write_huge_header(root / "c/huge.avi", 100_000, 100_000)
    data = (root / "c/good.avi").read_bytes()
    (root / "c/cut.avi").write_bytes(data[: data.index(b"movi") + (len(data) - data.index(b"movi")) // 4])
    (tmp_path / "outside.avi").write_bytes(data)
    (root / "c/link.avi").symlink_to(tmp_path / "outside.avi")
    (root / "c/inner link.avi").symlink_to(root / "c/good.avi")
    (root / "c/dangling.avi").symlink_to(root / "c/nothing.avi")
    os.mkfifo(root / "c/pipe.avi")
    (root / "linked class").symlink_to(root / "c")
    with caplog.at_level(logging.WARNING):
        got = probed(root)
    assert names(got) == ["c/good too.avi", "c/good.avi", "c/inner link.avi"]
    expected = {
        "c/empty.avi": "zero bytes",
        "c/text.mp4": "not a video",
        "c/sound.mp4": "audio only",
        "c/one.avi": "has only 1 frame; 8 are needed",
        "c/short.webm": "has only 7 frames; 8 are needed",
        "c/huge.avi": "impossible",
        "c/cut.avi": "of 20 frames decode; 8 are needed",
        "c/link.avi": "leaves the data root",
        "c/dangling.avi": "missing",
        "c/pipe.avi": "not a regular file",
        "linked class": "not followed",
    }
    assert got.bad.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in got.bad[name]
    (warning,) = caplog.messages
    assert warning.startswith("11 of 14 files")
    assert "c/empty.avi is empty (zero bytes)" in warning
    assert "and 1 more" in warning


def test_stride_counts_in_the_length_needed(put):
    assert len(probed(put("c/a.avi"), frames=10, stride=2)) == 1  # 19 of 20 frames
    with pytest.raises(UserError, match=r"none of its 1 files.*has only 20 frames; 21 are needed"):
        probed(put("c/a.avi"), frames=6, stride=4)


def test_all_bad_is_an_error_whatever_the_fraction(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.avi").write_bytes(b"")
    with pytest.raises(UserError, match=r"^data\.root=.*none of its 2 files can be used.*a\.avi is empty"):
        probed(tmp_path, max_bad_fraction=1.0)


def test_more_bad_than_allowed_is_an_error(put):
    root = put(*(f"c/{i}.avi" for i in range(3)))
    (root / "c/bad.avi").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 4 files .* data\.max_bad_fraction=0\.2, the first: c/bad\.avi is empty"):
        probed(root, max_bad_fraction=0.2)
    assert len(probed(root, max_bad_fraction=0.25)) == 3


def test_missing_files_of_a_manifest_are_bad_files(put):
    got = source(manifest(put("a.avi"), "file_name,text\na.avi,x\ngone.avi,y\n"))
    assert names(got) == ["a.avi"]
    assert got.texts == ("x",)
    assert "missing" in got.bad["gone.avi"]


# Faults of roots, lists and manifests


def refused(field, match, root, **settings):
    with pytest.raises(UserError, match=match) as error:
        source(root, **settings)
    assert error.value.field == field
    assert "\n" not in str(error.value)


def test_faults_of_the_root_and_settings(put, tmp_path):
    root = put("c/a.avi")
    (tmp_path / "empty").mkdir()
    refused("data.root", "no such folder", tmp_path / "nowhere")
    refused("data.root", "not a folder", root / "c/a.avi")
    refused("data.root", r"holds no videos \(\.avi", tmp_path / "empty")
    refused("data.layout", "use one of auto, ucf101", root, layout="classy")
    refused("data.layout", "no folder ucfTrainTestlist", root, layout="ucf101")
    refused("data.layout", "no metadata.csv or metadata.jsonl", root, layout="metadata")
    refused("data.split", "use one of train, val, test, all", root, split="held-out")
    refused("data.split", "no test part", root, split="test")
    refused("data.max_bad_fraction", "not a fraction", root, max_bad_fraction=float("nan"))
    refused("data.probe_timeout", "positive", root, probe_timeout=0)


def test_faults_of_ucf101_lists(ucf, tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    refused("data.fold", "use one of 1, 2", ucf, fold=3)
    refused("data.split", "use one of train, test, all", ucf, split="val")
    (lists / "testlist01.txt").unlink()
    refused("data.fold", "use one of 2", ucf, split="test")
    (lists / "testlist02.txt").unlink()
    refused("data.split", "no file .*testlist01", ucf, split="test")
    train = lists / "trainlist01.txt"
    for content, match in (
        ("../x.avi 1\n", r"trainlist01\.txt line 1: '\.\./x\.avi' leaves the data root"),
        ("Pear/a.avi 1\n\n/etc/x.avi 1\n", "line 3: '/etc/x.avi' leaves"),
        ("a.avi 1\n", "names no class folder"),
        ("Peer/a.avi 1\n", "lacks the class Peer .* use for example Pear"),
        ("Pear/a.avi 1\nPear/./a.avi 1\n", "more than once: Pear/a.avi"),
    ):
        train.write_text(content)
        refused("data.root", match, ucf)
    train.write_text("")
    refused("data.split", "name no clips", ucf)
    train.write_text("Pear/v_Pear_g01_c01.avi 1\n")
    (lists / "classInd.txt").write_text("1 Pear\n3 Fig\n")
    refused("data.root", "classInd.txt.*restore", ucf)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "it is empty"),
        ("file_name,text\n", "it has no rows"),
        ("file_name,caption\na.avi,x\n", "columns are file_name, caption, where text is needed"),
        ("name,text\na.avi,x\n", "where file_name is needed"),
        ("file_name,text,label\na.avi,x,u\na.avi,y,v\n", "line 3: a.avi has the label u in an earlier row, and v"),
        ("file_name,text\na.avi,red, big\n", "line 2: more or fewer fields"),
        ("file_name,text\na.avi\n", "line 2: more or fewer fields"),
        ('file_name,text\na.avi,"red\n', "after line 1: unexpected end of data"),
        ("file_name,text\na.avi,x\n../../etc/passwd,y\n", r"line 3: '\.\./\.\./etc/passwd' leaves the data root"),
        ("file_name,text\nsub/../../x.avi,y\n", "line 2: .* leaves the data root"),
        ("file_name,text\n/etc/passwd,y\n", "line 2: '/etc/passwd' leaves the data root"),
        ("file_name,text\nlink.avi,y\n", "line 2: 'link.avi' is a symbolic link that leaves"),
        ("file_name,text\n,y\n", "line 2: '' is no file name"),
        ("file_name,text\na\0.avi,y\n", r"line 2: .* is no file name"),
        (b"file_name,text\na.avi,\xff\xfe\n", "not UTF-8 text"),
    ],
)
def test_faults_of_a_csv_manifest(put, tmp_path, content, match):
    root = put("a.avi", "b.avi")
    (root / "link.avi").symlink_to(tmp_path / "outside.avi")
    refused("data.root", match, manifest(root, content))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "it has no rows"),
        ('{"file_name": "a.avi", "text": "x"}\nhello\n', "line 2: not JSON"),
        ('["a.avi", "x"]\n', "line 1: not a JSON object"),
        ('{"file_name": "a.avi"}\n', "line 1: no text"),
        ('{"file_name": 3, "text": "x"}\n', "line 1: file_name is no string"),
        ('{"file_name": "a.avi", "text": "x", "label": [1]}\n', r"line 1: label \[1\]"),
        ('{"file_name": "../a.avi", "text": "x"}\n', "leaves the data root"),
    ],
)
def test_faults_of_a_jsonl_manifest(put, content, match):
    refused("data.root", match, manifest(put("a.avi"), content, "metadata.jsonl"))


def test_two_manifests_are_refused(put):
    root = manifest(put("a.avi"), "file_name,text\na.avi,x\n")
    refused("data.root", "holds both", manifest(root, "{}", "metadata.jsonl"))


# Child processes

CHILD = """
    import json, os, sys, time
    parent = os.getppid()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        path = os.path.basename(json.loads(line)["path"])
        with open(os.path.join(os.path.dirname(__file__), "asked"), "a") as file:
            file.write(path + "\\n")
        if "crash" in path:
            os.abort()
        if "leave" in path:
            os._exit(3)
        while "hang" in path and os.getppid() == parent:
            time.sleep(0.05)
        for i in range(20):
            if "slow" in path or "endless" in path:
                time.sleep(0.06)
                print(json.dumps({"decoded": i}), flush=True)
        if "babble" in path:
            print("not json", flush=True)
        if "strange" in path:
            print('{"frames": "many"}', flush=True)
        print('ANSWER', flush=True)
"""


@pytest.fixture
def child(tmp_path):
    """(command of a child that crashes or hangs on files of such names, function -> the files it was asked about)."""
    script, asked = tmp_path / "child.py", tmp_path / "asked"
    script.write_text(textwrap.dedent(CHILD).replace("ANSWER", ANSWER))
    return [sys.executable, str(script)], lambda: sorted(asked.read_text().split()) if asked.exists() else []


def test_files_that_crash_or_hang_the_decoder_are_quarantined(put, child):
    command, asked = child
    good = [f"c/{i}.avi" for i in range(6)]
    root = put(*good, "c/crash.avi", "c/hang.avi", "c/leave.avi", "c/babble.avi", "c/strange.avi")
    began = time.monotonic()
    got = source(root, probe_command=command, probe_timeout=1.5)
    assert time.monotonic() - began < 30
    assert names(got) == good
    assert got.bad["c/crash.avi"] == "crashes the decoder (signal SIGABRT)"
    assert got.bad["c/leave.avi"] == "crashes the decoder (exit code 3)"
    assert "crashes the decoder" in got.bad["c/babble.avi"]
    assert "crashes the decoder" in got.bad["c/strange.avi"]
    assert got.bad["c/hang.avi"] == "hangs the decoder (no further frame for data.probe_timeout=1.5 s)"
    assert asked().count("hang.avi") == 1
    assert asked().count("crash.avi") == 2  # the second time by a child that had read nothing else


def test_a_file_may_take_long_as_long_as_frames_come(put, child):
    command, asked = child
    root = put("c/slow.avi", "c/hang.avi", "c/1.avi")
    settings = {"probe_command": command, "probe_timeout": 0.8}
    assert names(source(root, **settings)) == ["c/1.avi", "c/slow.avi"]  # 1.2 s
    bad = source(root, probe_cap=0.7, **settings).bad
    assert bad["c/slow.avi"] == "takes too long to decode (more than data.probe_cap=0.7 s)"
    assert asked().count("slow.avi") == 2


def test_a_child_that_does_not_start_is_no_fault_of_the_files(put):
    command = [sys.executable, "-c", "raise ImportError('no decoder here')"]
    with pytest.raises(UserError, match="does not start .*no decoder here"):
        source(put("c/a.avi"), probe_command=command)


def test_children_end_with_the_probing(put, child, monkeypatch):
    command, _ = child
    started = []

    class Recorded(probe.Child):
        def __init__(self, command):
            super().__init__(command)
            started.append(self.process)

    monkeypatch.setattr(probe, "Child", Recorded)
    paths = [str(put("c/a.avi", "c/hang.avi") / "c" / name) for name in ("a.avi", "hang.avi")]
    outcomes = probe.probe(paths, 600, command)
    path, facts = next(outcomes)
    assert (path, facts["frames"]) == (paths[0], 20)
    outcomes.close()  # while a child hangs
    assert started
    assert all(process.poll() is not None for process in started)


def test_outcomes_are_remembered(put, child, tmp_path):
    command, asked = child
    cache = tmp_path / "workdir/probe.jsonl"
    root = put("c/a.avi", "c/b.avi", "c/crash.avi", "c/hang.avi", "c/endless.avi")
    settings = {"probe_command": command, "probe_timeout": 0.6, "probe_cap": 0.8, "cache": cache}
    first = source(root, **settings)
    count = len(asked())
    second = source(root, **settings, stride=2)  # another need of frames, the same facts
    assert len(asked()) == count
    assert (names(second), second.bad) == (names(first), first.bad)
    os.utime(root / "c/a.avi", ns=(1, 1))
    source(root, **settings)
    assert asked()[:2] == ["a.avi", "a.avi"]
    assert len(asked()) == count + 1
    source(root, **{**settings, "probe_timeout": 0.7})  # more patience: the hung file gets another chance
    assert len(asked()) == count + 2
    got = source(root, **{**settings, "probe_timeout": 0.7, "probe_cap": 0})  # any time: so does the one that took long
    assert len(asked()) == count + 3
    assert names(got) == ["c/a.avi", "c/b.avi", "c/endless.avi"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [],
        lambda lines: ["{broken"],
        lambda lines: ['{"format": 1, "files": {}}'],
        lambda lines: [*lines[:2], *lines[3:], lines[2][:20]],  # torn by a kill
        lambda lines: [*lines[:2], lines[2][:20] + lines[3], ""],  # and gone on with
        lambda lines: [
            *lines[:2],
            "[" * 100_000,
            '{"name": 3}',
            '{"name": "c/b.avi", "key": [1, 2], "frames": 20}',
            "",
        ],
        lambda lines: [*lines[:2], lines[2].replace("20", '"20"'), ""],
        lambda lines: [*lines[:2], lines[2].replace("[]", f"[[48, 1, {2**63}]]"), ""],
        lambda lines: [*lines[:2], *lines[2:-1] * 3, ""],
    ],
)
def test_outcomes_that_cannot_be_read_are_found_again(put, child, tmp_path, spoil):
    command, asked = child
    cache, root = tmp_path / "probe.jsonl", put("c/a.avi", "c/b.avi", "c/c.avi")
    settings = {"probe_command": command, "cache": cache}
    first = source(root, **settings)
    whole = cache.read_text().split("\n")
    assert [json.loads(line).get("name") for line in whole[:-1]].count(None) == 1
    cache.write_text("\n".join(spoil(whole)))
    put("c/d.avi")
    assert names(source(root, **settings)) == [*names(first), "c/d.avi"]
    count = len(asked())
    again = cache.read_text().split("\n")
    assert json.loads(again[0])["format"] == 2 and again[-1] == ""
    assert sorted(json.loads(line)["name"] for line in again[1:-1]) == ["c/a.avi", "c/b.avi", "c/c.avi", "c/d.avi"]
    source(root, **settings)
    assert len(asked()) == count
    assert [path.name for path in tmp_path.glob("*probe*")] == ["probe.jsonl"]


def test_another_decoder_tests_files_again(put, child, tmp_path, monkeypatch):
    command, asked = child
    settings = {"probe_command": command, "cache": tmp_path / "probe.jsonl"}
    root = put("c/a.avi", "c/b.avi")
    for _ in range(2):
        source(root, **settings)
    assert len(asked()) == 2
    monkeypatch.setattr(outcomes, "HEADER", outcomes.HEADER | {"av": "another"})
    source(root, **settings)
    assert len(asked()) == 4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_learnt_survives_the_end_of_the_process(put, child, tmp_path, number):
    """At any moment, without any word of farewell: training ends so when it is asked to stop before its first step."""
    command, asked = child
    cache, root = tmp_path / "probe.jsonl", put(*(f"c/{i}.avi" for i in range(4)), "c/z-hang-1.avi", "c/z-hang-2.avi")
    code = (
        "import sys; from cmd_jax.data.folder import FolderSource; FolderSource(sys.argv[1], frames=8, height=24, "
        "width=32, cache=sys.argv[2], probe_timeout=600, probe_command=sys.argv[3:])"
    )
    with subprocess.Popen([sys.executable, "-c", code, root, cache, *command]) as process:
        end = time.monotonic() + 30
        while not (cache.exists() and cache.read_bytes().count(b"\n") == 5) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
    (root / "c/z-hang-1.avi").unlink()
    (root / "c/z-hang-2.avi").unlink()
    before = [name for name in asked() if "hang" not in name]
    assert before == ["0.avi", "1.avi", "2.avi", "3.avi"]
    assert len(source(root, probe_command=command, cache=cache)) == 4
    assert [name for name in asked() if "hang" not in name] == before


def test_an_unwritable_cache_is_a_warning(put, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(source(put("c/a.avi"), cache=tmp_path / "file/cache.json")) == 1
    assert "not kept" in caplog.text


def test_the_child_imports_no_jax():
    code = "import sys, cmd_jax.data.probe, cmd_jax.data.video; print({'jax', 'tensorflow', 'flax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"set()"


# Fingerprint


def test_fingerprint_is_of_the_data_set_not_of_its_place(put, tmp_path, clip_bytes):
    root = put("c/a.avi", "d/b.avi")
    first = source(root).fingerprint
    assert len(first) == 64
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert source(copy).fingerprint == first
    (copy / "c/a.avi").write_bytes(clip_bytes + b"\0")
    changed = source(copy).fingerprint
    assert changed != first
    (copy / "c/a.avi").rename(copy / "c/z.avi")
    assert source(copy).fingerprint not in (first, changed)
    shutil.move(root / "d", root / "e")
    assert source(root).fingerprint != first


def test_fingerprint_is_of_the_clips_that_are_drawn(put):
    root = put("c/a.avi", "d/b.avi")
    changes = ({}, {"stride": 2}, {"frames": 7}, {"height": 32}, {"width": 24}, {"random_start": False})
    assert len({source(root, **change).fingerprint for change in changes}) == len(changes)


def test_fingerprint_covers_texts_and_labels(put):
    root = put("a.avi", "b.avi")
    prints = {
        source(manifest(root, f"file_name,text,label\na.avi,{text},{label}\nb.avi,x,u\n")).fingerprint
        for text, label in (("red", "u"), ("blue", "u"), ("red", "w"))
    }
    assert len(prints) == 3


def test_a_file_that_changes_under_the_run_is_named(put):
    got = source(put("c/a.avi"))
    (put() / "c/a.avi").write_bytes(b"")
    with pytest.raises(UserError, match=r"c/a\.avi: the file is empty"):
        got.clip(0, np.random.default_rng(0))
