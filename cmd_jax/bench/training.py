"""A training step as it is run, on made-up batches of the run's shapes."""

import copy
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.bench.measure import Component
from cmd_jax.bench.parts import Random
from cmd_jax.interop.lpips import load_lpips
from cmd_jax.models.conditions import Texts
from cmd_jax.sharding import MESH_AXES, batch_sharding, check_batch, replicated
from cmd_jax.stages import AutoencoderStage
from cmd_jax.state import init_state, make_optimizer, make_step


def stage_of(parts: Random):
    """The stage of a training config, its frozen parts drawn."""
    config = parts.config
    if config.stage != "autoencoder":
        return parts.denoiser(config.stage)
    lpips = load_lpips(config.loss.vgg, config.loss.lpips_heads) if config.loss.vgg else None
    return AutoencoderStage(config, lpips, parts.space)


def batch_of(parts: Random, stage, size: int) -> dict:
    """A made-up batch on the mesh, of what training would read: latents where they are kept, else clips."""
    config, key, split = parts.config, jax.random.key(parts.config.seed), batch_sharding(parts.mesh)

    def make(key):
        batch = {"id": jnp.arange(size), "label": jnp.zeros(size, jnp.int32)}
        if not config.latents.starts:
            clip = (size, config.data.frames, config.data.height, config.data.width, 3)
            batch["video"] = jax.random.bits(key, clip, jnp.uint8)
        elif config.stage == "autoencoder":
            batch["frames"] = jax.random.normal(key, (size, *stage.video_shape[1:]), config.latents.store_dtype)
        else:
            names = {"content": stage.autoencoder.content_shape, "motion": stage.autoencoder.motion_shape}
            batch |= {n: jax.random.normal(key, (size, *s), config.latents.store_dtype) for n, s in names.items()}
        if config.stage != "autoencoder" and isinstance(stage.conditions, Texts):
            batch["ids"] = jnp.asarray(parts.tokenizer([""] * size))
        return batch

    return jax.jit(make, out_shardings=split)(key)


def component(parts: Random, stage, size: int) -> Component:
    """One update of the stage's state. Within `partitioning`."""
    config, mesh = parts.config, parts.mesh
    check_batch("--batch", size, mesh, config.train.accumulate)
    optimizer = make_optimizer(config.optimizer)
    state = init_state(stage, optimizer, config.seed, mesh, config.rules, parts.draw(stage.init))
    whole = replicated(mesh)
    frozen = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, whole), stage.frozen)
    asked = jax.device_put(np.zeros(mesh.size, np.int32), jax.NamedSharding(mesh, jax.P(MESH_AXES)))
    step = make_step(stage, optimizer, config.train, mesh, state)
    key = jax.random.key(config.seed)
    arguments = state, frozen, batch_of(parts, stage, size), jnp.int32(0), key, asked

    def again(out, arguments):
        return out[0], *arguments[1:3], arguments[3] + 1, *arguments[4:]

    def forward(state, frozen, batch, number, key, asked):
        return stage.loss(state.params, frozen, batch, key)

    plain = copy.copy(stage)
    plain.module = stage.module.clone(remat="none")
    counted = make_step(plain, optimizer, config.train, mesh, state)
    settings = {
        "accumulate": config.train.accumulate,
        "remat": config.model.remat,
        "latents": config.latents.starts > 0,
    }
    return Component(
        f"{config.stage}_step", step, arguments, size, config.model.dtype, settings,
        again=again, counted=counted, forward=forward,
    )  # fmt: skip


def components(parts: Random, sizes: tuple[int, ...]) -> Iterator[Component]:
    stage = stage_of(parts)
    for size in sizes:
        yield component(parts, stage, size)
