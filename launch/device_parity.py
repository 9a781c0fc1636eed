"""The models on this machine's device against the recorded numbers of tests/fixtures.

    python launch/device_parity.py --out parity.json [--models=autoencoder,dit,features,sd15,sd21]

Float32 with matrix products and convolutions at their highest precision, from which a device's faster default differs.
Prints and writes, for each output, the largest difference from the recorded one as a part of the largest recorded
number, which must be at most TOLERANCE; on CPUs it is 1e-4 (tests/). Exit code 1 if one is larger.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import jax
import numpy as np

from cmd_jax.errors import UserError, choose
from cmd_jax.files import local_path, write_json
from cmd_jax.interop import clip, cmd_release, i3d
from cmd_jax.interop.diffusers import load_pipeline
from cmd_jax.interop.lpips import lpips_params
from cmd_jax.models.vgg import LPIPS

TESTS = Path(__file__).parents[1] / "tests"
TOLERANCE = 1e-3


def release(name: str) -> Iterator[tuple]:
    """Models of the CMD release: weights by formula, outputs of the original code."""
    npz, state = recorded(name)
    kind = "autoencoder" if name.startswith("autoencoder") else name
    module, params = cmd_release.load(kind, json.loads(str(npz["config"])), state)
    x = last(npz["x"])
    if kind == "autoencoder":
        out, latents = run(module, params, x)
        yield name, np.moveaxis(np.asarray(out), -1, 2), npz["recon"]
        yield f"{name} content", latents.content, last(npz["z_c"])
        return
    more = (npz["y"],) if kind == "content_dit" else (None, last(npz["content"]))
    yield name, run(module, params, x, npz["t"], *more), last(npz["out"])


def features() -> Iterator[tuple]:
    """What scores are made of: I3D, LPIPS, CLIP."""
    from fixtures.formula import draw

    npz, state = recorded("i3d")
    config = json.loads(str(npz["config"]))
    video = np.tanh(draw("x", config["input_shape"], config["seed"]))
    yield "i3d", run(*i3d.load(state), last(video)), npz["logits"]
    npz, state = recorded("lpips")
    yield "lpips", run(LPIPS(), lpips_params(state), last(npz["a"]), last(npz["b"])), npz["distance"]
    module, params, _ = clip.load(TESTS / "fixtures" / "tiny-clip")
    npz = np.load(TESTS / "fixtures" / "tiny-clip" / "reference.npz")
    yield "clip", run(module, params, npz["input_ids"], last(npz["pixel_values"])), npz["logits_per_text"]


def stable_diffusion(name: str) -> Iterator[tuple]:
    """Tiny pipelines of diffusers with what it computes."""
    folder = TESTS / "fixtures" / name
    pipeline, npz = load_pipeline(folder), np.load(folder / "reference.npz")
    yield f"{name} text", run(*pipeline.text_encoder, npz["input_ids"])[0], npz["text_hidden"]
    inputs = last(npz["sample"]), npz["timesteps"], npz["text_hidden"]
    yield f"{name} unet", run(*pipeline.unet, *inputs), last(npz["unet_out"])
    yield f"{name} vae encoder", run(*pipeline.vae, last(npz["image"]), method="encode").mean, last(npz["vae_mean"])
    yield f"{name} vae decoder", run(*pipeline.vae, last(npz["sample"][:2]), method="decode"), last(npz["decoded"])


MODELS = {
    "autoencoder": lambda: chain(release("autoencoder_pixel"), release("autoencoder_latent")),
    "dit": lambda: chain(release("content_dit"), release("motion_dit")),
    "features": features,
    "sd15": lambda: stable_diffusion("tiny-sd15"),
    "sd21": lambda: stable_diffusion("tiny-sd21"),
}


def recorded(name: str) -> tuple[dict, dict]:
    from fixtures.formula import state_dict

    with np.load(TESTS / "fixtures" / f"{name}.npz") as npz:
        npz = dict(npz)
    return npz, state_dict(npz)


def run(module, params, *inputs, **method):
    return jax.device_get(jax.jit(partial(module.apply, **method))({"params": params}, *inputs))


def last(x):
    """Channels last."""
    return np.moveaxis(x, 1, -1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=local_path)
    parser.add_argument("--models", default=",".join(MODELS), help="some of them, separated by commas")
    flags = parser.parse_args()
    models = [choose("--models", name, MODELS) for name in flags.models.split(",")]
    sys.path.insert(0, str(TESTS))
    jax.config.update("jax_default_matmul_precision", "highest")
    found = {}
    for name, ours, expected in chain.from_iterable(MODELS[name]() for name in models):
        if ours.shape != expected.shape:
            raise ValueError(f"{name}: {ours.shape}, recorded {expected.shape}")
        found[name] = float(np.abs(ours - expected).max() / np.abs(expected).max())
        print(f"{name:26} {found[name]:.1e}", flush=True)
    wrong = [name for name, difference in found.items() if not difference <= TOLERANCE]
    write_json(
        flags.out,
        {"device": jax.devices()[0].device_kind, "tolerance": TOLERANCE, "differences": found, "beyond": wrong},
    )
    print(f"beyond {TOLERANCE:g}: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
