"""Whether a training that was killed, or moved to other devices, did what an undisturbed one did, by their records.

Pure functions of recorded runs: the steps in their ledgers, the digests in their summaries, and the kills.
"""

from pathlib import Path
from typing import NamedTuple

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import UserError
from cmd_jax.files import COUNT, parse_json, read_json

DIGESTS = ("params", "ema", "opt_state")
SUMMARY = {"digests": dict.fromkeys(DIGESTS, str), ...: object}
START = {"start": COUNT, "devices": COUNT, ...: object}
STEP = {"step": COUNT, "ids": str, "loss": str, ...: object}
# Relative difference of a step's loss on other numbers of devices, where sums are taken in another order. It grows with
# the steps: measured 1.3e-7 over 24 steps (2-1-2 devices, autoencoder), 4.6e-6 over 200 (8-1-4, motion).
TOLERANCE = 1e-4


# What a training leaves.


class Segment(NamedTuple):
    """What one start of a training wrote into its ledger: `steps` are (step, ids, loss), both as texts."""

    start: int
    devices: int
    steps: list[tuple[int, str, str]]

    @property
    def stop(self) -> int:
        """Steps done when it ended."""
        return self.start + len(self.steps)


class Run(NamedTuple):
    """A finished training: its segments, and its digests by name."""

    segments: list[Segment]
    digests: dict[str, str]

    def last(self) -> dict[int, tuple[str, str]]:
        """Step -> (ids, loss) as it was done last, which is what the final parameters come from."""
        return {step: (ids, loss) for segment in self.segments for step, ids, loss in segment.steps}

    def ids(self) -> dict[int, str]:
        return {step: ids for step, (ids, _) in self.last().items()}

    def losses(self) -> dict[int, str]:
        return {step: loss for step, (_, loss) in self.last().items()}

    def repeated(self) -> list[int]:
        """For each start but the first, the finished steps that had to be done again."""
        pairs = zip(self.segments, self.segments[1:], strict=False)
        return [max(0, before.stop - after.start) for before, after in pairs]


class Kill(NamedTuple):
    """The state of a training after a SIGKILL.

    step: steps finished. newest: the newest checkpoint whose save had begun, 0 for none. saving: whether that save was
    still under way.
    """

    step: int
    newest: int
    saving: bool


def read_line(line: str | bytes, ledger: Path | BucketPath) -> dict | None:
    """A record of a ledger, START or STEP; None for a line that was torn when the process died."""
    try:
        return parse_json(line, "ledger", ledger, like=(START, STEP))
    except UserError:
        return None


def read_ledger(path: Path | BucketPath) -> list[Segment]:
    """A step whose line was torn is done again by the next start, or will be missed."""
    segments = []
    for record in filter(None, (read_line(line, path) for line in path.read_text().splitlines())):
        if "start" in record:
            segments.append(Segment(record["start"], record["devices"], []))
        else:
            segments[-1].steps.append((record["step"], record["ids"], record["loss"]))
    return segments


def read_run(folder: Path | BucketPath) -> Run:
    """Of a finished stage folder."""
    return Run(read_ledger(folder / "ledger.jsonl"), read_json(folder / "summary.json", like=SUMMARY)["digests"])


# What is asked of it. Each verdict is about facts in the ledgers, and names the first that is wrong.


class Verdict(NamedTuple):
    claim: str
    holds: bool
    detail: str


def every_step(name: str, run: Run, steps: int) -> Verdict:
    """Every start goes on from a step that was reached, one step after another, and the last one to the end."""
    done, faults = 0, []
    for number, segment in enumerate(run.segments, 1):
        if segment.start > done:
            faults.append(f"start {number} begins at step {segment.start}, but only {done} were done")
        found = [step for step, _, _ in segment.steps]
        lacking = (step for step, there in zip(range(segment.start, segment.stop), found, strict=True) if step != there)
        faults += [f"start {number} lacks step {step}" for step in lacking][:1]
        done = segment.stop
    if done != steps:
        faults.append(f"{done} steps were done, not {steps}")
    detail = "; ".join(faults) or f"{steps} steps, starts: {len(run.segments)}"
    return Verdict(f"{name}: every step was done", not faults, detail)


def equal(claim: str, found: dict, wanted: dict) -> Verdict:
    """Two tables by step or by name are equal, to the bit."""
    different = [key for key in wanted | found if found.get(key) != wanted.get(key)]
    if not different:
        return Verdict(claim, True, f"all {len(wanted)} equal")
    key = different[0]
    detail = f"{len(different)} of {len(wanted)} differ, first {key}: {found.get(key)}, not {wanted.get(key)}"
    return Verdict(claim, False, detail)


def repeats_equal(run: Run) -> Verdict:
    """A step that was done again was done on the same clips with the same loss, to the bit."""
    first, different, count = {}, [], 0
    for segment in run.segments:
        for step, ids, loss in segment.steps:
            count += step in first
            if first.setdefault(step, (ids, loss)) != (ids, loss):
                different.append(step)
    detail = f"step {different[0]} came out otherwise" if different else f"{count} steps"
    return Verdict("killed: repeated steps gave the same clips and losses", not different, detail)


def lost_work(run: Run, kills: list[Kill], interval: int) -> Verdict:
    """A run resumes at the newest checkpoint whose save had begun before the kill, or if that was not complete, at most
    `interval` steps before it."""
    claim = f"killed: no kill cost a finished checkpoint, one in a save at most {interval} steps before it"
    if len(run.segments) != len(kills) + 1:
        return Verdict(claim, False, f"{len(run.segments)} starts in the ledger after {len(kills)} kills")
    for number, (kill, segment) in enumerate(zip(kills, run.segments[1:], strict=True), 1):
        if segment.start < kill.newest - interval * kill.saving:
            state = "was being written" if kill.saving else "was complete"
            resumed = f"checkpoint {kill.newest} {state}, but it resumed at {segment.start}"
            return Verdict(claim, False, f"kill {number} at step {kill.step}: {resumed}")
    return Verdict(claim, True, f"at most {max(run.repeated(), default=0)} steps repeated after one kill")


def difference(a: str, b: str) -> float:
    """Relative difference of two losses in hexadecimal."""
    a, b = float.fromhex(a), float.fromhex(b)
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def judge_killed(whole: Run, killed: Run, kills: list[Kill], asked: int, steps: int, interval: int) -> list[Verdict]:
    """Same devices: equal to the bit."""
    count = f"{len(kills)} of {asked} kills, {sum(k.saving for k in kills)} of them in a save"
    too_few = "" if len(kills) == asked else "; the run ended before: raise train.steps"
    return [
        every_step("killed", killed, steps),
        Verdict("killed: as often as asked", not too_few, count + too_few),
        equal("killed: same clips at every step", killed.ids(), whole.ids()),
        equal("killed: same loss at every step, to the bit", killed.losses(), whole.losses()),
        equal("killed: same " + ", ".join(DIGESTS) + " at the end, to the bit", killed.digests, whole.digests),
        repeats_equal(killed),
        lost_work(killed, kills, interval),
    ]


def judge_devices(whole: Run, changed: Run, devices: tuple[int, ...], steps: int) -> list[Verdict]:
    """Other numbers of devices: the same clips, and losses within TOLERANCE."""
    expected, trained = whole.losses(), changed.losses()
    apart = {s: difference(trained[s], expected[s]) for s in expected.keys() & trained.keys()}
    worst = max(apart, key=apart.get, default=None)
    largest = apart.get(worst, 0.0)
    used, wanted = ([*map(str, n)] for n in ([s.devices for s in changed.segments if s.steps], devices))
    too_few = "" if used == wanted else f", not {'-'.join(wanted)}: raise train.steps"
    where = "" if worst is None else f" at step {worst}"
    return [
        every_step("devices", changed, steps),
        Verdict("devices: trained on each number of devices in turn", not too_few, "-".join(used) + too_few),
        Verdict("devices: no step was repeated", not any(changed.repeated()), f"{sum(changed.repeated())} steps"),
        equal("devices: same clips at every step", changed.ids(), whole.ids()),
        Verdict(
            f"devices: losses within {TOLERANCE:g} of each other",
            largest <= TOLERANCE,
            f"largest relative difference {largest:.1e}{where}",
        ),
    ]


def table_rows(runs: dict[str, Run], steps: int, interval: int) -> list[dict]:
    """One row for each checkpointed step and the last one.

    ids: whether the clips of all steps up to here are those of `whole`. difference: relative, of the loss.
    """
    last = {name: run.last() for name, run in runs.items()}
    whole, rows, missing = last.pop("whole"), [], (None, None)
    for done in sorted({*range(interval, steps + 1, interval), steps}):
        wanted = whole.get(done - 1, missing)[1]
        row = {"step": done, "whole": wanted}
        for name, run in last.items():
            same = all(s in run and s in whole and run[s][0] == whole[s][0] for s in range(done))
            loss = run.get(done - 1, missing)[1]
            apart = difference(loss, wanted) if loss and wanted else None
            row[name] = {"ids": same, "loss": loss, "difference": apart}
        rows.append(row)
    return rows
