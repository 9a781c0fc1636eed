"""What the presets of sampling cost and give, on the shipped weights: the table of docs/performance.md.

    python launch/measure_presets.py --videos=256 --rounds=5

Each row: operations of both denoisers for one clip; multiply-adds of the whole in the paper's counting (of layers,
without guidance); attributes that a classical reader finds, with 95 % Wilson intervals; PSNR of videos, held to [-1,
1], to those of the full run and the same seed, mean and least; seconds of 32 videos, in turns. The full run is 50 + 50
Euler steps.
"""

import argparse
import math

import numpy as np

import cmd_jax
from cmd_jax.evaluation import shapes_oracle
from cmd_jax.evaluation.reconstruction import psnr
from cmd_jax.performance.flops import count
from cmd_jax.performance.timing import in_turns, ratio
from cmd_jax.report.video import to_uint8
from cmd_jax.sampling.calibration import cost_of, operations

CONFIG = "quickstart:sample,size=long"
RUNS = {  # name -> what differs from the config
    "full, 50 + 50": {"sampling.motion_steps": 50},
    "quality": {},
    "balanced": {"sampling.preset": "balanced"},
    "fast": {"sampling.preset": "fast"},
}


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, spread = correct / total, z * z / total
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def costs(sampler, settings) -> tuple[int, int]:
    """For one clip -> (operations of both denoisers, with guidance; multiply-adds of the whole as the paper counts)."""
    resolved = sampler.resolve(settings)
    denoisers = sum(
        operations(
            stage.kinds(guided=settings.guidance not in (None, 1), **resolved.run_of(name)), cost_of(sampler, name)
        )
        for name, stage in sampler.denoisers.items()
    )
    plain = cmd_jax.SamplingSettings(**{**vars(settings), "guidance": None, "batch_size": 1})
    plain, layout, (params, *arguments) = sampler.first_call(sampler.request(count=1), plain)
    program = sampler.program("generate", plain, layout)
    return denoisers, count(lambda params: program(params, *arguments), params).layers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    sampler = cmd_jax.load_sampler("quickstart")
    runs = {
        name: cmd_jax.SamplingSettings.of(cmd_jax.load_config(CONFIG, changes), batch_size=32)
        for name, changes in RUNS.items()
    }
    request, few = sampler.request(count=flags.videos), sampler.request(count=32)
    draw = lambda settings: np.concatenate([np.clip(x.video, -1, 1) for x in sampler.generate(request, settings)])  # noqa: E731
    videos = {name: draw(settings) for name, settings in runs.items()}
    calls = {name: lambda settings=settings: [*sampler.generate(few, settings)] for name, settings in runs.items()}
    times = in_turns(calls, flags.rounds)
    full, rows = next(iter(runs)), []
    for name, settings in runs.items():
        (denoisers, layers), (denoisers_full, layers_full) = costs(sampler, settings), costs(sampler, runs[full])
        read = shapes_oracle.score(to_uint8(videos[name]), request.conditions["label"], sampler.class_names)
        shares = []
        for field in ("color", "direction", "shape"):
            low, high = wilson(read[field]["correct"], read["count"])
            shares.append(f"{read[field]['accuracy']:.1%} ({low:.1%} to {high:.1%})")
        decibels = None if name == full else psnr(videos[name], videos[full])
        near = "" if decibels is None else f"{decibels.mean():.1f}, {decibels.min():.1f}"
        row = [name, f"{denoisers / 1e9:.2f} G, 1/{denoisers_full / denoisers:.2f}"]
        row += [f"{layers / 1e9:.2f} G, 1/{layers_full / layers:.2f}", *shares, near]
        rows.append([*row, f"{times[name].p50:.2f}, 1/{ratio(times[name], times[full]):.2f}"])
    head = ["", "denoisers, operations", "whole, as the paper counts", "colour", "direction", "shape", "PSNR, dB", "s"]
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
