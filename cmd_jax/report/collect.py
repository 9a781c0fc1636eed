"""One page from several sample folders: python -m cmd_jax.report.collect index.html DIR [DIR ...]

The folders are those that `cmd-jax sample` and `cmd-jax evaluate` write; they must lie below the page's own folder.
"""

import os
import sys
from pathlib import Path

from cmd_jax.buckets import BucketPath, check_url
from cmd_jax.errors import UserError, exit_code, of_file, with_remedy
from cmd_jax.files import as_path, is_remote, read_json
from cmd_jax.report.gallery import Item, Section, write_gallery

SECTION = {
    "title": str, "note": str, "table": ([[(str, float)]], None),
    "items": [{"caption": str, "video": str, "content": str, "index?": int}],
}  # fmt: skip
USAGE = "python -m cmd_jax.report.collect index.html DIR [DIR ...]"


def read_section(folder: Path | BucketPath, page: Path | BucketPath) -> Section:
    """The section of one sample folder, its files named relative to the page. UserError if there is none to read."""
    path = folder / "samples.json"
    if not path.is_file():
        raise UserError(
            "folder", folder, "holds no samples.json", "give a folder that `cmd-jax sample` or `evaluate` wrote"
        )
    home = _absolute(page.parent)
    try:
        base = _absolute(folder).relative_to(home)
    except ValueError as error:
        raise UserError("folder", folder, f"not below the page's folder {home}", "move one of them") from error
    section = read_json(path, "folder", remedy="sample or evaluate again", like=SECTION)
    items = [Item(r["caption"], video=str(base / r["video"]), image=str(base / r["content"])) for r in section["items"]]
    return Section(section["title"], items, note=section["note"], table=section["table"] or [])


def _absolute(path: Path | BucketPath) -> Path | BucketPath:
    return path if is_remote(path) else Path(os.path.abspath(path))


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 2:
            raise UserError("arguments", " ".join(arguments), "a page and sample folders are needed", f"run {USAGE}")
        for argument in arguments:
            check_url("arguments", argument)
        page, *folders = map(as_path, arguments)
        if page.is_dir():
            raise UserError("page", page, "is a folder, not the file to write", f"run {USAGE}")
        sections = [read_section(folder, page) for folder in folders]
        try:
            write_gallery(page, "CMD: sampled videos", sections)
        except (OSError, ValueError) as error:
            raise UserError("page", page, f"cannot be made ({error})", "mend that file or folder") from error
    except (UserError, OSError) as error:
        print(of_file(error) if isinstance(error, OSError) else with_remedy(error), file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
