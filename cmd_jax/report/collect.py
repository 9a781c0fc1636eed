"""One page from several sample folders: python -m cmd_jax.report.collect index.html DIR [DIR ...]

The folders are those that `cmd-jax sample` and `cmd-jax evaluate` write; they must lie below the page's own folder.
"""

import json
import sys
from pathlib import Path

from cmd_jax.errors import UserError
from cmd_jax.report.gallery import Item, Section, write_gallery


def read_section(folder: Path, page: Path) -> Section:
    """The section of one sample folder, its files named relative to the page."""
    path = folder / "samples.json"
    if not path.is_file():
        raise UserError(
            "folder", folder, "holds no samples.json", "give a folder that `cmd-jax sample` or `evaluate` wrote"
        )
    section = json.loads(path.read_text())
    base = folder.absolute().relative_to(page.parent.absolute())
    items = [Item(r["caption"], video=str(base / r["video"]), image=str(base / r["content"])) for r in section["items"]]
    return Section(section["title"], items, note=section["note"], table=section["table"])


def main(arguments: list[str]) -> int:
    page, *folders = map(Path, arguments)
    try:
        write_gallery(page, "CMD: sampled videos", [read_section(folder, page) for folder in folders])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
