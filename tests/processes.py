"""Real processes of cmd-jax for the tests: N of them on this machine, talking through gloo."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import tiny

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds; every wait ends


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int) -> bool:
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


@functools.cache
def hidden() -> Path:
    """A folder in which `clu` cannot be imported: TensorFlow, which it brings, would double the time of each start."""
    folder = tiny.scratch() / "hidden"
    folder.mkdir()
    (folder / "clu.py").write_text("raise ImportError('not in this test')\n")
    return folder


def environment(devices: int) -> dict[str, str]:
    """Of a process with that many fake devices; several must not take programs from a cache (see distributed.start)."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": str(int(devices == 1)),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(map(str, (hidden(), ROOT, ROOT / "tests"))),
    }


class Job:
    """Processes 0..count-1 of one command; `out(i)` is what the i-th has printed. All of them are gone at the end."""

    def __init__(self, folder: Path, *arguments, count=2, devices=4, own=None, before=None, start=None):
        """own: {process: extra arguments}; before: {process: Python to run first}; start: which ones really start.

        folder: for their output.
        """
        coordinator = f"127.0.0.1:{free_port()}"
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.processes, self.begun = folder, {}, time.monotonic()
        for i in range(count) if start is None else start:
            code = f"{(before or {}).get(i, '')}\nimport sys, cmd_jax.main\nsys.exit(cmd_jax.main.main())"
            command = [sys.executable, "-u", "-c", code, *map(str, arguments), *(own or {}).get(i, ())]
            if count > 1:
                command += ["--distributed=explicit", f"--coordinator={coordinator}"]
                command += [f"--num-processes={count}", f"--process-id={i}"]
            with open(folder / f"{i}.log", "w") as log:
                output = {"stdout": log, "stderr": log}
                self.processes[i] = subprocess.Popen(command, env=environment(devices), cwd=ROOT, **output)

    def out(self, i: int = 0) -> str:
        return (self.folder / f"{i}.log").read_text()

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Exit codes, in order."""
        end = time.monotonic() + seconds
        return [p.wait(timeout=max(0.1, end - time.monotonic())) for p in self.processes.values()]

    def until(self, condition, seconds: float = PATIENCE):
        """Wait for condition() to hold while all processes live."""
        end = time.monotonic() + seconds
        while not condition():
            dead = [i for i, p in self.processes.items() if p.poll() is not None]
            assert not dead, f"process {dead[0]} ended:\n{self.out(dead[0])[-3000:]}"
            assert time.monotonic() < end, "waited too long:\n" + "\n".join(self.out(i)[-1500:] for i in self.processes)
            time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes.values():
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()


def ledger(folder: Path) -> list[dict]:
    path = folder / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(folder: Path) -> list[dict]:
    return [line for line in ledger(folder) if "step" in line]


def train(workdir: Path, stage="autoencoder", *more) -> list[str]:
    files = [f"--config={tiny.CONFIG_FILE}:{stage}", f"--workdir={workdir}"]
    return ["train", *files, "--config.train.batch_size=8", *more]
