"""Whether anything became slower: new results against earlier ones of the same components."""

from statistics import median
from typing import NamedTuple

from cmd_jax.bench.records import key_of

LAST = 5


class Verdict(NamedTuple):
    """slower, unknown: lines on components that took too long, and on those without an earlier result."""

    slower: list[str]
    unknown: list[str]


def judge(records: list[dict], earlier: list[dict], bound: float) -> Verdict:
    """Each result against the earlier ones of the same component, batch, device, shapes and settings.

    It may take `bound` times the median of the last five, and no more than `bound` times the first one: medians follow
    a slow drift, the first result does not.
    """
    known, verdict = {}, Verdict([], [])
    for record in earlier:
        known.setdefault(key_of(record), []).append(record["p50_seconds"])
    for record in records:
        name = f"{record['verb']} {record['component']}, batch {record['batch']}"
        before = known.get(key_of(record))
        if before is None:
            verdict.unknown.append(f"{name}: no earlier result to compare with")
            continue
        references = {f"the median of the last {len(before[-LAST:])}": median(before[-LAST:]), "the first": before[0]}
        for reference, seconds in references.items():
            if record["p50_seconds"] > bound * seconds:
                times = record["p50_seconds"] / seconds
                verdict.slower.append(
                    f"{name}: {record['p50_seconds']:.4g} s, {times:.2f} times {reference}, {seconds:.4g} s; "
                    f"the bound is {bound:g}"
                )
                break
    return verdict
