"""A lock in a bucket: an object that says who holds it, who has to renew it while he lives.

No clock of a host is compared with another's: how old a lock is says the server, and a holder measures his own time.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from cmd_jax.buckets import BucketPath, read_versioned, write_if
from cmd_jax.errors import Unavailable, UserError
from cmd_jax.files import COUNT, parse_json
from cmd_jax.stores import patience

SECONDS, LONGEST = 48, 60  # of a lease: how long it is by default, and at most
RENEWALS = 4  # in the time of a lease
MARGIN = 1 / 6  # of a lease: so long before its end by his own clock a holder gives up
RESOLUTION = 1.0  # seconds: of the times that servers tell
PAUSE = 1.0  # seconds at least between two checks that ask the store, which takes one writing of an object a second
LOOK = 1.0  # seconds between looks at another's lock

RECORD = {
    "holder": str, "host": str, "boot": str, "namespace": str, "pid": COUNT, "started": str, "renewal": COUNT,
    "seconds": range(1, LONGEST + 1), "state": str,
}  # fmt: skip
# It goes on while a machine sleeps, as the clocks of others do.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

log = logging.getLogger(__name__)


def clock() -> float:
    return time.clock_gettime(CLOCK)


def this_process() -> dict:
    """What tells this process from all others, on other machines and in other containers too; JSON."""
    return {"host": socket.gethostname(), **_machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> dict[str, str]:
    """Where process numbers mean the same: this start of the machine, and the namespace; empty if it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"boot": "", "namespace": ""}


def _started(pid: int) -> str:
    """When a process of this machine was started, as the kernel counts; "" for none and for one that ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] in "ZX" else words[19]


def is_here(process: dict) -> bool:
    """Whether it is, or was, one of this very machine. process: as `this_process` has it."""
    here = this_process()
    return bool(here["boot"]) and all(process[name] == here[name] for name in ("host", "boot", "namespace"))


def is_gone(process: dict) -> bool:
    """Whether it was one of this machine, and runs no more."""
    return is_here(process) and _started(process["pid"]) != process["started"]


class Lease:
    """Within this context, or until `release`, this process alone holds the lock object `path`.

    It is renewed by a thread. Who cannot renew it, or finds it taken, has lost it: before it lapses for the others,
    `held` is False, `check` raises, and `on_lost(line)` is called, once, by another thread; set it at any time.

    Entering takes at once what was released, or belongs to a process of this machine that is gone; else what no one
    renewed for the time of its lease, which is waited for. UserError "FIELD=VALUE: another process WHAT" where one
    lives, or if the lock cannot be written. seconds: of the lease, 1 to LONGEST.
    """

    def __init__(self, path: BucketPath, what: str, field: str, value=None, seconds: int = SECONDS):
        self.path, self.what, self.field, self.value = path, what, field, path.parent if value is None else value
        self.seconds, self.on_lost, self.exact = seconds, None, True
        self._me = {"holder": secrets.token_hex(8), **this_process(), "seconds": seconds}
        self._renewal, self._version, self._until, self._lost, self._fault = 0, None, 0.0, "", "no answer"
        self._writing, self._leaving = threading.Lock(), threading.Event()

    def __enter__(self):
        try:
            self._acquire()
            # A server may know no conditions: then this succeeds though the object is there.
            if version := write_if(self.path, self._record("held"), None):
                self._version, self.exact = version, False
                log.warning("%s: its server ignores preconditions: see to it yourself that nobody else does", self.path)
        except OSError as e:
            problem = f"cannot be locked ({e.strerror or e})"
            raise UserError(self.field, self.value, problem, "give a folder you may write to") from e
        for work in (self._renew_always, self._look_out):
            threading.Thread(target=work, name=f"lease {self.path.name}", daemon=True).start()
        return self

    def __exit__(self, *error):
        self.release()

    def held(self) -> bool:
        """Whether nobody else can have it yet, by the last renewal."""
        return not self._lost and clock() < self._until

    def check(self):
        """Before what only its holder may do: renew it, if that was not just done. Unavailable if it is lost."""
        with self._writing:
            if self.held() and self._until < self._end(clock() - PAUSE):
                self._renew()
        if not self.held():
            raise Unavailable(None, self._why(), str(self.path))

    def release(self):
        """Give it back, to be taken at once; a second time this does nothing."""
        self._leaving.set()
        with self._writing:
            held, self._until = self.held(), 0.0
            try:
                with patience(self.seconds * MARGIN):
                    if held:
                        self._write_again("free")
            except OSError as e:
                log.warning("%s lapses in %d s: it cannot be released (%s)", self.path, self.seconds, e.strerror or e)

    def _record(self, state: str) -> bytes:
        self._renewal += 1
        return json.dumps(self._me | {"renewal": self._renewal, "state": state}).encode()

    def _acquire(self):
        first, lapse = None, 0.0  # the lock of another one as it was first seen, and when it lapses
        while True:
            begun = clock()
            data, version, updated = read_versioned(self.path) or (b"", None, 0.0)
            other = None if version is None else _holder(data)
            if other and other["state"] == "held" and not is_gone(other):
                who = f"another process {self.what} (host {other['host']}, pid {other['pid']})"
                if first is None:
                    first, left = version, other["seconds"] + RESOLUTION - self._age(updated)
                    lapse = clock() + left
                    if left > 0 and not is_here(other):
                        wait = f"waiting up to {left:.0f} s to hear whether it still runs"
                        log.warning("%s=%s: %s; %s", self.field, self.value, who, wait)
                if version != first or (is_here(other) and clock() < lapse):
                    raise UserError(self.field, self.value, who, "wait for it, or take another")
                if clock() < lapse:
                    time.sleep(LOOK)
                    continue
            self._version, self._until = write_if(self.path, self._record("held"), version), self._end(begun)
            if self._version is not None:
                return
            first = version or ""  # who was quicker lives

    def _end(self, begun: float) -> float:
        """When to give up what was renewed by a request that began then."""
        return begun + self.seconds * (1 - MARGIN)

    def _age(self, updated: float) -> float:
        """Seconds since the server's clock was at `updated`, by that same clock."""
        probe = self.path.with_name(f"{self.path.name}-{secrets.token_hex(4)}")
        try:
            probe.write_bytes(b"what time is it?")
            found = read_versioned(probe)
        finally:
            probe.unlink(missing_ok=True)
        return found[2] - updated if found else 0.0

    def _renew(self):
        """Renew it, or know better afterwards. `_writing` must be held."""
        begun = clock()
        try:
            with patience(self.seconds * MARGIN):
                version = self._write_again()
        except OSError as e:
            self._fault = e.strerror or str(e)
            return
        if version is not None:
            self._version, self._until = version, self._end(begun)

    def _write_again(self, state: str = "held") -> str | None:
        """The version that was written; None if it is lost."""
        for _ in range(5):
            # Where conditions are ignored this would write over another's.
            if self.exact and (version := write_if(self.path, self._record(state), self._version)):
                return version
            data, version, _ = read_versioned(self.path) or (b"", None, 0.0)
            other = version and _holder(data)
            if not other or other["holder"] != self._me["holder"]:
                who = other and f"another process took it over (host {other['host']}, pid {other['pid']})"
                self._lost = who or "its lock was removed"
                return None
            if not self.exact:
                return write_if(self.path, self._record(state), version)
            self._version = version  # written by a request of ours whose answer got lost
        raise Unavailable(None, "changes whenever it is written", str(self.path))

    def _why(self) -> str:
        return self._lost or f"its lock could not be renewed for {self.seconds * (1 - MARGIN):.0f} s ({self._fault})"

    def _renew_always(self):
        while not self._leaving.wait(self.seconds / RENEWALS) and self.held():
            with self._writing:
                if not self._leaving.is_set():
                    self._renew()

    def _look_out(self):
        """Apart from what renews, which may hang with the network."""
        while not self._leaving.wait(self.seconds / 60):
            if not self.held() and self.on_lost and not self._leaving.is_set():
                line = UserError(self.field, self.value, self._why(), "run the same command again to resume")
                self.on_lost(str(line))
                return


def _holder(data: bytes) -> dict:
    """Who holds a lock of that content; somebody, if it is not what is written here."""
    try:
        return parse_json(data, "lock", "content", like=RECORD)
    except UserError:
        nobody = {"holder": "", "host": "?", "boot": "", "namespace": "", "pid": 0, "started": ""}
        return nobody | {"seconds": SECONDS, "state": "held"}
