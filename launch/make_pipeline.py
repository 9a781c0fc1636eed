"""Makes a Stable Diffusion folder in the diffusers layout, for trials without the published weights.

    python launch/make_pipeline.py --size sd21-base --out DIR [--seed 0] [--dtype float16] [--tokenizer DIR]
    python launch/make_pipeline.py --size small --clips DIR --out DIR [--frames 16] [--height 64] [--width 64]

sd21-base and sd15 have the published architectures and random weights. small is for 2 CPU cores: its VAE (4 times down,
4 channels) is trained on the frames of the videos under --clips, so that decoding shows pictures, while its UNet and
text tower are random, to be trained with `cmd-jax train`. DIR/vae_reconstruction.png shows frames above what the VAE
makes of them.

The tokenizer is copied from the folder --tokenizer, by default from tests/fixtures: real byte-pair encoding with few
merges, so that captions become about a token a letter.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmd_jax.data.folder import FolderSource
from cmd_jax.errors import UserError
from cmd_jax.evaluation.reconstruction import psnr
from cmd_jax.files import local_path
from cmd_jax.interop.clip import text_from_config
from cmd_jax.interop.clip_tokenizer import Tokenizer, check_tokenizer
from cmd_jax.interop.diffusers import Pipeline, save_pipeline
from cmd_jax.interop.sd_config import unet_from_config, vae_from_config
from cmd_jax.interop.sd_known import ARCHITECTURES, SCHEDULER, TEXT, unet_config, vae_config
from cmd_jax.interop.weights import flatten, unflatten
from cmd_jax.keys import derive
from cmd_jax.models.clip import CLIPText
from cmd_jax.models.unet import init_unet
from cmd_jax.models.vae import VAE, init_vae
from cmd_jax.report.video import enlarge, image_grid, to_uint8, write_png

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


class Size(NamedTuple):
    """A pipeline's configs as its folder holds them; the text tower's still lacks what the tokenizer decides.

    tokenizer: the folder under tests/fixtures to take it from, which pads as the original does.
    """

    unet: dict
    vae: dict
    text: dict
    scheduler: dict
    tokenizer: str


SIZES = {
    "sd15": Size(*ARCHITECTURES["sd15"], "tiny-sd15"),
    "sd21-base": Size(*ARCHITECTURES["sd21"], "tiny-sd21"),
    "small": Size(
        unet_config(
            (64, 128, 128),
            1,
            16,
            attention_head_dim=[2, 4, 4],
            cross_attention_dim=64,
            use_linear_projection=True,
        ),
        vae_config((16, 32, 64), layers=1, groups=8, sample_size=64),
        TEXT
        | {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_act": "gelu",
            "projection_dim": 64,
        },
        # At the noisiest timesteps v asks for the picture itself; with eps a short training drew it in wrong colours.
        SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
        "tiny-sd21",
    ),
}

# Training of the small VAE.
STEPS = 1400
BATCH = 4  # frames; many steps gain more than large batches
LEARNING_RATE = 3e-3
WARMUP = 50
KL_WEIGHT = 5e-4  # small: it holds the latents together, and must not cost sharpness
MOST_CLIPS = 256
CHUNK = 16  # frames that are encoded or decoded at once
SHOWN = 8


def text_config(config: dict, tokenizer: Tokenizer) -> dict:
    """text_encoder/config.json for a tokenizer; without a published vocabulary it has as many tokens as that."""
    return {
        "vocab_size": tokenizer.vocabulary,
        **config,
        "bos_token_id": tokenizer.start,
        "eos_token_id": tokenizer.end,
        "pad_token_id": tokenizer.pad,
    }


def init_text(module: CLIPText, key):
    """Random parameters with their logical axes."""
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def draw(init, module, seed: tuple[int, int], dtype: str) -> dict:
    """Random parameters for a module: numpy arrays of `dtype`.

    Not drawn by its own initialisers: for a full UNet those are one program, which takes XLA many minutes to compile.
    """
    rng = np.random.default_rng(seed)
    like = flatten(jax.eval_shape(partial(init, module), jax.random.key(0)))
    return unflatten({name: draw_array(rng, name, leaf.shape).astype(dtype) for name, leaf in like.items()})


def draw_array(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Kernels that keep variance, CLIP's small tables, and norms and biases that change nothing: float32."""
    *modules, kind = name.split("/")
    if kind in ("scale", "bias"):
        return np.full(shape, kind == "scale", np.float32)
    values = rng.standard_normal(shape, np.float32)
    stacked = "blocks" in modules  # a kernel for each layer
    values *= np.prod(shape[stacked:-1]) ** -0.5 if kind == "kernel" else 0.02
    return values


def make(size: Size, tokenizer: Tokenizer, seed: int, dtype: str, frames: np.ndarray | None = None, steps=STEPS):
    """A Pipeline whose parameters are random, but for the VAE's where `frames` uint8 [N,H,W,3] are given to train on.

    Its modules compute in float32. UserError for a tokenizer with more tokens than the text tower.
    """
    configs = {"unet": size.unet, "vae": size.vae, "text_encoder": text_config(size.text, tokenizer)}
    text_encoder = text_from_config(configs["text_encoder"])
    check_tokenizer(tokenizer, text_encoder)
    vae, unet = vae_from_config(configs["vae"]), unet_from_config(configs["unet"])
    if frames is None:
        vae_params = draw(init_vae, vae, (seed, 0), dtype)
    else:
        vae, vae_params = train_vae(vae, frames, steps, seed)
        configs["vae"] = configs["vae"] | {"scaling_factor": vae.scaling_factor}
        vae_params = jax.tree.map(lambda x: x.astype(dtype), vae_params)
    return Pipeline(
        unet=(unet, draw(init_unet, unet, (seed, 1), dtype)),
        vae=(vae, vae_params),
        text_encoder=(text_encoder, draw(init_text, text_encoder, (seed, 2), dtype)),
        tokenizer=tokenizer,
        scheduler=size.scheduler,
        configs=configs,
    )


def read_frames(source: FolderSource, seed: int) -> np.ndarray:
    """Frames of a source's clips, of at most MOST_CLIPS of them: uint8 [N,H,W,3]."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(source))[:MOST_CLIPS])
    return np.concatenate([source.clip(int(index), rng)[0] for index in chosen])


def vae_loss(vae: VAE, params, images, key):
    """Mean absolute and squared error of the reconstruction and a little KL -> (loss, (squared error, KL)).

    images [N,H,W,3] in [-1,1]; KL in nats a latent number.
    """
    mean, log_variance = vae.apply({"params": params}, images, method="encode")
    sample = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = vae.apply({"params": params}, sample * vae.scaling_factor, method="decode") - images
    squared = jnp.mean(jnp.square(error))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    return jnp.mean(jnp.abs(error)) + squared + KL_WEIGHT * kl, (squared, kl)


def train_vae(vae: VAE, frames: np.ndarray, steps: int, seed: int) -> tuple[VAE, dict]:
    """frames uint8 [N,H,W,3] -> (the VAE with the scaling factor that gives them latents of unit variance, params)."""
    warmup, low = min(WARMUP, steps // 4), LEARNING_RATE / 100
    rate = optax.warmup_cosine_decay_schedule(low, LEARNING_RATE, warmup, steps, low)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    key, params = jax.random.key(seed), draw(init_vae, vae, (seed, 0), "float32")

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, frames, number):
        images = normalise(frames[jax.random.randint(derive(key, "frame", number), (BATCH,), 0, len(frames))])
        loss = jax.value_and_grad(partial(vae_loss, vae), has_aux=True)
        (_, metrics), grads = loss(params, images, derive(key, "noise", number))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    state, began = optimizer.init(params), time.monotonic()
    on_device = jnp.asarray(frames)
    for number in range(steps):
        params, state, (squared, kl) = step(params, state, on_device, number)
        if (number + 1) % 100 == 0 or number + 1 == steps:
            decibels = 10 * np.log10(4 / float(squared))
            seconds = time.monotonic() - began
            print(f"vae step {number + 1}/{steps}: {decibels:.1f} dB, KL {float(kl):.2f}, {seconds:.0f} s", flush=True)
    params = jax.tree.map(np.asarray, params)
    means = by_chunks(lambda images: vae.apply({"params": params}, images, method="encode").mean, frames)
    return vae.clone(scaling_factor=float(1 / means.std())), params


def normalise(frames):
    """uint8 -> float32 in [-1,1], any shape."""
    return frames.astype(jnp.float32) / 127.5 - 1


def by_chunks(function, frames: np.ndarray) -> np.ndarray:
    """function: images in [-1,1] -> arrays with as many rows, for uint8 [N,H,W,3], CHUNK of them at a time."""
    function = jax.jit(function)
    chunks = (frames[i : i + CHUNK] for i in range(0, len(frames), CHUNK))
    return np.concatenate([np.asarray(function(normalise(chunk))) for chunk in chunks])


def reconstruct(pipeline: Pipeline, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 [N,H,W,3] through the VAE and back."""
    vae, params = pipeline.vae
    return to_uint8(by_chunks(lambda images: vae.apply({"params": params}, images), frames))


def save_comparison(path: Path, frames: np.ndarray, reconstruction: np.ndarray):
    """PNG: SHOWN frames from all over the data in a row, and below each its reconstruction."""
    shown = np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).astype(int)
    write_png(path, enlarge(image_grid(np.concatenate([frames[shown], reconstruction[shown]]), len(shown)), 2))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--out", type=local_path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float32")
    parser.add_argument("--tokenizer", type=local_path)
    parser.add_argument("--clips", type=local_path)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=STEPS)
    return parser.parse_args()


def run(flags):
    began, size = time.monotonic(), SIZES[flags.size]
    if (flags.size == "small") != (flags.clips is not None):
        problem = "has a VAE trained on clips" if flags.size == "small" else "has random weights only"
        remedy = "give a folder of videos as --clips" if flags.size == "small" else "leave out --clips"
        raise UserError("--size", flags.size, problem, remedy)
    if flags.steps < 1:
        raise UserError("--steps", flags.steps, "not a number of training steps", f"leave it out for {STEPS}")
    if flags.out.exists():
        raise UserError("--out", flags.out, "exists already", "name a new folder")
    tokenizer = Tokenizer(flags.tokenizer or FIXTURES / size.tokenizer / "tokenizer")
    frames = None
    if flags.clips:
        shape = {"frames": flags.frames, "height": flags.height, "width": flags.width}
        frames = read_frames(FolderSource(flags.clips, **shape), flags.seed)
        print(f"{flags.clips}: {len(frames)} frames of {flags.height}x{flags.width}")
    pipeline = make(size, tokenizer, flags.seed, flags.dtype, frames, flags.steps)
    save_pipeline(flags.out, pipeline)
    if frames is not None:
        reconstruction = reconstruct(pipeline, frames)
        save_comparison(flags.out / "vae_reconstruction.png", frames, reconstruction)
        decibels = psnr(frames[:, None], reconstruction[:, None], 255.0)
        factor = pipeline.configs["vae"]["scaling_factor"]
        print(f"vae: {decibels.mean():.1f} dB, the worst frame {decibels.min():.1f}; scaling_factor {factor:.4f}")
    for part in ("unet", "vae", "text_encoder"):
        count = sum(x.size for x in jax.tree.leaves(getattr(pipeline, part)[1]))
        print(f"{part}: {count / 1e6:.2f} M parameters")
    total = sum(path.stat().st_size for path in flags.out.rglob("*") if path.is_file())
    print(f"{flags.out}: {total / 1e6:.0f} MB in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    try:
        run(parse())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
