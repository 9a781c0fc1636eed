"""What sampling waits for before its first program: the modules that `cmd-jax sample` imports."""

import subprocess
import sys

from processes import ROOT, environment

# What training, files of clips or checkpoints need, and drawing from files of weights does not.
NOT_NEEDED = (
    "orbax", "tensorstore", "optax", "av", "clu", "tensorflow", "grain", "array_record.python", "tensorflow_datasets",
    "torch", "matplotlib", "pandas", "scipy", "google.cloud", "gcsfs", "s3fs", "cmd_jax.train",
    "cmd_jax.running.checkpoint", "cmd_jax.data.video", "cmd_jax.data.dataset",
)  # fmt: skip
ROUNDS = 4
TIMES = 3.0  # as long as `import jax`; measured 1.6


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def seconds(module: str) -> float:
    """Of an import, in CPU time of its process, so that others beside it weigh less."""
    return float(run(f"import {module}, time; print(time.process_time())"))


def test_sampling_imports_only_what_it_needs():
    code = "import sys, cmd_jax.main, cmd_jax.config, cmd_jax.verbs.sample; print(*sys.modules)"
    found = run(code).split()
    assert "jax" in found and "cmd_jax.verbs.sample" in found
    assert not [name for name in found if any(name == x or name.startswith(f"{x}.") for x in NOT_NEEDED)]


def test_importing_it_takes_little_longer_than_importing_jax():
    ratios = []
    for _ in range(ROUNDS):
        ratios.append(seconds("cmd_jax.verbs.sample") / seconds("jax"))
        if ratios[-1] < TIMES:
            return
    raise AssertionError(ratios)
