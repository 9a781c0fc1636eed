"""The verb `bench`: how fast a config samples, trains or reads, component by component; see docs/benchmark.md."""

from pathlib import Path

from cmd_jax.bench import gate, peers, records, runs
from cmd_jax.bench.options import Options
from cmd_jax.bench.table import table
from cmd_jax.report.console import make_console
from cmd_jax.running.distributed import is_leader

FILE_WIDTH = 1000  # of output that is no terminal: nothing is cut off
RUNS = {"sample": runs.sample, "train": runs.train, "data": runs.data}


def bench(
    config, workdir: Path | None, end_process=None, *, specification: str, overrides: dict, options: Options
) -> int:
    """The `bench` verb -> exit code: 1 where the gate found a component slower, else 0.

    specification, overrides: of the config, from whose file come the other stages that it needs. end_process: as for
    `train`.
    """
    earlier = records.read(options.gate, "--gate") if options.gate else []
    console = make_console(quiet=not is_leader(), file_width=FILE_WIDTH)
    out = options.out or (workdir / "bench.jsonl" if workdir else None)
    run = runs.Run(config, workdir, specification, overrides, options)
    measure, shown = (runs.beside_peers, peers.table) if options.peers else (RUNS[options.verb], table)
    results = records.Results(out, console)
    try:
        measure(run, results)
    finally:  # what was measured is told, whatever came after it
        if results.all:
            console.print(shown(results.all), soft_wrap=False)
            console.print(f"appended to {out}" if out else "")
    verdict = gate.judge(results.all, earlier, options.bound) if options.gate else gate.Verdict([], [])
    for line in verdict.slower + verdict.unknown:
        console.print(line)
    return int(bool(verdict.slower))
