"""The `cmd-jax` command: verb, flags, one-line errors; nothing else."""

import argparse
import json
import logging
import os
import sys
import traceback
from pathlib import Path

from cmd_jax.errors import Stopped, UserError, nearest, of_file, tell
from cmd_jax.files import check_path
from cmd_jax.running.runtime import check_devices, keep_freed_memory
from cmd_jax.verbs import convert

QUICKSTART = "--config=quickstart"
EXAMPLES = {
    "train": (
        "train one stage, resuming what is there",
        f"{QUICKSTART}:autoencoder --workdir=runs/shapes",
    ),
    "sample": (
        "write videos and a gallery",
        f"{QUICKSTART}:sample,size=long --workdir=runs/shipped\n"
        "         cmd-jax sample --config=webvid:sample --workdir=runs/webvid"
        ' --config.pretrained.path=DIR --prompt="a sailing boat in the evening sun" --num=4',
    ),
    "evaluate": ("score reconstructions and generated videos", f"{QUICKSTART}:sample --workdir=runs/shapes"),
    "doctor": ("show how the model lies on the devices, and what is not split", f"{QUICKSTART}:content"),
    "verify-resume": (
        "kill and resume a training, and compare it with one that was left alone",
        f"{QUICKSTART}:autoencoder --workdir=runs/verify --kills=3 --config.train.steps=40"
        " --config.train.checkpoint_every=10 --config.optimizer.warmup_steps=10",
    ),
}
CONVERT = "cmd-autoencoder autoencoder.pt autoencoder.safetensors --architecture=autoencoder.json"
OVERRIDE = "--config.KEY=VALUE sets any value of the config, like --config.seed=1"


SAMPLING = {  # flags of `sample` -> what they stand for, and the keys that they set
    "prompt": ("TEXT", "what to draw", ("sampling.prompt",)),
    "prompts-file": ("FILE", "many prompts: .txt, .csv, .jsonl, or MSR-VTT's .json", ("sampling.prompts_file",)),
    "negative": ("TEXT", "what to lead away from", ("sampling.negative",)),
    "guidance": ("G", "1: none", ("sampling.guidance",)),
    "steps": ("N", "of both denoisers", ("sampling.content_steps", "sampling.motion_steps")),
    "solver": ("NAME", "of both denoisers, like ddim or dpmpp", ("sampling.content_solver", "sampling.motion_solver")),
    "seed": ("N", "of the noise", ("seed",)),
    "num": ("N", "videos; with prompts: of each", ("sampling.num",)),
}
PATHS = (
    "--config",
    "--workdir",
    "--prompts-file",
    "INPUT",
    "OUTPUT",
    "--architecture",
    "--classes",
    "--pretrained",
    "--unet",
)
DISTRIBUTED = ("train", "sample", "evaluate")  # what several processes do together


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
        sub.add_argument(
            "--config", metavar="FILE[:ARG]", help="required; or NAME of a shipped file; ARG is stage[,key=value...]"
        )
        optional = verb == "doctor"
        help_workdir = (
            "where trained stages are looked for" if optional else "required; one folder a stage is made in it"
        )
        sub.add_argument("--workdir", metavar="DIR", help=help_workdir)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
        if verb in DISTRIBUTED:
            sub.add_argument(
                "--distributed", metavar="auto|off|explicit", default="auto",
                help="auto: ask JAX for a cluster (TPU pod, SLURM, GKE); explicit: the three flags below",
            )  # fmt: skip
            sub.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
            sub.add_argument("--num-processes", metavar="N", type=int)
            sub.add_argument("--process-id", metavar="I", type=int, help="0 to N-1")
        if verb == "sample":
            for flag, (metavar, what, keys) in SAMPLING.items():
                sub.add_argument(f"--{flag}", metavar=metavar, help=f"{what} (config.{', config.'.join(keys)})")
        if verb == "verify-resume":
            sub.add_argument("--kills", metavar="N", type=int, default=5, help="SIGKILLs, about half of them in a save")
            sub.add_argument("--devices", metavar="N,N,...", help="device counts to train on in turn; default: all")
    add_convert(verbs)
    return parser


def add_convert(verbs):
    """The verb that takes files, not a config."""
    what = "convert files of weights, PyTorch's to ours and back"
    epilog = f"example: cmd-jax convert {CONVERT}"
    sub = verbs.add_parser(
        "convert", help=what, description=what, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    convert.add_flags(sub)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Known flags, and the `--config.key=value` overrides."""
    known, rest = build_parser().parse_known_args(arguments)
    overrides = {}
    for flag in rest:
        name, equals, value = flag.partition("=")
        if not name.startswith("--config.") or not equals:
            check_blank(flag, arguments)
            flags = ["--config=FILE", "--workdir=DIR", "--debug", "--config.KEY=VALUE"]
            if known.verb in DISTRIBUTED:
                flags += ["--distributed=auto", "--coordinator=HOST:PORT", "--num-processes=N", "--process-id=I"]
            if known.verb == "verify-resume":
                flags += ["--kills=N", "--devices=N,N"]
            if known.verb == "sample":
                flags += [f"--{name}={metavar}" for name, (metavar, _, _) in SAMPLING.items()]
            raise UserError("flag", flag, f"not a flag of {known.verb}", f"did you mean {nearest(flag, flags)[0]}")
        overrides[name.removeprefix("--config.")] = value
    for flag, (_, _, keys) in SAMPLING.items() if known.verb == "sample" else ():
        value = getattr(known, flag.replace("-", "_"))
        if value is not None:
            if twice := overrides.keys() & set(keys):
                raise UserError(f"--{flag}", value, f"--config.{min(twice)} is given too", "give one of the two")
            overrides |= dict.fromkeys(keys, value)
    for flag in PATHS:
        check_path(flag, getattr(known, flag.strip("-").replace("-", "_").lower(), None) or "")
    needed = {"doctor": ("config",), "convert": ()}.get(known.verb, ("config", "workdir"))
    for flag in needed:
        if not getattr(known, flag):
            raise UserError(f"--{flag}", "", "missing", f"see cmd-jax {known.verb} --help")
    return known, overrides


def check_blank(word: str, arguments: list[str]):
    """UserError for an unknown word where a blank stands in place of a `=`, behind one, or in a text."""
    place = arguments.index(word)
    before, after = arguments[place - 1], (arguments[place + 1 :] or ["--"])[0]
    if word.startswith("--config.") and "=" not in word:
        given = not after.startswith("--")
        problem = "a blank stands in place of =" if given else "has no value"
        raise UserError(word, "", problem, f"write {word}={after if given else 'VALUE'}")
    if not word.startswith("-") and before.startswith("--"):
        remedy = f"write {before}{word}" if before.endswith("=") else "write texts with blanks in quotes"
        raise UserError("flag", word, "a blank stands before it, and it belongs to no flag", remedy)


def run(flags, overrides: dict[str, str]) -> int:
    """Do what the verb says -> exit code. Modules are imported here, since they start JAX."""
    verb = flags.verb
    if verb in ("convert", "doctor"):
        check_devices()
    if verb == "convert":
        return convert.convert(flags)
    workdir = Path(flags.workdir).expanduser().absolute() if flags.workdir else None
    if verb == "doctor":
        from cmd_jax.verbs.doctor import doctor

        return doctor(flags.config, overrides, workdir)
    if verb == "verify-resume":
        from cmd_jax.verbs.verify_resume import verify_resume

        return verify_resume(flags.config, overrides, workdir, flags.kills, device_counts(flags.devices))
    from cmd_jax.config import load, to_json
    from cmd_jax.running import distributed

    config = load(flags.config, overrides)
    check_stage(verb, config.stage)
    cluster = flags.distributed, flags.coordinator, flags.num_processes, flags.process_id
    distributed.start(*cluster, config.processes, end_process)
    from cmd_jax.files import versions

    remedy = "start every process with the same command and the same installation"
    distributed.agree({f"versions.{name}": version for name, version in versions().items()}, remedy)
    distributed.agree({"verb": verb, "workdir": str(workdir), **flat(to_json(config))}, remedy)
    if verb == "train":
        from cmd_jax.train import train as do
    elif verb == "sample":
        from cmd_jax.verbs.sample import sample as do
    else:
        from cmd_jax.verbs.evaluate import evaluate as do
    do(config, workdir, end_process)
    return 0


def flat(text: str) -> dict[str, str]:
    """A config's JSON as {"group.key": "value"}."""
    from flax.traverse_util import flatten_dict

    return {key: str(value) for key, value in flatten_dict(json.loads(text), sep=".").items()}


def device_counts(text: str | None) -> tuple[int, ...]:
    words = text.split(",") if text else ()
    for word in words:
        if not word.strip().isdigit() or int(word) == 0:
            raise UserError("--devices", text, "not device counts separated by commas", "write it like 8,4,8")
    return tuple(map(int, words))


def check_stage(verb: str, stage: str):
    training = stage != "sample"
    if (verb == "train") != training:
        wanted = "autoencoder, content or motion" if verb == "train" else "sample"
        raise UserError("config", stage, f"`{verb}` takes another stage", f"use FILE:{wanted}")


def fail(error: UserError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    tell(error)
    return 2


def main(arguments: list[str] | None = None) -> int:
    try:
        code = command(arguments)
    except Exception:
        if one_of_several():
            leave(1, traceback.format_exc())
        raise
    if code and one_of_several():
        leave(code)
    return code


def one_of_several() -> bool:
    """Whether peers would be kept waiting; asked without starting JAX."""
    return "cmd_jax.running.distributed" in sys.modules and sys.modules["cmd_jax.running.distributed"].several()


def leave(code: int, last_words: str = ""):
    """End this process of several at once: an orderly end would wait for peers that may be gone."""
    if last_words:
        tell(last_words.rstrip("\n"))
    sys.modules["cmd_jax.running.distributed"].linger()
    end_process(code)


def end_process(code: int, last_words: str = ""):
    """At once, from any thread, whatever the others are stuck in."""
    if last_words:
        tell(last_words)
    os._exit(code)


def command(arguments: list[str] | None) -> int:
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("cmd_jax").setLevel(logging.INFO)
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    try:
        flags, overrides = parse(sys.argv[1:] if arguments is None else arguments)
        return run(flags, overrides)
    except UserError as error:
        return fail(error, debug)
    except Stopped:
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return fail(of_file(error), debug)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):  # XLA's name for it
            raise
        remedy = "lower train.batch_size or sampling.batch_size, set model.remat=full, or raise mesh.fsdp"
        return fail(UserError("memory", "full", " ".join(str(error).split())[:200], remedy), debug)


if __name__ == "__main__":
    sys.exit(main())
