"""The watch over the processes of one run: each tells by a file that it lives, and a thread reads the others'."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import Stopped, Unavailable, UserError, exit_code, of_file
from cmd_jax.files import COUNT, is_remote, parse_json, write_text
from cmd_jax.stores import patience

log = logging.getLogger(__name__)

HEARTBEAT = {
    "run": str, "process": COUNT, "count": COUNT, "host": str, "pid": COUNT, "step": (COUNT, None), "time": float,
    "state": str, "message": str, "fault": str,
}  # fmt: skip


class Peers:
    """Heartbeat files FOLDER/processes/INDEX.json of the `count` processes of a run, and a thread that reads them.

    run: a name that this start of the job alone has; files of other runs count for nothing. A disk or a bucket that
    cannot be written or read is no fault: there is a warning.

    In a bucket every process writes its object and lists the folder each `interval`, 5 s as a rule: 13 + 13 requests a
    second for 64 processes. An object that goes on changing is read when it appears, and when a line speaks of it;
    another one once, when it has stopped to change.

    The thread calls on_fault(reason, line, facts) at most once, and then watches no more. reason is
        "lost-peer"    a process was silent for `peer_timeout` seconds; facts: missing, step;
        "peer-failed"  a process failed; the line is its message; facts: failed, step;
        "peer-crashed" a process ended by an error that is none of the user's; facts: failed, step;
        "unavailable"  a store did not answer a process, which is a reason to start again; facts: failed, step;
        "stall"        no step was finished here for `stall_timeout` seconds (0: off); facts: seconds, steps, step.
    Who finds a process lost or a stall tells the others, for which it is the reason too (facts: failed, step).
    Only changes of a file count, by this process's clock: clocks of other hosts may differ. Leaving the context is
    `done`, or `fail` if by an error.
    """

    def __init__(
        self, folder: Path | BucketPath, index: int, count: int, run: str, *, peer_timeout: float, stall_timeout: float,
        on_fault: Callable[[str, str, dict], None],
    ):  # fmt: skip
        self.folder, self.index, self.count, self.run = folder / "processes", index, count, run
        self.peer_timeout, self.stall_timeout, self.on_fault = peer_timeout, stall_timeout, on_fault
        self.remote = is_remote(folder)
        self.interval = min(5.0, peer_timeout / 10) if self.remote else min(2.0, peer_timeout / 5)
        self._step, self._busy = None, 0
        self._state = {"state": "running", "message": "", "fault": ""}
        self._writing, self._deciding = threading.Lock(), threading.Lock()
        self._leaving, self._warned = threading.Event(), False
        # The last record of each process, and of the others what was last seen of the file and when that changed.
        others = [i for i in range(count) if i != index]
        self._records, self._seen, self._changed = {}, {}, dict.fromkeys(others, 0.0)
        self._versions, self._unread = {}, set()  # in a bucket: as they were listed, and whose changes were not read
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def __enter__(self):
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        if self._state["state"] == "running":
            if error is None:
                self.done()
            elif isinstance(error, UserError | Stopped | Unavailable):
                line = str(of_file(error) if isinstance(error, Unavailable) else error)
                self._end("failed", line, "unavailable" if exit_code(error) == 3 else "")
            else:
                crash = f"process {self.index} crashed ({kind.__name__}: {error})"
                line = self._line("processes", self.count, crash, "look at its log")
                self._end("failed", line, "peer-crashed")
        self._leaving.set()
        # It may itself be what ends this process, or hang with the file system.
        self._thread.join(timeout=self.peer_timeout)

    def progress(self, step: int):
        """A step was finished."""
        self._step = step

    @contextlib.contextmanager
    def busy(self):
        """A long pause that is known (compilation, a last save): no stall, whose clock starts anew afterwards."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    def fail(self, message: str):
        """The others end with this message."""
        self._end("failed", message)

    def done(self):
        """Silence from now on is no fault."""
        self._end("done")

    def _end(self, state: str, message: str = "", fault: str = ""):
        self._state = {"state": state, "message": " ".join(message.split()), "fault": fault}
        self._beat()

    def _beat(self):
        path = self.folder / f"{self.index}.json"
        with self._writing:
            record = {
                "run": self.run,
                "process": self.index,
                "count": self.count,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "step": self._step,
                "time": time.time(),
                **self._state,
            }
            self._records[self.index], text = record, json.dumps(record) + "\n"
            try:
                with patience(self.peer_timeout / 4):
                    write_text(path, text, sync=False)
            except OSError as e:
                self._warn(f"the heartbeat {path} cannot be written: {e}")
                if self.remote:
                    return
                # In its place it needs no new room on a full disk; a reader who comes between just reads again.
                with contextlib.suppress(OSError), open(path, "r+") as file:
                    file.write(text)
                    file.truncate()

    def _warn(self, problem: str):
        if not self._warned:
            log.warning(problem)
        self._warned = True

    def _read(self, now: float) -> bool:
        """See whose file has changed -> whether one could look."""
        if not self.remote:
            for i in self._changed:
                if self._read_one(i):
                    self._changed[i] = now
            return True
        with patience(self.peer_timeout / 4):
            try:
                versions = {name: status.version for name, status in self.folder.stats().items()}
            except OSError as e:
                self._warn(f"the heartbeats in {self.folder} cannot be listed: {e}")
                return False
            for i in self._changed:
                version, known = versions.get(f"{i}.json"), i in self._records
                new, self._versions[i] = version not in (None, self._versions.get(i)), version
                if new and known:
                    self._changed[i] = now
                    self._unread.add(i)
                elif (new or i in self._unread) and self._read_one(i) and not known:
                    self._changed[i] = now
        return True

    def _read_one(self, i: int) -> bool:
        """Whether its file says something new. One that cannot be read, or is of another run, is no news."""
        try:
            seen = (self.folder / f"{i}.json").read_bytes()
            record = parse_json(seen, "heartbeat", i, like=HEARTBEAT)
        except (OSError, UserError):
            return False
        if record["run"] != self.run or seen == self._seen.get(i):
            return False
        self._seen[i], self._records[i] = seen, record
        self._unread.discard(i)
        return True

    def _watch(self):
        now, ticked, moved, step = 0.0, time.monotonic(), 0.0, None
        while not self._leaving.wait(self.interval):
            # If this process was stopped, or the disk hung, the others may have been too: such a pause counts in part.
            elapsed, ticked = time.monotonic() - ticked, time.monotonic()
            passed = min(elapsed, self.peer_timeout / 2)
            state = self._state["state"]
            if state == "failed":
                return
            if state == "running":
                self._beat()
            now += passed if self._read(now + passed) else 0.0  # who cannot look knows of no silence
            if self._step != step or self._busy or state == "done":
                moved, step = now, self._step
            fault = self._lost(now) or self._failed(now) or (step is not None and self._stalled(now - moved))
            if fault:
                self.give_up(*fault)
                return

    def give_up(self, reason: str, line: str, facts: dict):
        """End with it, unless this process has failed already; from any thread."""
        with self._deciding:
            if self._state["state"] == "failed":
                return
            # The others would else find this process lost, and name the wrong one.
            self._end("failed", line, reason)
        self.on_fault(reason, line, {"step": self._step, **facts})

    def _lost(self, now: float):
        ages = {i: now - at for i, at in self._changed.items() if self._state_of(i) == "running"}
        if not ages or max(ages.values()) < self.peer_timeout:
            return None
        # Those that fell silent with it are on their way to the same.
        missing = {i: age for i, age in ages.items() if age > self.peer_timeout / 2}
        names = []
        for i, age in missing.items():
            heard = f"last heard of {age:.3g} s ago {self._where(i)}" if i in self._records else "never heard of"
            names.append(f"process {i}{self._who(i)} was {heard}")
        problem = " and ".join(names[:4]) + (f" and {len(names) - 4} more are silent" if names[4:] else "")
        line = self._line("processes", self.count, f"{problem}; the job ends", "look at its log")
        return "lost-peer", line, {"missing": [self._facts(i, age) for i, age in missing.items()]}

    def _failed(self, now: float):
        for i, changed in self._changed.items():
            # Not at the first sight: a fault that all see, like a loss that is not finite, is on its way here too.
            if self._state_of(i) == "failed" and changed < now:
                record, unnamed = self._records[i], f"process {i}{self._who(i)} failed; look at its log"
                line = record["message"] or f"processes={self.count}: {unnamed}"
                return record["fault"] or "peer-failed", line, {"failed": self._facts(i, now - changed)}
        return None

    def _stalled(self, seconds: float):
        if not self.stall_timeout or seconds < self.stall_timeout:
            return None
        for i in list(self._unread):
            self._read_one(i)
        steps = {i: record["step"] for i, record in sorted(self._records.items())}
        done = {i: -1 if step is None else step for i, step in steps.items()}
        behind = [i for i in done if done[i] == min(done.values())]
        problem = f"process {self.index} finished no step for {seconds:.3g} s, after step {self._step}"
        if len(behind) < len(done):
            names = (f"process {i}{self._who(i)} {self._where(i)}" for i in behind[:4])
            problem += f"; furthest behind: {', '.join(names)}"
        line = self._line("processes.stall_timeout", self.stall_timeout, problem, "look at flight/ and the logs")
        return "stall", line, {"seconds": round(seconds, 3), "steps": steps}

    def _state_of(self, i: int) -> str:
        return self._records[i]["state"] if i in self._records else "running"

    def _who(self, i: int) -> str:
        record = self._records.get(i)
        return f" (host {record['host']}, pid {record['pid']})" if record else ""

    def _where(self, i: int) -> str:
        step = self._records[i]["step"]
        return "before its first step" if step is None else f"at step {step}"

    def _facts(self, i: int, age: float) -> dict:
        record = self._records.get(i, {})
        return {"process": i, "age": round(age, 3)} | {key: record.get(key) for key in ("host", "pid", "step")}

    def _line(self, field: str, value, problem: str, remedy: str) -> str:
        return str(UserError(field, value, problem, f"{remedy}, then run the same command to resume"))
