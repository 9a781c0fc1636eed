"""`cmd-jax verify-resume`: does this config, on this machine, lose nothing when its process is killed?

The stage is trained three times in WORKDIR/verify-resume: `whole` without a break, `killed` with SIGKILLs at random
moments, and `devices` on changing numbers of devices. Their ledgers and digests are compared, and a report says whether
they agree. This process never starts JAX: it would hold the accelerator that the trainings need.
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from cmd_jax.buckets import BucketPath
from cmd_jax.config import load
from cmd_jax.errors import UserError
from cmd_jax.files import is_remote, scratch_folder, write_json
from cmd_jax.report.console import make_console
from cmd_jax.running.lock import lock_folder
from cmd_jax.running.runtime import is_heard
from cmd_jax.verbs.resume_trainings import Failed, Pace, Training, after, ask, at, never, plan_kills, with_devices
from cmd_jax.verbs.resume_verdicts import (
    DIGESTS,
    TOLERANCE,
    Kill,
    every_step,
    judge_devices,
    judge_killed,
    read_run,
    table_rows,
)

FOLDER = "verify-resume"
OURS = ("whole", "killed", "devices", "programs", "report.json", ".lock")
FILE_WIDTH = 200  # of the tables in output that is no terminal
GPU_EQUAL = (
    "All starts shared their programs. Set JAX_COMPILATION_CACHE_DIR for the long run too: compiled anew after a "
    "restart, a GPU program may consist of other kernels, which round otherwise."
)
GPU_DIFFERENT = "Some GPU kernels add in any order; XLA_FLAGS=--xla_gpu_deterministic_ops=true avoids those."


@contextlib.contextmanager
def fresh_folder(folder: Path | BucketPath):
    """An empty folder of our own; a SIGTERM or SIGHUP within it unwinds, so that no training is left behind."""
    with lock_folder(folder):
        if foreign := sorted({path.name for path in folder.iterdir()} - set(OURS)):
            problem = f"holds {foreign[0]}, which verify-resume did not write, and would be emptied"
            raise UserError("--workdir", folder.parent, problem, f"move {folder}, or give another folder")
        for path in folder.iterdir():
            if path.is_dir():
                path.rmtree() if is_remote(path) else shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
        unwound = filter(is_heard, (signal.SIGTERM, signal.SIGHUP))
        before = {number: signal.signal(number, lambda number, frame: sys.exit(128 + number)) for number in unwound}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def on_this_machine(folder: Path | BucketPath) -> Iterator[Path]:
    """Where compiled programs and open logs go: the folder itself, or for one of a bucket a temporary one."""
    if not is_remote(folder):
        yield folder
        return
    with scratch_folder() as place:
        yield place


def verify_resume(
    specification: str,
    overrides: dict[str, str],
    workdir: Path | BucketPath,
    kills: int = 5,
    devices: tuple[int, ...] = (),
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
    with fresh_folder(folder), on_this_machine(folder) as scratch_folder:
        try:
            report = compare(specification, overrides, config, folder, scratch_folder, kills, devices, console)
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


def compare(specification, overrides, config, folder, scratch_folder: Path, kills: int, devices, console) -> dict:
    """Run the trainings and judge them -> the report. scratch_folder: see `on_this_machine`."""
    stage, steps, interval = config.stage, config.train.steps, config.train.checkpoint_every
    arguments = [f"--config={specification}", "--distributed=off"]
    arguments += [f"--config.{key}={value}" for key, value in overrides.items()]
    # A restart should cost no compilation, and on a GPU, whose compiler times its choices, no other bits either: all
    # starts share their programs, as those of a long run do if it sets this variable.
    base = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(scratch_folder / "programs"),
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
        made = Training(folder / name, stage, arguments, scratch_folder)
        for known in (folder.parent, folder / "whole"):
            if (known / "probe.jsonl").exists():  # looking through a folder of videos can take long
                (made.folder / "probe.jsonl").write_bytes((known / "probe.jsonl").read_bytes())
                break
        return made

    runs, done, pace = {}, [], Pace()
    console.print(f"whole: {steps} steps of {stage} on {devices[0]} {platform} devices")
    runs["whole"] = whole = training("whole")
    whole.start(environments[devices[0]], pace)
    runs["killed"] = killed = training("killed")
    for number, plan in enumerate(plan_kills(kills, steps, interval, config.seed), 1):
        watch, ended = killed.start(environments[devices[0]], at(plan, pace))
        if not ended:
            break
        done.append(Kill(watch.done, watch.newest, watch.newest in watch.saving))
        moment = f"in the save of step {watch.newest}" if done[-1].saving else f"newest checkpoint {watch.newest}"
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

    recorded = {name: read_run(run.stage_folder) for name, run in runs.items()}
    verdicts = [every_step("whole", recorded["whole"], steps)]
    verdicts += judge_killed(recorded["whole"], recorded["killed"], done, kills, steps, interval)
    if "devices" in recorded:
        verdicts += judge_devices(recorded["whole"], recorded["devices"], devices, steps)
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
                "starts": len(run.segments),
                "kills": [kill._asdict() for kill in done] if name == "killed" else [],
                "most_repeated": max(run.repeated(), default=0),
                "seconds": round(runs[name].seconds, 1),
                "digests": run.digests,
            }
            for name, run in recorded.items()
        },
        "rows": table_rows(recorded, steps, interval),
    }


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
