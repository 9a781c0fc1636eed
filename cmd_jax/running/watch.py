"""What becomes of a run whose peers fail, or which finishes no step."""

import contextlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import Unavailable, UserError, tell
from cmd_jax.running.distributed import linger, linger_for, run_id
from cmd_jax.running.lease import Lease
from cmd_jax.running.peers import Peers
from cmd_jax.stores import patience

STOPPED_EARLY = "stopped by a signal before the first step; nothing to save"
# Who lost the lock of a bucket ends before it lapses for the others, whatever hangs.
LAST_WORDS = 1.0  # seconds in which the bucket is tried then
LAST_SECONDS = 4.0


@contextlib.contextmanager
def watched(
    folder: Path | BucketPath, options, flight, stop, end_process: Callable | None = None, lease: Lease | None = None
):
    """Peers of this run in its folder; the end of one is the end of all, with a line that says which and why.

    options: the config's `processes` group. flight: writes what was known at a fault, or None. stop: the StopRequest of
    this process, of which the others hear. lease: of the folder; to lose it is a fault like those of peers.
    end_process(exit code): called by the thread that watches, whatever the main thread is stuck in, with 3 where a
    restart may mend it. Without it the line is told; and where a collective breaks off over a lost peer, it is raised
    as a RuntimeError. A library whose main thread hangs in a collective hangs on: with several processes give one.
    """
    found, count, told, timers = queue.SimpleQueue(), jax.process_count(), threading.Event(), []

    def tell_once(line: str):
        if not told.is_set():
            told.set()
            tell(line)

    def on_fault(kind: str, line: str, facts: dict):
        try:
            if flight and kind != "peer-failed":
                flight.write(kind, message=line, **facts)
        finally:
            tell_once(line)
            if end_process:
                if lease:
                    lease.release()
                linger()
                end_process(0 if line == stop.farewell else 2 if kind == "peer-failed" else 3)
            found.put(line)

    with Peers(
        folder, jax.process_index(), count, run_id(),
        peer_timeout=options.peer_timeout, stall_timeout=options.stall_timeout, on_fault=on_fault,
    ) as peers:  # fmt: skip
        linger_for(2.5 * peers.interval)
        stop.first(lambda: peers.fail(stop.farewell))
        if lease:
            stop.first(lease.release)

            def end(line: str):
                tell_once(line)
                end_process(3)

            def lost(line: str):
                if end_process and count == 1:  # several hear of it by the heartbeat of this one
                    timer = threading.Timer(LAST_SECONDS, end, (line,))
                    timer.daemon = True
                    timers.append(timer)
                    timer.start()
                with patience(LAST_WORDS):
                    peers.give_up("lost-lock", line, {})

            lease.on_lost = lost
        try:
            yield peers
        except (UserError, Unavailable):
            raise
        except Exception as error:
            if count > 1:
                # A collective that breaks off is a lost peer as a rule; the watch will soon know which.
                tell(f"{type(error).__name__}: {error}; looking for a lost peer")
                with contextlib.suppress(queue.Empty):
                    raise RuntimeError(found.get(timeout=options.peer_timeout * 1.5)) from error
            raise
        finally:
            for timer in timers:
                timer.cancel()
