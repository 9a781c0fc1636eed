"""All three stages and the sampler on eight fake devices: the same numbers on every mesh as on one device."""

import json
import subprocess
import sys

import pytest
import tiny
from processes import ROOT, environment, steps

PRESETS = {"dp": (8, 1, 1), "fsdp": (1, 8, 1), "tp": (1, 1, 8), "fsdp_tp": (1, 4, 2)}
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
STEPS = 10

# One process for many trainings, since starting JAX takes longer than these; its flags are those of the meshes.
SCRIPT = """
import json, sys
from cmd_jax.main import main
root, file, meshes, samples, *more = sys.argv[1:]
for name, flags in json.loads(meshes).items():
    for stage in ("autoencoder", "content", "motion"):
        shared = [] if stage == "autoencoder" else [f"--config.latents.autoencoder={root}/one/autoencoder"]
        assert main(["train", f"--config={file}:{stage}", f"--workdir={root}/{name}", *shared, *flags, *more]) == 0
for arguments in json.loads(samples):
    assert main(arguments) == 0
"""


def run(root, file, meshes, devices, *more, samples=()):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), file, json.dumps(meshes), json.dumps(samples), *more],
        env=environment(devices), capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def check_all(root, file, meshes, batch_size, *more, samples=()):
    """meshes: {name: (flags, sizes)}. All denoisers learn on the latents of the one autoencoder."""
    more = (*more, f"--config.train.steps={STEPS}", f"--config.train.batch_size={batch_size}")
    run(root, file, {"one": []}, 1, *more)
    run(root, file, {name: flags for name, (flags, _) in meshes.items()}, 8, *more, samples=samples)
    for stage in ("autoencoder", "content", "motion"):
        one = steps(root / "one" / stage)
        assert len(one) == STEPS
        for name, (_, sizes) in meshes.items():
            summary = json.loads((root / name / stage / "summary.json").read_text())
            assert summary["mesh"] == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
            assert (summary["devices"], summary["step"]) == (8, STEPS)
            many = steps(root / name / stage)
            assert [line["ids"] for line in many] == [line["ids"] for line in one]
            losses = [float.fromhex(run[-1]["loss"]) for run in (one, many)]
            difference = abs(losses[1] / losses[0] - 1)
            print(f"{stage} {name}: loss {losses[0]:.6f}, relative difference {difference:.1e}")
            assert difference <= 1e-5


@pytest.mark.slow
def test_a_mesh_of_two_by_two_by_two_trains_as_one_device_does_and_samples(tmp_path):
    """A toy, on the mesh that splits everything; the test below does the presets at the quickstart's size."""
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    folder, drawn = tmp_path / "cube", tmp_path / "drawn"  # one run: the denoisers, and what they learnt on
    drawn.mkdir()
    for stage, trained in {"autoencoder": "one", "content": "cube", "motion": "cube"}.items():
        (drawn / stage).symlink_to(tmp_path / trained / stage)
    sample = ["sample", f"--config={tiny.CONFIG_FILE}:sample", f"--workdir={drawn}", *mesh]
    sample += ["--config.sampling.batch_size=4"]
    more = ["--config.optimizer.learning_rate=1e-3", f"--config.train.preview_every={STEPS}"]
    samples = [sample, [*sample, "--config.sampling.mode=vary-motion"]]
    check_all(tmp_path, tiny.CONFIG_FILE, {"cube": (mesh, (2, 2, 2))}, 8, *more, samples=samples)
    assert all(list((folder / stage / "previews").iterdir()) for stage in ("autoencoder", "content", "motion"))
    assert (drawn / "samples" / "0002.mp4").exists() and (drawn / "samples-2" / "0005.mp4").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_loss_after_ten_steps_of_the_quickstart_is_that_of_one_device(optimized, tmp_path):
    meshes = {preset: ([f"--config.mesh.preset={preset}"], sizes) for preset, sizes in PRESETS.items()}
    check_all(tmp_path, QUICKSTART, meshes, 16, "--config.optimizer.warmup_steps=5", "--config.train.preview_every=0")
