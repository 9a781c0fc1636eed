import logging
import os

import numpy as np
import pytest
from data.clip_files import numbers, write_clip
from data.folders import names, texts

from cmd_jax.data import folder
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.layouts import detect, list_clips
from cmd_jax.errors import UserError

HEADER = "videoid,contentUrl,duration,page_dir,name"
LIST = f"""{HEADER}
11,https://x/11.mp4,PT00H00M09S,000001_000050,A red boat on a lake
12,https://x/12.mp4,PT00H00M09S,000001_000050,"Rain, ""hard"" rain"
13,https://x/13.mp4,PT00H00M09S,000051_000100,An old man
14,https://x/14.mp4,PT00H00M09S,000101_000150,Absent with its folder
"""


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    """No file is decoded: `_probe` takes all for good ones of 20 frames."""
    facts = {"frames": 20, "declared": 20, "width": 64, "height": 48, "key_frames": []}
    monkeypatch.setattr(folder, "_probe", lambda root, stats, *_, **__: dict.fromkeys(stats, facts))


@pytest.fixture
def root(tmp_path):
    """11 and 12 below videos/, and one file that no list names; 13 and 14 are absent, and one folder is there."""
    for name in ("videos/000001_000050/11.mp4", "videos/000001_000050/12.mp4", "videos/000051_000100/99.mp4"):
        put(tmp_path / "data", name)
    return csv_file(tmp_path / "data", LIST)


def put(root, name):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"a video")


def csv_file(root, content, name="results_10M_train.csv"):
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def source(root, **settings):
    return FolderSource(root, **{"frames": 8, "height": 24, "width": 32, "layout": "webvid", **settings})


def refused(match, root, field="data.root", **settings):
    with pytest.raises(UserError, match=match) as error:
        source(root, **settings)
    assert error.value.field == field
    assert "\n" not in str(error.value)


def test_files_that_are_there_with_their_captions(root, caplog):
    with caplog.at_level(logging.INFO, "cmd_jax"):
        got = source(root, max_bad_fraction=0.0)
    assert names(got) == ["videos/000001_000050/11.mp4", "videos/000001_000050/12.mp4"]
    assert texts(got) == ("A red boat on a lake", 'Rain, "hard" rain')
    assert (got.class_names, got.bad, got.absent) == ((), {}, 2)
    assert caplog.messages == ["results_10M_train.csv: 2 videos are there, 2 rows name one that is absent"]


def test_a_clip_is_read(tmp_path):
    write_clip(tmp_path / "000001_000050/12.mp4")
    clip, label, _ = source(csv_file(tmp_path, LIST), random_start=False).clip(0, np.random.default_rng(0))
    assert (numbers(clip), label) == (list(range(8)), 0)


def test_videos_may_lie_in_the_root_or_deeper(tmp_path):
    for name in ("000001_000050/11.mp4", "videos/000001_000050/12.mp4", "000051_000100/13.mp4", "a/b/15.mp4"):
        put(tmp_path, name)
    put(tmp_path, "videos/000051_000100/13.mp4")
    got = source(csv_file(tmp_path, LIST + "15,u,PT1S,a/./b,Deep\n16,u,PT1S,000001_000050/11.mp4,A file\n"))
    assert names(got) == [
        "000001_000050/11.mp4", "videos/000001_000050/12.mp4", "videos/000051_000100/13.mp4", "a/b/15.mp4",
    ]  # fmt: skip
    assert got.absent == 2


def test_bom_crlf_quotes_other_columns_and_spaces(root):
    rows = ('3,"two\r\nlines, ü",000001_000050, 11 ', "", "3,,000001_000050,12")
    got = source(csv_file(root, "\r\n".join(("\ufeffpage_idx,name,page_dir , videoid", *rows))))
    assert names(got) == ["videos/000001_000050/11.mp4", "videos/000001_000050/12.mp4"]
    assert texts(got) == ("two\r\nlines, ü", "")


def test_splits_go_by_the_names_of_the_lists(root):
    put(root, "videos/000151_000200/21.mp4")
    put(root, "videos/000151_000200/22.mp4")
    row = "u,PT1S,000151_000200,Another"
    csv_file(root, f"{HEADER}\n21,{row}\n", "results_10M_VAL.csv")
    csv_file(root, f"{HEADER}\n22,{row}\n", "part2.train.csv")
    csv_file(root, "no,list\n", "notes.csv")
    csv_file(root, "no,list\n", ".results_train.csv")
    train = ["videos/000151_000200/22.mp4", "videos/000001_000050/11.mp4", "videos/000001_000050/12.mp4"]
    assert names(source(root)) == train
    assert names(source(root, split="test")) == ["videos/000151_000200/21.mp4"]
    assert names(source(root, split="val")) == names(source(root, split="test"))
    assert sorted(names(source(root, split="all"))) == sorted([*train, "videos/000151_000200/21.mp4"])


def test_rows_that_repeat_another_count_once(root, caplog):
    csv_file(root, f"{HEADER}\n11,u,PT1S,000001_000050,A red boat on a lake\n", "results_2M_train.csv")
    with caplog.at_level(logging.INFO, "cmd_jax"):
        got = source(root)
    assert len(got) == len(texts(got)) == 2
    assert "2 rows name one that is absent; 1 rows repeat another" in caplog.text


def test_rows_of_a_video_with_other_texts_are_captions_of_it(root):
    got = source(csv_file(root, LIST + "11,u,PT1S,000001_000050,Another\n11,u,PT1S,./000001_000050,Another\n"))
    assert (len(got), texts(got)) == (2, ("A red boat on a lake", 'Rain, "hard" rain'))
    assert got.texts(0) == ("A red boat on a lake", "Another")
    assert got.fingerprint != source(csv_file(root, LIST)).fingerprint


def test_rows_without_page_dir_are_absent_unless_the_file_lies_beside_the_page_dirs(root):
    """Of such a video nothing was fetched."""
    got = source(csv_file(root, LIST + "15,u,PT1S,,Never fetched\n11,u,PT1S, ,Another\n"))
    assert (len(got), got.absent) == (2, 4)
    put(root, "videos/15.mp4")
    got = source(root)
    assert (names(got)[-1], texts(got)[-1], got.absent) == ("videos/15.mp4", "Never fetched", 3)


def test_a_list_without_a_title_row(root, caplog):
    with caplog.at_level(logging.INFO, "cmd_jax"):
        got = source(csv_file(root, LIST.removeprefix(HEADER + "\n")), layout="auto")
    assert texts(got) == ("A red boat on a lake", 'Rain, "hard" rain')
    assert got.absent == 2
    assert f"no title row: its columns are taken for {HEADER.replace(',', ', ')}" in caplog.text
    refused("line 5: more or fewer fields than the 5", csv_file(root, LIST.removeprefix(HEADER + "\n") + "a,b\n"))


def test_the_same_id_in_two_folders_is_two_videos(root):
    put(root, "000051_000100/11.mp4")
    got = source(csv_file(root, LIST + "11,u,PT1S,000051_000100,Another\n"))
    assert texts(got) == ("A red boat on a lake", 'Rain, "hard" rain', "Another")


def test_folders_are_listed_once_and_files_not_asked_for(tmp_path, monkeypatch):
    put(tmp_path, "videos/p/1.mp4")
    rows = "".join(f"{i},u,PT1S,{page},x\n" for i in range(500) for page in ("p", f"absent{i}"))
    csv_file(tmp_path, f"{HEADER}\n{rows}")
    asked = []
    for name in ("listdir", "lstat", "stat"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, call=call, **k: asked.append(a) or call(*a, **k))
    assert list_clips(tmp_path, "webvid", 1, "train").absent == 999
    assert len(asked) < 60  # 1000 rows


def test_fingerprint_covers_captions_and_what_is_there(root):
    first = source(root).fingerprint
    assert source(root).fingerprint == first
    changed = source(csv_file(root, LIST.replace("red boat", "blue boat"))).fingerprint
    assert changed != first
    put(root, "000051_000100/13.mp4")
    assert source(csv_file(root, LIST)).fingerprint not in (first, changed)


# Which layout a folder shows


def test_auto_knows_the_layout_by_the_header(root, tmp_path):
    assert len(source(root, layout="auto")) == 2
    other = tmp_path / "other"
    put(other, "cat/a.mp4")
    for header in ("path,label", "name,duration", "a\0\xff"):
        csv_file(other, f"{header}\n1,2\n", "my_train.csv")
        assert detect(other) == "classes"
    (other / "a_train.csv").mkdir()
    os.mkfifo(other / "b_train.csv")  # nobody writes to it
    assert detect(other) == "classes"
    csv_file(other, HEADER, "list.csv")
    assert detect(other) == "classes"
    csv_file(other, '\ufeff"name", "page_dir"\n', "some_val.csv")
    assert detect(other) == "webvid"


def test_auto_takes_broken_lists_for_lists(root):
    csv_file(root, "")
    refused("results_10M_train.csv: it is empty", root, layout="auto")
    csv_file(root, "videoid,name\n11,x\n")
    refused("where page_dir is needed once", root, layout="auto")


def test_auto_refuses_to_choose(root):
    csv_file(root, "file_name,text\na.mp4,x\n", "metadata.csv")
    refused("metadata.csv and results_10M_train.csv; set data.layout to metadata or webvid", root, "data.layout",
            layout="auto")  # fmt: skip


# Faults


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "results_10M_train.csv: it is empty"),
        ("\n\n", "it is empty"),
        (HEADER, "no rows in results_10M_train.csv"),
        ("videoid,contentUrl,duration,name\n1,u,d,x\n", "columns are videoid, contentUrl, .*, where page_dir"),
        (f"{HEADER},name\n1,u,d,p,x,y\n", "where name is needed once"),
        (f"{HEADER}\n11,u,d,000001_000050,red, big\n", "line 2: more or fewer fields than the 5 columns"),
        (f"{HEADER}\n11,u,d\n", "line 2: more or fewer fields"),
        (f'{HEADER}\n11,u,d,000001_000050,"red\n', "after line 1: unexpected end"),
        (f"{HEADER}\n11,u,d,000001_000050,\xff".encode("latin-1"), r"train\.csv line 2: not UTF-8 text"),
        (LIST + "1,u,d,../../etc,x\n", r"line 6: '\.\./\.\./etc' leaves the data root"),
        (LIST + "1,u,d,absent/../../x,x\n", "line 6: .* leaves the data root"),
        (LIST + "1,u,d,/etc,x\n", "line 6: '/etc' leaves the data root"),
        (LIST + "1,u,d,a\0b,x\n", "line 6: .* is no file name"),
        (LIST + "../../x,u,d,000001_000050,x\n", r"line 6: the videoid '\.\./\.\./x' is no file name"),
        (LIST + "/etc/x,u,d,absent,x\n", "line 6: the videoid '/etc/x' is no file name"),
        (LIST + ",u,d,absent,x\n", "line 6: the videoid '' is no file name"),
        (LIST + "1,u,d,link,x\n", "line 6: 'link' is a symbolic link that leaves the data root"),
        (LIST + "1,u,d,vlink,x\n", "line 6: 'videos/vlink' is a symbolic link that leaves"),
    ],
)
def test_faults_of_a_list(root, tmp_path, content, match):
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "videos/vlink").symlink_to(tmp_path / "outside")
    refused(match, csv_file(root, content))


def test_no_list_of_the_split(root, tmp_path):
    refused(r"no \*val\*\.csv in .*; its CSV files: results_10M_train\.csv;", root, "data.split", split="test")
    refused(r"no \*train\*\.csv or \*val\*\.csv in .*; its CSV files: none;", tmp_path, "data.split", split="all")
    csv_file(root, LIST, "interval_train.csv")
    refused("interval_train.csv: its name holds both train and val", root)


def test_no_video_at_all_is_an_error(tmp_path):
    put(tmp_path, "videos/other/11.mp4")
    refused(
        r"none of the 4 videos of results_10M_train\.csv is there, neither 000001_000050/11\.mp4 nor videos/0.*; put "
        r"them there; the folder holds results_10M_train\.csv, videos$",
        csv_file(tmp_path, LIST),
    )


def test_videos_outside_the_root(tmp_path):
    put(tmp_path, "disk/000001_000050/11.mp4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/videos").symlink_to(tmp_path / "disk")
    refused("'videos' is a symbolic link that leaves the data root", csv_file(tmp_path / "data", LIST))


def test_bad_files_are_not_absent_ones(root, tmp_path):
    put(tmp_path, "outside.mp4")
    (root / "000051_000100").mkdir()
    (root / "000051_000100/13.mp4").symlink_to(tmp_path / "outside.mp4")
    (root / "000101_000150").mkdir()
    (root / "000101_000150/14.mp4").symlink_to(tmp_path / "nothing.mp4")
    refused("2 of 4 clips cannot be used, more than data.max_bad_fraction=0.05", root)
    got = source(root, max_bad_fraction=0.5)
    assert (len(got), got.absent) == (2, 0)
    assert "leaves the data root" in got.bad["000051_000100/13.mp4"]
    assert got.bad.keys() == {"000051_000100/13.mp4", "000101_000150/14.mp4"}


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    listdir = os.listdir

    def refuse(path):
        if str(path).endswith("000051_000100"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    got = source(root, max_bad_fraction=0.5)
    assert got.bad == {"videos/000051_000100": "cannot be listed (Permission denied)"}
    assert names(got) == ["videos/000001_000050/11.mp4", "videos/000001_000050/12.mp4"]
