"""The flags of the `cmd-jax` command, read without JAX, so that its help comes at once."""

import argparse
from typing import NamedTuple

from cmd_jax.buckets import check_url, scheme_of
from cmd_jax.errors import UserError, nearest
from cmd_jax.verbs.convert import add_flags as add_convert_flags

OVERRIDE = "--config.KEY=VALUE sets any value of the config, like --config.seed=1"


class Flag(NamedTuple):
    """--name=metavar, or without metavar --name alone, of type bool. keys: those of the config that it sets.

    value: the name of its value, where that is not its own. alone: its value where it is given without one.
    """

    name: str
    metavar: str
    help: str
    needed: bool = False
    type: type = str
    default: object = None
    keys: tuple[str, ...] = ()
    value: str = ""
    alone: str | None = None

    @property
    def dest(self) -> str:
        return self.value or self.name.replace("-", "_")


class Verb(NamedTuple):
    """example: of its arguments. passed: a prefix of flags that go on to others, as `flags.passed`."""

    help: str
    example: str
    flags: tuple[Flag, ...]
    passed: str = ""


CONFIG = Flag("config", "FILE[:ARG]", "required; or NAME of a shipped file; ARG is stage[,key=value...]", needed=True)
WORKDIR = Flag("workdir", "DIR", "required; one folder a stage is made in it", needed=True)
CLUSTER = (
    Flag(
        "distributed", "auto|off|explicit", default="auto",
        help="auto: ask JAX for a cluster (TPU pod, SLURM, GKE); explicit: the three flags below",
    ),
    Flag("coordinator", "HOST:PORT", "of process 0"),
    Flag("num-processes", "N", "how many there are", type=int),
    Flag("process-id", "I", "0 to N-1", type=int),
)  # fmt: skip
SAMPLING = (
    Flag("prompt", "TEXT", "what to draw", keys=("sampling.prompt",)),
    Flag("prompts-file", "FILE", "many: .txt, .csv, .jsonl, or MSR-VTT's .json", keys=("sampling.prompts_file",)),
    Flag("negative", "TEXT", "what to lead away from", keys=("sampling.negative",)),
    Flag("preset", "NAME", "quality, balanced or fast", keys=("sampling.preset",)),
    Flag("guidance", "G", "1: none", keys=("sampling.guidance",)),
    Flag("steps", "N", "of both denoisers", keys=("sampling.content_steps", "sampling.motion_steps")),
    Flag(
        "solver", "NAME", "of both denoisers, like ddim or dpmpp",
        keys=("sampling.content_solver", "sampling.motion_solver"),
    ),
    Flag("seed", "N", "of the noise", keys=("seed",)),
    Flag("num", "N", "videos; with prompts: of each", keys=("sampling.num",)),
    Flag("executable", "DIR", "keep compiled programs there; trust it as code", keys=("sampling.executable",)),
)  # fmt: skip
QUICKSTART = "--config=quickstart"
VERBS = {
    "train": Verb(
        "train one stage, resuming what is there",
        f"{QUICKSTART}:autoencoder --workdir=runs/shapes",
        (CONFIG, WORKDIR, *CLUSTER),
    ),
    "sample": Verb(
        "write videos and a gallery",
        f"{QUICKSTART}:sample,size=long --workdir=runs/shipped\n"
        "         cmd-jax sample --config=webvid:sample --workdir=runs/webvid"
        ' --config.pretrained.path=DIR --prompt="a sailing boat in the evening sun" --num=4',
        (CONFIG, WORKDIR, *CLUSTER, *SAMPLING),
    ),
    "evaluate": Verb(
        "score reconstructions and generated videos",
        f"{QUICKSTART}:sample --workdir=runs/shapes",
        (CONFIG, WORKDIR, *CLUSTER),
    ),
    "calibrate": Verb(
        "find which evaluations of sampling may reuse what is deep in the network, for a wanted speed-up",
        f"{QUICKSTART}:sample,size=long --workdir=runs/shipped --speedup=1.5",
        (
            CONFIG,
            WORKDIR,
            Flag("speedup", "X", "wanted, of each denoiser's operations; default: 1.5", type=float, default=1.5),
            Flag("out", "FILE", "default: WORKDIR/reuse.json"),
            *CLUSTER,
            *SAMPLING,
        ),
    ),
    "ingest": Verb(
        "decode clips once, into a dataset that TFDS reads too, or latents of them into a store",
        "--config=ucf101:autoencoder --source=UCF-101 --out=data/ucf101\n"
        "         cmd-jax ingest --config=webvid --source=webvid --out=data/webvid --part=1/500\n"
        "         cmd-jax ingest --config=webvid --source=webvid --out=data/webvid"
        " --beam=FlinkRunner --beam.flink_master=HOST:8081\n"
        "         cmd-jax ingest --config=webvid:content --source=webvid --encode=cmd --workdir=runs/webvid",
        (
            CONFIG,
            Flag("source", "DIR|CSV", "the clips; without it those of data.source"),
            Flag("out", "DIR", "where the dataset grows, a split at a time (data.split); of latents: latents.store"),
            Flag("workers", "N", "decoders at a time; default: the cores", type=int, default=0),
            Flag("part", "I/N", "write the I-th of N parts of the shards; whoever ends last finishes the dataset"),
            Flag("beam", "RUNNER", "write them with Apache Beam; its own flags: --beam.FLAG=VALUE"),
            Flag("encode", "vae|cmd", "keep latents instead, those that the stage of the config is trained on"),
            Flag("workdir", "DIR", "of --encode: where the autoencoder is"),
            *CLUSTER,
        ),
        passed="--beam.",
    ),
    "doctor": Verb(
        "show how the model lies on the devices, and what is not split",
        f"{QUICKSTART}:content",
        (
            CONFIG,
            Flag("workdir", "DIR", "where trained stages are looked for"),
            Flag(
                "data", "", "show the data instead: rate, balance, lengths, captions, a batch as a picture", type=bool
            ),
        ),
    ),
    "bench": Verb(
        "measure sampling, training steps or reading, component by component",
        f"{QUICKSTART}:sample,size=long --batch=1,8\n"
        "         cmd-jax bench --config=webvid:sample --config.sampling.dtype=bfloat16 --out=bench.jsonl\n"
        "         cmd-jax bench --config=webvid:motion --verb=train --batch=8 --gate=bench.jsonl",
        (
            CONFIG,
            Flag("workdir", "DIR", "where trained stages are looked for; without them weights are random"),
            Flag(
                "verb",
                "sample|train|data",
                default="sample",
                value="measured",
                help="sample takes a sample config, the others a stage's",
            ),
            Flag("batch", "N,N,...", "clips of a call; default: as the config says"),
            Flag("rounds", "N", "calls that are timed, at least 3 where they take long", type=int, default=10),
            Flag(
                "peers",
                "NAME,NAME,...",
                "in place of the config's parts: networks of the paper's shapes beside PyTorch's, in turns; alone: all",
                alone="all",
            ),
            Flag("only", "NAME,NAME,...", "of sampling: these components, like whole,vae_decoder"),
            Flag("peers-size", "paper|tiny", "tiny: to try it", default="paper"),
            Flag("gate", "FILE", "earlier results; a component that became slower is exit code 1"),
            Flag(
                "bound",
                "X",
                "of --gate: times the median of the last five, and times the first",
                type=float,
                default=1.25,
            ),
            Flag("out", "FILE", "results are appended to it; default: WORKDIR/bench.jsonl, else they are printed"),
            *CLUSTER,
        ),
    ),
    "verify-resume": Verb(
        "kill and resume a training, and compare it with one that was left alone",
        f"{QUICKSTART}:autoencoder --workdir=runs/verify --kills=3 --config.train.steps=40"
        " --config.train.checkpoint_every=10 --config.optimizer.warmup_steps=10",
        (
            CONFIG,
            WORKDIR,
            Flag("kills", "N", "SIGKILLs, about half of them in a save", type=int, default=5),
            Flag("devices", "N,N,...", "device counts to train on in turn; default: all"),
        ),
    ),
    "convert": Verb(
        "convert files of weights, PyTorch's to ours and back",
        "cmd-autoencoder autoencoder.pt autoencoder.safetensors --architecture=autoencoder.json",
        (),  # see `add_flags` of its module
    ),
}
PATHS = (
    "config",
    "workdir",
    "source",
    "out",
    "prompts_file",
    "input",
    "output",
    "architecture",
    "classes",
    "heads",
    "pretrained",
    "unet",
    "gate",
)
POSITIONAL = ("input", "output")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, like all others."""

    def error(self, message: str):
        raise UserError("command", self.prog, message, f"see {self.prog} --help")


def build_parser() -> Parser:
    parser = Parser(prog="cmd-jax", description="Train and sample CMD video diffusion.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.help,
            description=verb.help,
            epilog=f"{OVERRIDE}\n" * bool(verb.flags) + f"example: cmd-jax {name} {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
        for flag in verb.flags:
            told = f"{flag.help} (config.{', config.'.join(flag.keys)})" if flag.keys else flag.help
            kind = {"metavar": flag.metavar, "type": flag.type, "default": flag.default}
            kind |= {"nargs": "?", "const": flag.alone} if flag.alone else {}
            kind = kind if flag.metavar else {"action": "store_true"}
            sub.add_argument(f"--{flag.name}", help=told, dest=flag.dest, **kind)
        if name == "convert":
            add_convert_flags(sub)
    return parser


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Known flags, and what the `--config.key=value` and flags with keys set in the config."""
    known, rest = build_parser().parse_known_args(arguments)
    flags, overrides, passed = VERBS[known.verb].flags, {}, VERBS[known.verb].passed
    known.passed = [f"--{word.removeprefix(passed)}" for word in rest if passed and word.startswith(passed)]
    for word in rest:
        name, equals, value = word.partition("=")
        if passed and name.startswith(passed):
            continue
        if not name.startswith("--config.") or not equals:
            check_blank(word, arguments)
            choices = [f"--{flag.name}={flag.metavar}".rstrip("=") for flag in flags]
            choices += ["--debug", "--config.KEY=VALUE"]
            raise UserError("flag", word, f"not a flag of {known.verb}", f"did you mean {nearest(word, choices)[0]}")
        overrides[name.removeprefix("--config.")] = value
    for flag in flags:
        value = getattr(known, flag.dest)
        if flag.keys and value is not None:
            if twice := overrides.keys() & set(flag.keys):
                raise UserError(f"--{flag.name}", value, f"--config.{min(twice)} is given too", "give one of the two")
            overrides |= dict.fromkeys(flag.keys, value)
    for name in PATHS:
        shown = name.upper() if name in POSITIONAL else f"--{name.replace('_', '-')}"
        check_url(shown, value := getattr(known, name, None) or "")
        if name == "config" and scheme_of(value):
            raise UserError(shown, value, "a config is code, and read from this machine alone", "copy it here")
    for flag in flags:
        if flag.needed and not getattr(known, flag.dest):
            raise UserError(f"--{flag.name}", "", "missing", f"see cmd-jax {known.verb} --help")
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
