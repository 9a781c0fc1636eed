"""Faults that a server of buckets orders, and moto's server with them."""

import dataclasses
import io
import random
import re
import socket
import threading
import time
from email.utils import formatdate, parsedate_to_datetime

UNASKED = "X-Test-Unasked"  # the header of a test's own requests: no fault befalls them


@dataclasses.dataclass
class Faults:
    """What goes wrong from now on; a test sets fields as it goes."""

    share: float = 0.0  # of the requests meet one of `kinds`
    # 503, 429: not done; drop: not done, no answer; cut: done, but only half of the answer comes
    kinds: tuple[str, ...] = ("503", "429", "drop", "cut")
    seed: int = 0  # of who meets what, in the order of arrival
    only: str = ""  # a pattern; only requests like "POST /upload/storage/v1/b/..." meet them
    # So many of the next uploads lose the second half of their data: refused if a sum came along, else kept, and the
    # answer says so.
    truncate: int = 0
    deny: str = ""  # "read", "write" or "all" is answered `status`
    status: int = 403  # or 401
    hang: bool = False  # accepted, never answered
    skew: float = 0.0  # seconds that the server's clock is ahead


class Faulty:
    """A server's part in it. `seen`: (method, path with its query, status) of every request, 0 for a connection that
    was closed without a whole answer."""

    def __init__(self, **faults):
        self.seen: list[tuple[str, str, int]] = []
        self.stopped = threading.Event()
        self.lock = threading.RLock()
        self.order(**faults)

    def order(self, **faults):
        """These faults from now on, and no others."""
        self.faults = Faults(**faults)
        self.chance = random.Random(self.faults.seed)

    def now(self) -> float:
        return time.time() + self.faults.skew

    def fault_of(self, method: str, path: str) -> str:
        """What befalls a request now: one of `kinds`, "deny", or nothing. From a "hang" it comes back when
        the next faults are ordered."""
        faults = self.faults
        if not re.search(faults.only, f"{method} {path}"):
            return ""
        while faults.hang and faults is self.faults and not self.stopped.wait(0.05):
            pass
        if faults.hang:
            return "drop"
        if faults.deny in ("read" if method in ("GET", "HEAD") else "write", "all"):
            return "deny"
        if not faults.share:
            return ""
        with self.lock:
            return self.chance.choice(faults.kinds) if self.chance.random() < faults.share else ""

    def truncates(self) -> bool:
        """Whether this upload, of those that are counted, loses its second half."""
        with self.lock:
            self.faults.truncate -= (found := self.faults.truncate > 0)
            return found


class FaultyS3(Faulty):
    """moto's application behind the faults: a WSGI application."""

    def __init__(self, application, **faults):
        super().__init__(**faults)
        self.application = application

    def __call__(self, environ, start):
        method, path = environ["REQUEST_METHOD"], environ["RAW_URI"]
        unasked = "HTTP_" + UNASKED.upper().replace("-", "_") in environ
        fault = "" if unasked else self.fault_of(method, path)
        codes = {"503": "SlowDown", "429": "TooManyRequests", "deny": "AccessDenied"}
        if fault in codes:
            return self.refuse(environ, start, str(self.faults.status) if fault == "deny" else fault, codes[fault])
        if fault == "drop":
            return self.hang_up(environ, method, path)
        if method == "PUT" and not unasked and self.truncates():
            if any(name.startswith(("HTTP_X_AMZ_CHECKSUM", "HTTP_CONTENT_MD5")) for name in environ):
                return self.refuse(environ, start, "400", "IncompleteBody")
            half = int(environ["CONTENT_LENGTH"]) // 2
            environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(environ["wsgi.input"].read(half)), str(half)
        answer = {}

        def hear(status, headers, exc_info=None):
            answer["status"] = status
            answer["headers"] = [(name, self.shifted(name, value)) for name, value in headers]

        body = b"".join(self.application(environ, hear))
        if fault == "cut" and len(body) < 2:
            return self.hang_up(environ, method, path)
        self.seen.append((method, path, int(answer["status"][:3]) * (fault != "cut")))
        start(answer["status"], answer["headers"])
        return self.cut(environ, body) if fault == "cut" else [body]

    def refuse(self, environ, start, status: str, code: str):
        method = environ["REQUEST_METHOD"]
        self.seen.append((method, environ["RAW_URI"], int(status)))
        body = f"<Error><Code>{code}</Code><Message>as it was ordered</Message></Error>".encode()
        if environ.get("CONTENT_LENGTH"):
            environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        start(f"{status} Refused", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if method == "HEAD" else [body]

    def shifted(self, name: str, value: str) -> str:
        if name.lower() not in ("date", "last-modified"):
            return value
        return formatdate(parsedate_to_datetime(value).timestamp() + self.faults.skew, usegmt=True)

    def hang_up(self, environ, method: str, path: str):
        self.seen.append((method, path, 0))
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionError

    @staticmethod
    def cut(environ, body: bytes):
        yield body[: len(body) // 2]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
