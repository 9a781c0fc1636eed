"""The verb `train`: one stage, from its config, as cmd_jax/train.py trains it."""

from cmd_jax.train import train

__all__ = ["train"]
