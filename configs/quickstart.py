"""CMD on the generated `shapes` clips, 8x32x32: small enough for 2 CPU cores."""

from pathlib import Path

from cmd_jax import defaults
from cmd_jax.config import parse_argument
from cmd_jax.errors import choose

WEIGHTS = Path(__file__).parent / "weights" / "quickstart"
STEPS = {
    "small": dict(autoencoder=600, content=2000, motion=700),
    "long": dict(autoencoder=1500, content=6500, motion=3000),
}
CLIPS = {"small": 4_800, "long": 9_600}  # encoded once for the diffusion stages


def get_config(argument: str = ""):
    stage, values = parse_argument(argument, size="small")
    size = choose("config:size", values["size"], STEPS)
    long = size == "long"
    config = defaults.stage(stage)
    config.data.update(source="shapes", frames=8, height=32, width=32)
    if stage == "sample":
        config.weights = str(WEIGHTS) if long else ""
        config.sampling.update(num=24, batch_size=32, guidance=6.0 if long else 3.0, content_steps=50, motion_steps=20)
        return config
    config.train.steps = STEPS[size][stage]
    config.optimizer.update(learning_rate=1e-3, b1=0.9, b2=0.99, decay="cosine", warmup_steps=100, clip_norm=1.0)
    if stage == "autoencoder":
        config.data.clips = 48_000
        config.train.update(batch_size=16, ema_decay=0.995 if long else 0.99)
        config.model.update(patch=4, width=64, depth=3, heads=4, head_dim=16, rotary_base=100.0)
        config.loss.update(l1=1.0, l2=2.0, lpips=0.0)
    else:
        config.data.clips = CLIPS[size]
        config.train.update(batch_size=32, log_every=50, ema_decay=0.998 if long else 0.99)
        config.latents.update(normalize=True, cache_clips=CLIPS[size])
        config.diffusion.update(kind="flow", learned_range=False, clip=0.0)
        config.model.update(patch=4 if stage == "content" else 2, width=128, depth=4, heads=4)
    return config
