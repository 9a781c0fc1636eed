"""Results as lines of JSON: what every record says, the files that keep them, and which of them compare."""

import contextlib
import json
import os
import platform
import time
from pathlib import Path

import jax

from cmd_jax.errors import UserError
from cmd_jax.files import as_path, check_content, check_like, is_remote, parse_json, versions
from cmd_jax.running.distributed import is_leader

FORMAT = 1
# By what results are the same measurement: of two with equal ones, seconds compare.
SAME = ("verb", "component", "batch", "clip", "parameters", "dtype", "preset", "settings", "device", "devices", "mesh")
LIKE = {
    "format": range(FORMAT, FORMAT + 1), "verb": str, "component": str, "batch": int, "clip": [int], "parameters": int,
    "dtype": str, "preset": str, "settings": dict, "device": str, "devices": int, "mesh": dict, "p50_seconds": float,
    ...: object,
}  # fmt: skip


def machine() -> str:
    """The processor, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


class Results:
    """The records of a run: kept, and each at once appended to a file (`out`) or printed.

    common: what all of them say.
    """

    def __init__(self, out: Path | str | None, console):
        self.out, self.console, self.common, self.all = out, console, {}, []

    def emit(self, record: dict):
        record = self.common | record
        self.all.append(record)
        if self.out and is_leader():
            append(self.out, [record])
        elif not self.out:
            self.console.print(json.dumps(record))


def common(verb: str, specification: str, config, mesh, weights: str) -> dict:
    """What all records of a run say. weights: where they are from."""
    group = config.get("sampling", {})
    return {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "verb": verb,
        "config": specification,
        "weights": weights,
        "clip": [config.data.frames, config.data.height, config.data.width],
        "preset": group.get("preset", ""),
        "attention": config.get("attention", ""),
        # All CPUs are of one kind, "cpu", and as fast as the cores that are given.
        "device": machine() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "platform": jax.default_backend(),
        "machine": machine(),
        "versions": versions(),
    }


def key_of(record: dict) -> str:
    """The same for results that compare."""
    return json.dumps([record.get(name) for name in SAME], sort_keys=True)


def append(path, records: list[dict]):
    """Add lines to a file, which is made if it is not there."""
    path, lines = as_path(path), "".join(json.dumps(record) + "\n" for record in records)
    if is_remote(path):  # where nothing can be appended to
        path.write_text((path.read_text() if path.exists() else "") + lines)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(lines)


def read(path, field: str) -> list[dict]:
    """The results in a file, oldest first. UserError (field=path) if there is none, or for a line that is none."""
    path, remedy = as_path(path), "give a file that cmd-jax bench wrote, or leave the flag out"
    try:
        text = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(field, path, "no such file", remedy) from None
    check_content(text, field, path)
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        record = parse_json(line, field, place, remedy)
        problem = check_like(record, LIKE)
        if not problem and record["p50_seconds"] <= 0:
            problem = f"p50_seconds is {record['p50_seconds']}, not positive"
        if problem:
            raise UserError(field, place, problem, remedy)
        records.append(record)
    if not records:
        raise UserError(field, path, "holds no results", remedy)
    return records
