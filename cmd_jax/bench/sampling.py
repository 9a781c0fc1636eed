"""The components of sampling: the whole program, and each network of it at the run's shapes and guidance."""

from collections.abc import Iterator
from dataclasses import asdict

import jax
import jax.numpy as jnp

from cmd_jax.bench.measure import Component
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Texts
from cmd_jax.models.frames import Pixels
from cmd_jax.sampling import calibration
from cmd_jax.sampling.programs import computing_in
from cmd_jax.sampling.sampler import Sampler
from cmd_jax.sampling.settings import SamplingSettings
from cmd_jax.sharding import batch_sharding
from cmd_jax.stages import DiffusionStage, normalize

PROMPT = "a sailing boat in the evening sun"


def settings_of(sampler: Sampler, config, batch: int) -> SamplingSettings:
    """The resolved settings of a sample config for batches of that size."""
    return sampler.resolve(calibration.settings_of(sampler, config, batch_size=batch))


def request_of(sampler: Sampler, count: int):
    """`count` samples: of all classes in turn, or of one prompt."""
    return sampler.request(count=count) if sampler.tokenizer is None else sampler.request(prompts=PROMPT, count=count)


def components(sampler: Sampler, settings: SamplingSettings) -> Iterator[Component]:
    """The whole program, then its parts; each with inputs on the devices. Within the `partitioning` of their layout."""
    size = settings.batch_size
    settings, layout, arguments = sampler.first_call(request_of(sampler, size), settings)
    rows = {"out_shardings": batch_sharding(layout.mesh)}
    params, batch, _, guidance, null_ids = arguments
    denoisers = {name: computing_in(settings.dtype, stage) for name, stage in sampler.denoisers.items()}
    autoencoder = computing_in(settings.dtype, sampler.autoencoder)
    guided = {"guidance": settings.guidance if guidance is not None else None}

    told = guided | {name: value for name, value in asdict(settings.static).items() if name not in IN_ALL}
    evaluations = {}
    for stage in denoisers.values():
        evaluations |= evaluated(stage, settings, guidance)
    whole = sampler.program("generate", settings, layout)
    yield Component("whole", whole, arguments, size, dtype_of(denoisers["content"]), told | evaluations)

    conditions = sampler.conditions

    def encode(params, batch):
        condition = conditions.of(params, batch)
        return condition, None if guidance is None else conditions.null(params, size, null_ids)

    condition, null = jax.jit(encode, **rows)(params["conditions"], batch)
    if isinstance(conditions, Texts):
        name = "text_encoder"
        yield Component(name, encode, (params["conditions"], batch), size, dtype_of(conditions), {}, rows)

    def noise(shape):
        return jax.jit(lambda key: jax.random.normal(key, (size, *shape)), **rows)(jax.random.key(settings.seed))

    content = noise(autoencoder.content_shape)
    for name, stage in denoisers.items():
        given = None if name == "content" else normalize(content, sampler.statistics[name]["content"])
        features = jax.jit(stage.content_features, **rows)(params[name], given)

        def denoise(params, x, timesteps, condition, features, null, guidance, stage=stage):
            return stage.guided_denoiser(params, condition, features, guidance, null)(x, timesteps)

        arguments = params[name], noise(stage.shape), jnp.full(size, 500.0), condition, features, null, guidance
        yield Component(f"{name}_denoiser", denoise, arguments, size, dtype_of(stage), guided, rows)

    def decode(params, content, motion):
        return autoencoder.module.apply({"params": params}, Latents(content, motion), method="decode")

    arguments = params["autoencoder"]["autoencoder"], content, noise(autoencoder.motion_shape)
    yield Component("cmd_decoder", decode, arguments, size, dtype_of(autoencoder), {}, rows)

    if not isinstance(autoencoder.space, Pixels):
        arguments = params["autoencoder"]["vae"], noise(autoencoder.video_shape)
        name, space = "vae_decoder", autoencoder.space
        yield Component(name, space.decode, arguments, size, dtype_of(space), {}, rows)


IN_ALL = ("batch_size", "seed", "guidance", "negative", "dtype")  # or told otherwise


def dtype_of(part) -> str:
    return jnp.dtype(part.module.dtype).name


def evaluated(stage: DiffusionStage, settings: SamplingSettings, guidance) -> dict[str, int]:
    """Evaluations of a stage's network for one clip in the whole run, two for each that is guided: all of it, and those
    that reuse what is deep in it."""
    kinds = stage.kinds(guided=guidance is not None, **settings.run_of(stage.name))
    runs = {reuses: sum(1 + kind.guided for kind in kinds if kind.reuses == reuses) for reuses in (False, True)}
    return {f"{stage.name}_evaluations": runs[False], f"{stage.name}_reusing": runs[True]}
