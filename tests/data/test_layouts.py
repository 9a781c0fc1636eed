"""Folders as people have them: layouts, splits, roots, lists and manifests; and their faults."""

import json
import logging
import os
import shutil

import numpy as np
import pytest
from data.folders import drawn_texts, labels, manifest, names, probed, refused, source, texts

# Layouts


def test_class_folders(put):
    got = probed(
        put("b dog/2.avi", "b dog/1.AVI", "a cat/deep/er/x.avi", ".hidden/x.avi", "a cat/._x.avi", "a cat/notes.txt")
    )
    assert got.class_names == ("a cat", "b dog")
    assert names(got) == ["a cat/deep/er/x.avi", "b dog/1.AVI", "b dog/2.avi"]
    assert labels(got) == [0, 1, 1]
    assert texts(got) is None
    assert got.bad == {}


def test_loose_videos_have_no_class(put):
    got = source(put("x.avi", "y.avi"))
    assert got.class_names == ()
    assert labels(got) == [0, 0]
    mixed = source(put("cat/z.avi"))
    assert mixed.class_names == ("cat",)
    assert dict(zip(names(mixed), labels(mixed), strict=True)) == {"cat/z.avi": 0, "x.avi": 1, "y.avi": 1}


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
    assert texts(got) == ('red, "big"\r\nand round', "grün", "")
    assert got.class_names == ("apple", "pear")
    assert labels(got) == [0, 2, 1]


def test_metadata_jsonl(put):
    rows = [{"file_name": "a.avi", "text": "one\ntwo", "label": 10}, {"file_name": "b.avi", "text": "x", "label": 2}]
    root = manifest(put("a.avi", "b.avi"), "\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)), "metadata.jsonl")
    got = source(root)
    assert texts(got) == ("one\ntwo", "x")
    assert got.class_names == ("2", "10")
    assert labels(got) == [1, 0]


def test_metadata_without_labels_is_unlabelled(put):
    got = source(manifest(put("a.avi"), "text,file_name\nhello,a.avi\n"))
    assert (got.class_names, labels(got), texts(got)) == ((), [0], ("hello",))


def test_rows_of_one_file_are_captions_of_it(put, caplog):
    rows = "a.avi,one\nb.avi,x\n./a.avi,two\na.avi,one\na.avi,three\n"
    with caplog.at_level(logging.INFO):
        got = source(manifest(put("a.avi", "b.avi"), "file_name,text\n" + rows))
    assert (names(got), texts(got)) == (["a.avi", "b.avi"], ("one", "x"))
    assert "4 captions of 2 files; 1 rows repeat another" in caplog.text
    drawn = drawn_texts(got, 0, 30)
    assert {*drawn} == {"one", "two", "three"}
    assert drawn == drawn_texts(got, 0, 30) and drawn_texts(got, 1, 3) == ["x"] * 3
    for index in (0, 1):  # after the start, which is that of a clip without captions; a single one draws nothing
        rng, again = np.random.default_rng(7), np.random.default_rng(7)
        text, _ = got.clip(index, rng)[2], again.integers(0, 13)
        assert text == got.texts(index)[again.integers(3) if index == 0 else 0]
        assert rng.random() == again.random()
    fewer = source(manifest(put(), "file_name,text\na.avi,one\nb.avi,x\n"))
    assert got.fingerprint != fewer.fingerprint


def test_a_manifest_without_a_title_row(put, caplog):
    root = manifest(put("a.avi", "b c.avi"), 'a.avi,"a dog, running",dog\nb c.avi,a cat,cat\n')
    with caplog.at_level(logging.INFO):
        got = source(root)
    assert (names(got), texts(got)) == (["a.avi", "b c.avi"], ("a dog, running", "a cat"))
    assert (got.class_names, labels(got)) == (("cat", "dog"), [1, 0])
    assert "taken for file_name, text, label" in caplog.text
    assert texts(source(manifest(root, "a.avi,a dog\n"))) == ("a dog",)
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
        assert (names(got), texts(got)) == (["train/a.avi", "train/sub/b.avi"], ("a dog", "a cat"))
        assert (got.class_names, labels(got)) == (("9", "10"), [1, 0])
        assert texts(source(root, layout=layout, split="test")) == ("a cow",)
        assert len(texts(source(root, layout=layout, split="all"))) == 3
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
    assert (texts(source(root)), texts(source(root, split="val"))) == (("a dog",), ("a cat",))
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
    for number in range(40):
        (root / f"clips.{number:05d}-of-00040").touch()
    refused("data.root", r"but files: 2 \.txt, (1 \S+, ){10}1 \S+ and \d\d more kinds;", root)


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


# Faults of roots, lists and manifests


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
