from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

from cmd_jax.report.gallery import Item, Section, write_gallery
from cmd_jax.report.video import film_strip, write_mp4, write_png


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text by innermost tag."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def folder(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3), dtype=np.uint8)
    write_mp4(tmp_path / "videos" / "0 #1.mp4", video, scale=1)
    write_png(tmp_path / "videos" / "0.png", video[0])
    write_png(tmp_path / "strip.png", film_strip(video))
    return tmp_path


def test_page_shows_video_beside_content_frame_from_relative_files(folder):
    item = Item("red circle", "videos/0 #1.mp4", "videos/0.png", {"seed": 3, "guidance": 4.0, "psnr": 24.123456})
    write_gallery(
        folder / "index.html", "Title", [Section("One", [item]), Section("Two", [Item("frames", image="strip.png")])]
    )
    page = Page(folder / "index.html")
    (video,) = page.all("video")
    assert {"autoplay", "loop", "muted", "playsinline"} <= set(video) and (video["width"], video["height"]) == (
        "32",
        "16",
    )
    links = [video["src"], *(image["src"] for image in page.all("img"))]
    assert links == ["videos/0%20%231.mp4", "videos/0.png", "strip.png"]
    assert all((folder / unquote(link)).is_file() for link in links)
    assert [figure.get("class") for figure in page.all("figure")] == [None, "wide"]
    assert "image-rendering: pixelated" in page.source and "prefers-color-scheme: dark" in page.source
    assert {("div", "red circle"), ("b", "3"), ("b", "4"), ("b", "24.12")} <= set(page.texts)
    assert page.open == []
    assert not page.all("script") and not page.all("link") and "http" not in page.source and "url(" not in page.source


def test_text_is_escaped_everywhere(folder):
    evil = '</title></style><script>alert(1)</script>"\' onload="x" & <b>'
    section = Section(evil, [Item(evil, "videos/0 #1.mp4", "videos/0.png", {evil: evil})], evil, [[evil], [evil]])
    write_gallery(folder / "index.html", evil, [section], evil)
    page = Page(folder / "index.html")
    assert not page.all("script") and "<script" not in page.source and page.open == []
    assert len(page.all("b")) == 1  # the value's own
    for tag in ("h1", "h2", "title", "th", "td", "a", "b", "span"):
        assert (tag, evil) in page.texts
    assert page.all("img")[0]["alt"] == evil and set(page.all("video")[0]) == {
        "src", "width", "height", "aria-label", "autoplay", "loop", "muted", "playsinline"
    }  # fmt: skip


def test_captions_of_all_scripts(folder):
    captions = ["مثلث أحمر يتحرك", "赤い 円\u3000左へ", "family 👨‍👩‍👧 🔺", "a\0b\x1b[0m\ud800", "x" * 10_000, ""]
    write_gallery(folder / "index.html", "t", [Section("s", [Item(c, image="videos/0.png") for c in captions])])
    page = Page(folder / "index.html")
    expected = [*captions[:3], "a\ufffdb\ufffd[0m\ufffd", captions[4]]
    assert [text for tag, text in page.texts if tag == "div"] == expected
    assert page.source.count('<div dir="auto">') == 6 and "\0" not in page.source


def test_score_tables_stand_side_by_side_above_the_items(folder):
    table = [["", "right", "of", "accuracy"], ["color", 250, 256, 0.9765625]]
    items = [Item("x", image="videos/0.png")]
    write_gallery(
        folder / "index.html", "t", [Section("Here", items, table=table), Section("Shipped", items, table=table)]
    )
    page = Page(folder / "index.html")
    assert len(page.all("table")) == 2 and page.texts.count(("td", "250")) == 2 and ("td", "0.9766") in page.texts
    assert [a["href"] for a in page.all("a")] == ["#s0", "#s1"] and [h["id"] for h in page.all("h2")] == ["s0", "s1"]
    assert page.source.rindex("</table>") < page.source.index("<figure>")


@pytest.mark.parametrize("name", ["missing.mp4", "../outside.png", "/etc/hostname", "videos"])
def test_files_that_would_not_travel_are_refused(folder, name):
    write_png(folder.parent / "outside.png", np.zeros((2, 2, 3), np.uint8))
    (folder / "index.html").write_text("old")
    with pytest.raises(ValueError, match="gallery file"):
        write_gallery(folder / "index.html", "t", [Section("s", [Item("c", name)])])
    assert (folder / "index.html").read_text() == "old"
    assert sorted(p.name for p in folder.iterdir()) == ["index.html", "strip.png", "videos"]


def test_no_sections_and_empty_sections(folder):
    write_gallery(folder / "index.html", "t", [Section("nothing yet", [])])
    assert ("h2", "nothing yet") in Page(folder / "index.html").texts
