"""What several files ask of eight devices, in one process: starting JAX takes longer than most of it."""

import subprocess
import sys

import pytest
from processes import ROOT, environment

CHECKS = (
    "test_sharding.check_mesh",
    "test_sharding.check_presets",
    "test_sharding.check_command",
    "interop.test_diffusers.check_eight_devices",
    "interop.test_clip_weights.check_eight_devices",
    "models.test_attention.check_eight_devices",
)
SLOW = ("test_calibration.check_eight_devices",)
SCRIPT = """
import importlib, sys
for name in sys.argv[1:]:
    module, _, function = name.rpartition(".")
    getattr(importlib.import_module(module), function)()
    print(name, flush=True)
"""


@pytest.mark.parametrize("checks", [CHECKS, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["short", "long"])
def test_checks_of_eight_devices(checks):
    command = [sys.executable, "-c", SCRIPT, *checks]
    done = subprocess.run(command, cwd=ROOT, env=environment(8), capture_output=True, text=True, timeout=500)
    assert (done.returncode, tuple(done.stdout.split())) == (0, checks), done.stderr[-4000:]
