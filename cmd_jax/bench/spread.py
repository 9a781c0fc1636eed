"""What each of several devices does for a batch of samples, read from compiled programs; nothing is computed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.bench.parts import Random
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Text, Texts
from cmd_jax.models.frames import Pixels
from cmd_jax.performance.hlo import Work, work
from cmd_jax.sampling.layouts import Layout, Layouts
from cmd_jax.sampling.programs import computing_in
from cmd_jax.sharding import SAMPLING_AXES, batch_sharding, mesh_over, replicated, shardings_of


@dataclass
class Share:
    """A part of sampling. mesh: sizes of its axes. calls: how often a batch needs it. work, parameter_bytes and
    temporary_bytes: of one device and one call."""

    part: str
    mesh: dict[str, int]
    calls: int
    work: Work
    parameter_bytes: int
    temporary_bytes: int


class Shapes(Random):
    """The stages of a config, whose parameters are boxed shapes."""

    def __init__(self, specification: str, overrides: dict, config):
        super().__init__(specification, overrides, config)
        self.draw = lambda init: jax.eval_shape(init, jax.random.key(0))


def shares(stages: Shapes, devices: list, samples: int, only=(), split_parameters: bool = False) -> Iterator[Share]:
    """Each part of sampling in turn, or those named, for a batch of so many samples over these devices.

    split_parameters: in place of tokens, rows of cells and frames, by the rules of the config, to compare with.
    """
    config, guided = stages.config, stages.config.sampling.guidance != 1
    mesh = mesh_over(np.array(devices).reshape(-1, 1, 1, 1), SAMPLING_AXES)
    layout = Layouts(mesh, config.rules, config.attention, by_size=True).of(samples, samples, guided)
    if split_parameters:
        layout = layout._replace(rules=config.rules)
    for name, calls, function, boxed, *inputs in _parts(stages, layout, guided):
        if only and name not in only:
            continue
        places = shardings_of(boxed, layout.mesh, config.rules)
        if not split_parameters:
            places = jax.tree.map(lambda _: replicated(layout.mesh), places)
        dtype = config.sampling.dtype
        shape = lambda x, place, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place)  # noqa: E731
        params = jax.tree.map(shape, nn.unbox(boxed), places)
        with layout.partitioning():
            compiled = jax.jit(function).lower(params, *inputs).compile()
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
        temporary = compiled.memory_analysis().temp_size_in_bytes
        yield Share(name, dict(layout.mesh.shape), calls, work(compiled.as_text()), held, temporary)


def _parts(stages: Shapes, layout: Layout, guided: bool) -> Iterator[tuple]:
    """(name, calls, function, its parameters, further arguments)."""
    config, rows = stages.config, batch_sharding(layout.mesh)
    options, whole = config.sampling, replicated(layout.mesh)
    autoencoder = computing_in(options.dtype, stages.autoencoder.resized(config.data.height, config.data.width))

    def batch(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((layout.rows, *shape), dtype, sharding=rows)

    condition, conditions = batch(dtype=jnp.int32), stages.conditions
    if isinstance(conditions, Texts):
        width = conditions.module.width
        condition = Text(batch(conditions.module.length, width), batch(width))
    for name in ("content", "motion"):
        stage = computing_in(options.dtype, stages.denoiser(name))
        boxed = stages.draw(stage.init)
        content = None if name == "content" else batch(*autoencoder.content_shape)
        features = jax.eval_shape(stage.content_features, nn.unbox(boxed), content)
        features = jax.tree.map(lambda x: batch(*x.shape[1:], dtype=x.dtype), features)

        def denoise(params, x, t, condition, features, null, guidance, stage=stage):
            return stage.guided_denoiser(params, condition, features, guidance, null)(x, t)

        guidance = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole) if guided else None
        inputs = batch(*stage.shape), batch(), condition, features, condition, guidance
        yield f"{name} denoiser", options[f"{name}_steps"], denoise, boxed, *inputs

    def decode(params, content, motion):
        return autoencoder.module.apply({"params": params}, Latents(content, motion), method="decode")

    params, content = autoencoder.params, batch(*autoencoder.content_shape)
    yield "CMD decoder", 1, decode, params["autoencoder"], content, batch(*autoencoder.motion_shape)
    if not isinstance(autoencoder.space, Pixels):
        yield "VAE, frames", 1, autoencoder.space.decode, params["vae"], batch(*autoencoder.video_shape)
        yield "VAE, content frame", 1, autoencoder.space.decode_image, params["vae"], content
