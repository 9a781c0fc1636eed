"""Stand-ins for the programs that the launch scripts call, and the scripts started with them."""

import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TRAIN = ["train", "--config=c.py:content", "--workdir=/shared/two words"]


def stand_in(folder: Path, name: str, body: str):
    """A program of that name, found first."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def script(folder: Path, *command, **variables) -> subprocess.Popen:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    ours = ("VENV", "PYTHON", "RESTARTS", "PREPARE", "EXTRAS", "SLICE", "POLL", "SLURM_JOB_ID")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    return subprocess.Popen(
        command, env=kept | {"PATH": path} | variables, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def ended(running: subprocess.Popen):
    out, err = running.communicate(timeout=60)
    return running.returncode, out, err


def await_file(*paths: Path):
    """Until all are there and say something."""
    end = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end, paths
        time.sleep(0.02)
