"""WebVid's layout: CSV files in the root list mp4 files `page_dir/videoid.mp4`, of which many may be absent."""

import bisect
import csv
import logging
import os
import re
from array import array
from collections.abc import Iterable

from cmd_jax.data.grouped import Rows
from cmd_jax.data.packed import Listing
from cmd_jax.data.roots import folder_with, inside, names_in, normal
from cmd_jax.data.tables import csv_rows
from cmd_jax.errors import UserError, some

HEADER = "videoid,contentUrl,duration,page_dir,name"
COLUMNS = ("videoid", "page_dir", "name")  # those that are read
NUMBER = re.compile("0|[1-9][0-9]{0,17}")
WORDS = {"train": ("train",), "val": ("val",), "test": ("val",), "all": ("train", "val")}  # in the names of its lists

log = logging.getLogger(__name__)


def read(root: str, split: str) -> Listing:
    """The videos of the split's lists that are there; their captions are the column `name`.

    The lists are all CSV files directly in the root whose names hold "train" (split train) or "val" (val or test) in
    any case, or either ("all"). A row without page_dir is of a video that was never fetched. Rows that name a video
    again give it further captions; those that repeat its caption too count once.
    """
    paths, videos = [os.path.join(root, name) for name in lists_of(root, split)], Videos(root)
    found, rows, absent, example = Rows(), 0, 0, ""
    for path in paths:
        for line, (video_id, page, text) in csv_rows(path, "data.root", COLUMNS, HEADER, untitled):
            rows += 1
            name = videos.find(page, video_id.strip(), f"{path} line {line}")
            if name is None:
                absent, example = absent + 1, example or os.path.join(page.strip(), f"{video_id.strip()}.mp4")
            else:
                found.add(line, name, text)
    read = ", ".join(map(os.path.basename, paths))
    if not rows:
        raise UserError("data.root", root, f"no rows in {read}", f"write one row a video: {HEADER}")
    if not len(found):
        problem = f"none of the {rows} videos of {read} is there, neither {example} nor videos/{example}"
        if videos.bad:
            problem += f" ({some([f'{name} {reason}' for name, reason in videos.bad.items()])})"
        raise UserError("data.root", root, problem, f"put them there; the folder holds {some(names_in(root))}")
    entries = found.entries()
    repeated = len(found) - len(entries.texts)
    more = f"; {repeated} rows repeat another" if repeated else ""
    log.info("%s: %d videos are there, %d rows name one that is absent%s", read, len(entries), absent, more)
    return Listing(entries, (), videos.bad, absent)


def untitled(row: list[str]) -> list[str] | None:
    """WebVid's columns, if a list begins with this row and it is no title row but already that of a video."""
    shown = len(row) >= 5 and re.match("https?://", row[1]) and re.match("P.*T", row[2])
    return HEADER.split(",") if shown else None


def lists_in(root: str) -> list[str]:
    """Names of the CSV files in the root that are WebVid's."""
    return [name for name in _csv_files(root) if is_list(os.path.join(root, name))]


def is_list(path: str) -> bool:
    """Whether a CSV file is WebVid's by name and header.

    An incomplete header counts, and so does an empty file: `read` says what is wrong with them.
    """
    named = any(word in os.path.basename(path).lower() for word in WORDS["all"])
    if not (named and os.path.isfile(path)):  # to open a named pipe would wait for ever
        return False
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = next(csv.reader([file.readline(10_000)], skipinitialspace=True), [])
    except (OSError, csv.Error):
        return False
    columns = [column.strip() for column in first]
    return not any(columns) or bool({"videoid", "contentUrl", "page_dir"} & {*columns} or untitled(columns))


class Videos:
    """The mp4 files that are there, below videos/ or, after that, the root itself.

    Each page_dir is listed once, and only if its parent holds it: WebVid has millions of rows, but few page_dirs.
    bad: name -> why a page_dir cannot be listed.
    """

    def __init__(self, root: str):
        self.root, self.bad, self._pages = root, {}, {}
        self._held = {"": set(names_in(root))}
        if "videos" in self._held[""] and os.path.isdir(os.path.join(root, "videos")):
            self._held["videos/"] = set(names_in(os.path.join(root, inside(root, "videos", root))))

    def find(self, page: str, video_id: str, where: str) -> str | None:
        """The file's name relative to the root, None where it is absent; `where` names the row in errors."""
        if not video_id or "/" in video_id or "\0" in video_id:
            raise UserError("data.root", where, f"the videoid {video_id!r} is no file name", "mend the row")
        if page not in self._pages:
            self._pages[page] = self._list(normal(page, where) if page.strip() else "", where)
        return next((f"{base}{video_id}.mp4" for base, ids in self._pages[page] if video_id in ids), None)

    def _list(self, page: str, where: str) -> list[tuple[str, "Ids"]]:
        """The folders of a page_dir, with their files; "" stands for what lies beside the page_dirs."""
        found = []
        for base, held in self._held.items():
            if not page:
                found.append((base, Ids(held)))
                continue
            if page.partition("/")[0] not in held:
                continue
            folder = inside(self.root, base + page, where)
            try:
                names = os.listdir(os.path.join(self.root, folder))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                self.bad[folder] = f"cannot be listed ({error.strerror})"
                continue
            found.append((f"{folder}/", Ids(names)))
        return found[::-1]


class Ids:
    """The ids of a folder's mp4 files, eight bytes for one that is a number, as WebVid's are."""

    def __init__(self, names: Iterable[str]):
        ids = [name.removesuffix(".mp4") for name in names if name.endswith(".mp4")]
        self._numbers = array("q", sorted(int(x) for x in ids if NUMBER.fullmatch(x)))
        self._others = frozenset(x for x in ids if not NUMBER.fullmatch(x))

    def __contains__(self, video_id: str) -> bool:
        if not NUMBER.fullmatch(video_id):
            return video_id in self._others
        place = bisect.bisect_left(self._numbers, number := int(video_id))
        return place < len(self._numbers) and self._numbers[place] == number


def _csv_files(root: str) -> list[str]:
    return [name for name in names_in(root) if name.lower().endswith(".csv") and not name.startswith(".")]


def lists_of(root: str, split: str) -> list[str]:
    by_word = {word: [name for name in _csv_files(root) if word in name.lower()] for word in WORDS["all"]}
    if both := set(by_word["train"]) & set(by_word["val"]):
        problem = "its name holds both train and val"
        raise UserError("data.root", os.path.join(root, min(both)), problem, "name it for the split that it lists")
    names = [name for word in WORDS[split] for name in by_word[word]]
    if not names:
        patterns = " or ".join(f"*{word}*.csv" for word in WORDS[split])
        problem, folder = (
            f"no {patterns} in {root}; its CSV files: {some(_csv_files(root))}",
            folder_with(root, lists_in),
        )
        remedy = f"give data.root={folder}" if folder else "put WebVid's list there, or use another data.split"
        raise UserError("data.split", split, problem, remedy)
    return names
