import json
import re
import subprocess
import sys
from urllib.parse import unquote

import numpy as np
import pytest

from cmd_jax.report.collect import main
from cmd_jax.report.video import write_mp4, write_png

RECORD = {"caption": "a", "video": "0000.mp4", "content": "0000_content.png"}


def sampled(folder, title, captions, note="", table=None):
    """A folder as `cmd-jax sample` writes it, as far as a page needs it."""
    video = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    items = []
    for i, caption in enumerate(captions):
        names = {"video": f"{i:04d}.mp4", "content": f"{i:04d}_content.png"}
        write_mp4(folder / names["video"], video)
        write_png(folder / names["content"], video[0])
        items.append({"index": i, "caption": caption, **names})
    section = {"title": title, "note": note, "table": table, "items": items}
    (folder / "samples.json").write_text(json.dumps(section))
    return folder


def refused(capsys, *arguments):
    """The one line that is printed instead of writing a page."""
    assert main([str(a) for a in arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    return error


def test_a_page_shows_the_samples_of_every_folder(tmp_path, monkeypatch, capsys):
    table = [["", "right", "of"], ["color", 250, 256]]
    sampled(tmp_path / "a run" / "samples", "CMD: generate", ["red circle", "<blue>"], note="guidance 4", table=table)
    sampled(tmp_path / "b", "CMD: reconstruct", ["yellow square"])
    monkeypatch.chdir(tmp_path / "b")
    assert main(["../index.html", str(tmp_path / "a run" / "samples"), "."]) == 0
    assert capsys.readouterr().err == ""

    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    links = [unquote(link) for link in re.findall('src="([^"]*)"', page)]
    names = ["0000.mp4", "0000_content.png", "0001.mp4", "0001_content.png"]
    assert links == [f"a run/samples/{n}" for n in names] + [f"b/{n}" for n in names[:2]]
    assert all((tmp_path / link).is_file() for link in links)
    assert [t.strip() for t in re.findall("<h2[^>]*>(.*?)<small>", page)] == ["CMD: generate", "CMD: reconstruct"]
    captions = re.findall('<figcaption><div dir="auto">(.*?)</div>', page)
    assert captions == ["red circle", "&lt;blue&gt;", "yellow square"]
    assert re.findall("<td>(.*?)</td>", page) == ["color", "250", "256"] and "guidance 4" in page


def test_without_arguments_it_says_how_it_is_used(tmp_path):
    done = subprocess.run([sys.executable, "-m", "cmd_jax.report.collect"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"arguments=: .*; run python -m cmd_jax\.report\.collect index\.html DIR .*\n", done.stderr)


def test_a_page_needs_a_name_and_folders(tmp_path, capsys):
    folder = sampled(tmp_path / "a", "t", ["a"])
    assert refused(capsys, tmp_path / "index.html").startswith("arguments=")
    assert refused(capsys, tmp_path, folder).startswith(f"page={tmp_path}: ")
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("page", ["pages/index.html", "a/pages/index.html", "a/../pages/index.html"])
def test_a_folder_that_is_not_below_the_page_is_refused(tmp_path, capsys, page):
    folder = sampled(tmp_path / "a", "t", ["a"])
    error = refused(capsys, tmp_path / page, folder)
    assert error.startswith(f"folder={folder}: not below the page's folder ")
    assert not (tmp_path / page).exists()


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_without_samples_is_refused(tmp_path, capsys, name):
    assert refused(capsys, tmp_path / "index.html", tmp_path / name).startswith(f"folder={tmp_path / name}: holds no ")


@pytest.mark.parametrize(
    "changes",
    [
        {"items": None}, {"items": [{}]}, {"items": [3]}, {"items": [RECORD | {"video": None}]}, {"table": 3},
        {"table": [1, 2]},
    ],
)  # fmt: skip
def test_samples_of_another_form_are_refused(tmp_path, capsys, changes):
    folder = sampled(tmp_path / "a", "t", ["a"])
    path = folder / "samples.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert refused(capsys, tmp_path / "index.html", folder).startswith(f"folder={path}: ")
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("content", [b"", b'{"title": "CMD', b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_samples_json_is_refused(tmp_path, capsys, content):
    path = sampled(tmp_path / "a", "t", ["a"]) / "samples.json"
    path.write_bytes(content)
    assert refused(capsys, tmp_path / "index.html", tmp_path / "a").startswith(f"folder={path}: ")


@pytest.mark.parametrize("content", [None, b"", b"no video"])
def test_a_lost_or_damaged_video_is_refused(tmp_path, capsys, content):
    folder, page = sampled(tmp_path / "a", "t", ["a"]), tmp_path / "index.html"
    (folder / "0000.mp4").unlink()
    if content is not None:
        (folder / "0000.mp4").write_bytes(content)
    error = refused(capsys, page, folder)
    assert error.startswith(f"page={page}: cannot be made (") and "0000.mp4" in error
    assert not page.exists()


def test_a_bucket_that_is_none(gcs, capsys):
    for page, folder in ((f"{gcs}/index.html", f"{gcs}-none/samples"), (f"{gcs}-none/index.html", f"{gcs}/samples")):
        assert re.fullmatch(f"file={gcs}-none/[^ ]+: no such bucket; .*\n", refused(capsys, page, folder))
