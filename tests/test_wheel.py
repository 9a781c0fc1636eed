"""What `pip install` gives who has no checkout: a wheel, built and installed as a user would, and used elsewhere.

The dependencies are those of this interpreter: a .pth file shows them to the fresh environment, nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd: Path, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a build folder in the tree, and would take up what an earlier one holds."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("cmd_jax", "configs", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    flags = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", f"--wheel-dir={out}")
    built = run(sys.executable, "-m", "pip", "wheel", *flags, tree, cwd=out)
    assert built.returncode == 0, built.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`cmd-jax` of a fresh environment that holds the wheel."""
    environment = tmp_path_factory.mktemp("venv")
    assert run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment).returncode == 0
    flags = (f"--python={environment}/bin/python", "install", "--quiet", "--no-deps", "--no-index")
    put = run(sys.executable, "-m", "pip", *flags, wheel, cwd=environment)
    assert put.returncode == 0, put.stderr
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return environment / "bin" / "cmd-jax"


def test_a_wheel_holds_the_package_and_the_shipped_configs_weights_and_prompts(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "cmd_jax").rglob("*.py")}
    shipped = {path for pattern in ("*.py", "prompts/*", "weights/*/*") for path in (ROOT / "configs").glob(pattern)}
    tree |= {f"cmd_jax/{path.relative_to(ROOT)}" for path in shipped}
    assert {name for name in names if ".dist-info/" not in name} == tree
    assert sum(name.endswith(".safetensors") for name in names) == 3


def test_the_shipped_weights_are_sampled_from_another_folder(installed, tmp_path):
    small = [f"--config.sampling.{key}=1" for key in ("num", "batch_size", "content_steps", "motion_steps")]
    done = run(installed, "sample", "--config=quickstart:sample,size=long", "--workdir=x", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "x" / "samples").rglob("*.mp4")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_config_of_the_tests_own_weights_says_that_a_wheel_lacks_them(installed, tmp_path):
    refused = run(installed, "train", "--config=webvid:content,size=tiny", "--workdir=x", cwd=tmp_path)
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and line.startswith("config:size=tiny: ") and "repository" in line
    assert not any(tmp_path.iterdir())


def test_help_and_import_need_no_jax(installed, tmp_path):
    code = "import sys, cmd_jax, cmd_jax.main as m; sys.argv[1:] = ['train', '--help']\ntry: m.main()\nfinally: print("
    code += "m.__file__, *{'jax', 'numpy', 'flax', 'tensorflow', 'ml_collections'} & set(sys.modules))"
    python = installed.with_name("python")
    place, *heavy = run(python, "-c", code, cwd=tmp_path).stdout.splitlines()[-1].split()
    assert Path(place).is_relative_to(installed.parents[1]) and not heavy
