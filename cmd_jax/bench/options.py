"""What is asked of a benchmark, beside the config."""

from dataclasses import dataclass

from cmd_jax.errors import UserError, choose

VERBS = ("sample", "train", "data")


@dataclass(frozen=True)
class Options:
    """verb: what is measured. batches: clips of a call; () for that of the config. peers: PyTorch's too.

    gate: file of earlier results, or "". bound: how many times as long as those a component may take. out: file that
    results are appended to, or "". rounds: calls that are timed; fewer, but at least three, where they take more than
    `budget` seconds together.
    """

    verb: str = "sample"
    batches: tuple[int, ...] = ()
    peers: bool = False
    gate: str = ""
    bound: float = 1.25
    out: str = ""
    rounds: int = 10
    budget: float = 30.0

    @classmethod
    def of(cls, flags) -> "Options":
        """Of the command's flags; UserError for values that cannot be."""
        choose("--verb", flags.measured, VERBS)
        if flags.rounds < 1:
            raise UserError("--rounds", flags.rounds, "must be positive", "give 10")
        if not 1 <= flags.bound < float("inf"):
            raise UserError("--bound", flags.bound, "not a factor from 1", "give 1.25, for a quarter more")
        return cls(
            flags.measured, sizes_of(flags.batch), flags.peers, flags.gate or "", flags.bound, flags.out or "",
            flags.rounds,
        )  # fmt: skip


def sizes_of(text: str | None) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")] if text else []
    if any(not word.isdigit() or int(word) == 0 for word in words):
        raise UserError("--batch", text, "not numbers of clips separated by commas", "write it like 1,4,16")
    return tuple(dict.fromkeys(map(int, words)))
