"""launch/Dockerfile without Docker: what it says is done in a scratch folder, with what .dockerignore lets in."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from stand_ins import LAUNCH, ROOT, stand_in

INSTRUCTIONS = [
    line.split(" ", 1)
    for line in re.sub(r"^#.*\n|\\\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M).splitlines()
    if line
]
PATTERNS = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def is_ignored(path: str) -> bool:
    """By .dockerignore's rules: a pattern takes in what lies below, and the last one that matches says it."""
    ignored = False
    for pattern in PATTERNS:
        parts = re.split(r"(\*\*/|\*)", pattern.removeprefix("!"))
        text = "".join({"**/": "(.*/)?", "*": "[^/]*"}.get(part) or re.escape(part) for part in parts)
        if re.fullmatch(f"{text}(/.*)?", path):
            ignored = not pattern.startswith("!")
    return ignored


class Build:
    """What an image would hold: WORKDIR and CMD_JAX_CACHE are folders in `folder`."""

    def __init__(self, folder: Path, path: str, **arguments):
        self.home, self.user = folder / "workdir", "root"
        self.home.mkdir()
        self.environment = {"PATH": path, "HOME": str(folder)}
        self.environment |= {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        self.entry, self.command = [], []
        for name, rest in INSTRUCTIONS:
            match name:
                case "ARG" | "ENV":
                    self.environment |= dict(word.split("=", 1) for word in rest.split())
                    self.environment |= arguments | {"CMD_JAX_CACHE": str(folder / "cache")}
                case "COPY":
                    *sources, target = rest.split()
                    assert target in (".", "./")
                    for source in sources:
                        self.copy(source)
                case "RUN":
                    assert self.user == "root"
                    self.run("sh", "-c", rest)
                case "USER":
                    self.user = rest
                case "ENTRYPOINT":
                    self.entry = json.loads(rest)
                case "CMD":
                    self.command = json.loads(rest)
                case _:
                    assert name in ("FROM", "WORKDIR"), name

    def copy(self, source: str):
        for path in sorted(ROOT.iterdir()) if source == "." else [ROOT / source]:
            if path.is_dir() and not is_ignored(path.name):
                shutil.copytree(path, self.home / path.name, ignore=self.ignored_in, dirs_exist_ok=True)
            elif not is_ignored(path.name):
                shutil.copy(path, self.home)

    @staticmethod
    def ignored_in(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if is_ignored(str((Path(folder) / name).relative_to(ROOT)))}

    def run(self, *command) -> str:
        done = subprocess.run(command, cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout


@pytest.fixture
def build(tmp_path):
    """Build with stand-ins for pip and cmd-jax, and for what would need root."""
    for name in ("useradd", "chown", "pip", "cmd-jax"):
        stand_in(tmp_path, name, f'echo "{name} $*" | tee -a "{tmp_path}/calls"')
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    return lambda **arguments: Build(tmp_path, f"{tmp_path / 'bin'}:/usr/bin:/bin", **arguments)


def test_each_instruction_does_what_it_should(build, tmp_path):
    image = build()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [
        "useradd --uid 1000 --create-home cmd", f"chown 1000:1000 {tmp_path}/cache",
        "pip install -r requirements.txt -r extra.txt", "pip install --no-deps -e .",
    ]  # fmt: skip
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert (image.home / "extra.txt").read_text().split("\n")[:-1] == extras["tpu"] + extras["gcs"]
    assert (tmp_path / "cache").is_dir() and image.user == "1000:1000"
    assert (image.home / "cmd_jax/main.py").exists() and (image.home / "configs/ucf101.py").exists()
    assert {path.name for path in image.home.iterdir()} == {
        "LICENSE", "README.md", "pyproject.toml", "requirements.txt", "extra.txt", "cmd_jax", "configs", "launch",
    }  # fmt: skip
    assert not [*image.home.rglob("__pycache__")]
    assert image.run(*image.entry, *image.command) == "cmd-jax --help\n"
    tunables = image.run(*image.entry, "sh", "-c", 'echo "$GLIBC_TUNABLES"')
    assert tunables == subprocess.run(
        [". launch/env.sh; echo $GLIBC_TUNABLES"], shell=True, cwd=ROOT, capture_output=True, text=True, env={}
    ).stdout and tunables.startswith("glibc.malloc")  # fmt: skip


def test_what_is_needed_comes_before_the_sources():
    """So that a change of them installs nothing anew; and no tag that moves from one Python to the next."""
    steps = [f"{name} {rest}" for name, rest in INSTRUCTIONS]
    installed = next(i for i, step in enumerate(steps) if "requirements.txt -r" in step)
    assert installed < steps.index("COPY . .") and "COPY pyproject.toml requirements.txt ./" in steps[:installed]
    (major, minor), lowest = re.match(r"FROM python:(\d+)\.(\d+)-slim$", steps[0]).groups(), (3, 11)
    assert (int(major), int(minor)) >= lowest


@pytest.mark.parametrize("extra, lines", [("", 0), ("s3", 1), ("cuda,gcs", 2)])
def test_extras_are_an_argument(build, extra, lines):
    assert len((build(EXTRA=extra).home / "extra.txt").read_text().split()) == lines


def test_an_unknown_extra_ends_the_build(build):
    with pytest.raises(RuntimeError, match="KeyError: 'gsc'"):
        build(EXTRA="tpu,gsc")


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".venv/bin/python", ".venv-3.13/x", "runs/quickstart/config.json", "data/a.mp4",
        "tests/tiny.py", "docs/data.md", "cmd_jax/__pycache__/main.pyc", "cmd_jax/data/__pycache__/a.pyc",
        "key.json", ".ci/run", "cmd_jax.egg-info/PKG-INFO", "nohup.out", "shared/SPEC.md",
    ],
)  # fmt: skip
def test_what_stays_out(path):
    assert is_ignored(path)


def test_what_a_pod_gets_an_image_gets():
    """launch/tpu_pod.sh copies the same."""
    copied = re.search(r"^ +(pyproject\.toml .*) &&$", (LAUNCH / "tpu_pod.sh").read_text(), flags=re.M)[1].split()
    assert {f"!{name}" for name in copied} == {pattern for pattern in PATTERNS if pattern.startswith("!")}


@pytest.mark.slow
def test_it_installs(tmp_path):
    """With the real pip, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    for name in ("useradd", "chown"):
        stand_in(tmp_path, name, "")
    image = Build(tmp_path, f"{tmp_path / 'bin'}:{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin")
    assert "usage: cmd-jax" in image.run(*image.entry, *image.command)
    code = "import gcsfs, libtpu; from cmd_jax.buckets import check_url; check_url('a', 'gs://bucket/run')"
    image.run(*image.entry, "python", "-c", code)
