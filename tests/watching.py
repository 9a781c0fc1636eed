"""The watch over peers, for tests. Times are short, and long enough for a busy machine."""

import threading
import time

from cmd_jax.running.peers import Peers

TIMEOUT = 1.0
SLACK = 2.0  # seconds that a busy machine may add


class Watch(Peers):
    """Peers whose faults are kept; the test is any other process that it needs."""

    def __init__(self, folder, index=0, count=2, stall_timeout=0.0, peer_timeout=TIMEOUT, interval=None):
        self.faults, self.fault, self.begun = [], threading.Event(), time.monotonic()
        times = {"peer_timeout": peer_timeout, "stall_timeout": stall_timeout}
        super().__init__(folder, index, count, "this", on_fault=self._on_fault, **times)
        self.interval = interval or self.interval

    def _on_fault(self, *fault):
        self.faults.append((*fault, time.monotonic() - self.begun, threading.current_thread().name))
        self.fault.set()

    def the_fault(self, seconds=TIMEOUT + SLACK):
        assert self.fault.wait(seconds), "no fault was found"
        time.sleep(3 * self.interval)
        (fault,) = self.faults  # at most one
        assert fault[-1] == "peers"
        return fault[:-1]


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
