"""Who writes which shards: threads of this machine, each with a decoder of its own, or the jobs of a batch system."""

import os
import queue
import threading
from collections.abc import Callable, Sequence

from cmd_jax.data.supervised import Ended
from cmd_jax.errors import UserError
from cmd_jax.ingest.plan import Plan
from cmd_jax.ingest.shard import Limits, open_reader, write_shard


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def part_of(text: str | None, count: int) -> range:
    """The shards, of `count`, of the I-th of N parts, given as I/N from 1/N to N/N; all without a text."""
    if text is None:
        return range(count)
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError("--part", text, "not a part", "write it like 1/8, the first of eight; the last is 8/8")
    return range(int(part) - 1, count, int(parts))


def run_pool(
    plan: Plan, shards: Sequence[int], workers: int, limits: Limits, told: Callable[[str], None] = lambda reason: None
):
    """Write the shards, of which many may be finished; told: see `write_shard`, is called by any thread."""
    todo, errors, ended = queue.SimpleQueue(), [], threading.Event()
    for k in shards:
        todo.put(k)
    readers = [open_reader(plan, limits) for _ in range(min(workers, len(shards)))]

    def work(reader):
        try:
            while not ended.is_set():
                write_shard(plan, todo.get_nowait(), reader, told)
        except (queue.Empty, Ended):
            pass
        except BaseException as error:  # noqa: BLE001  whatever it is, the caller must hear of it
            errors.append(error)
            stop()
        finally:
            reader.close()

    def stop():
        ended.set()
        for reader in readers:
            reader.stop()

    threads = [threading.Thread(target=work, args=(reader,), daemon=True) for reader in readers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop()
        for thread in threads:
            if thread.ident:  # it was started
                thread.join()
    if errors:
        raise errors[0]
