"""A page of videos to look at side by side: one index.html, no scripts, no network, works from file://."""

import html
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from cmd_jax.buckets import BucketPath
from cmd_jax.files import as_path, each, write_text

WIDE = 3.0  # a picture with a larger width : height gets a row to itself (film strips, grids of frames)

UNFIT = ("Cc", "Cs")  # Unicode's control characters and lone surrogates: not allowed in a page


@dataclass(frozen=True)
class Item:
    """A video, a picture (its content frame, or a film strip), or both; paths are relative to the page's folder.

    extra: short facts under the caption, such as {"seed": 3, "guidance": 4.0}.
    """

    caption: str
    video: str | None = None
    image: str | None = None
    extra: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Section:
    """A heading with items below it.

    table: rows of scores, the first of them the head; the tables of all sections stand side by side on top of the page,
    and what has no items stands only there.
    """

    title: str
    items: Sequence[Item]
    note: str = ""
    table: Sequence[Sequence[object]] | None = None


STYLE = """
:root { color-scheme: light dark; --page: #f5f5f3; --card: #fff; --ink: #1d1d1f;
  --soft: #6b6b70; --line: #dededa; --link: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #141416; --card: #1f1f22; --ink: #ececee; --soft: #9c9ca3; --line: #34343a; --link: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 3vw, 3rem) 4rem; max-width: 110rem;
  background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .25rem; padding-top: 1.25rem; border-top: 1px solid var(--line); font-size: 1.2rem; }
h2 small { color: var(--soft); font-weight: 400; font-size: .9rem; margin-inline-start: .4rem; }
h1, h2, figcaption, .note { overflow-wrap: anywhere; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
.note { margin: 0 0 1rem; color: var(--soft); max-width: 70rem; white-space: pre-line; }
.scores { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.25rem 0; align-items: flex-start; }
.scores > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: start; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .25rem 1.1rem .25rem 0; text-align: end; border-top: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .85rem; border-top: 0; }
th:first-child, td:first-child { text-align: start; } th:last-child, td:last-child { padding-inline-end: 0; }
.items { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--width)), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
figure.wide { grid-column: 1 / -1; }
.media { display: flex; gap: 2px; background: var(--line); align-items: flex-start; }
.media > * { flex: 1 1 0; min-width: 0; width: 100%; height: auto; display: block;
  image-rendering: pixelated; background: #000; }
figcaption { padding: .55rem .75rem .65rem; max-height: 9rem; overflow-y: auto; }
.facts { margin: .15rem 0 0; color: var(--soft); font-size: .82rem; display: flex; flex-wrap: wrap; gap: 0 .9rem; }
.facts b { color: var(--ink); font-weight: 500; font-variant-numeric: tabular-nums; }
"""


def text(value: object) -> str:
    """Anything as text that is safe in HTML, in quotes too; floats are rounded, control characters become visible."""
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return html.escape("".join("\ufffd" if unicodedata.category(c) in UNFIT and c not in "\n\t" else c for c in shown))


def pixels(folder: Path | BucketPath, name: str) -> tuple[int, int]:
    """Width and height of a video or picture that the page will refer to.

    ValueError where a moved or copied gallery would lose it, and where it is damaged.
    """
    import av

    path = PurePosixPath(name)
    missing = ValueError(f"gallery file {name!r} must exist inside {folder}, named relative to it")
    if path.is_absolute() or ".." in path.parts:
        raise missing
    try:
        content = (folder / name).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise missing from None
    try:
        with av.open(io.BytesIO(content)) as container:
            stream = container.streams.video[0]
            return stream.width, stream.height
    except (av.FFmpegError, IndexError) as e:
        raise ValueError(f"{name} in {folder} is damaged: {getattr(e, 'strerror', e)}") from e


def figure(item: Item, folder: Path | BucketPath) -> tuple[str, float]:
    """-> (HTML, the width : height of all its media in a row)."""
    media, shape = [], 0.0
    alt = text(item.caption)
    if item.video is not None:
        width, height = pixels(folder, item.video)
        shape += width / height
        media.append(
            f'<video src="{quote(item.video)}" width="{width}" height="{height}" aria-label="{alt}" '
            "autoplay loop muted playsinline></video>"
        )
    if item.image is not None:
        width, height = pixels(folder, item.image)
        shape += width / height
        title = ' title="content frame"' if item.video is not None else ""
        media.append(
            f'<img src="{quote(item.image)}" width="{width}" height="{height}" alt="{alt}"{title} loading="lazy">'
        )
    facts = "".join(f"<span>{text(name)} <b>{text(value)}</b></span>" for name, value in (item.extra or {}).items())
    facts = f'<div class="facts">{facts}</div>' if facts else ""
    kind = ' class="wide"' if shape > WIDE and len(media) == 1 else ""
    return (
        f'<figure{kind}><div class="media">{"".join(media)}</div>'
        f'<figcaption><div dir="auto">{text(item.caption)}</div>{facts}</figcaption></figure>\n',
        shape,
    )


def score_table(section: Section, number: int) -> str:
    head, *rows = section.table
    lines = ["".join(f"<th>{text(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    title = f'<a href="#s{number}">{text(section.title)}</a>' if section.items else text(section.title)
    caption = f'<caption dir="auto">{title}</caption>'
    return f"<div><table>{caption}\n{body}</table></div>\n"


def write_gallery(path, title: str, sections: Sequence[Section], note: str = "") -> None:
    """Writes the page to `path` (an index.html) at once, replacing what was there.

    Every file named by an Item must already lie in the page's folder or below it (ValueError otherwise): the folder can
    then be moved, zipped or served as it is. All text is escaped.
    """
    path = as_path(path)
    folder = path.parent
    tables = "".join(score_table(s, i) for i, s in enumerate(sections) if s.table)
    parts = []
    for i, section in enumerate(sections):
        if section.table and not section.items:
            continue
        figures = each(folder, lambda item: figure(item, folder), section.items)
        shapes = sorted(shape for _, shape in figures if shape)
        # Cards wide enough for 150 pixels of height, the two halves of an item side by side.
        width = round(min(640, max(170, 150 * shapes[len(shapes) // 2]))) if shapes else 300
        parts.append(
            f'<h2 id="s{i}" dir="auto">{text(section.title)} <small>{len(section.items)}</small></h2>\n'
            + (f'<p class="note" dir="auto">{text(section.note)}</p>\n' if section.note else "")
            + f'<div class="items" style="--width: {width}px">\n{"".join(markup for markup, _ in figures)}</div>\n'
        )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1 dir="auto">{text(title)}</h1>\n'
        + (f'<p class="note" dir="auto">{text(note)}</p>\n' if note else "")
        + (f'<div class="scores">\n{tables}</div>\n' if tables else "")
        + "".join(parts)
        + "</body>\n</html>\n"
    )
    write_text(path, page)
