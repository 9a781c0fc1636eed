"""Checks a machine with an accelerator and no network within minutes: numbers, kernels, speed.

    ./launch/device_check.sh --out=check
    ./launch/device_check.sh --out=check --wheels=wheels --steps=sample-fast,train-unet

Writes into the folder --out: parity.json (models against recorded numbers), attention.jsonl (kernels against plain
one), sampling.jsonl, training.jsonl and peers.jsonl (what `cmd-jax bench` writes), log.txt (what the steps said), and
after each step summary.json: the device, and of each step its command, what became of it and why, and its seconds.

A step that fails or takes longer than its limit does not keep the others from running; one that needs a module which
the machine lacks is skipped. Steps run in the order of their worth until --minutes are over; those left are named. Exit
code: 1 if a step failed, took too long or found no time, 2 if nothing could be tried, else 0.

--wheels: a folder of wheels of what the machine lacks; they are installed without a network, without what they need,
and for this check alone.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from cmd_jax.errors import UserError, choose
from cmd_jax.files import local_path, write_json

ROOT = Path(__file__).resolve().parents[1]
LEAST = 10  # seconds without which no step is begun
BFLOAT16 = "--config.{}.dtype=bfloat16"
LATENT = ("webvid:content", "webvid:motion")
NEEDED = ("jax", "flax", "optax", "ml_collections", "einops", "rich", "safetensors", "tokenizers", "filelock")


class Step(NamedTuple):
    """command: its words. limit: seconds that it may take. needs: modules without which it is skipped."""

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()


def plan(out: Path, tiny: bool) -> list[Step]:
    """All steps, the worthiest first; of sampling in bfloat16, one clip of 16x512x1024 with weights made on the device.

    tiny: the same commands on the smallest configs that there are.
    """

    def script(name, file, *more):
        return sys.executable, str(ROOT / "launch" / name), "--out", str(out / file), *more

    def bench(full, small, file, *more):
        config = small if tiny else full
        known = ("--config.pretrained.architecture=sd21",) if config in ("webvid:sample", *LATENT) else ()
        command = sys.executable, "-m", "cmd_jax.main", "bench", f"--config={config}", f"--out={out / file}"
        return *command, *more, *known, *(("--rounds=1",) if tiny else ())

    def sample(preset, *only):
        more = *only, "--batch=1", BFLOAT16.format("sampling"), f"--config.sampling.preset={preset}"
        return bench("webvid:sample", "webvid:sample,size=tiny", "sampling.jsonl", *more)

    def train(full, small, batch):
        more = "--verb=train", f"--batch={2 if tiny else batch}", BFLOAT16.format("model")
        return bench(full, small, "training.jsonl", *more)

    def peers(verb, config, group, names):
        names, size = ("dit-motion", "tiny") if tiny else (names, "paper")
        more = f"--verb={verb}", f"--peers={names}", f"--peers-size={size}", BFLOAT16.format(group)
        return bench(config, config, "peers.jsonl", *more)

    networks, torch = "unet,dit-motion,autoencoder,vae,modelscope", ("torch", "diffusers")
    # The quickstart's shipped weights make clips of 8x32x32.
    few = ("--batch=1", *(f"--config.sampling.{name}_steps=2" for name in ("content", "motion")))
    shipped = bench(*["quickstart:sample,size=long"] * 2, "sampling.jsonl", *(few if tiny else ("--batch=1,24",)))
    return [
        Step("parity", script("device_parity.py", "parity.json", *(("--models=dit",) if tiny else ())), 90),
        Step("attention", script("measure_attention.py", "attention.jsonl", *(("--tiny",) if tiny else ())), 90),
        Step("sample-shipped", shipped, 90),
        Step("sample-fast", sample("fast", "--only=whole"), 150),
        Step("train-motion-l", train("ucf101:motion", "quickstart:motion", 64), 90),
        Step("train-unet", train("webvid:content", "webvid:content,size=tiny", 8), 150),
        Step("peers-forward", peers("sample", "ucf101:sample", "sampling", networks), 150, torch),
        Step("sample-quality", sample("quality"), 150),
        Step("train-motion-xl", train("webvid:motion", "webvid:motion,size=tiny", 32), 90),
        Step("peers-training", peers("train", "ucf101:motion", "model", "dit-motion,unet"), 150, torch),
        Step("sample-balanced", sample("balanced", "--only=whole"), 150),
        Step("train-content-l", train("ucf101:content", "quickstart:content", 32), 90),
    ]


class Summary:
    """What is known so far, written after each step."""

    def __init__(self, out: Path, minutes: float):
        self.path = out / "summary.json"
        self.told = {"minutes": minutes, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "steps": []}

    def add(self, step: Step, state: str, why: str = "", seconds: float = 0.0, code: int | None = None):
        """state: ran, failed, "took too long", "no time left" or skipped."""
        self.told["steps"].append(
            {
                "name": step.name, "state": state, "why": why, "code": code, "seconds": round(seconds, 1),
                "limit_seconds": step.limit, "command": list(step.command),
            }
        )  # fmt: skip
        print(f"{step.name:18} {state:14} {seconds:6.1f} s  {why}", flush=True)
        write_json(self.path, self.told)

    @property
    def well(self) -> bool:
        return all(step["state"] in ("ran", "skipped") for step in self.told["steps"])


def check(steps: list[Step], summary: Summary, log: Path, minutes: float, environment: dict[str, str]):
    """Runs the steps, one after the other."""
    end = time.monotonic() + 60 * minutes
    for step in steps:
        missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
        left = end - time.monotonic()
        if missing:
            summary.add(step, "skipped", f"not installed here: {', '.join(missing)}")
        elif left < LEAST:
            summary.add(step, "no time left", f"of --minutes={minutes:g}")
        else:
            run(step, summary, log, min(step.limit, left), environment)


def run(step: Step, summary: Summary, log: Path, limit: float, environment: dict[str, str]):
    begun = time.monotonic()
    with log.open("a") as file:
        print(f"\n== {step.name}: {' '.join(step.command)}", file=file, flush=True)
        start = file.tell()
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # with whatever it started; also where this check is stopped
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - begun
    if code is None:
        summary.add(step, "took too long", f"stopped after {limit:.0f} s", seconds)
    elif code:
        said = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        summary.add(step, "failed", said[-1] if said else "it said nothing", seconds, code)
    else:
        summary.add(step, "ran", seconds=seconds, code=0)


def install(wheels: Path, site: Path):
    """Wheels into a folder of their own."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise UserError("--wheels", wheels, "holds no wheels", "fetch them with `pip download --no-deps -d DIR NAME`")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
               "--disable-pip-version-check", "--target", str(site), *files]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()[-1]
        raise UserError("--wheels", wheels, f"could not be installed: {said}", "give wheels for this Python")


def device(environment: dict[str, str]) -> dict:
    """The device as JAX sees it; UserError where there is none."""
    code = (
        "import json, jax; d = jax.devices(); print(json.dumps({'platform': d[0].platform, 'kind': d[0].device_kind, "
        "'count': len(d), 'jax': jax.__version__, 'version': d[0].client.platform_version}))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        raise UserError("device", "?", "JAX did not find one within 120 s", "look at the driver") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError("device", "?", f"JAX finds none: {said[-1]}", "install JAX for this machine")
    return json.loads(done.stdout.splitlines()[-1])


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=local_path, help="a folder for results")
    parser.add_argument("--wheels", type=local_path, help="a folder of wheels to install for this check")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together")
    parser.add_argument("--steps", default="", help="names, separated by commas; default: all")
    parser.add_argument("--tiny", action="store_true", help="the smallest models, to try the check itself")
    parser.add_argument("--plan", action="store_true", help="print the steps, and run none")
    return parser


def chosen(steps: list[Step], names: str) -> list[Step]:
    """Those of the names, in their own order; all without names."""
    wanted = names.split(",") if names else [step.name for step in steps]
    for name in wanted:
        choose("--steps", name, [step.name for step in steps])
    return [step for step in steps if step.name in wanted]


def main() -> int:
    flags = parser_of().parse_args()
    steps = chosen(plan(flags.out.absolute(), flags.tiny), flags.steps)
    if flags.plan:
        for step in steps:
            print(f"{step.name} (at most {step.limit:g} s): {' '.join(step.command)}")
        return 0
    if not 0 < flags.minutes < float("inf"):
        raise UserError("--minutes", flags.minutes, "not a time", "give minutes, like 8")
    flags.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="device-check-") as site:
        if flags.wheels:
            install(flags.wheels, Path(site))
        sys.path.insert(0, site)
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise UserError("--wheels", flags.wheels or "", f"not installed here: {', '.join(missing)}", "give wheels")
        paths = filter(None, (site, str(ROOT), os.environ.get("PYTHONPATH")))
        # PyTorch takes memory of the same device.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        summary = Summary(flags.out, flags.minutes)
        summary.told["device"] = device(environment)
        spent = (time.monotonic() - begun) / 60
        check(steps, summary, flags.out / "log.txt", flags.minutes - spent, environment)
    print(f"results in {flags.out}")
    return 0 if summary.well else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
