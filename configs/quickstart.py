"""CMD on the generated `shapes` clips, 8x32x32: small enough for 2 CPU cores.

`size=small` (default) is what ./launch/quickstart.sh trains, in 418 s on 2 cores of an AMD EPYC, sampling and scores
included: autoencoder 158 s on both cores, then side by side content 194 s and motion 139 s. Held-out clips 25.3 dB;
colour 100 %, direction 100 %, shape 67.2 % of 256 videos (guidance 3, 25 and 20 Euler steps, seed 0).

`size=long` made the shipped weights, configs/weights/quickstart, seed 0, on 2 cores of an AMD EPYC:

    cmd-jax train --config=configs/quickstart.py:autoencoder,size=long --workdir=runs/long             # 1,473 s
    taskset -c 0 cmd-jax train --config=configs/quickstart.py:content,size=long --workdir=runs/long &  # 1,848 s
    taskset -c 1 cmd-jax train --config=configs/quickstart.py:motion,size=long --workdir=runs/long     # 1,767 s
    python launch/ship_weights.py --workdir runs/long --out configs/weights/quickstart

57 minutes in all with 71 s of encoding, other work going on beside them. Scores of 256 videos (guidance 6, 50 and 20
Euler steps, seed 0): colour 99.6 %, direction 99.6 %, shape 91.8 %; reconstruction of held-out clips 29.3 dB.
Guidance 3 gave 92.6 / 97.3 / 85.5 %. The recipe differs from the paper's: flow matching instead of eps with a learned
range, and latents scaled to unit variance.

`sampling.preset` on the shipped weights, beside the full run of 50 + 50 steps: quality takes 1/1.57 of its operations;
balanced 1/3.55, 34.6 dB PSNR, shape 92.2 %; fast 1/5.54, 31.6 dB, shape 91.4 %; colour, direction 99.6 % in all three.
"""

from pathlib import Path

from cmd_jax import defaults
from cmd_jax.config import parse_argument
from cmd_jax.errors import choose

WEIGHTS = Path(__file__).parent / "weights" / "quickstart"
STEPS = {
    "small": dict(autoencoder=450, content=2000, motion=900),
    "long": dict(autoencoder=1500, content=6500, motion=3000),
}
CLIPS = {"small": 4_800, "long": 9_600}  # encoded once for the diffusion stages
TITLES = {
    "small": "Trained here, small and in minutes; a longer training gives the videos above",
    "long": "Shipped weights, of a training of 57 minutes on 2 cores",
}

PRESETS = defaults.presets(
    balanced=dict(  # lists of `cmd-jax calibrate --speedup=1.6`
        content_solver="ab2", content_shift=2.0, content_steps=24, content_reuse="5,7,9,11,13,15,17,19,21,23",
        motion_steps=24, motion_reuse="2,4,6,8,10,12,14,16,18,20",
    ),
    fast=dict(
        content_solver="ab2", content_shift=2.0, content_steps=16, content_reuse="9,11,13,15",
        motion_steps=16, motion_reuse="3,4,6,7,9,10,12,13,15",
    ),
)  # fmt: skip


def get_config(argument: str = ""):
    stage, values = parse_argument(argument, size="small")
    size = choose("config:size", values["size"], STEPS)
    long = size == "long"
    config = defaults.stage(stage)
    config.data.update(source="shapes", frames=8, height=32, width=32)
    if stage == "sample":
        config.weights = str(WEIGHTS) if long else ""
        config.sampling.update(num=24, batch_size=8, guidance=6.0 if long else 3.0)
        config.sampling.update(content_steps=50 if long else 25, motion_steps=20, presets=PRESETS)
        config.sampling.title = TITLES[size]
        return config
    config.train.steps = STEPS[size][stage]
    config.optimizer.update(learning_rate=1e-3, b1=0.9, b2=0.99, decay="cosine", warmup_steps=100, clip_norm=1.0)
    if not long:
        config.train.preview_every = 0  # compiling them would take longer than looking at them
    if stage == "autoencoder":
        config.data.clips = 48_000
        config.train.update(batch_size=16, ema_decay=0.995 if long else 0.99)
        config.model.update(patch=4, width=64, depth=3, heads=4, head_dim=16, rotary_base=100.0)
        config.loss.update(l1=1.0, l2=2.0, lpips=0.0)
        if not long:
            config.optimizer.learning_rate = 2e-3
            config.model.update(depth=2, heads=2, head_dim=32)
    else:
        config.data.clips = CLIPS[size]
        config.train.update(batch_size=32, log_every=50, ema_decay=0.998 if long else 0.99)
        config.latents.update(normalize=True, starts=1)
        config.diffusion.update(kind="flow", learned_range=False)
        config.model.update(patch=4 if stage == "content" else 2, width=128, depth=4, heads=4)
        if not long:
            # A large object in one colour stands out of the noise from t=0.92 down, and the class matters only above:
            # with times around 1/2 (time_mean=0) 1 in 140 lies there, with 0.8 1 in 20, with 1.5 1 in 6.
            config.diffusion.time_mean = 0.8 if stage == "content" else 1.5
            config.model.label_init = 1.0
            config.model.update(dict(width=96, depth=3) if stage == "content" else dict(content_patch=8))
    return config
