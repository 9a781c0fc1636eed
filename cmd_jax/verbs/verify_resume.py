"""`cmd-jax verify-resume`: does this config, on this machine, lose nothing when its process is killed?

The stage is trained three times in WORKDIR/verify-resume: `whole` without a break, `killed` with SIGKILLs at random
moments, and `devices` on changing numbers of devices. Their ledgers and digests are compared, and a report says whether
they agree. This process never starts JAX: it would hold the accelerator that the trainings need.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from cmd_jax.config import load
from cmd_jax.errors import UserError
from cmd_jax.files import read_json, write_json
from cmd_jax.report.console import make_console
from cmd_jax.running.checkpoint import SAVING
from cmd_jax.running.lock import lock_folder
from cmd_jax.running.runtime import check_devices, is_heard

FOLDER = "verify-resume"
OURS = ("whole", "killed", "devices", "programs", "report.json", ".lock")
DIGESTS = ("params", "ema", "opt_state")
SUMMARY = {"digests": dict.fromkeys(DIGESTS, str), ...: object}
# Relative difference of a step's loss on other numbers of devices, where sums are taken in another order. It grows with
# the steps: measured 1.3e-7 over 24 steps (2-1-2 devices, autoencoder), 4.6e-6 over 200 (8-1-4, motion).
TOLERANCE = 1e-4
LOOK = 0.002  # seconds between two looks at a training; a save of a small model takes some 50 ms
STOP_SECONDS = 900.0  # that a training may take to save and end after SIGTERM
FILE_WIDTH = 200  # of the tables in output that is no terminal
TAIL = 20  # lines shown of the log of a training that failed
GPU_EQUAL = (
    "All starts shared their programs. Set JAX_COMPILATION_CACHE_DIR for the long run too: compiled anew after a "
    "restart, a GPU program may consist of other kernels, which round otherwise."
)
GPU_DIFFERENT = "Some GPU kernels add in any order; XLA_FLAGS=--xla_gpu_deterministic_ops=true avoids those."


# What a training leaves.


class Leg(NamedTuple):
    """What one start of a training wrote into its ledger: `steps` are (step, ids, loss), both as texts."""

    start: int
    devices: int
    steps: list[tuple[int, str, str]]


class Evidence(NamedTuple):
    """A finished training: its legs, and its digests by name."""

    legs: list[Leg]
    digests: dict[str, str]

    def last(self) -> dict[int, tuple[str, str]]:
        """Step -> (ids, loss) as it was done last, which is what the final parameters come from."""
        return {step: (ids, loss) for leg in self.legs for step, ids, loss in leg.steps}

    def repeated(self) -> list[int]:
        """For each start but the first, the finished steps that had to be done again."""
        done, counts = 0, []
        for leg in self.legs:
            counts.append(max(0, done - leg.start))
            done = leg.start + len(leg.steps)
        return counts[1:]


class Kill(NamedTuple):
    """The state of a training after a SIGKILL.

    step: steps finished. newest: the newest checkpoint whose save had begun, 0 for none. saving: whether that save was
    still under way.
    """

    step: int
    newest: int
    saving: bool


def read_ledger(path: Path) -> list[Leg]:
    legs = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn when the process died; the step is done again, or will be missed
            continue
        if "start" in record:
            legs.append(Leg(record["start"], record["devices"], []))
        else:
            legs[-1].steps.append((record["step"], record["ids"], record["loss"]))
    return legs


def read_evidence(folder: Path) -> Evidence:
    """Of a finished stage folder."""
    return Evidence(read_ledger(folder / "ledger.jsonl"), read_json(folder / "summary.json", like=SUMMARY)["digests"])


# What is asked of it. Each verdict is about facts in the ledgers, and names the first that is wrong.


class Verdict(NamedTuple):
    claim: str
    holds: bool
    detail: str


def unbroken(name: str, run: Evidence, steps: int) -> Verdict:
    """Every start goes on from a step that was reached, one step after another, and the last one to the end."""
    done, faults = 0, []
    for number, leg in enumerate(run.legs, 1):
        if leg.start > done:
            faults.append(f"start {number} begins at step {leg.start}, but only {done} were done")
        wanted = range(leg.start, leg.start + len(leg.steps))
        faults += [
            f"start {number} lacks step {w}" for w, (step, _, _) in zip(wanted, leg.steps, strict=True) if w != step
        ][:1]
        done = leg.start + len(leg.steps)
    if done != steps:
        faults.append(f"{done} steps were done, not {steps}")
    return Verdict(
        f"{name}: every step was done", not faults, "; ".join(faults) or f"{steps} steps, starts: {len(run.legs)}"
    )


def agreement(claim: str, found: dict, wanted: dict) -> Verdict:
    """Two tables by step or by name are equal, to the bit."""
    different = [key for key in wanted | found if found.get(key) != wanted.get(key)]
    if not different:
        return Verdict(claim, True, f"all {len(wanted)} equal")
    key = different[0]
    detail = f"{len(different)} of {len(wanted)} differ, first {key}: {found.get(key)}, not {wanted.get(key)}"
    return Verdict(claim, False, detail)


def ids_of(run: Evidence) -> dict[int, str]:
    return {step: ids for step, (ids, _) in run.last().items()}


def losses_of(run: Evidence) -> dict[int, str]:
    return {step: loss for step, (_, loss) in run.last().items()}


def repeats_agree(run: Evidence) -> Verdict:
    """A step that was done again was done on the same clips with the same loss, to the bit."""
    first, different, count = {}, [], 0
    for leg in run.legs:
        for step, ids, loss in leg.steps:
            count += step in first
            if first.setdefault(step, (ids, loss)) != (ids, loss):
                different.append(step)
    detail = f"step {different[0]} came out otherwise" if different else f"{count} steps"
    return Verdict("killed: repeated steps gave the same clips and losses", not different, detail)


def little_lost(run: Evidence, kills: list[Kill], interval: int) -> Verdict:
    """A run resumes at the newest checkpoint whose save had begun before the kill, or if that was not complete, at most
    `interval` steps before it."""
    claim = f"killed: no kill cost a finished checkpoint, one in a save at most {interval} steps before it"
    if len(run.legs) != len(kills) + 1:
        return Verdict(claim, False, f"{len(run.legs)} starts in the ledger after {len(kills)} kills")
    for number, (kill, leg) in enumerate(zip(kills, run.legs[1:], strict=True), 1):
        if leg.start < kill.newest - interval * kill.saving:
            state = "was being written" if kill.saving else "was complete"
            detail = (
                f"kill {number} at step {kill.step}: checkpoint {kill.newest} {state}, but it resumed at {leg.start}"
            )
            return Verdict(claim, False, detail)
    return Verdict(claim, True, f"at most {max(run.repeated(), default=0)} steps repeated after one kill")


def difference(a: str, b: str) -> float:
    """Relative difference of two losses in hexadecimal."""
    a, b = float.fromhex(a), float.fromhex(b)
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def judge_killed(whole: Evidence, killed: Evidence, kills: list[Kill], asked: int, steps: int, interval: int):
    """Same devices: equal to the bit."""
    return [
        unbroken("killed", killed, steps),
        Verdict(
            "killed: as often as asked", len(kills) == asked,
            f"{len(kills)} of {asked} kills, {sum(k.saving for k in kills)} of them in a save"
            + ("" if len(kills) == asked else "; the run ended before: raise train.steps"),
        ),
        agreement("killed: same clips at every step", ids_of(killed), ids_of(whole)),
        agreement("killed: same loss at every step, to the bit", losses_of(killed), losses_of(whole)),
        agreement("killed: same " + ", ".join(DIGESTS) + " at the end, to the bit", killed.digests, whole.digests),
        repeats_agree(killed),
        little_lost(killed, kills, interval),
    ]  # fmt: skip


def judge_devices(whole: Evidence, changed: Evidence, devices: tuple[int, ...], steps: int):
    """Other numbers of devices: the same clips, and losses within TOLERANCE."""
    expected, trained = whole.last(), changed.last()
    apart = {s: difference(trained[s][1], expected[s][1]) for s in expected.keys() & trained.keys()}
    worst = max(apart, key=apart.get, default=None)
    largest = apart.get(worst, 0.0)
    legs = [leg.devices for leg in changed.legs if leg.steps]
    enough = legs == list(devices)
    return [
        unbroken("devices", changed, steps),
        Verdict(
            "devices: trained on each number of devices in turn", enough,
            "-".join(map(str, legs)) + ("" if enough else f", not {'-'.join(map(str, devices))}: raise train.steps"),
        ),
        Verdict("devices: no step was repeated", not any(changed.repeated()), f"{sum(changed.repeated())} steps"),
        agreement("devices: same clips at every step", ids_of(changed), ids_of(whole)),
        Verdict(
            f"devices: losses within {TOLERANCE:g} of each other", largest <= TOLERANCE,
            f"largest relative difference {largest:.1e}" + ("" if worst is None else f" at step {worst}"),
        ),
    ]  # fmt: skip


# The report.


def table_rows(runs: dict[str, Evidence], steps: int, interval: int) -> list[dict]:
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


def show(console, report: dict):
    """The rows and runs of a report as tables, and its verdicts."""

    def number(loss):
        return "none" if loss is None else f"{float.fromhex(loss):.9g}"

    others = [name for name in report["runs"] if name != "whole"]
    table = Table("step", "loss, whole", title="after each checkpointed step", title_justify="left")
    for name in others:
        for column in ("ids", "loss", "difference"):
            table.add_column(f"{column}, {name}", overflow="fold")
    for row in report["rows"]:
        cells = [str(row["step"]), number(row["whole"])]
        for name in others:
            same, loss, apart = (row[name][key] for key in ("ids", "loss", "difference"))
            apart = "none" if apart is None else f"{apart:.1e}" if apart else "0"
            cells += ["equal" if same else "DIFFER", number(loss), apart]
        table.add_row(*cells)
    console.print(table, soft_wrap=False)

    table = Table("run", "devices", "starts", "kills (in a save)", "most repeated", "seconds", *DIGESTS)
    for name, run in report["runs"].items():
        kills = f"{len(run['kills'])} ({sum(kill['saving'] for kill in run['kills'])})"
        cells = [name, "-".join(map(str, run["devices"])), str(run["starts"]), kills, str(run["most_repeated"])]
        table.add_row(*cells, f"{run['seconds']:.0f}", *(run["digests"][d][:12] for d in DIGESTS))
    console.print(table, soft_wrap=False)
    for verdict in report["verdicts"]:
        text = f"{'ok  ' if verdict['holds'] else 'FAIL'}  {verdict['claim']}: {verdict['detail']}"
        console.print(text)


# Running trainings.


class PlannedKill(NamedTuple):
    """Kill when `step` steps are done, or with in_save when a save of that step or a later one is under way.

    delay: in [0, 1), of the time of a step or of a save.
    """

    step: int
    in_save: bool
    delay: float


def plan_kills(kills: int, steps: int, interval: int, seed: int) -> list[PlannedKill]:
    """Random moments in order of steps, every other one in a save; the last `interval` steps are left to finish in."""
    draw, planned = random.Random(seed), []
    for i in range(kills):
        in_save = i % 2 == 0
        step = draw.randrange(interval, steps, interval) if in_save else draw.randint(1, steps - interval)
        planned.append(PlannedKill(step, in_save, draw.random()))
    return sorted(planned)


class Watch:
    """What a training shows of itself on disk from now on.

    done: steps finished, None until this start has finished one. saving: steps of its saves that are under way.
    newest: the newest checkpoint whose save has begun, 0 for none.
    """

    def __init__(self, folder: Path):
        self.checkpoints, self.ledger = folder / "checkpoints", folder / "ledger.jsonl"
        self.offset = self.ledger.stat().st_size if self.ledger.exists() else 0
        self.done, self.saving, self.newest = None, [], 0

    def look(self):
        with contextlib.suppress(FileNotFoundError), open(self.ledger, "rb") as file:
            file.seek(self.offset)
            text = file.read()
            for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
                self.offset += len(line)
                with contextlib.suppress(ValueError):  # torn by an earlier kill
                    self.done = json.loads(line).get("step", -1) + 1 or self.done
        if self.done is None:  # what an earlier start left half saved may not be removed yet
            return
        names = os.listdir(self.checkpoints) if self.checkpoints.exists() else []
        self.saving = [int(name.removesuffix(SAVING)) for name in names if name.endswith(SAVING)]
        self.newest = max([int(name) for name in names if name.isdigit()] + self.saving, default=0)


Decision = Callable[[Watch], signal.Signals | None]


def never(watch: Watch) -> None:
    """The Decision not to stop a training."""


def after(done: int) -> Decision:
    """SIGTERM when so many steps are done."""
    return lambda watch: signal.SIGTERM if (watch.done or 0) >= done else None


def at(plan: PlannedKill, pace: "Pace") -> Decision:
    """SIGKILL at the moment that was planned."""
    moment = None

    def decide(watch):
        nonlocal moment
        if watch.done is None:
            return None
        if moment is None and plan.in_save and max(watch.saving, default=0) >= plan.step:
            moment = time.perf_counter() + plan.delay * pace.save_seconds()
        elif moment is None and not plan.in_save and watch.done >= plan.step:
            moment = time.perf_counter() + plan.delay * pace.step_seconds()
        if moment is not None and time.perf_counter() >= moment:
            return signal.SIGKILL
        return None

    return decide


class Pace:
    """The Decision not to stop a training, which measures meanwhile what its steps and saves take."""

    def __init__(self):
        self.times: dict[int, float] = {}  # steps done -> when first seen
        self.saves: dict[int, list[float]] = {}  # step -> when its save was first and last seen

    def __call__(self, watch):
        now = time.perf_counter()
        if watch.done is not None:
            self.times.setdefault(watch.done, now)
        for step in watch.saving:
            self.saves.setdefault(step, [now, now])[1] = now

    def step_seconds(self) -> float:
        first, last = min(self.times, default=0), max(self.times, default=0)
        return (self.times[last] - self.times[first]) / (last - first) if last > first else 0.0

    def save_seconds(self) -> float:
        return statistics.median([last - first for first, last in self.saves.values()] or [0.0])


class Failed(Exception):
    """A training ended with an exit code that it should not have."""


class Training:
    """One of the trainings that are compared, in WORKDIR/verify-resume/NAME; `seconds` is what its starts took."""

    PROGRAM = (sys.executable, "-m", "cmd_jax.main", "train")

    def __init__(self, folder: Path, stage: str, arguments: list[str]):
        self.folder, self.stage_folder, self.log, self.seconds = folder, folder / stage, folder / "log.txt", 0.0
        self.command = [*self.PROGRAM, *arguments, f"--workdir={folder}"]
        folder.mkdir(parents=True)

    def start(self, environment: dict[str, str], decide: Decision = never) -> tuple[Watch, bool]:
        """Train on until the end, or until `decide` names a signal -> what was seen last, whether the signal ended it.

        UserError: the training's own. Failed: it crashed, which its log explains.
        """
        watch, number, begun = Watch(self.stage_folder), None, time.perf_counter()
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            while process.poll() is None and number is None:
                time.sleep(LOOK)
                watch.look()
                number = decide(watch)
            if number is not None:
                process.send_signal(number)
            code = process.wait(STOP_SECONDS if number else None)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.folder.name} did not end {STOP_SECONDS:.0f} s after SIGTERM") from None
        finally:
            process.kill()
            process.wait()
        self.seconds += time.perf_counter() - begun
        watch.look()
        if code not in (0, -(number or 0)):
            raise_error(self.log.read_text(errors="replace"), code, f"{self.folder.name}: a training", self.log)
        return watch, code != 0


def raise_error(text: str, code: int, what: str, log: Path | str):
    """The UserError that a process ended with, or Failed with the end of its output."""
    lines = text.strip().splitlines()
    for line in reversed(lines[-TAIL:] if code == 2 else ()):
        if parts := re.fullmatch(r"([^=]+)=(.*?): (.*); (.*)", line):
            raise UserError(*parts.groups())
    raise Failed("\n".join([*lines[-TAIL:], f"{what} ended with exit code {code}; its output is in {log}"]))


def probe(specification: str, overrides: dict[str, str], devices: int | None):
    """Runs in a process of its own: print platform and device count, and refuse what a training on them would refuse.

    devices: how many are meant; nothing is refused yet if there are others.
    """
    import jax

    from cmd_jax.sharding import check_batch, make_mesh

    check_devices()
    if devices in (None, jax.device_count()):
        config = load(specification, overrides)
        mesh = make_mesh(config.mesh)
        check_batch("train.batch_size", config.train.batch_size, mesh, config.train.accumulate)
    print(json.dumps([jax.default_backend(), jax.device_count()]))


PROBE = """
import json, sys
from cmd_jax.errors import UserError
from cmd_jax.verbs.verify_resume import probe
try:
    probe(*json.loads(sys.argv[1]))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def ask(environment: dict[str, str], *arguments) -> tuple[str, int]:
    """What `probe` says in this environment: (platform, devices); UserError if it refuses them."""
    command = [sys.executable, "-c", PROBE, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise_error(done.stderr, done.returncode, "looking for devices", "the lines above")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def with_devices(environment: dict[str, str], platform: str, available: int, devices: int) -> dict[str, str]:
    """The environment in which JAX sees so many devices."""
    if platform == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", environment.get("XLA_FLAGS", ""))
        flag = f"--xla_force_host_platform_device_count={devices}"
        return environment | {"XLA_FLAGS": " ".join([*flags.split(), flag])}
    if devices > available or devices < available and platform != "gpu":
        how = f"at most {available}" if platform == "gpu" else f"{available}, or leave --devices out"
        raise UserError(
            "--devices", devices, f"{available} {platform} devices here, all of which are used", f"use {how}"
        )
    if devices == available:
        return environment
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = visible if visible != [""] else [str(i) for i in range(available)]
    return environment | {"CUDA_VISIBLE_DEVICES": ",".join(visible[:devices])}


@contextlib.contextmanager
def fresh_folder(folder: Path):
    """An empty folder of our own; a SIGTERM or SIGHUP within it unwinds, so that no training is left behind."""
    with lock_folder(folder):
        if foreign := sorted({path.name for path in folder.iterdir()} - set(OURS)):
            problem = f"holds {foreign[0]}, which verify-resume did not write, and would be emptied"
            raise UserError("--workdir", folder.parent, problem, f"move {folder}, or give another folder")
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
        unwound = filter(is_heard, (signal.SIGTERM, signal.SIGHUP))
        before = {number: signal.signal(number, lambda number, frame: sys.exit(128 + number)) for number in unwound}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def verify_resume(
    specification: str, overrides: dict[str, str], workdir: Path, kills: int = 5, devices: tuple[int, ...] = ()
) -> int:
    """The `verify-resume` verb -> exit code: 0 if all verdicts hold, 1 if not or if a training could not be finished.

    The whole and the killed training run on devices[0] devices, by default all there are; a third one runs if several
    numbers are given. The report is printed and written to WORKDIR/verify-resume/report.json.
    UserError: for flags and configs with which nothing would be shown, and those of the trainings.
    """
    config = load(specification, overrides)
    steps, interval = (config.train.steps, config.train.checkpoint_every) if "train" in config else (0, 0)
    if not steps:
        raise UserError("config", config.stage, "there is nothing to train", "use FILE:autoencoder, content or motion")
    if kills < 0:
        raise UserError("--kills", kills, "must not be negative", "give zero or more")
    if any(n < 1 for n in devices):
        raise UserError("--devices", ",".join(map(str, devices)), "must be positive", "write it like 8,4,8")
    if steps < 2 * interval:
        raise UserError(
            "train.steps", steps, f"less than two times train.checkpoint_every={interval}: too little to resume",
            f"use at least {2 * interval}, or set train.checkpoint_every={max(1, steps // 4)} or so",
        )  # fmt: skip
    overrides = {**overrides, "processes.expected": "0"}  # the trainings are of this machine alone
    if config.stage != "autoencoder" and not config.latents.autoencoder:
        overrides["latents.autoencoder"] = str(workdir / "autoencoder")
    console = make_console(file_width=FILE_WIDTH)
    folder = workdir / FOLDER
    with fresh_folder(folder):
        try:
            report = compare(specification, overrides, config, folder, kills, devices, console)
        except Failed as error:
            console.print(str(error))
            return 1
        write_json(folder / "report.json", report)
        show(console, report)
    equal = report["equal"]
    console.print(f"{'equal' if equal else 'NOT equal'}; {folder / 'report.json'}")
    if report["platform"] == "gpu":
        console.print(GPU_EQUAL if equal else GPU_DIFFERENT)
    return 0 if equal else 1


def compare(specification, overrides, config, folder: Path, kills: int, devices, console) -> dict:
    """Run the trainings and judge them -> the report."""
    stage, steps, interval = config.stage, config.train.steps, config.train.checkpoint_every
    arguments = [f"--config={specification}", "--distributed=off"]
    arguments += [f"--config.{key}={value}" for key, value in overrides.items()]
    # A restart should cost no compilation, and on a GPU, whose compiler times its choices, no other bits either: all
    # starts share their programs, as those of a long run do if it sets this variable.
    base = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",  # a killed training takes no lines of its log with it
    }
    first = with_devices(base, "cpu", 0, devices[0]) if devices else base  # means nothing to other platforms
    platform, available = ask(first, specification, overrides, devices[0] if devices else None)
    devices = devices or (available,)
    environments = {n: with_devices(base, platform, available, n) for n in devices}
    for n, environment in environments.items():
        if n != available and (seen := ask(environment, specification, overrides, n)[1]) != n:
            raise UserError("--devices", n, f"JAX sees {seen} devices then", "leave --devices out")

    def training(name: str) -> Training:
        made = Training(folder / name, stage, arguments)
        for known in (folder.parent, folder / "whole"):
            if (known / "probe.jsonl").exists():  # looking through a folder of videos can take long
                shutil.copy(known / "probe.jsonl", made.folder)
                break
        return made

    runs, struck, pace = {}, [], Pace()
    console.print(f"whole: {steps} steps of {stage} on {devices[0]} {platform} devices")
    runs["whole"] = whole = training("whole")
    whole.start(environments[devices[0]], pace)
    runs["killed"] = killed = training("killed")
    for number, plan in enumerate(plan_kills(kills, steps, interval, config.seed), 1):
        watch, ended = killed.start(environments[devices[0]], at(plan, pace))
        if not ended:
            break
        struck.append(Kill(watch.done, watch.newest, watch.newest in watch.saving))
        moment = f"in the save of step {watch.newest}" if struck[-1].saving else f"newest checkpoint {watch.newest}"
        console.print(f"killed: kill {number} of {kills} after {watch.done} steps, {moment}")
    else:
        killed.start(environments[devices[0]])
    topology = {"whole": devices[:1], "killed": devices[:1]}
    if len(devices) > 1:
        runs["devices"], topology["devices"] = training("devices"), devices
        for number, n in enumerate(devices, 1):
            console.print(f"devices: to step {steps * number // len(devices)} on {n} {platform} devices")
            stop = after(steps * number // len(devices)) if number < len(devices) else never
            runs["devices"].start(environments[n], stop)

    evidence = {name: read_evidence(run.stage_folder) for name, run in runs.items()}
    verdicts = [unbroken("whole", evidence["whole"], steps)]
    verdicts += judge_killed(evidence["whole"], evidence["killed"], struck, kills, steps, interval)
    if "devices" in evidence:
        verdicts += judge_devices(evidence["whole"], evidence["devices"], devices, steps)
    return {
        "equal": all(verdict.holds for verdict in verdicts),
        "config": specification,
        "overrides": overrides,
        "platform": platform,
        "steps": steps,
        "checkpoint_every": interval,
        "tolerance": TOLERANCE,
        "step_seconds": pace.step_seconds(),
        "save_seconds": pace.save_seconds(),
        "verdicts": [verdict._asdict() for verdict in verdicts],
        "runs": {
            name: {
                "devices": topology[name],
                "starts": len(run.legs),
                "kills": [kill._asdict() for kill in struck] if name == "killed" else [],
                "most_repeated": max(run.repeated(), default=0),
                "seconds": round(runs[name].seconds, 1),
                "digests": run.digests,
            }
            for name, run in evidence.items()
        },
        "rows": table_rows(evidence, steps, interval),
    }
