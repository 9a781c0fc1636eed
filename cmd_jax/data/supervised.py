"""Child processes for what may crash, hang or never end, like a decoder given a hostile file: it harms nobody else.

`Supervised` is the parent's side, `serve` the child's. The child reads one JSON request a line, with a "timeout" in
seconds, and answers each with one line of JSON, `{"error": reason}` where the file is at fault, and behind it as many
bytes as its "payload" says. Before that come lines `{"decoded": frames}`, a few in each second in which frames were
decoded.
"""

import contextlib
import fcntl
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence

from cmd_jax.data import video
from cmd_jax.errors import UserError

START_TIMEOUT = 60.0
PROGRESS_EVERY = 0.2  # seconds
MEMORY_LIMIT = 4 << 30
LARGEST_LINE, LARGEST_PAYLOAD = 1 << 28, 1 << 30  # bytes
PIPE = 1 << 20  # bytes that a child may be ahead
READY = {"ready": True}


class Crash(Exception):
    """The child died."""


class Hang(Exception):
    """The child said nothing for too long."""


class Endless(Exception):
    """The child went on for too long."""


class Ended(Exception):
    """`stop` was called."""


class Child:
    """One child process; `ask` sends a request and waits for the answer."""

    def __init__(self, command: Sequence[str]):
        self.unread = bytearray()
        package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        # A session of its own: Ctrl-C reaches the parent alone, which then ends its children.
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0,
            start_new_session=True, env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        with contextlib.suppress(OSError, AttributeError):  # only Linux has it, and not more than its owner may have
            fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, PIPE)
        try:
            if self._answer(START_TIMEOUT, math.inf) != READY:
                raise Crash("it gave a wrong first answer")
        except (Crash, Hang) as error:
            self.process.kill()
            self.errors.seek(0)
            said = (self.errors.read().decode(errors="replace").strip().splitlines() or [str(error)])[-1]
            self.close()
            problem = f"the process that decodes videos does not start ({said})"
            raise UserError(
                "python", " ".join(command), problem, "check that this command starts in a shell"
            ) from error

    def ask(self, request: dict, timeout: float, cap: float) -> tuple[dict, bytearray]:
        """The child's answer and payload, however long it says that it decodes, but for `cap` seconds at most.

        Raises Crash, Hang after `timeout` seconds without a word, or Endless.
        """
        end = time.monotonic() + cap
        try:
            self.process.stdin.write(json.dumps(request | {"timeout": timeout}).encode() + b"\n")
        except OSError as error:
            raise Crash(self._death()) from error
        while "decoded" in (answer := self._answer(timeout, end)):
            pass
        size = answer.get("payload", 0)
        if type(size) is not int or not 0 <= size <= LARGEST_PAYLOAD:
            raise Crash(f"it answered {str(answer)[:80]}")
        payload = bytearray(size)
        filled = min(size, len(self.unread))
        payload[:filled] = self._take(filled)
        with memoryview(payload) as view:
            while filled < size:
                self._wait(time.monotonic() + timeout, end)
                filled += self._some(os.readv(self.process.stdout.fileno(), [view[filled:]]))
        return answer, payload

    def _answer(self, timeout: float, end: float) -> dict:
        """The child's next line."""
        deadline, searched = time.monotonic() + timeout, 0
        while (length := self.unread.find(b"\n", searched)) < 0:
            searched = len(self.unread)
            if searched > LARGEST_LINE:
                raise Crash("its answer has no end")
            self._wait(deadline, end)
            self.unread += self._some(os.read(self.process.stdout.fileno(), PIPE))
        line = self._take(length + 1)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise Crash(f"it answered {line[:80]!r}")
        return answer

    def _wait(self, deadline: float, end: float):
        """Until there are more bytes, or to the earlier of the two."""
        output, left = self.process.stdout.fileno(), min(deadline, end) - time.monotonic()
        poll = select.poll()
        poll.register(output, select.POLLIN)
        if left <= 0 or not poll.poll(left * 1000 if left < math.inf else None):
            raise Hang if deadline < end else Endless

    def _some(self, read):
        """What was read, if it is anything."""
        if not read:
            raise Crash(self._death())
        return read

    def _take(self, size: int) -> bytes:
        taken = bytes(self.unread[:size])
        del self.unread[:size]
        return taken

    def _death(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        try:
            return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except ValueError:
            return f"signal {-code}"

    def close(self):
        """End the child, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


class Supervised:
    """A child that is started when there is something to ask, and anew after one died or was given up.

    timeout: seconds without a further frame. cap: seconds of a request. valid: whether an answer, of which the error
    and the size of the payload are right, is what was asked for.
    """

    def __init__(
        self, command: Sequence[str], timeout: float, cap: float, valid: Callable[[dict], bool] = lambda answer: True
    ):
        self.command, self.timeout, self.cap, self.valid = command, timeout, cap, valid
        self.child, self.stopped = None, False

    def ask(self, request: dict) -> tuple[dict, bytearray]:
        """(answer, payload); of what hangs its child, or crashes two in turn: ({"error": reason}, nothing).

        With "hung": timeout or "endless": cap where it came to that. Raises Ended after `stop`.
        """
        for _ in range(2):  # a crash may be the fault of an earlier request: it counts if a fresh child repeats it
            if self.child is None:
                self.child = Child(self.command)
            if self.stopped:
                self.child.process.kill()
            try:
                answer, payload = self.child.ask(request, self.timeout, self.cap)
                if not (is_error(answer) if "error" in answer else self.valid(answer)):
                    raise Crash(f"it answered {str(answer)[:80]}")
                return answer, payload
            except Crash as crash:
                answer = {"error": f"crashes the decoder ({crash})"}
            except Hang:
                said = f"no further frame for data.probe_timeout={self.timeout:g} s"
                answer = {"error": f"hangs the decoder ({said})", "hung": self.timeout}
            except Endless:
                said = f"more than data.probe_cap={self.cap:g} s"
                answer = {"error": f"takes too long to decode ({said})", "endless": self.cap}
            self.close()
            if self.stopped:
                raise Ended
            if answer.keys() & {"hung", "endless"}:
                break
        return answer, bytearray()

    def stop(self):
        """From another thread: end the request that is being answered, and all that follow."""
        self.stopped = True
        if child := self.child:
            child.process.kill()

    def close(self):
        if self.child:
            self.child.close()
            self.child = None


def is_error(answer: dict) -> bool:
    """Whether an answer that has an "error" is as `Supervised.ask` gives it."""
    limits = (answer.get("hung", 0), answer.get("endless", 0))
    return isinstance(answer["error"], str) and all(isinstance(limit, int | float) for limit in limits)


# The child's side.


def answered(handle: Callable[[dict, Callable], tuple[dict, list]], request: dict, progress: Callable[[], None]):
    """What `handle` gives, (answer, parts of the payload), or the error that the file is to blame for."""
    try:
        return handle(request, progress)
    except video.VideoError as error:
        return {"error": str(error), **({"transient": True} if isinstance(error.__cause__, OSError) else {})}, []
    except MemoryError:
        return {"error": f"needs more memory than the {MEMORY_LIMIT >> 30} GiB that a decoder may have"}, []
    except Exception as error:  # noqa: BLE001  a file must not end the child by an error of a kind unknown here
        return {"error": f"cannot be decoded ({type(error).__name__}: {error})"}, []


def serve(handle: Callable[[dict, Callable], tuple[dict, list]]):
    """The child's loop, until its input ends. handle: (request, a function to call at each frame) -> as `answered`."""
    for limit, value in ((resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # some systems lack a limit; the header check still holds
            resource.setrlimit(limit, (value, value))
    output = os.dup(1)
    os.dup2(2, 1)  # a codec's own prints must not mix with the answers

    def say(message: dict, parts: Iterable = ()):
        for part in (json.dumps(message).encode() + b"\n", *parts):
            view = memoryview(part).cast("B")
            while view:
                view = view[os.write(output, view) :]

    say(READY)
    for line in sys.stdin:
        request = json.loads(line)
        answer, parts = answered(handle, request, _reporter(say, int(request["timeout"]) + 10))
        signal.alarm(0)
        say(answer | {"payload": sum(memoryview(part).nbytes for part in parts)} if parts else answer, parts)


def _reporter(say: Callable[[dict], None], patience: int) -> Callable[[], None]:
    """A function to call at each frame, which tells the parent from time to time.

    This process ends `patience` seconds after it last did: should the parent be gone, nobody else ends a hung decoder.
    """
    said, decoded = time.monotonic(), 0
    signal.alarm(patience)

    def progress():
        nonlocal said, decoded
        decoded += 1
        if time.monotonic() > said + PROGRESS_EVERY:
            said = time.monotonic()
            say({"decoded": decoded})
            signal.alarm(patience)

    return progress
