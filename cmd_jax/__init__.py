"""CMD in JAX: content-frame / motion-latent video diffusion (Yu et al., ICLR 2024).

    modules      Autoencoder, DiT, UNet, VAE: flax.linen, pure
    processes    Gaussian, Flow: how noise is added, learnt and taken away
    configs      load_config("quickstart:content", {"train.steps": 100}) -> a config, all keys declared and checked
    data         open_source(config.data) -> clips by index
    training     run_training(config, workdir) -> summary; resumes what is there, and returns or raises
    trained      load_trained(path, "content") -> Trained: config, parameters, metadata
    sampling     load_sampler(folder) -> Sampler; SamplingSettings: steps, guidance, solvers, of a call, or .of(config)
    scores       run_evaluation(config, workdir) -> scores
    notebooks    Videos: shown where they stand
    errors       UserError: one line that says what to do; Stopped: a training that was asked to stop, and saved

A name is imported at its first use, so that `import cmd_jax` takes no time and starts no device.
"""

import importlib

__version__ = "0.1.0"
_PLACES = {  # public name -> module and its name there
    "Autoencoder": "models.autoencoder",
    "DiT": "models.dit",
    "UNet": "models.unet",
    "VAE": "models.vae",
    "Latents": "models.autoencoder",
    "Gaussian": "diffusion.gaussian",
    "Flow": "diffusion.flow",
    "load_config": "config:load",
    "open_source": "data.sources",
    "run_training": "train:train",
    "Trained": "trained",
    "load_trained": "trained",
    "Sampler": "sampling.sampler",
    "SamplingSettings": "sampling.settings",
    "load_sampler": "loading",
    "run_evaluation": "verbs.evaluate:evaluate",
    "Videos": "report.notebook",
    "UserError": "errors",
    "Stopped": "errors",
}
__all__ = ["__version__", *_PLACES]  # noqa: PLE0604


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module 'cmd_jax' has no attribute {name!r}")
    module, _, there = _PLACES[name].partition(":")
    value = getattr(importlib.import_module(f"cmd_jax.{module}"), there or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
