"""What is asked of a benchmark, beside the config."""

from dataclasses import dataclass

from cmd_jax.errors import UserError, choose

COMPONENTS = (
    "whole",
    "text_encoder",
    "content_denoiser",
    "motion_denoiser",
    "cmd_decoder",
    "vae_decoder",
)  # of sampling
VERBS = ("sample", "train", "data")
PEERS_SIZES = ("paper", "tiny")


@dataclass(frozen=True)
class Options:
    """verb: what is measured. batches: clips of a call; () for that of the config. peers: names of networks that are
    measured beside PyTorch's in place of the config's parts. peers_size: how large those are. only: components of
    sampling that are measured; () for all.

    gate: file of earlier results, or "". bound: how many times as long as those a component may take. out: file that
    results are appended to, or "". rounds: calls that are timed; fewer, but at least three, where they take more than
    `budget` seconds together.
    """

    verb: str = "sample"
    batches: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    peers_size: str = "paper"
    gate: str = ""
    bound: float = 1.25
    out: str = ""
    rounds: int = 10
    budget: float = 30.0
    only: tuple[str, ...] = ()

    @classmethod
    def of(cls, flags) -> "Options":
        """Of the command's flags; UserError for values that cannot be."""
        choose("--verb", flags.measured, VERBS)
        if flags.rounds < 1:
            raise UserError("--rounds", flags.rounds, "must be positive", "give 10")
        if not 1 <= flags.bound < float("inf"):
            raise UserError("--bound", flags.bound, "not a factor from 1", "give 1.25, for a quarter more")
        if flags.peers and flags.measured == "data":
            raise UserError("--peers", flags.peers, "reading has no peer", "use --verb=sample or --verb=train")
        peers, size = tuple(flags.peers.split(",")) if flags.peers else (), flags.peers_size
        return cls(
            flags.measured, sizes_of(flags.batch), peers, choose("--peers-size", size, PEERS_SIZES), flags.gate or "",
            flags.bound, flags.out or "", flags.rounds, only=only_of(flags),
        )  # fmt: skip


def only_of(flags) -> tuple[str, ...]:
    if flags.only and (flags.measured != "sample" or flags.peers):
        raise UserError("--only", flags.only, "names components of sampling", "leave it out")
    return tuple(choose("--only", name, COMPONENTS) for name in (flags.only or "").split(",") if name)


def sizes_of(text: str | None) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")] if text else []
    if any(not word.isdigit() or int(word) == 0 for word in words):
        raise UserError("--batch", text, "not numbers of clips separated by commas", "write it like 1,4,16")
    return tuple(dict.fromkeys(map(int, words)))
