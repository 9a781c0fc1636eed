"""A pipeline, a trained run and a sampler of texts at toy size."""

from functools import cache

import jax
import jax.numpy as jnp
import tiny

from cmd_jax.interop.diffusers import load_pipeline
from cmd_jax.loading import open_sampler
from cmd_jax.models.conditions import Texts
from cmd_jax.train import train

PROMPTS = ["a red circle", "blue square, moving"]


config_of = lambda argument, **changes: tiny.config_of(f"{argument},kind=text", **changes)  # noqa: E731


@cache
def pipeline():
    return load_pipeline(tiny.pipeline_folder())


@cache
def trained():
    """A workdir with the three stages, on latents made once; content is stopped after its third step, and resumed."""
    workdir = tiny.scratch() / "text"
    cached = {"latents__starts": 1}
    train(config_of("autoencoder", **cached, train__preview_every=6), workdir)
    train(config_of("motion", **cached), workdir)
    train(config_of("content", **cached, train__steps=3), workdir)
    train(config_of("content", **cached, train__preview_every=6), workdir)
    return workdir


def settings(**changes):
    changes = {"sampling__guidance": 7.5, "sampling__negative": "dim", **changes}
    return config_of("sample", **changes)


@cache
def sampler():
    """The tiny run's, with the pretrained UNet itself as its content stage: what fine-tuning starts from."""
    sampler = open_sampler(settings(), trained())
    sampler.params["content"] = jax.tree.map(jnp.asarray, pipeline().unet[1])
    return sampler


def texts():
    module, params = pipeline().text_encoder
    tokenizer = pipeline().tokenizer
    return Texts(module, params, tokenizer([""])[0], tokenizer.end), tokenizer
