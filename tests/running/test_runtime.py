"""Requests to stop, sent to real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cmd_jax.errors import Stopped, UserError
from cmd_jax.running import runtime
from cmd_jax.running.runtime import StopRequest

SCRIPT = """
import os, sys, time
from cmd_jax.main import end_process
from cmd_jax.running import runtime
from cmd_jax.running.runtime import StopRequest
runtime.SAME_REQUEST = {same}
with StopRequest("nothing to save", end_process) as stop:
    stop.first(lambda: print("cleared", flush=True))
    stop.running = {running}
    print("ready", flush=True)
    {busy}
    while not (stop.running and stop.signal):
        time.sleep(0.01)
    print("heard", stop.signal, flush=True)
    time.sleep(60)
"""
# Holds the main thread in C, like XLA does: a Python signal handler would have to wait for its end.
IN_C = """import ctypes
    end = time.time() + 30
    while time.time() < end:
        ctypes.CDLL(None).sleep(30)
"""


@pytest.fixture
def start():
    started = []

    def run(running: bool, busy: str = "", same: float = 0.0):
        script = SCRIPT.format(running=running, busy=busy, same=same)
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("busy", ["", IN_C])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_loop_clears_up_and_ends_with_0(start, number, busy):
    process, begun = start(False, busy), time.monotonic()
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert (process.returncode, out, error) == (0, "cleared\n", "nothing to save\n")
    assert time.monotonic() - begun < 5


def test_a_signal_in_the_loop_only_sets_the_flag_and_a_second_one_ends_at_once(start):
    process = start(True)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == f"heard {int(signal.SIGINT)}\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_a_terminal_that_closes_sends_several_sighups(start):
    process = start(True)
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == f"heard {int(signal.SIGHUP)}\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_signals_at_about_the_same_time_are_one_request(start):
    """Of a machine that shuts down: systemd sends SIGTERM and SIGHUP to all processes, and launch/local.py its own."""
    process = start(True, same=0.7)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.7)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=5)[0].startswith("heard ")
    assert process.returncode == 128 + signal.SIGTERM


def test_what_nohup_started_goes_on(start):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the process inherits
    try:
        process = start(True)
    finally:
        signal.signal(signal.SIGHUP, handler)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == f"heard {int(signal.SIGTERM)}\n"


TALKER = """
import sys, time
from pathlib import Path
from cmd_jax.errors import tell
from cmd_jax.main import end_process
from cmd_jax.report.console import make_console
from cmd_jax.running.runtime import StopRequest
console = make_console()
with StopRequest("", end_process) as stop:
    stop.running = True
    while not stop.signal:
        console.print("a step")
    time.sleep(0.2)
    console.print("saved")
    tell("and said")
Path(sys.argv[1]).write_text(str(stop.signal))
"""


def test_a_run_whose_terminal_is_closed_still_saves(tmp_path):
    """It writes to it all the time; each write is an error from then on."""
    ours, theirs = os.openpty()
    script = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{TALKER}"
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "saved"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    assert b"a step" in os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGHUP))


def test_the_second_signal_does_not_wait_for_a_computation(start):
    process = start(True, IN_C)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


TERMINAL = """
import subprocess, sys
from cmd_jax.running.runtime import has_terminal
if sys.argv[1:]:
    import pty
    pty.spawn([sys.executable, "-c", f"import subprocess; subprocess.run({sys.argv[1:]}, stdin=subprocess.DEVNULL)"])
else:
    print(has_terminal())
"""


@pytest.mark.parametrize("inside", [True, False])
def test_a_terminal_is_noticed_wherever_input_comes_from(inside):
    plain = [sys.executable, "-c", TERMINAL]
    command = plain + plain * inside
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert done.stdout.strip() == str(inside), done.stderr


def ways():
    """What this process does at signals: what a caller of the library has set, which must be there again afterwards."""
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return wakeup, *map(signal.getsignal, StopRequest.SIGNALS)


class Ended(Exception):
    pass


@pytest.mark.parametrize("end_process", [None, print])
@pytest.mark.parametrize("error", [None, UserError("a", 1, "b", "c"), SystemExit(1), KeyboardInterrupt()])
def test_handlers_are_put_back(error, end_process):
    before, threads = ways(), threading.active_count()
    with contextlib.suppress(BaseException), StopRequest("", end_process) as stop:
        assert not set(ways()[1:]) & set(before[1:]) and stop.signal is None
        raise error or Ended
    assert ways() == before and threading.active_count() == threads


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_in_a_library_a_signal_before_the_loop_is_an_exception(number):
    before = ways()
    with pytest.raises(Stopped, match="nothing to save"), StopRequest("nothing to save"):
        signal.raise_signal(number)
    assert ways() == before


def test_in_a_library_a_second_signal_in_the_loop_is_an_exception(monkeypatch):
    before = ways()
    with pytest.raises(Stopped, match="second signal"), StopRequest("") as stop:
        stop.running = True
        for _ in range(3):  # of a terminal that closes
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)  # at about the same time
        assert stop.signal == signal.SIGHUP
        monkeypatch.setattr(runtime, "SAME_REQUEST", 0.0)
        signal.raise_signal(signal.SIGTERM)
    assert ways() == before


def test_outside_of_the_main_thread_no_signal_is_heard():
    def run():
        with StopRequest("") as stop:
            return stop.signal, [*map(signal.getsignal, StopRequest.SIGNALS)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() == (None, [*map(signal.getsignal, StopRequest.SIGNALS)])
