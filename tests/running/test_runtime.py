"""Requests to stop, sent to real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
from cmd_jax.running.runtime import StopRequest
with StopRequest("nothing to save") as stop:
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

    def run(running: bool, busy: str = ""):
        script = SCRIPT.format(running=running, busy=busy)
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
from cmd_jax.report.console import make_console
from cmd_jax.running.runtime import StopRequest
console = make_console()
with StopRequest("") as stop:
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


def test_handlers_are_put_back():
    from cmd_jax.running.runtime import StopRequest

    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with StopRequest("") as stop:
        assert signal.getsignal(signal.SIGTERM) is not before[0] and stop.signal is None
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before
