"""What the testing of files has found, in a file that grows by a line a file: whatever ends the process keeps it."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from cmd_jax.data import probe
from cmd_jax.errors import UserError
from cmd_jax.files import is_remote, parse_json, write_text

HEADER = {"format": 2, "av": version("av")}  # another decoder may find otherwise
UPLOAD_EVERY = 60.0

log = logging.getLogger(__name__)


class Outcomes:
    """Facts (see `probe.probe`) of files, with the key (size, modification time in ns) that they had then.

    path: JSON lines, the header first. Lines that are torn, or that a later one of the same file replaces, go when the
    next are appended. In a bucket, where nothing is appended, it is written anew each UPLOAD_EVERY seconds and at the
    end. Without a path nothing is kept.
    """

    def __init__(self, path: Path | None):
        self.path, self.known, self._whole = path, {}, True
        if path is None:
            return
        try:
            header, *lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            self._whole = False
            return
        except OSError as error:
            log.warning("%s is not readable (%s): all files are tested again", path, error.strerror)
            return
        if self._parse(header) != HEADER:
            log.warning("%s is not of this version: all files are tested again", path)
            self._whole = False
            return
        torn = lines.pop() if lines else b""
        for entry in map(self._parse, lines):
            name, key = entry.pop("name", None), entry.pop("key", None)
            if isinstance(name, str) and isinstance(key, list) and probe.is_facts(entry):
                self.known[name] = (key, entry)
        self._whole = not torn and len(self.known) == len(lines)

    def _parse(self, line: bytes) -> dict:
        try:
            return parse_json(line, "cache", self.path)
        except UserError:
            return {}

    def of(self, name: str, key: list[int]) -> dict | None:
        """The facts of a file that has this key."""
        known, facts = self.known.get(name, (None, None))
        return facts if known == key else None

    @contextlib.contextmanager
    def appending(self) -> Iterator[Callable[[str, list[int], dict], None]]:
        """A function that keeps the facts of a file at once; where that fails it costs the next start's time only."""
        file, remote, written = None, self.path is not None and is_remote(self.path), time.monotonic()

        def warn(error: OSError):
            log.warning("the outcome of testing the files is not kept in %s (%s)", self.path, error.strerror)

        def append(name: str, key: list[int], facts: dict):
            nonlocal file, written
            self.known[name] = (key, facts)
            try:
                if file is not None:  # at once, so that a killed process tears one line at most
                    os.write(file, _line(name, key, facts).encode())
                elif remote and time.monotonic() > written + UPLOAD_EVERY:
                    written = time.monotonic()
                    self._write()
            except OSError as error:
                warn(error)
                if file is not None:
                    os.close(file)
                file = None

        try:
            if self.path and not self._whole:
                self._write()
            if self.path and not remote:
                file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            warn(error)
        try:
            yield append
        finally:
            try:
                if remote:
                    self._write()
            except OSError as error:
                warn(error)
            if file is not None:
                os.close(file)

    def _write(self):
        lines = (_line(name, *known) for name, known in self.known.items())
        write_text(self.path, "".join([json.dumps(HEADER) + "\n", *lines]))


def _line(name: str, key: list[int], facts: dict) -> str:
    return json.dumps({"name": name, "key": key, **facts}) + "\n"
