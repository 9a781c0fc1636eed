"""Decoding every file once in child processes (`cmd_jax.data.supervised`), to know which are whole, and how long.

`probe` is the parent's side. `python -m cmd_jax.data.probe` is the child, which is asked about a "path".
"""

import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from cmd_jax.data import seeking, timing, video
from cmd_jax.data.supervised import Ended, Supervised, is_error, serve

COMMAND = (sys.executable, "-m", "cmd_jax.data.probe")
MOST_CHILDREN = 8


def is_facts(facts: dict) -> bool:
    """Whether they are as `probe` yields them."""
    if "error" in facts:
        return is_error(facts)
    numbers = [facts.get(name) for name in ("frames", "declared", "width", "height")]
    rows = [(facts.get("key_frames"), 3), (facts.get("steps", []), 2), ([facts.get("tick", [0, 1])], 2)]
    if any(not isinstance(some, list) for some, _ in rows):
        return False
    if any(not isinstance(row, list) or len(row) != n for some, n in rows for row in some):
        return False
    numbers += [number for some, _ in rows for row in some for number in row]
    return all(type(number) is int and abs(number) < 2**63 for number in numbers)


def probe(
    paths: Sequence[str],
    timeout: float,
    command: Sequence[str] = COMMAND,
    cap: float = math.inf,
    times: bool = False,
) -> Iterator[tuple[str, dict]]:
    """Decode each of `paths` once, in at most 8 children: yields (path, facts) as they come, in any order.

    facts: {"frames", "declared", "width", "height", "key_frames"} (frames that decode, frames that the header promises,
    0 if it doesn't say, the size at which they are shown, and `video.KeyFrame`s at which decoding may begin) or
    {"error": reason}, with "hung": timeout or "endless": cap where it came to that, and "transient": true where the
    file could not be read. timeout: seconds without a further frame. cap: seconds a file. times: give the times of the
    frames too, as "steps" (`timing.Steps.runs`) of "tick" seconds, a fraction. A file that hangs its child, or crashes
    two in turn, costs that file only.
    """
    todo, done = queue.SimpleQueue(), queue.SimpleQueue()
    for path in paths:
        todo.put(path)
    children = [
        Supervised(command, timeout, cap, is_facts) for _ in range(min(os.cpu_count() or 1, MOST_CHILDREN, len(paths)))
    ]

    def work(child: Supervised):
        try:
            while True:
                path = todo.get_nowait()
                done.put((path, child.ask({"path": path, "times": times})[0]))
        except (queue.Empty, Ended):
            pass
        except Exception as error:  # noqa: BLE001  whatever it is, the parent's thread must hear of it
            done.put((None, error))
        finally:
            child.close()

    workers = [threading.Thread(target=work, args=(child,), daemon=True) for child in children]
    for worker in workers:
        worker.start()
    try:
        for _ in paths:
            path, facts = done.get()
            if path is None:
                raise facts
            yield path, facts
    finally:
        for child in children:
            child.stop()
        for worker in workers:
            worker.join()


def inspect(request: dict, progress: Callable[[], None]) -> tuple[dict, list]:
    """Decode all of one file -> (the facts that `probe` yields, nothing). Runs in the child."""
    path = request["path"]
    with video.open_video(path) as (container, stream):
        count, candidates, clock, steps = 0, seeking.Candidates(), timing.Clock.of(stream), timing.Steps()
        for frame in video.steady(video.decode(container, stream, candidates.see_packet)):
            progress()
            if count == 0:
                width, height, _ = video.shown(stream, frame)
            candidates.see_frame(count, frame)
            steps.add(clock.step(frame.pts))
            count += 1
        facts = {"frames": count, "declared": stream.frames, "width": width, "height": height}
        if request["times"]:
            facts |= {"steps": steps.runs, "tick": stream.time_base.as_integer_ratio()}
    return facts | {"key_frames": candidates.tried(path, progress)}, []


if __name__ == "__main__":
    serve(inspect)
