"""The shipped weights of configs/quickstart.py keep what README says of them."""

import json
from pathlib import Path

import pytest

from cmd_jax.main import main
from cmd_jax.trained import belongs, load_trained, read_stage

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "configs" / "weights" / "quickstart"


def test_they_are_small_enough_for_git():
    files = sorted(WEIGHTS.iterdir())
    assert [f.name for f in files] == ["autoencoder.safetensors", "content.safetensors", "motion.safetensors"]
    assert sum(f.stat().st_size for f in files) <= 10e6


def test_they_belong_together():
    autoencoder = load_trained(WEIGHTS / "autoencoder.safetensors", "autoencoder")
    for name in ("content", "motion"):
        _, metadata = read_stage(WEIGHTS / f"{name}.safetensors", name)
        assert belongs(metadata, autoencoder) and len(metadata.class_names) == 48 and metadata.statistics


@pytest.mark.slow
def test_their_videos_show_what_was_asked_for(optimized, tmp_path):
    """256 videos, read by the oracle: colour >= 95%, direction >= 90%, shape >= 60%; took 69 s on two cores."""
    config = f"{ROOT}/configs/quickstart.py:sample,size=long"
    assert main(["evaluate", f"--config={config}", f"--workdir={tmp_path}", "--config.seed=1"]) == 0
    scores = json.loads((tmp_path / "samples" / "summary.json").read_text())["scores"]
    assert scores["attributes"]["count"] == 256
    accuracy = {name: scores["attributes"][name]["accuracy"] for name in ("color", "direction", "shape")}
    assert accuracy["color"] >= 0.95 and accuracy["direction"] >= 0.90 and accuracy["shape"] >= 0.60, accuracy
    assert scores["reconstruction_psnr"]["mean"] >= 28
