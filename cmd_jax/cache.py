"""Ground: copies of a bucket's objects on a disk of this machine, shared by all of its processes.

A copy is FOLDER/STEM-SHA256, so that its name says its content; STEM is of that too, or where no facts tell it, of the
object's address, size and version. FOLDER/STEM.part is a copy in the making. Who makes one has locked its file (flock)
alone, who reads one together with others, and what can be locked alone is in nobody's use: locks go with their
processes, however these end.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cmd_jax.buckets import CHUNK, BucketPath
from cmd_jax.errors import UserError
from cmd_jax.files import as_path, cache_root, is_remote

GIB = 2**30
PATIENCE = 60.0  # seconds for others to close what fills the cache
POLL = 0.05
WANTED = ".wanted"  # the name of a file that is touched while there is no room
STEM = 32  # digits of SHA-256
TRIES = 2  # of a copy that is not what it should be
FETCH_AGAIN = "fetch or make it again"


class Copy:
    """A copy, `path`, that stays until this is closed or forgotten."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self.descriptor = path, descriptor

    def close(self):
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # it may be another user's
                os.utime(descriptor)  # used until now
            os.close(descriptor)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error):
        self.close()

    __del__ = close


class Cache:
    """folder: of the copies. limit: bytes that they may take together; 0: any number."""

    def __init__(self, folder: Path, limit: int = 0):
        self.folder, self.limit = folder, limit
        self._sound: set[str] = set()  # names of the copies that this process has made or read through
        self._swept = False

    def fetch(self, path: BucketPath, size: int, sha256: str, spare: Callable[[], bool] = lambda: False) -> Copy:
        """The copy of an object whose bytes and SHA-256 are known.

        spare(): gives up copies that this process could do without -> whether there were any. UserError for an object
        that is not as known, and for a cache without room; OSError as of the bucket.
        """
        stem = sha256[:STEM]
        return self._found(stem, sha256, size) or self._made(path, stem, size, sha256, spare)

    def fetch_newest(self, path: BucketPath) -> Copy:
        """The copy of an object as it is now."""
        while True:
            status = path.stat()
            size, state = status.st_size, (status.st_size, status.version, status.st_mtime)
            stem = hashlib.sha256(repr((str(path), *state)).encode()).hexdigest()[:STEM]
            if copy := self._found(stem, None, size):
                return copy
            copy, after = self._made(path, stem, size, None, lambda: False), path.stat()
            if (after.st_size, after.version, after.st_mtime) == state:
                return copy
            self.discard(copy)  # parts of two objects, perhaps

    def discard(self, copy: Copy):
        """Remove a copy; who reads it just now reads it to its end."""
        copy.path.unlink(missing_ok=True)
        self._sound.discard(copy.path.name)
        copy.close()

    def is_sound(self, copy: Copy) -> bool:
        """Whether a copy, the open file and not what came in its place, is what its name says, read anew."""
        with os.fdopen(os.dup(copy.descriptor), "rb") as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest() == copy.path.name.rpartition("-")[2]

    def _found(self, stem: str, sha256: str | None, size: int) -> Copy | None:
        names = [f"{stem}-{sha256}"] if sha256 else [name for name in self._names() if name.startswith(f"{stem}-")]
        return next(filter(None, (self._copy(name, size) for name in names)), None)

    def _copy(self, name: str, size: int) -> Copy | None:
        """A copy that is there; one that is damaged goes."""
        try:
            copy = Copy(self.folder / name, _locked(self.folder / name, os.O_RDONLY, fcntl.LOCK_SH))
            sound = copy.path.stat().st_size == size and (name in self._sound or self.is_sound(copy))
        except FileNotFoundError:
            return None
        if not sound:
            self.discard(copy)
            return None
        self._sound.add(name)
        return copy

    def _made(self, path: BucketPath, stem: str, size: int, sha256: str | None, spare: Callable[[], bool]) -> Copy:
        part = self.folder / f"{stem}.part"
        while True:
            with self._told():
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    descriptor = _locked(part, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # another makes it; to wait for the lock would be to wait for its readers too
                    time.sleep(POLL)
            if self._is_wanted():  # the other may wait for what we have
                spare()
        try:
            if copy := self._found(stem, sha256, size):  # which the other has made
                part.unlink()
                os.close(descriptor)
                return copy
            self._reserve(descriptor, part.name, path, size, spare)
            digest = self._filled(descriptor, path, size, sha256)
            made = self.folder / f"{stem}-{digest}"
            with self._counting():  # or whoever counts just now might find it under neither name, or remove it
                part.rename(made)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        self._sound.add(made.name)
        return Copy(made, descriptor)

    def _filled(self, descriptor: int, path: BucketPath, size: int, sha256: str | None) -> str:
        """The SHA-256 of what was fetched, which is the one that is given."""
        for _ in range(TRIES):
            found = path.stat().st_size
            problem = f"has {found:,} bytes, not {size:,}"
            if found == size:
                digest = self._fetched(descriptor, path, size)
                if sha256 in (None, digest):
                    return digest
                problem = f"its SHA-256 is {digest[:12]}..., not {sha256[:12]}..."
        raise UserError("shard", path, f"{problem}: it is damaged or another's", FETCH_AGAIN)

    def _fetched(self, descriptor: int, path: BucketPath, size: int) -> str:
        digest = hashlib.sha256()
        for at in range(0, size, CHUNK):
            chunk = path.read_range(at, min(at + CHUNK, size))
            digest.update(chunk)
            with self._told():
                while chunk:
                    written = os.pwrite(descriptor, chunk, at)
                    chunk, at = chunk[written:], at + written
        return digest.hexdigest()

    def _reserve(self, descriptor: int, part: str, path: BucketPath, size: int, spare: Callable[[], bool]):
        """Give a copy in the making its size, which counts from now on."""
        gib = f"{self.limit / GIB:g}"
        if self.limit and size > self.limit:
            problem = f"{path.name} alone has {size / GIB:.3g} GiB"
            raise UserError("data.cache_gib", gib, problem, "raise it; the data should fit in as a whole")
        end = time.monotonic() + PATIENCE
        while True:
            with self._told():
                if self._made_room(descriptor, part, size):
                    return
                (self.folder / WANTED).touch()
            if not spare():
                if time.monotonic() > end:
                    problem = f"all of it is in use by open files, and {path.name} needs {size / GIB:.3g} GiB"
                    raise UserError("data.cache_gib", gib, problem, "raise it")
                time.sleep(POLL)

    def _is_wanted(self) -> bool:
        """Whether some process has waited for room just now."""
        with contextlib.suppress(FileNotFoundError):
            return time.time() < (self.folder / WANTED).stat().st_mtime + 10 * POLL
        return False

    def _made_room(self, descriptor: int, part: str, size: int) -> bool:
        """Remove what is in nobody's use, the longest unused first, until there is room, and take it -> whether it was
        enough."""
        if not self.limit and self._swept:
            return True
        self._swept = True
        with self._counting():
            there = {}
            for name in self._names():
                with contextlib.suppress(FileNotFoundError):
                    there[name] = os.stat(self.folder / name)
            excess = sum(status.st_size for name, status in there.items() if name != part) + size - self.limit
            # What dead processes left in the making goes first, and in any case.
            order = lambda name: (not name.endswith(".part"), there[name].st_mtime)  # noqa: E731
            for name in sorted(there.keys() - {part}, key=order):
                if (name.endswith(".part") or self.limit and excess > 0) and self._removed(name):
                    excess -= there[name].st_size
            if self.limit and excess > 0:
                return False
            os.ftruncate(descriptor, size)
            return True

    @contextlib.contextmanager
    def _counting(self):
        """No other process counts, or changes what counts but to make it less."""
        lock = _locked(self.folder / ".lock", os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(lock)

    def _removed(self, name: str) -> bool:
        """Remove a copy, unless it is in use."""
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            descriptor = _locked(self.folder / name, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                (self.folder / name).unlink()
            finally:
                os.close(descriptor)
            return True
        return False

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.folder) if not name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):  # who makes a copy tells of the latter
            return []

    @contextlib.contextmanager
    def _told(self):
        """What the disk refuses, as the user is told it."""
        try:
            yield
        except OSError as error:
            remedy = "give a folder of a local disk that you may write to"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                remedy = "free space, give a folder on a larger disk, or set data.cache_gib below what is free"
            raise UserError("data.cache_dir", self.folder, error.strerror or str(error), remedy) from error


def _locked(path: Path, flags: int, operation: int) -> int:
    """The descriptor of the file that has this name once it is locked; its maker may have renamed it meanwhile.

    BlockingIOError, of LOCK_NB, where it is in use.
    """
    while True:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            # Not waiting in flock: it would be for a file that got another name, in whose use its readers lock it.
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            if operation & fcntl.LOCK_NB:
                os.close(descriptor)
                raise
            time.sleep(POLL / 5)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


# The cache of this process. Where data is opened the config says which; what has no config takes what was said last.

_lock = threading.Lock()
_said = ("", 0.0)
_current: Cache | None = None


def use(folder: str, gib: float):
    """From now on the cache in `folder`, "" for `files.cache_root`, of at most so many GiB, 0 for any number."""
    global _said
    if is_remote(as_path(folder)):
        raise UserError("data.cache_dir", folder, "is itself in a bucket", "give a folder of a local disk")
    _said = (folder, gib)


def current() -> Cache:
    global _current
    folder, gib = _said
    place, limit = (as_path(folder).absolute() if folder else cache_root()) / "objects", int(min(gib * GIB, 2.0**62))
    with _lock:
        if _current is None or (_current.folder, _current.limit) != (place, limit):
            _current = Cache(place, limit)
        return _current


@contextlib.contextmanager
def local(path: Path | BucketPath) -> Iterator[Path]:
    """A file of this machine with what `path` holds: itself, or the copy of an object in the cache of this process."""
    if not is_remote(path):
        yield path
        return
    with current().fetch_newest(path) as copy:
        yield copy
