"""Trainings in processes of their own, which are watched from outside and stopped or killed at chosen moments."""

import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cmd_jax.buckets import BucketPath
from cmd_jax.config import load
from cmd_jax.errors import UserError
from cmd_jax.files import is_remote
from cmd_jax.running.runtime import check_devices
from cmd_jax.running.steps import steps_in
from cmd_jax.verbs.resume_verdicts import read_line

LOOK = 0.002  # seconds between two looks at a training; a save of a small model takes some 50 ms
LOOK_REMOTE = 0.02  # at one in a bucket, where a look is some requests, and a save many
STOP_SECONDS = 900.0  # that a training may take to save and end after SIGTERM
TAIL = 20  # lines shown of the log of a training that failed


class PlannedKill(NamedTuple):
    """Kill when `step` steps are done, or with in_save when a save of that step or a later one is under way.

    delay: in [0, 1), of the time of a step, or of those between two looks at a bucket's ledger, or of a save.
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
    """What a training shows of itself in its folder from now on.

    done: steps finished, None until this start has finished one, and told of it where the ledger is in a bucket.
    saving: steps of its saves that are under way. newest: the newest checkpoint whose save has begun, 0 for none.
    """

    def __init__(self, folder: Path | BucketPath):
        self.steps, self.ledger = steps_in(folder), folder / "ledger.jsonl"
        self.offset = self.ledger.stat().st_size if self.ledger.exists() else 0
        self.done, self.saving, self.newest = None, [], 0

    def look(self):
        with contextlib.suppress(FileNotFoundError), self.ledger.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
            for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
                self.offset += len(line)
                if "step" in (record := read_line(line, self.ledger) or {}):
                    self.done = record["step"] + 1
        if self.done is None:  # what an earlier start left half saved may not be removed yet
            return
        there, begun = self.steps.look()
        # In a bucket what has no manifest may also be a step that is being removed.
        self.saving = [step for step in begun if step > max(there, default=-1)]
        self.newest = max(there + self.saving, default=0)


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
            moment = time.perf_counter() + plan.delay * pace.news_seconds()
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

    def news_seconds(self) -> float:
        """Between the moments at which steps are seen to be done: of a bucket's ledger, when it is uploaded."""
        moments = [*self.times.values()]
        return statistics.median([b - a for a, b in zip(moments, moments[1:], strict=False)] or [0.0])

    def save_seconds(self) -> float:
        return statistics.median([last - first for first, last in self.saves.values()] or [0.0])


class Failed(Exception):
    """A training ended with an exit code that it should not have."""


class Training:
    """One of the trainings that are compared, in WORKDIR/verify-resume/NAME; `seconds` is what its starts took.

    scratch: a folder of this machine, for what is written by and by where that of the trainings is in a bucket.
    """

    PROGRAM = (sys.executable, "-m", "cmd_jax.main", "train")

    def __init__(self, folder: Path | BucketPath, stage: str, arguments: list[str], scratch: Path):
        self.folder, self.stage_folder, self.log, self.seconds = folder, folder / stage, folder / "log.txt", 0.0
        self.command = [*self.PROGRAM, *arguments, f"--workdir={folder}"]
        self.written = scratch / f"{folder.name}.txt" if is_remote(folder) else self.log
        folder.mkdir(parents=True)

    def start(self, environment: dict[str, str], decide: Decision = never) -> tuple[Watch, bool]:
        """Train on until the end, or until `decide` names a signal -> what was seen last, whether the signal ended it.

        UserError: the training's own. Failed: it crashed, which its log explains.
        """
        watch, number, begun = Watch(self.stage_folder), None, time.perf_counter()
        with open(self.written, "ab") as log:
            process = subprocess.Popen(
                self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            while process.poll() is None and number is None:
                time.sleep(LOOK_REMOTE if is_remote(self.folder) else LOOK)
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
            if is_remote(self.log):
                self.log.upload(self.written)
        self.seconds += time.perf_counter() - begun
        watch.look()
        if code not in (0, -(number or 0)):
            raise_error(self.written.read_text(errors="replace"), code, f"{self.folder.name}: a training", self.log)
        return watch, code != 0


def raise_error(text: str, code: int, what: str, log: Path | BucketPath | str):
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
from cmd_jax.verbs.resume_trainings import probe
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
