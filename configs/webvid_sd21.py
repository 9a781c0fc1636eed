"""CMD on WebVid-10M, text to video at 16x512x1024 with Stable Diffusion 2.1-base (paper section 4 and appendix B).

Data: `--config.data.root=DIR` with WebVid's CSV files and videos; weights: `--config.pretrained.path=SD`, a folder of
Stable Diffusion 2.1-base in the diffusers layout. All commands take both; sampling takes only the second.

    cmd-jax train --config=configs/webvid_sd21.py:autoencoder --workdir=runs/webvid21 ...
    cmd-jax train --config=configs/webvid_sd21.py:content     --workdir=runs/webvid21 ...
    cmd-jax train --config=configs/webvid_sd21.py:motion      --workdir=runs/webvid21 ...
    cmd-jax sample --config=configs/webvid_sd21.py:sample     --workdir=runs/webvid21 --prompt="..."

`size`: paper, or tiny: 8x32x64 with the random weights of tests/fixtures/tiny-sd21, any folder of captioned clips. On
2 CPU cores its stages took 53, 84 and 29 s and sampling 18 s; they show the path, not pictures. At the paper's size one
video in 2 + 2 steps, untrained, took 488 s and 10.5 GiB there (README); time of training and score: not measured.
"""

from pathlib import Path

from cmd_jax import defaults
from cmd_jax.config import parse_argument
from cmd_jax.errors import choose
from cmd_jax.models.dit import SIZES

CLIPS = 10_700_000
EPOCHS = 3
TINY = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-sd21"


def get_config(argument: str = ""):
    stage, values = parse_argument(argument, size="paper")
    tiny = choose("config:size", values["size"], ("paper", "tiny")) == "tiny"
    config = defaults.stage("fine_tuned_content" if stage == "content" else stage)
    config.data.update(source="folder", layout="webvid", frames=16, height=512, width=1024)
    if stage == "sample":
        config.sampling.update(num=1, batch_size=1, guidance=7.5, content_steps=50, motion_steps=100)
    else:
        paper(config)
    return shrink(config) if tiny else config


def paper(config):
    """The numbers of SPEC sections 2 to 4; where the paper gives none, the comment says so."""
    config.train.update(checkpoint_every=5000, preview_every=5000, log_every=50)
    if config.stage == "autoencoder":
        config.model.update(mode="latent", channels=4, patch=2, width=384, depth=8, heads=8, head_dim=48)
        config.model.update(motion_channels=8, remat="dots")
        config.loss.update(l1=0.0, l2=1.0, lpips=0.0)
        config.train.update(batch_size=24, steps=500_000)  # steps: not given
        return
    config.train.update(batch_size=256, steps=EPOCHS * CLIPS // 256, ema_decay=0.999)
    config.model.remat = "dots"
    if config.stage == "motion":  # epochs: not given, those of the content stage
        depth, width, heads = SIZES["XL"]
        config.model.update(condition="text", patch=2, content_patch=8, depth=depth, width=width, heads=heads)


def shrink(config):
    config.pretrained.path = str(TINY)
    config.data.update(layout="auto", frames=8, height=32, width=64)
    if config.stage == "sample":
        config.data.split = "train"
        config.sampling.update(content_steps=10, motion_steps=10)
        return config
    config.train.update(steps=60, batch_size=4, ema_decay=0.9, checkpoint_every=20, preview_every=30, log_every=10)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=10, decay="cosine")
    if config.stage == "autoencoder":
        config.model.update(width=48, depth=2, heads=4, head_dim=12, remat="none")
    else:
        config.latents.cache_clips = 64
        config.model.remat = "none"
    if config.stage == "motion":
        config.model.update(depth=2, width=64, heads=4)
    return config
