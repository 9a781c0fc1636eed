"""Writes untrained weights of the three stages of a text config, to try sampling at full size without a training.

    python launch/make_pipeline.py --size sd21-base --dtype float16 --out runs/sd21
    python launch/random_stages.py --config configs/webvid.py --pipeline runs/sd21 --out runs/stages
    cmd-jax sample --config=configs/webvid.py:sample --workdir=runs/full-size --config.weights=runs/stages \\
        --config.pretrained.path=runs/sd21 --prompt="a boat in the evening sun" --steps=2

The content stage is the pipeline's own UNet, which is what fine-tuning starts from; autoencoder and motion stage are as
their initialisers draw them. Files are half precision.
"""

import argparse
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.config import load
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.errors import UserError
from cmd_jax.files import local_path
from cmd_jax.interop.diffusers import load_unet
from cmd_jax.keys import derive
from cmd_jax.pretrained import (
    ImageModelMetadata,
    TextEncoderMetadata,
    VAEMetadata,
    describe,
    stated_conditions,
    stated_space,
)
from cmd_jax.stages import AutoencoderStage, FrozenAutoencoder, diffusion_stage
from cmd_jax.trained import AutoencoderMetadata, Metadata, Trained, export


def drawn(stage, seed: int) -> dict:
    """Random parameters of a stage, half precision, on the host."""

    def make(key):
        return jax.tree.map(lambda x: x.astype(jnp.float16), nn.unbox(stage.init(key)))

    return jax.tree.map(np.asarray, jax.jit(make)(derive(jax.random.key(seed), "parameters")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--pipeline", required=True, type=local_path, help="a Stable Diffusion folder")
    parser.add_argument("--out", required=True, type=local_path)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    given = {"pretrained.path": str(flags.pipeline)}
    configs = {s: load(f"{flags.config}:{s}", given) for s in ("autoencoder", "content", "motion")}
    kinds = (VAEMetadata, TextEncoderMetadata, ImageModelMetadata)
    parts = {kind.part: describe(flags.pipeline, kind) for kind in kinds}
    space, conditions = stated_space(parts["vae"]), stated_conditions(0, parts["text_encoder"])
    autoencoder = FrozenAutoencoder(configs["autoencoder"], None, space)
    metadata = Metadata(
        class_names=(), digest="untrained", autoencoder=AutoencoderMetadata("untrained"), **parts,
        statistics=LatentStatistics.unit(autoencoder.content_shape[-1], autoencoder.motion_shape[-1]),
    )  # fmt: skip
    flags.out.mkdir(parents=True)
    for number, (name, config) in enumerate(configs.items()):
        if name == "content":
            params = load_unet(flags.pipeline / "unet", "float16")[1]
        elif name == "autoencoder":
            params = drawn(AutoencoderStage(config, space=space), flags.seed + number)
        else:
            stage = diffusion_stage(config, autoencoder, conditions)
            params = drawn(stage, flags.seed + number)
        export(flags.out / f"{name}.safetensors", Trained(config, params, metadata), np.float16)
        count = sum(x.size for x in jax.tree.leaves(params))
        print(f"{name}: {count / 1e6:.1f} M parameters", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (UserError, FileExistsError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
