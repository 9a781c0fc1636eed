"""The `cmd-jax` command: verb, flags, one-line errors; nothing else."""

import argparse
import logging
import sys
import traceback
from pathlib import Path

from cmd_jax.errors import UserError, nearest
from cmd_jax.runtime import keep_freed_memory

EXAMPLES = {
    "train": (
        "train one stage, resuming what is there",
        "--config=configs/quickstart.py:autoencoder --workdir=runs/shapes",
    ),
    "sample": ("write videos and a gallery", "--config=configs/quickstart.py:sample,size=long --workdir=runs/shipped"),
    "evaluate": (
        "score reconstructions and generated videos",
        "--config=configs/quickstart.py:sample --workdir=runs/shapes",
    ),
}
OVERRIDE = "--config.KEY=VALUE sets any value of the config, like --config.seed=1"


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, like all others."""

    def error(self, message: str):
        raise UserError("command", self.prog, message, f"see {self.prog} --help")


def build_parser() -> Parser:
    parser = Parser(prog="cmd-jax", description="Train and sample CMD video diffusion.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (what, example) in EXAMPLES.items():
        sub = verbs.add_parser(
            verb,
            help=what,
            description=what,
            epilog=f"{OVERRIDE}\nexample: cmd-jax {verb} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--config", metavar="FILE[:ARG]", help="required; ARG is stage[,key=value...]")
        sub.add_argument("--workdir", metavar="DIR", help="required; one folder a stage is made in it")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    return parser


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Known flags, and the `--config.key=value` overrides."""
    known, rest = build_parser().parse_known_args(arguments)
    overrides = {}
    for flag in rest:
        name, equals, value = flag.partition("=")
        if not name.startswith("--config.") or not equals:
            flags = ("--config=FILE", "--workdir=DIR", "--debug", "--config.KEY=VALUE")
            raise UserError("flag", flag, f"not a flag of {known.verb}", f"did you mean {nearest(flag, flags)[0]}")
        overrides[name.removeprefix("--config.")] = value
    for flag in ("config", "workdir"):
        if not getattr(known, flag):
            raise UserError(f"--{flag}", "", "missing", f"see cmd-jax {known.verb} --help")
    return known, overrides


def run(verb: str, config, workdir: Path):
    """Do what the verb says; modules are imported here, since they start JAX."""
    training = config.stage != "sample"
    if (verb == "train") != training:
        wanted = "autoencoder, content or motion" if verb == "train" else "sample"
        raise UserError("config", config.stage, f"`{verb}` takes another stage", f"use FILE:{wanted}")
    if verb == "train":
        from cmd_jax.train import train

        train(config, workdir)
    else:
        from cmd_jax import sample

        getattr(sample, verb)(config, workdir)


def fail(error: UserError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(error, file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("cmd_jax").setLevel(logging.INFO)
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    try:
        flags, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        from cmd_jax.config import load

        run(flags.verb, load(flags.config, overrides), Path(flags.workdir).expanduser().absolute())
    except UserError as error:
        return fail(error, debug)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        remedy = "free space or mend its rights, or give another --workdir"
        return fail(UserError("file", error.filename or "?", error.strerror or str(error), remedy), debug)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA's name for it
            raise
        remedy = "lower train.batch_size or sampling.batch_size, set model.remat=full, or raise mesh.fsdp"
        return fail(UserError("memory", "full", " ".join(str(error).split())[:200], remedy), debug)
    return 0


if __name__ == "__main__":
    sys.exit(main())
