"""CMD on the generated `shapes` clips, 8x32x32: small enough for 2 CPU cores."""

from cmd_jax import defaults
from cmd_jax.config import parse_argument
from cmd_jax.errors import choose

STEPS = {  # autoencoder, content, motion
    "small": dict(autoencoder=700, content=900, motion=700),
    "long": dict(autoencoder=1500, content=5000, motion=3500),
}


def get_config(argument: str = ""):
    stage, values = parse_argument(argument, size="small")
    size = choose("config:size", values["size"], STEPS)
    config = defaults.stage(stage)
    config.data.update(source="shapes", frames=8, height=32, width=32)
    if stage == "sample":
        return config
    long = size == "long"
    config.train.steps = STEPS[size][stage]
    config.optimizer.update(decay="cosine", warmup_steps=100, clip_norm=1.0)
    if stage == "autoencoder":
        config.data.clips = 48_000
        config.train.update(batch_size=16, ema_decay=0.99 if not long else 0.995)
        config.model.update(patch=4, width=64, depth=3, heads=4, head_dim=16, rotary_base=100.0)
        config.optimizer.update(learning_rate=1e-3, b1=0.9, b2=0.99)
        config.loss.update(l1=1.0, l2=2.0)
    else:
        config.data.clips = 19_200
        config.train.update(batch_size=64, ema_decay=0.99 if not long else 0.998)
        config.latents.update(normalize=True, cache_clips=19_200)
        config.diffusion.update(kind="flow", learned_range=False, clip=0.0)
        config.optimizer.update(learning_rate=1e-3, b2=0.99)
        config.model.update(patch=4 if stage == "content" else 2, width=128, depth=6, heads=4)
    return config
