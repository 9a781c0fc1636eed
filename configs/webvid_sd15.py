"""CMD on WebVid-10M, text to video at 16x512x512 with Stable Diffusion 1.5, the paper's zero-shot model (section 4).

Data: `--config.data.root=DIR` with WebVid's CSV files and videos; weights: `--config.pretrained.path=SD`, a folder of
Stable Diffusion 1.5 in the diffusers layout. All commands take both; sampling takes only the second.

    cmd-jax train --config=configs/webvid_sd15.py:autoencoder --workdir=runs/webvid15 ...
    cmd-jax train --config=configs/webvid_sd15.py:content     --workdir=runs/webvid15 ...
    cmd-jax train --config=configs/webvid_sd15.py:motion      --workdir=runs/webvid15 ...
    cmd-jax sample --config=configs/webvid_sd15.py:sample     --workdir=runs/webvid15 --prompt="..."

`size`: paper, or tiny: 16x64x64 with the random weights of tests/fixtures/tiny-sd15 or, to see something, with a small
folder that launch/make_pipeline.py trains on the clips; any folder of captioned clips. On 2 CPU cores, with eight
clips, its stages took 1,310, 588 and 440 s, and videos drawn from the captions show the clips (README). Time and
score of the paper's size: not measured.
"""

from pathlib import Path

from cmd_jax import defaults
from cmd_jax.config import parse_argument
from cmd_jax.errors import choose
from cmd_jax.models.dit import SIZES

CLIPS = 10_700_000
EPOCHS = 3
TINY = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-sd15"


def get_config(argument: str = ""):
    stage, values = parse_argument(argument, size="paper")
    tiny = choose("config:size", values["size"], ("paper", "tiny")) == "tiny"
    config = defaults.stage("fine_tuned_content" if stage == "content" else stage)
    config.data.update(source="folder", layout="webvid", frames=16, height=512, width=512)
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
        config.model.update(condition="text", patch=2, content_patch=4, depth=depth, width=width, heads=heads)


def shrink(config):
    """Enough to learn a few clips with captions of their own by heart."""
    config.pretrained.path = str(TINY)
    config.data.update(layout="auto", frames=16, height=64, width=64)
    if config.stage == "sample":
        config.data.split = "train"
        config.sampling.update(batch_size=4, content_steps=25, motion_steps=25)
        return config
    config.train.update(batch_size=8, ema_decay=0.98, checkpoint_every=300, preview_every=300, log_every=20)
    config.optimizer.update(learning_rate=1e-3, b1=0.9, b2=0.99, warmup_steps=20, decay="cosine", clip_norm=1.0)
    config.latents.cache_clips = 64
    config.model.remat = "none"
    config.train.steps = {"autoencoder": 1500, "content": 1500, "motion": 5000}[config.stage]
    if config.stage == "autoencoder":
        config.model.update(width=96, depth=2, heads=4, head_dim=24, rotary_base=100.0)
    elif config.stage == "motion":
        config.model.update(depth=4, width=128, heads=4)
    return config
