"""Mutated files against their readers, in child processes of little memory: what each makes of each file, and how fast.

A `Kind` says how files begin, how they are changed and who reads them. File i of a kind is always the same one:

    python tests/fuzz.py fuzz_weights:PICKLES 17            # reads that file here, with a traceback
    python tests/fuzz.py fuzz_weights:PICKLES 17 --keep x.pt  # writes it

`run` reads many in children, so that a crash of the process, a hang and a bomb are seen as such.
"""

import argparse
import importlib
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

SECONDS = 60  # for one file
START_SECONDS = 300  # for the imports of a child, on a busy machine
MEMORY = 3 * 2**30  # bytes of address space beyond what the child has when it begins
MARKER = "CMD_JAX_FUZZ_MARKER"  # environment variable: a file that only code from a mutated file would make
NUMBERS = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**64 - 1,
)


class Kind(NamedTuple):
    """seeds() -> whole files. mutate: (a seed, another one, generator) -> a changed file. read: path -> whatever.

    suffix: of the path. `read` must return or raise UserError of one line.
    """

    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, bytes, np.random.Generator], bytes]
    read: Callable[[Path], object]
    suffix: str


class Verdict(NamedTuple):
    """outcome: "read", "refused", or what must not be: "traceback", "several lines", "died", "hung", "executed"."""

    index: int
    outcome: str
    seconds: float
    text: str


def make(kind: Kind, index: int) -> bytes:
    """File `index` of a kind: one of its seeds, mutated."""
    rng, seeds = np.random.default_rng(index), kind.seeds()
    return kind.mutate(seeds[index % len(seeds)], seeds[int(rng.integers(len(seeds)))], rng)


# Changes of any file.


def place(data: bytes, rng, least: int = 0) -> int:
    """Somewhere in the data; every second time in its first 64 bytes, where lengths and magic numbers are."""
    most = len(data) if rng.random() < 0.5 else min(len(data), 64)
    return int(rng.integers(least, max(most, least) + 1))


def flip(data, _, rng):
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        if changed:
            changed[place(data[:-1], rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def truncate(data, _, rng):
    return data[: place(data, rng)]


def insert(data, _, rng):
    at, length = place(data, rng), int(rng.choice((1, 2, 4, 8, 64, 4096)))
    return data[:at] + rng.bytes(length) + data[at:]


def remove(data, _, rng):
    at = place(data, rng)
    return data[:at] + data[at + int(rng.choice((1, 2, 4, 8, 64, 4096))) :]


def repeat(data, _, rng):
    at, length = place(data, rng), int(rng.choice((1, 8, 64, 512)))
    return data[:at] + data[at : at + length] * int(rng.integers(2, 5)) + data[at:]


def number(data, _, rng):
    """Another length, offset or count, at any place and in either order of bytes."""
    at, size = place(data, rng), int(rng.choice((1, 2, 4, 8)))
    value = int(rng.choice(np.array(NUMBERS, np.uint64))) % 2 ** (8 * size)
    return data[:at] + value.to_bytes(size, "big" if rng.random() < 0.3 else "little") + data[at + size :]


def splice(data, other, rng):
    return data[: place(data, rng)] + other[place(other, rng) :]


BYTES = (flip, truncate, insert, remove, repeat, number, splice)


def mutate_bytes(data: bytes, other: bytes, rng) -> bytes:
    """One of BYTES, sometimes several in a row."""
    for _ in range(int(rng.integers(1, 4))):
        data = BYTES[int(rng.integers(len(BYTES)))](data, other, rng)
    return data


# Changes of what JSON says.

DEEP = "\1DEEP"  # stands for 100,000 nested lists
VALUES = (None, True, 0, -1, 1, 2.5, 2**40, 2**63, 10**400, float("nan"), float("inf"), -0.0, "", "x", "\0", "../../x",
          "é" * 300, "\x1b[2J", [], [[]], {}, {"": {}}, [1, 2, 3], ["x"], {"x": 1}, DEEP)  # fmt: skip


def mutate_json(value, rng):
    """A JSON value with one of its parts replaced, left out, added, renamed, or exchanged with another part."""
    parts = [(None, None)]

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            parts.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    value = json.loads(json.dumps(value))
    if isinstance(value, dict | list):
        walk(value)
    node, key = parts[int(rng.integers(len(parts)))]
    new = VALUES[int(rng.integers(len(VALUES)))]
    if node is None:
        return new if rng.random() < 0.1 or not isinstance(value, dict) else value | {"stray": new}
    how = int(rng.integers(6))
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif how == 2 and len(parts) > 2:
        other, name = parts[int(rng.integers(1, len(parts)))]
        if name in other if isinstance(other, dict) else name < len(other):
            node[key] = json.loads(json.dumps(other[name]))
    elif how == 3 and isinstance(node, dict):
        node[f"{key}2"] = new
    else:
        node[key] = new
    return value


def dump_json(value) -> str:
    """JSON as Python writes it (NaN too), in which DEEP is 100,000 lists."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


# Reading.


def run(name: str, count: int, seconds: float = SECONDS) -> list[Verdict]:
    """Verdicts on files 0 to count-1 of the kind `module:NAME`; after a child that dies or hangs comes another one."""
    verdicts, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder, "executed")
        while len(verdicts) < count:
            verdicts += _child(name, range(len(verdicts), count), seconds, marker)
            if marker.exists():  # of a file whose child died or hung, or late
                verdicts[-1] = verdicts[-1]._replace(outcome="executed")
                marker.unlink()
    _tell(name, verdicts, time.monotonic() - started)
    return verdicts


def _child(name: str, indices: range, seconds: float, marker: Path) -> list[Verdict]:
    """Verdicts on the first of these files, as many as the child lives for."""
    command = [sys.executable, __file__, name, str(indices.start), "--until", str(indices.stop)]
    path = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    environment = os.environ | {MARKER: str(marker), "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        lines = queue.Queue()
        threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put(None)], daemon=True).start()
        verdicts, patience, begun = [], START_SECONDS, time.monotonic()
        try:
            for index in [None, *indices]:  # the first line says that the child is ready
                try:
                    line, problem = lines.get(timeout=patience), "died"
                except queue.Empty:
                    line, problem = None, "hung"
                if line is None and index is None:
                    errors.seek(0)
                    raise RuntimeError(f"the child of {name} did not start: {errors.read()[-2000:]}")
                if line is None:
                    process.kill()
                    errors.seek(0)
                    text = f"exit code {process.wait()}: {errors.read()[-500:].decode(errors='replace')}"
                    return [*verdicts, Verdict(index, problem, time.monotonic() - begun, text)]
                if index is not None:
                    verdicts.append(Verdict(*json.loads(line)))
                patience, begun = seconds, time.monotonic()
            return verdicts
        finally:
            process.kill()
            process.wait()


def _tell(name: str, verdicts: list[Verdict], seconds: float):
    outcomes = [verdict.outcome for verdict in verdicts]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
    slowest = max(verdicts, key=lambda verdict: verdict.seconds)
    print(f"{name}: {len(verdicts)} files in {seconds:.0f} s: {counts}; "
          f"slowest {slowest.seconds:.2f} s (file {slowest.index})", flush=True)  # fmt: skip


def faults(verdicts: list[Verdict], seconds: float = SECONDS) -> list[Verdict]:
    """Those that are neither read nor refused by one line, or later than that."""
    return [v for v in verdicts if v.outcome not in ("read", "refused") or v.seconds > seconds]


def judge(kind: Kind, index: int, path: Path) -> Verdict:
    """Read one file here."""
    from cmd_jax.errors import UserError

    path.write_bytes(make(kind, index))
    begun = time.monotonic()
    try:
        kind.read(path)
        outcome, text = "read", ""
    except UserError as error:
        text = str(error)
        outcome = "refused" if len(text.splitlines()) == 1 and text.isprintable() else "several lines"
    except BaseException as error:  # noqa: BLE001
        outcome, text = "traceback", f"{type(error).__name__}: {error}"[:500]
    marker = Path(os.environ[MARKER])
    if marker.exists():  # looked for here, before the next file: the parent may read this verdict later
        outcome = "executed"
        marker.unlink()
    return Verdict(index, outcome, time.monotonic() - begun, text.encode(errors="backslashreplace").decode())


def find(name: str) -> Kind:
    module, _, kind = name.partition(":")
    return getattr(importlib.import_module(module), kind)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("index", type=int)
    parser.add_argument("--until", type=int)
    parser.add_argument("--keep", type=Path)
    flags = parser.parse_args()
    kind = find(flags.kind)
    if flags.keep:
        flags.keep.write_bytes(make(kind, flags.index))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file{kind.suffix}")
        if flags.until is None:
            path.write_bytes(make(kind, flags.index))
            print(kind.read(path))
            return
        answers, sys.stdout = sys.stdout, sys.stderr  # what readers print is no answer
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        print("ready", file=answers, flush=True)
        for index in range(flags.index, flags.until):
            print(json.dumps(judge(kind, index, path)), file=answers, flush=True)


if __name__ == "__main__":
    main()
