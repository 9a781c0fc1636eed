"""One page from several sample folders: python -m cmd_jax.report.collect index.html DIR [DIR ...]

The folders are those that `cmd-jax sample` and `cmd-jax evaluate` write; they must lie below the page's own folder.
"""

import os
import sys
from pathlib import Path

import av

from cmd_jax.errors import UserError
from cmd_jax.files import read_json
from cmd_jax.report.gallery import Item, Section, write_gallery

SECTION = {
    "title": str, "note": str, "table": ([[(str, float)]], None),
    "items": [{"caption": str, "video": str, "content": str, "index?": int}],
}  # fmt: skip
USAGE = "python -m cmd_jax.report.collect index.html DIR [DIR ...]"


def read_section(folder: Path, page: Path) -> Section:
    """The section of one sample folder, its files named relative to the page. UserError if there is none to read."""
    path = folder / "samples.json"
    if not path.is_file():
        raise UserError(
            "folder", folder, "holds no samples.json", "give a folder that `cmd-jax sample` or `evaluate` wrote"
        )
    home = Path(os.path.abspath(page.parent))
    try:
        base = Path(os.path.abspath(folder)).relative_to(home)
    except ValueError as error:
        raise UserError("folder", folder, f"not below the page's folder {home}", "move one of them") from error
    section = read_json(path, "folder", remedy="sample or evaluate again", like=SECTION)
    items = [Item(r["caption"], video=str(base / r["video"]), image=str(base / r["content"])) for r in section["items"]]
    return Section(section["title"], items, note=section["note"], table=section["table"] or [])


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 2:
            raise UserError("arguments", " ".join(arguments), "a page and sample folders are needed", f"run {USAGE}")
        page, *folders = map(Path, arguments)
        if page.is_dir():
            raise UserError("page", page, "is a folder, not the file to write", f"run {USAGE}")
        sections = [read_section(folder, page) for folder in folders]
        try:
            write_gallery(page, "CMD: sampled videos", sections)
        except (OSError, ValueError, av.FFmpegError) as error:
            raise UserError("page", page, f"cannot be made ({error})", "mend that file or folder") from error
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
