"""What each device computes, sends and holds for one batch of samples, by the number of devices.

    python launch/layouts.py --config=webvid:sample --config.pretrained.architecture=sd21

Every part of the config's sampler is compiled at full size, one evaluation of each denoiser, for fake devices of this
machine's CPU; nothing is computed, and no weights are needed. Weights count in `sampling.dtype`; programs of a CPU may
send and hold in float32 what others do in bfloat16.
"""

import argparse
import os
import sys

MIB = 2**20


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE:sample", help="of a sampler")
    parser.add_argument("--devices", default="1,8", metavar="N,N,...", help="how many; the first is compared with")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="of the batch")
    parser.add_argument("--only", action="append", metavar="PART", help="compile this part; default: all")
    parser.add_argument("--split-parameters", action="store_true", help="split parameters in place of tokens and cells")
    flags, rest = parser.parse_known_args(arguments)
    counts = [int(n) for n in flags.devices.split(",")]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(counts)}"

    import jax

    from cmd_jax.bench.spread import Shapes, shares
    from cmd_jax.config import load

    overrides = dict(word.removeprefix("--config.").split("=", 1) for word in rest)
    stages = Shapes(flags.config, overrides, load(flags.config, overrides, shapes_only=True))
    only, totals = flags.only or (), {}
    for count in counts:
        print(f"{count} devices", flush=True)
        totals[count] = 0
        for share in shares(stages, jax.devices()[:count], flags.samples, only, flags.split_parameters):
            totals[count] += share.calls * share.work.flops
            sent = ", ".join(
                f"{name} {share.work.calls[name]} of {size / 1e6:.1f} MB" for name, size in share.work.sent.items()
            )
            mesh = " ".join(f"{axis}={size}" for axis, size in share.mesh.items())
            held = f"{share.parameter_bytes / MIB:,.0f} + {share.temporary_bytes / MIB:,.0f} MiB"
            line = f"{share.part}, {mesh}: {share.work.flops / 1e9:,.1f} GFLOP, {share.calls} times"
            print(f"  {line}; sends {sent or 'nothing'}; holds {held} of parameters and temporaries", flush=True)
        print(f"  together: {totals[count] / 1e12:,.2f} TFLOP, {totals[counts[0]] / totals[count]:.2f} times less")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
