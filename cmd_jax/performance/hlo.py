"""What one device does in a compiled program, read from its HLO: products, and what the devices send one another.

What is in a loop counts as often as it runs, which `cost_analysis` of XLA does not do.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast", "reduce-scatter")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([\w-]+)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?(%[\w.-]+) .*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=(%[\w.-]+)|branch_computations=\{([^}]*)\}")


@dataclass
class Work:
    """flops: of dots and convolutions, two for a multiply-add. sent: {collective: bytes of its results on a device}.

    largest: {collective: bytes of the largest single one}. calls: {collective: how often}.
    """

    flops: float = 0.0
    sent: Counter = field(default_factory=Counter)
    largest: dict = field(default_factory=dict)
    calls: Counter = field(default_factory=Counter)

    def add(self, other: "Work", times: int = 1):
        self.flops += times * other.flops
        for name in other.sent:
            self.sent[name] += times * other.sent[name]
            self.calls[name] += times * other.calls[name]
            self.largest[name] = max(self.largest.get(name, 0), other.largest[name])


def work(text: str) -> Work:
    """Of the text of a compiled program (`compiled.as_text()`), of one device."""
    computations, entry = _computations(text)
    done = {}

    def of(name: str) -> Work:
        if name not in done:
            done[name] = total = Work()
            shapes = {x: shape for x, shape, _, _ in computations[name]}
            for _, shape, operation, rest in computations[name]:
                total.add(_own(operation, shape, rest, shapes))
                called = [x for single, several in CALLED.findall(rest) for x in (single, *several.split(", ")) if x]
                if operation == "conditional" and called:
                    total.add(max(map(of, called), key=lambda branch: branch.flops))
                elif called:
                    trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                    for x in called:
                        total.add(of(x), int(trips[1]) if trips else 1)
        return done[name]

    return of(entry)


def _computations(text: str) -> tuple[dict[str, list], str]:
    """-> ({computation: [(instruction, shape, operation, what follows its bracket)]}, the one that is run)."""
    found, entry, lines = {}, "", []
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif instruction := INSTRUCTION.match(line):
            lines.append(instruction.groups())
    return found, entry


def _own(operation: str, shape: str, rest: str, shapes: dict[str, str]) -> Work:
    """Of an instruction without what it calls."""
    own, name = Work(), operation.removesuffix("-start")
    if name in COLLECTIVES:
        arrays = ARRAY.findall(shape)
        own.calls[name] = 1
        own.sent[name] = own.largest[name] = sum(BYTES.get(kind, 4) * _size(dims) for kind, dims in arrays)
    elif operation in ("dot", "convolution"):
        left, right = (_dims(shapes[x]) for x in re.findall(r"%[\w.-]+", rest)[:2])
        if operation == "dot":
            contracted = [
                left[int(i)] for i in re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1].split(",") if i
            ]
            inner = math.prod(contracted)
        else:
            inner = math.prod(right) // right[re.search(r"dim_labels=\w+_(\w+)->", rest)[1].index("o")]
        own.flops = 2 * math.prod(_dims(shape)) * inner
    return own


def _dims(shape: str) -> list[int]:
    return [int(n) for n in ARRAY.search(shape)[2].split(",") if n]


def _size(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)
