"""The process itself: memory settings that must hold before JAX starts its threads, and requests to stop."""

import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory():
    """Tell glibc to keep freed buffers: handing them back after every op makes page faults dominate on a CPU.

    launch/env.sh says the same through GLIBC_TUNABLES, which also turns on huge pages; where it was
    used, this does nothing.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    for parameter, value in ((M_MMAP_THRESHOLD, 2**31 - 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
        mallopt(parameter, value)


def peak_memory_gib() -> float:
    """The most memory this process has held so far, GiB of the host."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


class StopRequest:
    """Turns the first SIGTERM or SIGINT into `signal`, which the training loop reads; a second one ends at once.

    Until the loop sets `running` there is nothing to save: the first one ends the process with 0, `farewell`, and
    after the calls that `first` was given. A thread hears the signals, since Python's own handlers wait while
    the main thread compiles or computes.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, farewell: str):
        self.farewell, self.signal, self.running, self._calls = farewell, None, False, []

    def first(self, call: Callable[[], None]):
        """Have `call()` done before an early end."""
        self._calls.append(call)

    def __enter__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def _listen(self):
        while number := os.read(self._read, 1)[0]:
            if number in self.SIGNALS:
                self._receive(number)

    def _receive(self, number: int):
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        if not self.running:
            for call in self._calls:
                call()
            print(self.farewell, file=sys.stderr, flush=True)
            os._exit(0)

    def __exit__(self, *error):
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
