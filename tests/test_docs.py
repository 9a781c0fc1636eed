"""README and docs/: links lead somewhere, functions exist, commands are those that cmd-jax takes."""

import ast
import contextlib
import operator
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from data.clip_files import quarters, write_clip
from PIL import Image

from cmd_jax.config import STAGES, keys, load
from cmd_jax.data.shapes import CLASS_NAMES
from cmd_jax.main import check_stage, parse, run

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
        pod = "./launch/tpu_pod.sh"
        for start in (("cmd-jax",), (pod, "start"), (pod, "keep"), ("sbatch", "launch/slurm.sbatch")):
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
        config = load(flags.config, overrides, shapes_only=flags.verb in ("bench", "doctor"))
        if flags.verb in ("train", "sample", "evaluate", "calibrate", "bench"):
            check_stage(flags.measured if flags.verb == "bench" else flags.verb, config.stage)


# Running what the pages say at tiny settings, in the order in which they say it.

SHIPPED = "--config=quickstart:sample,size=long --workdir=runs/shipped"
NOT_RUN = {  # how a command begins -> why it is not run here
    "git clone": "what it fetches is this repository",
    "cd cmd_jax": "goes with it",
    ". .venv/bin/activate": "the environment of the tests is active",
    "export": "goes with the pod's commands",
    "gcloud": "needs an account; its own parser took them",
    "docker": "needs Docker; tests/test_dockerfile.py does what the file says",
    "./launch/tpu_pod.sh": "needs a TPU pod; tests/test_launch_cloud.py has a stand-in",
    "sbatch launch/slurm.sbatch": "needs a SLURM cluster; tests/test_launch_scripts.py has a stand-in",
    "kubectl": "needs a Kubernetes cluster; tests/test_launch_cloud.py reads the file",
    "./launch/quickstart.sh": "trains for minutes; its stages and scores are run here on their own",
    "./launch/test.sh": "runs this very test",
    "./launch/device_check.sh": "takes minutes; tests/test_device_check.py",
    "pip download": "fetches from PyPI",
    "python launch/local.py": "starts processes; tests/test_launch.py",
    "python launch/layouts.py": "compiles for minutes; tests/test_layouts.py",
    "python launch/make_pipeline.py": "trains a VAE for minutes, or writes 3 GB; tests/test_make_pipeline.py",
    "python launch/random_stages.py": "writes 3 GB",
    "cmd-jax sample --config=webvid:sample --workdir=runs/full-size": "takes what that writes",
    "cmd-jax ingest --config=ucf101:autoencoder --source=UCF": "needs a bucket",
    "cmd-jax sample --config=ucf101:sample --workdir=runs/ucf101": "takes what a pod trained",
    "XLA_FLAGS=": "starts JAX anew, with more devices; tests/verbs/test_doctor.py",
    "cmd-jax calibrate": "tests/test_calibration.py, and sampling with what it writes",
    f"cmd-jax sample {SHIPPED} --config.sampling.reuse": "goes with it",
    f"cmd-jax sample {SHIPPED} --preset": "its lists are for more steps than are taken here",
    "cmd-jax bench": "measures for minutes; tests/bench/test_bench.py",
    "cmd-jax verify-resume": "kills trainings for minutes; tests/verbs/test_verify_resume.py",
    "cmd-jax sample --config=quickstart:sample,size=long --workdir=gs://": "tests/verbs/test_bucket_sample.py",
    "python -m cmd_jax.report.collect": "goes with it",
    "cmd-jax convert": "needs published weights; tests/verbs/test_convert.py takes small ones of every kind",
}
# What the settings of tests/tiny.py replace, so that commands run the programs that other tests have compiled.
TINY = (
    "data.frames", "data.height", "data.width", "data.clips", "train", "optimizer", "model", "loss", "diffusion",
    "latents.normalize", "latents.starts", "sampling.batch_size", "sampling.content_steps",
    "sampling.motion_steps", "sampling.motions", "evaluation", "pretrained.path",
)  # fmt: skip
GIVEN = {"folder": {"data.root": "DIR"}, "webvid": {"data.root": "WEBVID", "pretrained.path": "SD"}}


class Sandbox:
    """A folder to work in. A stage is trained once for classes, once for texts; other commands get that one."""

    def __init__(self):
        self.trained, self.done = {}, set()
        Path("configs").symlink_to(ROOT / "configs")
        for name in CLASS_NAMES:  # those of the generated shapes, so that one model serves both
            write_clip(Path("DIR", name, "0.avi"), quarters())
        lines = ["videoid,contentUrl,duration,page_dir,name"]
        for number, name in enumerate(("walking", "waving")):
            write_clip(Path("WEBVID", "page", f"{number}.mp4"))
            lines.append(f"{number},url,1,page,someone is {name}")
        Path("WEBVID", "results_train.csv").write_text("\n".join(lines) + "\n")
        Image.new("RGB", (40, 30), "teal").save("frame.png")

    def run(self, command: Command):
        if command.words in self.done:
            return
        self.done.add(command.words)
        if command.words[0] == "python":
            script, *flags = command.words[1:]
            less = {"--distinct": "2", "--frames": "4", "--size": "32"}
            flags = [less.get(before, flag) for before, flag in zip(("", *flags), flags, strict=False)]
            subprocess.run([sys.executable, ROOT / script, *flags, "--step", "40"], check=True, timeout=120)
            return
        flags, overrides = parse(list(command.cmd_jax))
        if flags.verb == "train":
            self.train(flags.config, overrides, Path(flags.workdir))
        elif flags.verb == "ingest" and flags.encode:
            file = flags.config.partition(":")[0]
            self.train(f"{file}:autoencoder", overrides, Path(flags.workdir))
            assert run(flags, overrides | shrunk(load(flags.config, overrides), file)) == 0
            assert Path(flags.workdir, "latents", flags.encode, "1.0.0/dataset_info.json").exists()
        elif flags.verb == "ingest":
            overrides |= shrunk(load(flags.config, overrides), flags.config.partition(":")[0])
            assert run(flags, overrides) == 0
            assert Path(flags.out, "clips/1.0.0/dataset_info.json").exists()
        elif flags.verb == "doctor":  # at full size: it allocates nothing
            assert run(flags, overrides) == 0
        else:
            self.sample(flags, overrides)

    def train(self, specification: str, overrides: dict, workdir: Path):
        file, _, argument = specification.partition(":")
        stage = argument.split(",")[0]
        kind = kind_of(file)
        if (kind, stage) not in self.trained:
            flags, _ = parse(["train", f"--config={specification}", f"--workdir={workdir}"])
            assert run(flags, overrides | shrunk(load(specification, overrides), file)) == 0
            self.trained[kind, stage] = (workdir / stage).absolute()
        elif not (workdir / stage).exists():
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / stage).symlink_to(self.trained[kind, stage])
        assert (workdir / stage / "ema.safetensors").is_file()

    def sample(self, flags, overrides: dict):
        config, workdir, file = load(flags.config, overrides), Path(flags.workdir), flags.config.partition(":")[0]
        overrides = overrides | shrunk(config, file) | {"sampling.num": str(min(config.sampling.num, 8))}
        if Path(config.weights).exists() and config.weights:
            overrides = {key: value for key, value in overrides.items() if not key.startswith("data.")}
        else:
            overrides["weights"] = ""
            for stage in STAGES:
                self.train(f"{file}:{stage}", GIVEN.get(file, {}), workdir)
        before = set(workdir.glob("samples*/index.html"))
        assert run(flags, overrides) == 0
        assert len(set(workdir.glob("samples*/index.html")) - before) == 1


def kind_of(file: str) -> str:
    """The kind of tests/tiny.py that a config file's models are."""
    return "text" if file == "webvid" else "flow"


def shrunk(config, file: str) -> dict[str, str]:
    """Overrides that bring a config to the size of tests/tiny.py."""
    small = tiny.config_of(f"{config.stage},kind={kind_of(file)}")
    values = {key: operator.attrgetter(key)(small) for key in keys(small)}
    if file == "webvid" and config.stage != "sample":
        values["latents.starts"] = 24  # of two clips: as many windows as there are in tests/test_text_to_video.py
    wanted = [key for key in keys(config) & values.keys() if key.startswith(TINY) and key != "optimizer.steps"]
    return {key: str(values[key]) for key in wanted}


def fewer(code: str) -> str:
    """Python code with numbers of steps and samples that take little time."""
    return re.sub(r"\b(steps|content_steps|motion_steps|count)=\d+", r"\1=2", code)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("docs")):
        yield Sandbox()


def not_run(command: Command) -> list[str]:
    words = " ".join([*(f"{name}={value}" for name, value in command.environment.items()), *command.words])
    return [start for start in NOT_RUN if words.startswith(start) or " ".join(command.words).startswith(start)]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_runs(page, sandbox):
    names = {}
    for block in BLOCKS:
        if block.page != page:
            continue
        if block.language == "python":
            exec(compile(fewer(block.text), f"{page}.md", "exec"), names)
        for command in commands_of(block) if block.language == "sh" else ():
            if not not_run(command):
                sandbox.run(command)


def test_what_is_not_run_is_there():
    assert {start for command in COMMANDS for start in not_run(command)} == NOT_RUN.keys()
