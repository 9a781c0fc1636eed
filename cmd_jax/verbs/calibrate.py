"""The verb `calibrate`: the evaluations of a run that may reuse, for a wanted speed-up."""

import time
from pathlib import Path

from rich.table import Table

from cmd_jax.errors import UserError
from cmd_jax.files import as_path
from cmd_jax.loading import open_sampler
from cmd_jax.report.console import make_console
from cmd_jax.running.distributed import is_leader
from cmd_jax.sampling import calibration
from cmd_jax.sampling.settings import SamplingSettings
from cmd_jax.verbs.requests import make_request, open_clips

FILE = "reuse.json"


def calibrate(config, workdir: Path, end_process=None, *, speedup: float, out: str | None) -> calibration.Calibration:
    """The `calibrate` verb: measure on one batch of samples, print and write the lists for `speedup`.

    Of several processes each measures the samples of its own devices. end_process: unused, as nothing is written until
    the end.
    """
    console, started = make_console(quiet=not is_leader()), time.perf_counter()
    if config.sampling.mode != "generate":
        raise UserError("sampling.mode", config.sampling.mode, "calibrate generates videos", "use generate")
    if config.sampling.reuse:
        raise UserError("sampling.reuse", config.sampling.reuse, "calibrate writes such a file", "leave it out")
    sampler = open_sampler(config, workdir)
    settings = SamplingSettings.of(config)
    clips = open_clips(config, workdir, config.sampling.num) if sampler.tokenizer else None
    request = make_request(sampler, config, config.sampling.num, clips)
    found, path = calibration.calibrate(sampler, request, settings, speedup), as_path(out or workdir / FILE)
    table = Table("denoiser", "evaluations", "reuse", "operations", "change from one to the next", "of those reused")
    for name, cache in (("content", found.content), ("motion", found.motion)):
        reused = [cache.changes[int(n)] for n in cache.reuse.split(",") if n]
        mean = sum(cache.changes[1:]) / max(1, len(cache.changes) - 1)
        row = [name, len(cache.changes), len(reused), f"1/{cache.speedup:.2f}", f"{mean:.3f}"]
        table.add_row(*map(str, row), f"{sum(reused) / max(1, len(reused)):.3f}")
    console.print(table, soft_wrap=False)
    for name, cache in (("content", found.content), ("motion", found.motion)):
        console.print(f"sampling.{name}_reuse={cache.reuse}")
    if is_leader():
        calibration.write(path, found)
    seconds = time.perf_counter() - started
    console.print(f"{found.samples} samples in {seconds:.0f} s; use it by --config.sampling.reuse={path}")
    return found
