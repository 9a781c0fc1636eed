"""Decoding every file once in child processes, so that a file that crashes or hangs the decoder harms nobody else.

`probe` is the parent's side. `python -m cmd_jax.data.probe` is the child: it reads one JSON request a line
(`{"path": ..., "timeout": seconds}`) and answers each with one line: what is in the file, or `{"error": reason}`.
Before that come lines `{"decoded": frames}`, a few in each second in which frames were decoded.
"""

import contextlib
import itertools
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from cmd_jax.errors import UserError

COMMAND = (sys.executable, "-m", "cmd_jax.data.probe")
MOST_CHILDREN = 8
START_TIMEOUT = 60.0
PROGRESS_EVERY = 0.2  # seconds
MEMORY_LIMIT = 4 << 30
READY = {"ready": True}


class Crash(Exception):
    """The child died."""


class Hang(Exception):
    """The child said nothing for too long."""


class Endless(Exception):
    """The child went on for too long."""


class Child:
    """One child process; `ask` sends a request and waits for the answer."""

    def __init__(self, command: Sequence[str]):
        self.unread = b""
        package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        # A session of its own: Ctrl-C reaches the parent alone, which then ends its children.
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0,
            start_new_session=True, env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            if self._answer(START_TIMEOUT, math.inf) != READY:
                raise Crash("it gave a wrong first answer")
        except (Crash, Hang) as error:
            self.process.kill()
            self.errors.seek(0)
            said = (self.errors.read().decode(errors="replace").strip().splitlines() or [str(error)])[-1]
            self.close()
            problem = f"the process that tests videos does not start ({said})"
            raise UserError(
                "python", " ".join(command), problem, "check that this command starts in a shell"
            ) from error

    def ask(self, request: dict, timeout: float, cap: float) -> dict:
        """The child's answer, however long it says that it decodes, but for `cap` seconds at most.

        Raises Crash, Hang after `timeout` seconds without a word, or Endless.
        """
        end = time.monotonic() + cap
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise Crash(self._death()) from error
        while "decoded" in (answer := self._answer(timeout, end)):
            pass
        if not is_facts(answer):
            raise Crash(f"it answered {str(answer)[:80]}")
        return answer

    def _answer(self, timeout: float, end: float) -> dict:
        """The child's next line."""
        deadline, output = min(time.monotonic() + timeout, end), self.process.stdout.fileno()
        poll = select.poll()
        poll.register(output, select.POLLIN)
        while b"\n" not in self.unread:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise Hang if deadline < end else Endless
            piece = os.read(output, 65536)
            if not piece:
                raise Crash(self._death())
            self.unread += piece
        line, _, self.unread = self.unread.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise Crash(f"it answered {line[:80]!r}")
        return answer

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


def is_facts(facts: dict) -> bool:
    """Whether they are as `probe` yields them."""
    if "error" in facts:
        limits = (facts.get("hung", 0), facts.get("endless", 0))
        return isinstance(facts["error"], str) and all(isinstance(limit, int | float) for limit in limits)
    numbers = [facts.get(name) for name in ("frames", "declared", "width", "height")]
    key_frames = facts.get("key_frames")
    if not isinstance(key_frames, list) or any(not isinstance(row, list) or len(row) != 3 for row in key_frames):
        return False
    return all(type(number) is int and abs(number) < 2**63 for number in itertools.chain(numbers, *key_frames))


def probe(
    paths: Sequence[str], timeout: float, command: Sequence[str] = COMMAND, cap: float = math.inf
) -> Iterator[tuple[str, dict]]:
    """Decode each of `paths` once, in at most 8 children: yields (path, facts) as they come, in any order.

    facts: {"frames", "declared", "width", "height", "key_frames"} (frames that decode, frames that the header promises,
    0 if it doesn't say, the size at which they are shown, and `video.KeyFrame`s at which decoding may begin) or
    {"error": reason}, with "hung": timeout or "endless": cap where it came to that, and "transient": true where the
    file could not be read. timeout: seconds without a further frame. cap: seconds a file. A file that hangs its child,
    or crashes two in turn, costs that file only.
    """
    todo, done, stopped = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    children: set[Child] = set()
    for path in paths:
        todo.put(path)

    def start() -> Child:
        child = Child(command)
        children.add(child)
        if stopped.is_set():
            child.process.kill()
        return child

    def end(child: Child):
        children.discard(child)
        child.close()

    def work():
        child = None
        try:
            while not stopped.is_set():
                path, facts = todo.get_nowait(), None
                for _ in range(2):  # a crash may be the fault of an earlier file: it counts if a fresh child repeats it
                    child = child or start()
                    try:
                        facts = child.ask({"path": path, "timeout": timeout}, timeout, cap)
                        break
                    except Crash as crash:
                        facts = {"error": f"crashes the decoder ({crash})"}
                    except Hang:
                        said = f"no further frame for data.probe_timeout={timeout:g} s"
                        facts = {"error": f"hangs the decoder ({said})", "hung": timeout}
                    except Endless:
                        said = f"more than data.probe_cap={cap:g} s"
                        facts = {"error": f"takes too long to decode ({said})", "endless": cap}
                    end(child)
                    child = None
                    if facts.keys() & {"hung", "endless"} or stopped.is_set():
                        break
                done.put((path, facts))
        except queue.Empty:
            pass
        except Exception as error:  # noqa: BLE001  whatever it is, the parent's thread must hear of it
            done.put((None, error))
        finally:
            if child:
                end(child)

    workers = [
        threading.Thread(target=work, daemon=True) for _ in range(min(os.cpu_count() or 1, MOST_CHILDREN, len(paths)))
    ]
    for worker in workers:
        worker.start()
    try:
        for _ in paths:
            path, facts = done.get()
            if path is None:
                raise facts
            yield path, facts
    finally:
        stopped.set()
        for child in list(children):
            child.process.kill()
        for worker in workers:
            worker.join()


def inspect(path: str, progress: Callable[[], None] = lambda: None) -> dict:
    """Decode all of one file -> the facts that `probe` yields. Runs in the child; calls `progress` at each frame."""
    from av.video.reformatter import VideoReformatter

    from cmd_jax.data import seeking, video

    try:
        with video.open_video(path) as (container, stream):
            count, shape, candidates = 0, None, seeking.Candidates()
            for frame in video.decode(container, stream, candidates.see_packet):
                progress()
                if count == 0:
                    video.to_rgb(frame, VideoReformatter())  # is there a way from its pixel format to RGB?
                    shape, (width, height, _) = (frame.width, frame.height), video.shown(stream, frame)
                if (frame.width, frame.height) != shape:
                    size = f"{shape[0]}x{shape[1]} to {frame.width}x{frame.height}"
                    raise video.VideoError(f"changes its frame size on the way ({size})")
                candidates.see_frame(count, frame)
                count += 1
            if count == 0:
                raise video.VideoError("holds no frame that decodes")
            facts = {"frames": count, "declared": stream.frames, "width": width, "height": height}
        return facts | {"key_frames": candidates.tried(path, progress)}
    except video.VideoError as error:
        return {"error": str(error), **({"transient": True} if isinstance(error.__cause__, OSError) else {})}
    except MemoryError:
        return {"error": f"needs more memory than the {MEMORY_LIMIT >> 30} GiB that a decoder may have"}
    except Exception as error:  # noqa: BLE001  a file must not end the child by an error of a kind unknown here
        return {"error": f"cannot be decoded ({type(error).__name__}: {error})"}


def main():
    """The child's loop, until its input ends."""
    import resource

    import cmd_jax.data.video  # noqa: F401  so that READY says that the decoder is there

    for limit, value in ((resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # some systems lack a limit; the header check still holds
            resource.setrlimit(limit, (value, value))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a codec's own prints must not mix with the answers
    print(json.dumps(READY), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        progress = _reporter(answers, int(request["timeout"]) + 10)
        answer = inspect(request["path"], progress)
        signal.alarm(0)
        print(json.dumps(answer), file=answers)


def _reporter(answers: TextIO, patience: int) -> Callable[[], None]:
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
            print(json.dumps({"decoded": decoded}), file=answers)
            signal.alarm(patience)

    return progress


if __name__ == "__main__":
    main()
