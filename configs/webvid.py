"""CMD on WebVid-10M, text to video with Stable Diffusion, the paper's zero-shot models (section 4 and appendix B).

Data: `--config.data.root=DIR` with WebVid's CSV files and videos; weights: `--config.pretrained.path=SD`, a folder of
Stable Diffusion in the diffusers layout. All commands take both; sampling takes only the second.

    cmd-jax train --config=configs/webvid.py:autoencoder --workdir=runs/webvid ...
    cmd-jax train --config=configs/webvid.py:content     --workdir=runs/webvid ...
    cmd-jax train --config=configs/webvid.py:motion      --workdir=runs/webvid ...
    cmd-jax sample --config=configs/webvid.py:sample     --workdir=runs/webvid --prompt="..."

`sd=21` (default): Stable Diffusion 2.1-base at 16x512x1024; `sd=15`: 1.5 at 16x512x512. `size`:
paper: its numbers. One video of sd=21 in 2 + 2 steps, untrained, took 488 s and 10.5 GiB on 2 CPU cores; time of
    training and score: not measured.
small: 16x64x64, for a small folder that launch/make_pipeline.py trains on some captioned clips, which are learned by
    heart. With eight clips the stages took 1,310, 588 and 440 s on 2 CPU cores, and videos drawn from the captions show
    the clips (docs/text-to-video.md).
tiny: 8x32x64 with the random weights of tests/fixtures, any folder of captioned clips. With those of sd=21 the stages
    took 53, 84 and 29 s on 2 CPU cores and sampling 18 s; they show the path, not pictures.

`sampling.preset` at sd=21, of one video: quality (50 + 100 steps) 55.5 T of the paper's multiply-adds, balanced 22.5 T,
fast 12.7 T; 50 + 50 steps have 44.1 T. Nearness to the full run and score: not measured.
"""

from pathlib import Path

from cmd_jax import defaults
from cmd_jax.config import parse_argument
from cmd_jax.errors import UserError, choose
from cmd_jax.models.dit import SIZES

CLIPS = 10_700_000
EPOCHS = 3
LATE = "4,6,8,10,12,14,16,18"  # of 20 evaluations; nothing is measured here: `cmd-jax calibrate` does that for a run
PRESETS = defaults.presets(
    balanced=dict(content_solver="dpmpp", content_steps=25, motion_solver="dpmpp", motion_steps=25),
    fast=dict(
        content_solver="dpmpp", content_steps=20, content_reuse=LATE,
        motion_solver="dpmpp", motion_steps=20, motion_reuse=LATE, guidance_from=0.2,
    ),
)  # fmt: skip
WIDTHS, CONTENT_PATCHES = {15: 512, 21: 1024}, {15: 4, 21: 8}  # of the paper, by Stable Diffusion
FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


def get_config(argument: str = ""):
    stage, values = parse_argument(argument, size="paper", sd=21)
    size = choose("config:size", values["size"], ("paper", "small", "tiny"))
    sd = choose("config:sd", values["sd"], WIDTHS)
    config = defaults.stage(stage, denoiser="unet" if stage == "content" else None)
    paper(config, sd)
    if size == "small":
        small(config)
    elif size == "tiny":
        tiny(config, FIXTURES / f"tiny-sd{sd}")
    return config


def paper(config, sd: int):
    """The numbers of SPEC sections 2 to 4; where the paper gives none, the comment says so."""
    config.data.update(source="folder", layout="webvid", frames=16, height=512, width=WIDTHS[sd])
    config.ingest.update(codec="jpeg", frames=64)
    config.pretrained.architecture = f"sd{sd}"
    if config.stage == "sample":
        config.sampling.update(num=1, batch_size=1, guidance=7.5, content_steps=50, motion_steps=100, presets=PRESETS)
        return
    config.train.update(checkpoint_every=5000, preview_every=5000, log_every=50)
    config.model.remat = "dots"
    if config.stage == "autoencoder":
        config.model.update(mode="latent", channels=4, patch=2, width=384, depth=8, heads=8, head_dim=48)
        config.model.motion_channels = 8
        config.loss.update(l1=0.0, l2=1.0, lpips=0.0)
        config.train.update(batch_size=24, steps=500_000)  # steps: not given
        return
    config.train.update(batch_size=256, steps=EPOCHS * CLIPS // 256, ema_decay=0.999)
    if config.stage == "motion":  # epochs: not given, those of the content stage
        depth, width, heads = SIZES["XL"]
        config.model.update(condition="text", patch=2, content_patch=CONTENT_PATCHES[sd])
        config.model.update(depth=depth, width=width, heads=heads)


def small(config):
    """Enough to learn a few clips with captions of their own by heart."""
    config.data.update(layout="auto", height=64, width=64)
    if config.stage == "sample":
        config.data.split = "train"
        config.sampling.update(batch_size=4, content_steps=25, motion_steps=25)
        return
    config.train.update(batch_size=8, ema_decay=0.98, checkpoint_every=300, preview_every=300, log_every=20)
    config.train.steps = {"autoencoder": 1500, "content": 1500, "motion": 5000}[config.stage]
    config.optimizer.update(learning_rate=1e-3, b1=0.9, b2=0.99, warmup_steps=20, decay="cosine", clip_norm=1.0)
    config.latents.starts = 8
    config.model.remat = "none"
    if config.stage == "autoencoder":
        config.model.update(width=96, depth=2, heads=4, head_dim=24, rotary_base=100.0)
    elif config.stage == "motion":
        config.model.update(depth=4, width=128, heads=4, content_patch=4)


def tiny(config, pipeline: Path):
    """The whole path within minutes. pipeline: the folder of a tiny Stable Diffusion, which only a checkout has."""
    if not pipeline.is_dir():
        remedy = "clone the repository, or give size=small or paper with --config.pretrained.path=DIR"
        raise UserError("config:size", "tiny", f"its weights, {pipeline.name}, come with the repository only", remedy)
    config.pretrained.path = str(pipeline)
    config.data.update(layout="auto", frames=8, height=32, width=64)
    if config.stage == "sample":
        config.data.split = "train"
        config.sampling.update(content_steps=10, motion_steps=10)
        return
    config.train.update(steps=60, batch_size=4, ema_decay=0.9, checkpoint_every=20, preview_every=30, log_every=10)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=10, decay="cosine")
    config.model.remat = "none"
    if config.stage == "autoencoder":
        config.model.update(width=48, depth=2, heads=4, head_dim=12)
    else:
        config.latents.starts = 8
    if config.stage == "motion":
        config.model.update(depth=2, width=64, heads=4)
