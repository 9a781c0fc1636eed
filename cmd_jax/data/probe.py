"""Decoding every file once in child processes, so that a file that crashes or hangs the decoder harms nobody else.

`probe` is the parent's side. `python -m cmd_jax.data.probe` is the child: it reads one JSON request a line
(`{"path": ..., "timeout": seconds}`) and answers each with one line: what is in the file, or `{"error": reason}`.
"""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

from cmd_jax.errors import UserError

COMMAND = (sys.executable, "-m", "cmd_jax.data.probe")
MOST_CHILDREN = 8
START_TIMEOUT = 60.0
MEMORY_LIMIT = 4 << 30
READY = {"ready": True}


class Crash(Exception):
    """The child died."""


class Hang(Exception):
    """The child did not answer in time."""


class Child:
    """One child process; `ask` sends a request and waits for the answer."""

    def __init__(self, command: Sequence[str]):
        package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        # A session of its own: Ctrl-C reaches the parent alone, which then ends its children.
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0,
            start_new_session=True, env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            if self._answer(START_TIMEOUT) != READY:
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

    def ask(self, request: dict, timeout: float) -> dict:
        """The child's answer; raises Crash or Hang."""
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise Crash(self._death()) from error
        return self._answer(timeout)

    def _answer(self, timeout: float) -> dict:
        deadline, line, output = time.monotonic() + timeout, b"", self.process.stdout.fileno()
        poll = select.poll()
        poll.register(output, select.POLLIN)
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise Hang
            piece = os.read(output, 65536)
            if not piece:
                raise Crash(self._death())
            line += piece
        try:
            return json.loads(line)
        except ValueError as error:
            raise Crash(f"it answered {line[:80]!r}") from error

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


def probe(paths: Sequence[str], timeout: float, command: Sequence[str] = COMMAND) -> Iterator[tuple[str, dict]]:
    """Decode each of `paths` once, in at most 8 children: yields (path, facts) as they come, in any order.

    facts: {"frames", "declared", "width", "height"} (frames that decode, frames that the header promises, 0 if it
    doesn't say, and the size at which they are shown) or {"error": reason}, with "hung": timeout where it hung and
    "transient": true where the file could not be read. `timeout` is seconds a file; a file that hangs its child, or
    crashes two in turn, costs that file only.
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
                for attempt in (
                    1,
                    2,
                ):  # a crash may be the fault of an earlier file, so it counts if a fresh child repeats it
                    child = child or start()
                    try:
                        facts = child.ask({"path": path, "timeout": timeout}, timeout)
                        break
                    except Crash as crash:
                        facts = {"error": f"crashes the decoder ({crash})"}
                    except Hang:
                        facts = {"error": f"hangs the decoder (no end after {timeout:g} s)", "hung": timeout}
                        attempt = 2
                    end(child)
                    child = None
                    if attempt == 2 or stopped.is_set():
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


def inspect(path: str) -> dict:
    """Decode all of one file -> the facts that `probe` yields. Runs in the child."""
    from cmd_jax.data import video

    try:
        with video.open_video(path) as (container, stream):
            count, shape = 0, None
            for frame in video.decode(container, stream):
                if count == 0:
                    video.to_rgb(frame)  # is there a way from its pixel format to RGB?
                    shape, (width, height, _) = (frame.width, frame.height), video.shown(stream, frame)
                if (frame.width, frame.height) != shape:
                    size = f"{shape[0]}x{shape[1]} to {frame.width}x{frame.height}"
                    raise video.VideoError(f"changes its frame size on the way ({size})")
                count += 1
            if count == 0:
                raise video.VideoError("holds no frame that decodes")
            return {"frames": count, "declared": stream.frames, "width": width, "height": height}
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
        signal.alarm(int(request["timeout"]) + 10)  # should the parent be gone by then, nobody else ends a hung decoder
        answer = inspect(request["path"])
        signal.alarm(0)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
