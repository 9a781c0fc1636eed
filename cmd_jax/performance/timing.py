"""Wall times of repeated calls: percentiles of one, and several compared in turns."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Times:
    """seconds: of each call, in order, at least one."""

    seconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        return float(np.percentile(self.seconds, 50))

    @property
    def p95(self) -> float:
        return float(np.percentile(self.seconds, 95))


def once(call: Callable) -> float:
    """Seconds of one call, until the arrays that it gives are computed."""
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def repeated(call: Callable, rounds: int, budget: float = float("inf"), warmup: int = 1) -> Times:
    """The times of at most `rounds` calls, after some that do not count.

    budget: seconds after which no further one begins once there are LEAST_ROUNDS, or `rounds` if that is fewer.
    """
    for _ in range(warmup):
        once(call)
    end, seconds = time.perf_counter() + budget, []
    while len(seconds) < rounds and (len(seconds) < LEAST_ROUNDS or time.perf_counter() < end):
        seconds.append(once(call))
    return Times(tuple(seconds))


def in_turns(calls: dict[str, Callable], rounds: int, warmup: int = 1) -> dict[str, Times]:
    """The times of `rounds` calls of each, one after the other in every round: whatever slows the machine down for a
    while slows them all. The order is turned round from round to round, so that none is always the first."""
    for _ in range(warmup):
        for call in calls.values():
            once(call)
    seconds = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(once(calls[name]))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def ratio(times: Times, others: Times) -> float:
    """How many times as long as `times` the `others` took: the median over rounds that were taken in turns."""
    return float(np.median(np.divide(others.seconds, times.seconds)))
