"""CMD on your own clips, 16x64x64: a folder of class folders, a UCF-101 layout, or metadata.csv / metadata.jsonl.

    cmd-jax train --config=configs/folder.py:autoencoder --workdir=runs/mine --config.data.root=DIR
    cmd-jax train --config=configs/folder.py:content     --workdir=runs/mine --config.data.root=DIR
    cmd-jax train --config=configs/folder.py:motion      --workdir=runs/mine --config.data.root=DIR
    cmd-jax sample --config=configs/folder.py:sample     --workdir=runs/mine --config.data.root=DIR

Sized for 2 CPU cores and some hundred clips; the paper's sizes are in configs/ucf101.py. Measured on the 89 training
clips that launch/real_clips.py cuts (2 cores of an AMD EPYC, other work going on): autoencoder 300 steps in 171 s to
24.1 dB on its training batches, content 600 steps in 306 s, motion 300 steps in 104 s.
FVD, and what the presets give: not measured.
"""

from cmd_jax import defaults
from cmd_jax.config import parse_argument

PRESETS = defaults.presets(  # those of configs/quickstart.py, where they were measured
    balanced=dict(
        content_solver="ab2", content_shift=2.0, content_steps=24, content_reuse="5,7,9,11,13,15,17,19,21,23",
        motion_steps=24, motion_reuse="2,4,6,8,10,12,14,16,18,20",
    ),
    fast=dict(
        content_solver="ab2", content_shift=2.0, content_steps=16, content_reuse="9,11,13,15",
        motion_steps=16, motion_reuse="3,4,6,7,9,10,12,13,15",
    ),
)  # fmt: skip


def get_config(argument: str = ""):
    stage, _ = parse_argument(argument)
    config = defaults.stage(stage)
    config.data.update(source="folder", frames=16, height=64, width=64)
    if stage == "sample":
        config.data.split = "train"
        config.sampling.update(guidance=2.0, content_steps=25, motion_steps=25, presets=PRESETS)
        return config
    config.train.update(steps=300, checkpoint_every=100, preview_every=100, log_every=10)
    config.optimizer.update(learning_rate=1e-3, b1=0.9, b2=0.99, decay="cosine", warmup_steps=20, clip_norm=1.0)
    if stage == "autoencoder":
        config.train.update(batch_size=4, ema_decay=0.98)
        config.model.update(patch=8, width=96, depth=2, heads=4, head_dim=24, rotary_base=100.0)
        config.loss.update(l1=1.0, l2=2.0, lpips=0.0)
    else:
        config.train.update(batch_size=16, ema_decay=0.98)
        config.latents.update(normalize=True, starts=6)
        config.diffusion.update(kind="flow", learned_range=False)
        config.model.update(width=128, depth=4, heads=4)
        if stage == "content":
            config.model.patch = 4  # 8 would press 192 values of noise through 128 channels
            config.train.steps = 600
        else:
            config.model.update(patch=2, content_patch=8)
    return config
