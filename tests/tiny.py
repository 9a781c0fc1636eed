"""CMD at toy size, for the end-to-end tests. `tiny.py:STAGE[,kind=flow|gaussian|text]` is a config file too.

Classes at 4x16x24; or, of kind text, captions at 4x16x32, whose frames are latents of `pipeline_folder`. H != W.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from cmd_jax import defaults
from cmd_jax.config import check, override, parse_argument
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.interop.clip_tokenizer import Tokenizer
from cmd_jax.interop.diffusers import save_pipeline
from cmd_jax.models.conditions import Classes
from cmd_jax.stages import FrozenAutoencoder, MotionStage
from cmd_jax.train import train
from cmd_jax.trained import AutoencoderMetadata, Metadata, Trained, export, load_trained

CONFIG_FILE = str(Path(__file__).resolve())
STEPS = 6
FIXTURES = Path(__file__).resolve().parent / "fixtures"
SCRATCH = "CMD_JAX_TINY"  # environment variable: this file is imported as a module and run as a config file


def get_config(argument: str = ""):
    stage, values = parse_argument(argument, kind="flow")
    text = values["kind"] == "text"
    config = defaults.stage(stage, denoiser="unet" if text and stage == "content" else None)
    config.data.update(frames=4, height=16, width=32 if text else 24, clips=48)
    config.pretrained.path = str(pipeline_folder()) if text else ""
    if stage == "sample":
        config.sampling.update(num=3, batch_size=2, guidance=2.0, content_steps=3, motion_steps=4, motions=2)
        config.evaluation.update(videos=3, clips=3, shown=2)
        return config
    config.train.update(steps=STEPS, batch_size=4, ema_decay=0.5, log_every=1, checkpoint_every=100, preview_every=0)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=1)
    if stage == "autoencoder":
        config.model.update(patch=4, width=16, depth=1, heads=2, head_dim=8, motion_channels=4)
        config.optimizer.decay = "cosine"
        if text:
            config.model.update(mode="latent", channels=4, patch=2)
            config.loss.update(l1=0.0, l2=1.0, lpips=0.0)
        return config
    if text and stage == "content":
        return config
    config.model.update(patch=4 if stage == "content" else 2, width=16, depth=1, heads=2)
    if text:
        config.model.condition = "text"
    if values["kind"] == "flow":
        config.latents.update(normalize=True, starts=1)
        config.diffusion.update(kind="flow", learned_range=False)
    else:
        config.diffusion.timesteps = 20
    return config


def config_of(argument: str, **changes):
    """The resolved config of `STAGE[,kind=...]`; changes are `group__key=value`."""
    config = get_config(argument)
    for key, value in changes.items():
        override(config, key.replace("__", "."), str(value))
    return check(config.copy_and_resolve_references())


def metadata(*class_names: str, **more) -> Metadata:
    """What a stage may say of its training, so that it loads."""
    told = {"class_names": class_names, "digest": "", "autoencoder": AutoencoderMetadata("")}
    return Metadata(**told | {"statistics": LatentStatistics.unit(1, 1)} | more)


@functools.cache
def scratch() -> Path:
    if SCRATCH not in os.environ:
        # Until the process ends, also where a run of this file as a config made it.
        os.environ[SCRATCH] = tempfile.mkdtemp(prefix="cmd-jax-tiny-")
        atexit.register(shutil.rmtree, os.environ[SCRATCH], ignore_errors=True)
    return Path(os.environ[SCRATCH])


@functools.cache
def pipeline_folder() -> Path:
    """A Stable Diffusion folder of random weights whose programs compile fast: one level of UNet, two of VAE."""
    from launch import make_pipeline

    folder = scratch() / "pipeline"
    if not folder.exists():
        small = make_pipeline.SIZES["small"]
        size = small._replace(
            unet=make_pipeline.unet_config((16,), 1, 8, attention_head_dim=2, cross_attention_dim=8, norm_num_groups=8),
            vae=make_pipeline.vae_config((8, 16), layers=1, groups=8, sample_size=16),
            text=small.text | {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2},
        )
        tokenizer = Tokenizer(FIXTURES / size.tokenizer / "tokenizer")
        save_pipeline(folder, make_pipeline.make(size, tokenizer, seed=0, dtype="float32"))
    return folder


@functools.cache
def trained() -> Path:
    """A workdir with the three stages trained, the denoisers by flow matching; once a process."""
    workdir = scratch() / "run"
    train(config_of("autoencoder", train__preview_every=3, train__checkpoint_every=3), workdir)
    train(config_of("motion", train__preview_every=STEPS), workdir)  # either order will do
    train(config_of("content"), workdir)
    return workdir


@functools.cache
def gaussian_weights() -> Path:
    """A folder of half-precision weights: the same autoencoder, denoisers of eps with learned range and clipping.

    The content stage is trained, on the half-precision autoencoder; the motion stage is a random one.
    """
    folder = scratch() / "gaussian"
    folder.mkdir()
    autoencoder = load_trained(trained() / "autoencoder", "autoencoder")
    export(folder / "autoencoder.safetensors", autoencoder, np.float16)
    changes = {"latents__autoencoder": folder / "autoencoder.safetensors"}
    train(config_of("content,kind=gaussian", train__steps=2, **changes), folder)
    content = load_trained(folder / "content", "content")
    export(folder / "content.safetensors", content, np.float16)

    config = config_of("motion,kind=gaussian", **changes)
    stage = MotionStage(
        config, FrozenAutoencoder(autoencoder.config, autoencoder.params), Classes(48), content.metadata.statistics
    )
    shapes = nn.unbox(jax.eval_shape(stage.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    export(folder / "motion.safetensors", Trained(config, params, content.metadata), np.float16)
    return folder
