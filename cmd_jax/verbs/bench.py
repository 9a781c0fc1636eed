"""The verb `bench`: how fast a config samples, trains or reads, component by component; see docs/benchmark.md."""

import json
from pathlib import Path

import jax

from cmd_jax.bench import gate, peers, records, sampling
from cmd_jax.bench.measure import Component, measure
from cmd_jax.bench.options import Options
from cmd_jax.bench.parts import Random, sampler_of
from cmd_jax.bench.table import table
from cmd_jax.report.console import make_console
from cmd_jax.running.distributed import is_leader
from cmd_jax.sharding import make_mesh, partitioning

FILE_WIDTH = 1000  # of output that is no terminal: nothing is cut off


class Results:
    """The records of a run: kept, and each at once appended to the file or printed."""

    def __init__(self, common: dict, out: Path | None, console):
        self.common, self.out, self.console, self.all = common, out, console, []

    def emit(self, record: dict):
        """Keep a record with what all of this run say."""
        record = self.common | record
        self.all.append(record)
        if is_leader() and self.out:
            records.append(self.out, [record])
        elif is_leader():
            self.console.print(json.dumps(record))

    def measured(self, component: Component, options: Options, **more):
        self.emit(
            {
                "component": component.name,
                "batch": component.clips,
                "dtype": component.dtype,
                "parameters": sum(x.size for x in jax.tree.leaves(component.arguments[0])),
                "settings": component.settings,
                **measure(component, options.rounds, options.budget),
                **more,
            }
        )


def bench(config, workdir: Path | None, end_process=None, *, specification: str, overrides: dict, options: Options):
    """The `bench` verb -> exit code: 1 where the gate found a component slower, else 0. end_process: as for `train`."""
    earlier = records.read(options.gate, "--gate") if options.gate else []
    console = make_console(quiet=not is_leader(), file_width=FILE_WIDTH)
    out = options.out or (workdir / "bench.jsonl" if workdir else None)
    run = {"sample": bench_sampling, "train": bench_training, "data": bench_data}[options.verb]
    run = bench_peers if options.peers else run
    results = run(config, workdir, specification, overrides, options, console, out)
    console.print((peers.table if options.peers else table)(results.all), soft_wrap=False)
    if out:
        console.print(f"appended to {out}")
    verdict = gate.judge(results.all, earlier, options.bound) if options.gate else gate.Verdict([], [])
    for line in verdict.slower + verdict.unknown:
        console.print(line)
    return int(bool(verdict.slower))


def bench_sampling(config, workdir, specification, overrides, options, console, out) -> Results:
    sampler, origin = sampler_of(specification, overrides, config, workdir)
    results = Results(records.common(options, specification, config, sampler.mesh, origin), out, console)
    with partitioning(sampler.mesh, sampler.rules):
        for size in options.batches or (config.sampling.batch_size,):
            settings = sampling.settings_of(sampler, config, size)
            for component in sampling.components(sampler, settings):
                results.measured(component, options)
    return results


def bench_training(config, workdir, specification, overrides, options, console, out) -> Results:
    from cmd_jax.bench import training

    parts = Random(specification, overrides, config)
    results = Results(records.common(options, specification, config, parts.mesh, "random"), out, console)
    with partitioning(parts.mesh, config.rules):
        for component in training.components(parts, options.batches or (config.train.batch_size,)):
            results.measured(component, options)
    return results


def bench_peers(config, workdir, specification, overrides, options, console, out) -> Results:
    """Networks of the paper's shapes, whatever the config's; of the config come dtype and what records say."""
    results = Results(records.common(options, specification, config, make_mesh(config.mesh), "equal"), out, console)
    sampling = options.verb == "sample"
    dtype = (config.sampling.dtype if sampling else config.model.dtype) or "float32"
    peers.run(options.peers, "forward" if sampling else "training", options, dtype, results.emit)
    return results


def bench_data(config, workdir, specification, overrides, options, console, out) -> Results:
    from cmd_jax.bench import reading

    results = Results(records.common(options, specification, config, make_mesh(config.mesh), "none"), out, console)
    for size in options.batches or (config.train.batch_size,):
        results.emit(
            {"component": f"{config.stage}_data", "batch": size, "dtype": "", "parameters": 0, "settings": {}}
            | reading.measure(config, workdir, size, options.rounds)
        )
    return results
