"""CMD on UCF-101 with the paper's sizes: class-conditional, 16x64x64 pixels (paper section 4 and appendix B).

Data: `--config.data.root=DIR` with the class folders and `ucfTrainTestlist/`; fold 1, train split (9,537 clips).

    cmd-jax train --config=configs/ucf101.py:autoencoder --workdir=runs/ucf101 --config.data.root=DIR
    cmd-jax train --config=configs/ucf101.py:content     --workdir=runs/ucf101 --config.data.root=DIR
    cmd-jax train --config=configs/ucf101.py:motion      --workdir=runs/ucf101 --config.data.root=DIR
    cmd-jax sample --config=configs/ucf101.py:sample     --workdir=runs/ucf101

`size`: paper (autoencoder depth 8 of 8 heads of 48, which the paper's FLOP count and the reference match; content XL/2,
motion L/2), appendix (autoencoder depth 12 of 8 heads of 64, as the appendix lists it), reference (content L/2), S, B,
L or XL (both denoisers of that DiT size). Time and score of these trainings: not measured.
Nor are those of the presets.
"""

from cmd_jax import defaults
from cmd_jax.config import parse_argument
from cmd_jax.errors import choose
from cmd_jax.models.dit import SIZES

CLIPS = 9537
DENOISERS = {  # content, motion
    "paper": ("XL", "L"),
    "appendix": ("XL", "L"),
    "reference": ("L", "L"),
    "S": ("S", "S"),
    "B": ("B", "B"),
    "L": ("L", "L"),
    "XL": ("XL", "XL"),
}
LATE = "4,6,8,10,12,14,16,18"  # of 20 evaluations; nothing is measured here: `cmd-jax calibrate` does that for a run
PRESETS = defaults.presets(
    balanced=dict(content_solver="dpmpp", content_steps=25, motion_solver="dpmpp", motion_steps=50),
    fast=dict(
        content_solver="dpmpp", content_steps=20, content_reuse=LATE,
        motion_solver="dpmpp", motion_steps=20, motion_reuse=LATE, guidance_from=0.2,
    ),
)  # fmt: skip


def get_config(argument: str = ""):
    stage, values = parse_argument(argument, size="paper")
    size = choose("config:size", values["size"], DENOISERS)
    config = defaults.stage(stage)
    config.data.update(source="folder", root="", layout="ucf101", fold=1, frames=16, height=64, width=64)
    if stage == "sample":
        config.sampling.update(guidance=4.0, content_steps=50, motion_steps=100, presets=PRESETS)
        return config
    config.train.update(checkpoint_every=5000, preview_every=5000, log_every=50)
    if stage == "autoencoder":
        # 4 L1 + 4 LPIPS; LPIPS joins where its weights are given: --config.loss.vgg=FILE.
        config.model.update(patch=2, width=384, motion_channels=8)
        config.model.update(dict(depth=12, head_dim=64) if size == "appendix" else dict(depth=8, head_dim=48))
        config.train.update(batch_size=24, steps=500_000)  # the paper gives no number of steps
        return config
    depth, width, heads = SIZES[DENOISERS[size][stage == "motion"]]
    config.model.update(patch=2, depth=depth, width=width, heads=heads, remat="dots")
    config.train.update(batch_size=256, steps=3000 * CLIPS // 256)
    return config
