"""What grows cannot grow in a bucket, where objects are written whole: it does on this machine, and is uploaded."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from cmd_jax.buckets import BucketPath, read_versioned, write_if
from cmd_jax.files import scratch_folder, temporary_prefix

EVERY = 15.0  # seconds between uploads
SHARE = 0.05  # of the time that uploads in the background may take

log = logging.getLogger(__name__)


class Mirror:
    """A local `folder`, of this process alone, whose files are uploaded to `remote` as they grow; those in folders of
    it, which do not, once.

    names: of files that are fetched first, where they are there. A file that somebody else writes in the meantime is
    left to him, with a warning. before(): called before each upload. OSError where something cannot be fetched.
    """

    def __init__(self, remote: BucketPath, names: tuple[str, ...], before: Callable[[], None]):
        self.remote, self._before = remote, before
        self._held = contextlib.ExitStack()
        self.folder = self._held.enter_context(scratch_folder())
        self._versions, self._uploaded, self._left, self._unsure = {}, {}, set(), set()
        self._uploading, self._leaving, self._warned = threading.Lock(), threading.Event(), False
        for name in names:
            if found := read_versioned(remote / name):
                (self.folder / name).write_bytes(found.data)
                self._versions[name] = found.version
        self._thread = threading.Thread(target=self._upload_always, name="uploads", daemon=True)
        self._thread.start()

    def upload(self):
        """Bring to the bucket what was written until now. OSError if it cannot."""
        with self._uploading:
            self._before()
            for path in self.folder.rglob("*"):
                name = str(path.relative_to(self.folder))
                if name in self._left or path.name.startswith(temporary_prefix()) or not path.is_file():
                    continue
                if path.parent != self.folder:
                    (self.remote / name).upload(path)
                    path.unlink()
                    continue
                stat = path.stat()
                state = stat.st_size, stat.st_mtime_ns
                if self._uploaded.get(name) != state:
                    self._replace(name, path.read_bytes())
                    self._uploaded[name] = state

    def _replace(self, name: str, data: bytes):
        before = self._versions.get(name)
        if name in self._unsure and (found := read_versioned(self.remote / name)) and data.startswith(found.data):
            before = found.version  # written by a request of ours whose answer got lost
        self._unsure.add(name)
        version = write_if(self.remote / name, data, before)
        if version is None and before:  # if it was removed, all that was in it is here
            version = write_if(self.remote / name, data, None)
        self._unsure.discard(name)
        if version is None:
            self._left.add(name)
            log.warning("%s is no longer written: somebody else has written it", self.remote / name)
        self._versions[name] = version

    def _try(self):
        try:
            self.upload()
        except OSError as e:
            if not self._warned:
                log.warning("%s cannot be uploaded (%s); it is tried again", e.filename, e.strerror or e)
            self._warned = True

    def _upload_always(self):
        pause = EVERY
        while not self._leaving.wait(pause):
            begun = time.monotonic()
            self._try()
            pause = max(EVERY, (time.monotonic() - begun) / SHARE)

    def close(self):
        """The last upload, and the end of the folder."""
        self._leaving.set()
        self._try()
        with self._uploading:
            self._left |= {path.name for path in self.folder.iterdir()}
            self._held.close()
