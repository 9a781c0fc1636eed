"""README and docs/: links lead somewhere, functions exist, commands are those that cmd-jax takes."""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from cmd_jax.config import load
from cmd_jax.main import check_stage, parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page.stem: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LANGUAGES = {"sh", "python", "text"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


class Command(NamedTuple):
    """One command of a shell block: variables set for it, and its words."""

    page: str
    environment: dict[str, str]
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def cmd_jax(self) -> tuple[str, ...] | None:
        """The arguments of cmd-jax, called here or by a launcher; None of another command."""
        for start in (("cmd-jax",), ("./launch/tpu_pod.sh", "start"), ("sbatch", "launch/slurm.sbatch")):
            if self.words[: len(start)] == start:
                return self.words[len(start) :]
        if self.words[:2] == ("python", "launch/local.py"):
            return self.words[self.words.index("--") + 1 :]
        return None


def prose_and_blocks(page: str) -> tuple[str, list[Block]]:
    """The text of a page without its fenced blocks, and those."""
    pieces = re.split(r"^```(.*)\n((?:.*\n)*?)```\n", PAGES[page].read_text(), flags=re.M)
    return "\n".join(pieces[::3]), [Block(page, *both) for both in zip(pieces[1::3], pieces[2::3], strict=True)]


def commands_of(block: Block) -> list[Command]:
    """The commands of a shell block; `for` loops are written out."""

    def written_out(loop):
        name, values, body = loop.groups()
        return "\n".join(body.replace(f"${name}", value) for value in values.split())

    text = re.sub(r"^for (\w+) in (.*); do\n((?:.*\n)*?)done$", written_out, block.text, flags=re.M)
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            first = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
            if words:
                environment = dict(word.split("=", 1) for word in words[:first])
                commands.append(Command(block.page, environment, tuple(words[first:])))
    return commands


BLOCKS = [block for page in PAGES for block in prose_and_blocks(page)[1]]
COMMANDS = [command for block in BLOCKS if block.language == "sh" for command in commands_of(block)]
CMD_JAX = list(dict.fromkeys(command.cmd_jax for command in COMMANDS if command.cmd_jax))


def anchors(page: Path) -> set[str]:
    """The fragments by which forges link to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    prose, _ = prose_and_blocks(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not target.startswith("https://"):
            path, _, fragment = target.partition("#")
            place = (PAGES[page].parent / path).resolve() if path else PAGES[page]
            assert place.is_file() and place.is_relative_to(ROOT), target
            assert not fragment or fragment in anchors(place), target


def test_every_page_and_picture_is_linked():
    linked = {
        (path.parent / target.partition("#")[0]).resolve()
        for path in PAGES.values()
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    }
    files = {
        path
        for path in (ROOT / "docs").rglob("*")
        if path.suffix in (".md", ".ipynb") or path.parent.name == "pictures"
    }
    assert files <= linked, files - linked


def test_blocks_say_what_they_are():
    assert {block.language for block in BLOCKS} <= LANGUAGES
    for page in PAGES:
        assert not re.search(r"^(    |```)", prose_and_blocks(page)[0], flags=re.M), page


def test_the_readme_is_short():
    assert len(PAGES["README"].read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    for name in re.findall(r"`((?:configs|launch|tests|cmd_jax|docs)/[\w/.-]+)`", prose_and_blocks(page)[0]):
        assert (ROOT / name).exists(), name


def defined(path: Path) -> set[str]:
    """The functions of a file, and the methods of its classes as Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def test_the_walk_through_the_code_names_functions_that_exist():
    """Each table of docs/design.md's walk has at most six files."""
    walk = PAGES["design"].read_text().partition("## A stranger's walk")[2]
    ways = [
        re.findall(r"^\| `([\w/]+\.py)` \| (.*?) \|", way, flags=re.M)
        for way in re.split(r"^\*\*", walk, flags=re.M)[1:]
    ]
    assert len(ways) == 3 and all(2 <= len(way) <= 6 for way in ways)
    for file, functions in (row for way in ways for row in way):
        path = ROOT / file if file.startswith("launch/") else ROOT / "cmd_jax" / file
        assert set(re.findall(r"`([\w.]+)`", functions)) <= defined(path), file


@pytest.mark.parametrize("arguments", CMD_JAX, ids=shlex.join)
def test_a_command_is_one_that_cmd_jax_takes(arguments):
    """Verb, flags, config file with its stage and sizes, and the names and types of its overrides."""
    flags, overrides = parse(list(arguments))
    if flags.verb != "convert":
        config = load(flags.config, overrides)
        if flags.verb in ("train", "sample", "evaluate"):
            check_stage(flags.verb, config.stage)
