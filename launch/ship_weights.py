"""Write the three trained stages of a workdir as float16 safetensors, small enough for git.

    python launch/ship_weights.py --workdir runs/long --out configs/weights/quickstart

This is how the shipped weights of configs/quickstart.py were made. Each file carries its config and the digest of the
float32 parameters it was rounded from, so that sampling still knows which stages belong together.
"""

import argparse

import numpy as np

from cmd_jax.config import STAGES
from cmd_jax.files import local_path
from cmd_jax.trained import export, load_trained


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=local_path, required=True)
    parser.add_argument("--out", type=local_path, required=True)
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        path = flags.out / f"{stage}.safetensors"
        export(path, load_trained(flags.workdir / stage, stage), np.float16)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
