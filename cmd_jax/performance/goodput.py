"""Where the wall time of a training goes, and how much of it came to something: goodput is the share of the latter."""

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

import jax

# What time is spent on. Only "steps" is useful: "repeated" are steps of earlier runs that had to be done again.
PURPOSES = (
    "steps", "repeated", "start_up", "restore", "compile", "data_wait", "save_wait", "validation", "previews",
    "profile", "finish",
)  # fmt: skip


class Clock:
    """Gives each moment since it was made to one of PURPOSES, so that they add up to all of the time."""

    def __init__(self, purpose: str = "start_up"):
        self.begun = self._since = time.perf_counter()
        self._purpose, self._seconds = purpose, Counter()

    def turn(self, purpose: str) -> str:
        """From now on time goes to this -> what it went to before."""
        before, now = self._purpose, time.perf_counter()
        self._seconds[before] += now - self._since
        self._purpose, self._since = purpose, now
        return before

    @contextlib.contextmanager
    def spent(self, purpose: str):
        before = self.turn(purpose)
        try:
            yield
        finally:
            self.turn(before)

    def move(self, seconds: float, source: str, target: str):
        """Give time that went to one purpose to another."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def seconds(self) -> dict[str, float]:
        """{purpose: seconds} so far, of those that there were."""
        self.turn(self._purpose)
        return {name: self._seconds[name] for name in PURPOSES if name in self._seconds}


class Devices:
    """When the devices came to an end with what they were given last; a thread waits for it."""

    def __init__(self):
        self._given, self._last = queue.SimpleQueue(), None
        self._thread = threading.Thread(target=self._wait, name="devices", daemon=True)
        self._thread.start()

    def _wait(self):
        while given := self._given.get():
            array, ready = given
            with contextlib.suppress(Exception):  # it is raised where the result is read
                array.block_until_ready()
            ready.set_result(time.perf_counter())

    def given(self, result: jax.Array):
        """They have work whose result this is."""
        self._last = Future()
        self._given.put((result, self._last))

    def busy_until(self) -> float:
        """Of time.perf_counter(); now where they still are, and the past where they never were."""
        if self._last is None:
            return 0.0
        return self._last.result() if self._last.done() else time.perf_counter()

    def close(self):
        self._given.put(None)
        self._thread.join(timeout=10.0)  # of a device that lost its peers no result may ever come


def fed(batches: Iterable, clock: Clock, devices: Devices) -> Iterator:
    """The batches; waiting for one goes to "data_wait" from the moment at which the devices have nothing else to do."""
    batches = iter(batches)
    while True:
        with clock.spent("data_wait"):
            begun, batch = time.perf_counter(), next(batches, None)
            hidden = min(devices.busy_until(), time.perf_counter()) - begun
        if hidden > 0:
            clock.move(hidden, "data_wait", "steps")
        if batch is None:
            return
        yield batch


def earlier_seconds(records: Iterable[dict], start: int) -> tuple[int, dict[str, float]]:
    """What the runs before one that begins after `start` steps took -> (how many they were, {purpose: seconds}).

    records: each run's {"start": steps done before it}, and then {"step": steps done, or begun at its end, "seconds":
    {purpose: in this run so far}} now and again. Steps after the one from which a later run went on were done again:
    they are "repeated".
    """
    runs = []
    for record in records:
        if "start" in record:
            runs.append((record["start"], []))
        elif runs:
            runs[-1][1].append((record["step"], record["seconds"]))
    total, kept = Counter(), start
    for begun, told in reversed(runs):
        if told:
            seconds = Counter(told[-1][1])
            useful = max((of.get("steps", 0.0) for step, of in told if begun < step <= kept), default=0.0)
            seconds["repeated"] += seconds["steps"] - useful
            seconds["steps"] = useful
            total.update(seconds)
        kept = min(kept, begun)
    return len(runs), dict(total)


def goodput(seconds: dict[str, float]) -> dict:
    """{"share": of useful steps, "wall_seconds", "seconds": {purpose: its part of them}}."""
    parts = {name: round(seconds[name], 3) for name in PURPOSES if seconds.get(name)}
    wall = sum(parts.values())
    return {"share": round(parts.get("steps", 0.0) / wall, 4), "wall_seconds": round(wall, 3), "seconds": parts}


def in_words(told: dict) -> str:
    """A line of `goodput`, what took longest first."""
    rest = sorted(((s, name) for name, s in told["seconds"].items() if name != "steps"), reverse=True)
    listed = ", ".join(f"{name.replace('_', ' ')} {s:.1f} s" for s, name in rest if s >= 0.05)
    return f"{told['share']:.1%} of {told['wall_seconds']:.1f} s" + (f" ({listed})" if listed else "")
