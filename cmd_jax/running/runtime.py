"""The process itself: memory settings that must hold before JAX starts its threads, devices, and requests to stop."""

import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cmd_jax.errors import Stopped, UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
SAME_REQUEST = 1.0  # seconds
_IMPORTED = time.perf_counter()


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


def check_devices():
    """Start JAX's devices. UserError where those that JAX_PLATFORMS names are not here, or cannot be had."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # the latter, without a word, for cuda in a CPU build of jaxlib
        text = " ".join(str(e).partition(" (set JAX_PLATFORMS")[0].split())
        reason = text.partition(": ")[2] or text or "jaxlib is not built for it, or its plugin is not installed"
        problem = f"JAX cannot start it here ({reason[:200].rstrip('.')})"
        remedy = f"use {other_platform()}, or leave it unset"
        raise UserError("JAX_PLATFORMS", jax.config.jax_platforms or "", problem, remedy) from e


def other_platform() -> str:
    """What JAX finds here where it is free to look, asked of a process of its own."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.stdout.split()[-1]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "cpu"


def has_terminal() -> bool:
    """Whether this process is controlled by a terminal, wherever its input and output go."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        return True
    except OSError:
        return False


def process_seconds() -> float:
    """Since this process was started, its imports and all."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return time.perf_counter() - _IMPORTED


def is_heard(number: int) -> bool:
    """Whether a signal is meant for Python in this process: not a SIGHUP that its parent had it ignore, like nohup."""
    handler = signal.getsignal(number)  # None where a program in which Python is embedded has set it
    return handler is not None and (number != signal.SIGHUP or handler != signal.SIG_IGN)


def is_same_request(number: int, first: float) -> bool:
    """Whether a signal says no more than the one that time.monotonic() saw at `first`, and does not ask for haste.

    So does SIGHUP, of which a terminal that closes may send several, and whatever comes within SAME_REQUEST: a machine
    that shuts down signals all its processes, often twice (SIGTERM, SIGHUP), and a supervisor passes its own signal on.
    """
    return number == signal.SIGHUP or time.monotonic() - first < SAME_REQUEST


def drop_terminal():
    """Have output that went to a terminal, which is being closed, go nowhere: to write to it would be an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # os.isatty denies it once the terminal is gone
                os.dup2(null, descriptor)
    os.close(null)


class StopRequest:
    """Turns the first SIGTERM, SIGINT or SIGHUP into `signal`, which the training loop reads.

    A second one ends at once, unless it is_same_request. Until the loop sets `running` there is nothing to save: the
    first one ends all with `farewell`, after the calls that `first` was given. A SIGHUP that is ignored, as by nohup,
    stays ignored.

    end_process(exit code, last_words=""): for a command. A thread that hears the signals calls it, since Python's own
    handlers wait while the main thread compiles or computes. Without it, as in a library, an end is Stopped, raised in
    the main thread as soon as Python runs there. Outside of the main thread, where Python lets nobody set handlers, no
    signal is heard.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, farewell: str, end_process: Callable | None = None):
        self.farewell, self.signal, self.running = farewell, None, False
        self._heard = 0.0  # when, of time.monotonic()
        self._calls, self._end_process, self._undo = [], end_process, contextlib.ExitStack()

    def first(self, call: Callable[[], None]):
        """Have `call()` done before an early end."""
        self._calls.append(call)

    def __enter__(self):
        with contextlib.ExitStack() as undo:
            if threading.current_thread() is threading.main_thread():
                wakeup = self._start_thread(undo) if self._end_process else None
                for number in filter(is_heard, self.SIGNALS):
                    handler = signal.signal(number, (lambda *_: None) if self._end_process else self._interrupt)
                    undo.callback(signal.signal, number, handler)
                if wakeup is not None:
                    undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wakeup))
            self._undo = undo.pop_all()
        return self

    def _start_thread(self, undo: contextlib.ExitStack) -> int:
        """A thread that listens -> the descriptor to which Python shall write the signals."""
        read, write = os.pipe()
        undo.callback(os.close, read)
        undo.callback(os.close, write)
        os.set_blocking(write, False)
        thread = threading.Thread(target=self._listen, args=(read,), daemon=True)
        thread.start()
        undo.callback(thread.join)
        undo.callback(os.write, write, b"\0")
        return write

    def _listen(self, read: int):
        while number := os.read(read, 1)[0]:
            if number in self.SIGNALS:
                self._receive(number)

    def _receive(self, number: int):
        """In the thread of a command."""
        if number == signal.SIGHUP:
            drop_terminal()
        if self.signal:
            if not is_same_request(number, self._heard):
                self._end_process(128 + number)
            return
        self._heard, self.signal = time.monotonic(), number
        if not self.running:
            for call in self._calls:
                call()
            self._end_process(0, self.farewell)

    def _interrupt(self, number: int, frame):
        """As the handler of a library. What `first` was given is left to the contexts that Stopped leaves."""
        if self.signal:
            if not is_same_request(number, self._heard):
                raise Stopped("stopped by a second signal, before all was saved")
            return
        self._heard, self.signal = time.monotonic(), number
        if not self.running:
            raise Stopped(self.farewell)

    def __exit__(self, *error):
        self._undo.close()
