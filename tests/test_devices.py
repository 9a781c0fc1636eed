"""All three stages and the sampler on eight fake devices, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import jax, sys
sys.path[:0] = [{root!r}, {tests!r}]
import tiny
from cmd_jax.main import main
assert jax.device_count() == 8
mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
work = "--workdir=" + sys.argv[1]
for stage in ("autoencoder", "content", "motion"):
    config = f"--config={{tiny.CONFIG_FILE}}:{{stage}}"
    assert main(["train", config, work, "--config.train.preview_every=6", *mesh]) == 0
sample = ["--config=" + tiny.CONFIG_FILE + ":sample", work, "--config.sampling.batch_size=4", *mesh]
assert main(["sample", *sample]) == 0
assert main(["sample", *sample, "--config.sampling.mode=vary-motion"]) == 0
"""


def test_a_mesh_of_two_by_two_by_two_trains_and_samples(tmp_path):
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"))
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("autoencoder", "content", "motion"):
        summary = json.loads((tmp_path / stage / "summary.json").read_text())
        assert (summary["devices"], summary["step"]) == (8, 6)
        assert list((tmp_path / stage / "previews").iterdir())
    assert (tmp_path / "samples" / "0002.mp4").exists() and (tmp_path / "samples-2" / "0005.mp4").exists()
