"""The programs of toy-sized stages and samplers, lowered but not compiled, on any number of fake devices."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from cmd_jax import defaults
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.interop.diffusers import load_pipeline
from cmd_jax.loading import assemble, denoiser_stage
from cmd_jax.models.conditions import Classes, Texts
from cmd_jax.models.frames import Pixels, VAELatents
from cmd_jax.pretrained import ImageModelMetadata, TextEncoderMetadata, VAEMetadata, describe, stated_space
from cmd_jax.sampling.settings import SamplingSettings
from cmd_jax.sharding import abstract, batch_sharding, make_mesh, partitioning, replicated
from cmd_jax.stages import AutoencoderStage, FrozenAutoencoder, diffusion_stage
from cmd_jax.state import TrainState, make_optimizer, train_step
from cmd_jax.trained import AutoencoderMetadata, Metadata, Trained

CACHED = {"content": (8, 16, 4), "motion": (4, 12, 4), "states": (77, 8)}


@cache
def mesh_of(ways: int):
    return make_mesh(defaults.stage("content").mesh, jax.devices()[:ways])


@cache
def pipeline():
    return load_pipeline(tiny.pipeline_folder())


def whole(tree, mesh):
    """Shapes of arrays that every device has."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=replicated(mesh)), tree)


def batch_of(rows, mesh, count):
    """Shapes of `count` such rows, split over the mesh."""
    split = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *np.shape(x)), x.dtype, sharding=split), rows)


def space_of(kind):
    return VAELatents(*pipeline().vae) if kind == "text" else Pixels()


@cache
def metadata_of(kind, class_names=()) -> Metadata:
    """What the later stages of a run would say of themselves."""
    parts, kinds = {}, (VAEMetadata, TextEncoderMetadata, ImageModelMetadata)
    if kind == "text":
        parts = {part.part: describe(tiny.pipeline_folder(), part) for part in kinds}
    return Metadata(
        class_names=tuple(class_names), digest="autoencoder", autoencoder=AutoencoderMetadata("autoencoder"),
        statistics=LatentStatistics.unit(space_of(kind).channels, 4), **parts,
    )  # fmt: skip


@cache
def stage_of(name, kind):
    """A stage as training has it; its frozen arrays are those of the tiny pipeline, or shapes."""
    config, space, said = tiny.config_of(f"{name},kind={kind}"), space_of(kind), metadata_of(kind)
    if name == "autoencoder":
        config.loss.update(adversarial=0.5, discriminator_channels=4, discriminator_layers=1)
        return AutoencoderStage(config, space=space)
    stage = stage_of("autoencoder", kind)
    autoencoder = FrozenAutoencoder(tiny.config_of(f"autoencoder,kind={kind}"), params_of(stage, mesh_of(1)), space)
    conditions = Classes(7)
    if kind == "text":
        tokenizer = pipeline().tokenizer
        conditions = Texts(*pipeline().text_encoder, tokenizer([""])[0], tokenizer.end)
    return diffusion_stage(config, autoencoder, conditions, said.statistics, said.image_model)


def params_of(stage, mesh):
    return abstract(stage.init, mesh, defaults.RULES)


def train_program(name, kind, ways: int, rows: int, accumulate=1):
    """The step of a stage, on `rows` rows of a batch a device. What texts and frames give was encoded before."""
    mesh, config, stage = mesh_of(ways), tiny.config_of(f"{name},kind={kind}"), stage_of(name, kind)
    optimizer = make_optimizer(config.optimizer)
    if kind == "text":
        row = {name: np.zeros(shape, np.float32) for name, shape in CACHED.items()} | {"ids": np.zeros(77, np.int32)}
    else:
        row = {"video": np.zeros((4, 16, 24, 3), np.uint8), "label": np.int32(0)}
    if kind == "text" and name == "autoencoder":
        row = {"video": np.zeros((4, 16, 32, 3), np.uint8), "label": np.int32(0)}
    step = partial(train_step, loss_fn=stage.loss, optimizer=optimizer, ema_decay=0.5, accumulate=accumulate)
    with partitioning(mesh, config.rules):
        params = params_of(stage, mesh)
        state = TrainState(np.int32(0), params, params, jax.eval_shape(optimizer.init, params))
        arguments = whole((state, stage.frozen), mesh)
        jitted = jax.jit(step, out_shardings=replicated(mesh))
        batch = batch_of(row, mesh, rows * ways * accumulate)
        return jitted.lower(*arguments, batch, jnp.int32(0), jax.random.key(0))


def sample_program(program, kind, ways: int, rows: int, class_names=(), **options):
    """A program of the Sampler, on `rows` samples a device; options of `sampling`."""
    mesh, config = mesh_of(ways), tiny.config_of(f"sample,kind={kind}", **options)
    stages, said = {}, metadata_of(kind, tuple(class_names))
    for name in ("autoencoder", "content", "motion"):
        trained = tiny.config_of(f"{name},kind={kind}")
        if name == "autoencoder":
            stage = AutoencoderStage(trained, space=stated_space(said.vae))
        else:
            stage = denoiser_stage(trained, said, stages["autoencoder"])
        stages[name] = Trained(trained, params_of(stage, mesh), said)
    with partitioning(mesh, config.rules):
        sampler = assemble(stages, config.pretrained, mesh, config.rules)
        settings, *arguments = sampler._arguments(replace(SamplingSettings.of(config), batch_size=rows * ways))
        row = {"index": np.int32(0), "variant": np.int32(0)}
        row |= {"ids": np.zeros(77, np.int32)} if kind == "text" else {"label": np.int32(0)}
        if program == "animate":
            row["content"] = np.zeros(sampler.autoencoder.content_shape, np.float32)
        if program == "reconstruct":
            row, arguments = {"video": np.zeros(sampler.autoencoder.clip_shape, np.uint8)}, ()
        batch, layout = batch_of(row, mesh, rows * ways), sampler.layout(rows * ways, settings)
        return sampler.program(program, settings, layout).lower(sampler.params, batch, *arguments)
