"""What is measured of a config: sampling, training steps, or reading."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax

from cmd_jax.bench import peers, quality, records, sampling
from cmd_jax.bench.measure import Component, measure
from cmd_jax.bench.options import Options
from cmd_jax.bench.parts import Random, sampler_of
from cmd_jax.config import load
from cmd_jax.sharding import make_mesh, partitioning


class Run(NamedTuple):
    """A config with where it is from: its specification and overrides; workdir: where stages may be, or None."""

    config: object
    workdir: Path | None
    specification: str
    overrides: dict
    options: Options

    def common(self, mesh, weights: str) -> dict:
        return records.common(self.options.verb, self.specification, self.config, mesh, weights)


def measured(component: Component, options: Options, more: Callable = lambda out: {}) -> dict:
    """The record of a component; more(what it gave): what it says beside."""
    record, out = measure(component, options.rounds, options.budget)
    told = {
        "component": component.name,
        "batch": component.clips,
        "dtype": component.dtype,
        "parameters": sum(x.size for x in jax.tree.leaves(component.arguments[0])),
        "settings": component.settings,
    }
    return told | record | more(out)


def sample(run: Run, results: records.Results):
    """The whole program and its networks, at each batch size."""
    config, options = run.config, run.options
    sampler, origin = sampler_of(run.specification, run.overrides, config, run.workdir)
    results.common = run.common(sampler.mesh, origin)
    sizes = options.batches or (config.sampling.batch_size,)
    for size in sizes:
        settings = sampling.settings_of(sampler, config, size)
        with sampler.layout(size, settings).partitioning():
            for component in sampling.components(sampler, settings):
                if options.only and component.name not in options.only:
                    continue
                compared = component.name == "whole" and size == sizes[0] and origin != "random"
                results.emit(measured(component, options, partial(near, run, component) if compared else no_more))


def no_more(out) -> dict:
    return {}


def near(run: Run, whole: Component, out) -> dict:
    """How near videos come to those of the full runs of the same seed: {"psnr_to": {its name: ...}}, or {} of such."""
    found = {}
    for name, changes in quality.references(run.config, whole.dtype).items():
        config = load(run.specification, {**run.overrides, **changes}, shapes_only=True)
        sampler, _ = sampler_of(run.specification, run.overrides, config, run.workdir)
        reference = next(sampling.components(sampler, sampling.settings_of(sampler, config, whole.clips)))
        video = reference.jitted()(*reference.arguments)["video"]
        found[name] = quality.psnr_to(out["video"], video, sampler.mesh)
    return {"psnr_to": found} if found else {}


def train(run: Run, results: records.Results):
    """Whole training steps, at each batch size."""
    from cmd_jax.bench import training

    parts = Random(run.specification, run.overrides, run.config)
    results.common = run.common(parts.mesh, "random")
    with partitioning(parts.mesh, run.config.rules, run.config.attention):
        for component in training.components(parts, run.options.batches or (run.config.train.batch_size,)):
            results.emit(measured(component, run.options))


def beside_peers(run: Run, results: records.Results):
    """Networks of the paper's shapes, whatever the config's; of the config come dtype and what records say."""
    results.common = run.common(make_mesh(run.config.mesh), "equal")
    sampling = run.options.verb == "sample"
    dtype = (run.config.sampling.dtype if sampling else run.config.model.dtype) or "float32"
    peers.run(run.options.peers, "forward" if sampling else "training", run.options, dtype, results.emit)


def data(run: Run, results: records.Results):
    """Batches as training reads them, at each batch size."""
    from cmd_jax.bench import reading  # here: it needs PyAV and tfds, of which the others are free

    results.common = run.common(make_mesh(run.config.mesh), "none")
    for size in run.options.batches or (run.config.train.batch_size,):
        told = {"component": f"{run.config.stage}_data", "batch": size, "dtype": "", "parameters": 0, "settings": {}}
        results.emit(told | reading.measure(run.config, run.workdir, size, run.options.rounds))
