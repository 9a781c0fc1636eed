"""The programs are those that were recorded: SHA-256 of the lowered StableHLO of each train step and sampler.

A change that alters one must say so in its commit, and record them again: `python tests/test_programs.py --record`.
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from lowered import sample_program, train_program
from processes import ROOT, environment

RECORDED = Path(__file__).parent / "fixtures" / "programs.json"
NAMES = ("red", "green", "blue")
PROGRAMS = {  # what it is -> lowered
    "train autoencoder, pixel": lambda: train_program("autoencoder", "gaussian", 1, 2),
    "train autoencoder, latent": lambda: train_program("autoencoder", "text", 1, 2),
    "train content, flow": lambda: train_program("content", "flow", 1, 2),
    "train content, gaussian": lambda: train_program("content", "gaussian", 1, 2),
    "train content, text": lambda: train_program("content", "text", 1, 2),
    "train motion, flow": lambda: train_program("motion", "flow", 1, 2),
    "train motion, gaussian in two microbatches": lambda: train_program("motion", "gaussian", 1, 2, accumulate=2),
    "train motion, text": lambda: train_program("motion", "text", 1, 2),
    "train content, gaussian on 4 devices": lambda: train_program("content", "gaussian", 4, 1),
    "sample flow, class": lambda: sample_program("generate", "flow", 1, 2, NAMES),
    "sample flow, class, heun": lambda: sample_program("generate", "flow", 1, 2, NAMES, sampling__motion_solver="heun"),
    "sample gaussian, class": lambda: sample_program("generate", "gaussian", 1, 2, NAMES),
    "sample gaussian, pixel, unguided": lambda: sample_program("generate", "gaussian", 1, 2),
    "sample gaussian, ddpm and dpmpp": lambda: sample_program(
        "generate", "gaussian", 1, 2, NAMES, sampling__content_solver="ddpm", sampling__motion_solver="dpmpp"
    ),
    "sample text, latent": lambda: sample_program("generate", "text", 1, 2),
    "animate text, latent": lambda: sample_program("animate", "text", 1, 2),
    "reconstruct pixel": lambda: sample_program("reconstruct", "flow", 1, 2),
    "sample gaussian, class on 4 devices": lambda: sample_program("generate", "gaussian", 4, 1, NAMES),
}


def text_of(lowered) -> str:
    """StableHLO without the names of Python functions and of the results' places in their trees."""
    text = re.sub(r"module @\w+", "module", lowered.as_text())
    text = re.sub(r'(, )?jax\.result_info = "[^"]*"', "", text)
    functions = {}
    return re.sub(r"@[\w.]+", lambda name: functions.setdefault(name[0], f"@f{len(functions)}"), text)


def digest_of(lowered) -> str:
    return hashlib.sha256(text_of(lowered).encode()).hexdigest()


def test_programs_are_those_recorded():
    recorded = json.loads(RECORDED.read_text())
    if recorded["jax"] != jax.__version__:
        pytest.skip(f"recorded with jax {recorded['jax']}, this is {jax.__version__}")
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=environment(4), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == recorded


if __name__ == "__main__":
    found = {"jax": jax.__version__, "sha256": {name: digest_of(lower()) for name, lower in PROGRAMS.items()}}
    print(json.dumps(found))
    if "--record" in sys.argv:
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")
