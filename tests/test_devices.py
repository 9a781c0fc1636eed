"""All three stages and the sampler on eight fake devices: the same numbers on every mesh as on one device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from processes import ROOT, environment, steps

PRESETS = {"dp": (8, 1, 1), "fsdp": (1, 8, 1), "tp": (1, 1, 8), "fsdp_tp": (1, 4, 2)}
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
STEPS = 10

# One process for many trainings, since starting JAX takes longer than these.
SCRIPT = """
import sys
from cmd_jax.main import main
root, file, presets, *more = sys.argv[1:]
for preset in presets.split(","):
    for stage in ("autoencoder", "content", "motion"):
        shared = [] if stage == "autoencoder" else [f"--config.latents.autoencoder={root}/given/autoencoder"]
        mesh = [] if preset == "one" else [f"--config.mesh.preset={preset}"]
        assert main(["train", f"--config={file}:{stage}", f"--workdir={root}/{preset}", *shared, *mesh, *more]) == 0
"""


def train_all(root, file, presets, devices, plain, *more):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), file, ",".join(presets), *more],
        env=environment(devices, plain), capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def check_all(root, file, presets, batch_size, plain, *more):
    more = (*more, f"--config.train.steps={STEPS}", f"--config.train.batch_size={batch_size}")
    given = [
        sys.executable,
        "-m",
        "cmd_jax.main",
        "train",
        f"--config={file}:autoencoder",
        f"--workdir={root / 'given'}",
    ]
    subprocess.run([*given, *more], env=environment(1, plain), check=True, capture_output=True, timeout=600)
    train_all(root, file, ("one",), 1, plain, *more)
    train_all(root, file, presets, 8, plain, *more)
    meshes = set()
    for stage in ("autoencoder", "content", "motion"):
        one = steps(root / "one" / stage)
        assert len(one) == STEPS
        for preset in presets:
            summary = json.loads((root / preset / stage / "summary.json").read_text())
            meshes.add(tuple(summary["mesh"].values()))
            assert (summary["devices"], summary["step"]) == (8, STEPS)
            many = steps(root / preset / stage)
            assert [line["ids"] for line in many] == [line["ids"] for line in one]
            losses = [float.fromhex(run[-1]["loss"]) for run in (one, many)]
            difference = abs(losses[1] / losses[0] - 1)
            print(f"{stage} {preset}: loss {losses[0]:.6f}, relative difference {difference:.1e}")
            assert difference <= 1e-5
    assert meshes == {PRESETS[preset] for preset in presets}


def test_loss_after_ten_steps_is_that_of_one_device(tmp_path):
    """Of a toy, on the mesh that splits most; the slow test below does all of them at the quickstart's size."""
    check_all(tmp_path, tiny.CONFIG_FILE, ("fsdp_tp",), 8, True, "--config.optimizer.learning_rate=1e-3")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_loss_after_ten_steps_of_the_quickstart_is_that_of_one_device(tmp_path):
    check_all(
        tmp_path, QUICKSTART, PRESETS, 16, False, "--config.optimizer.warmup_steps=5", "--config.train.preview_every=0"
    )


def test_a_mesh_of_two_by_two_by_two_trains_and_samples(tmp_path):
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    sample = ["sample", "--config=" + tiny.CONFIG_FILE + ":sample", f"--workdir={tmp_path / 'given'}", *mesh]
    sample.append("--config.sampling.batch_size=4")
    script = SCRIPT + f"assert main({sample!r}) == 0\n"
    script += f"assert main({[*sample, '--config.sampling.mode=vary-motion']!r}) == 0\n"
    more = ["--config.train.preview_every=6", *mesh]
    done = subprocess.run(
        [sys.executable, "-c", script.replace("{preset}", "given"), str(tmp_path), tiny.CONFIG_FILE, "one", *more],
        env=environment(8), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    folder = Path(tmp_path / "given")
    for stage in ("autoencoder", "content", "motion"):
        summary = json.loads((folder / stage / "summary.json").read_text())
        assert (summary["devices"], summary["step"], summary["mesh"]) == (8, 6, {"data": 2, "fsdp": 2, "tensor": 2})
        assert list((folder / stage / "previews").iterdir())
    assert (folder / "samples" / "0002.mp4").exists() and (folder / "samples-2" / "0005.mp4").exists()
