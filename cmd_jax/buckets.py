"""Ground: objects of a bucket, gs:// and s3://, as paths; what they are reached by comes with the extras gcs and s3.

An object is there whole or not at all, and there is no rename. A prefix with objects below it counts as a folder.
"""

import base64
import contextlib
import datetime
import errno
import fnmatch
import hashlib
import importlib.util
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("EPATH_USE_TF", "false")  # etils would take TensorFlow, which cannot read gs:// by itself

from etils.epath.gpath import PosixGPath  # noqa: E402

from cmd_jax.errors import Unavailable, UserError  # noqa: E402
from cmd_jax.stores import UPLOAD, NoBucket, codes_of, retrying  # noqa: E402

EXTRAS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> the module that reaches it, and its extra
CHUNK = 2**24  # bytes of a request when a whole object is fetched


def scheme_of(text: str) -> str:
    """ "gs", "s3", or "" for what is no URL of a bucket."""
    head = text.partition("://")[0]
    return head if head in EXTRAS and text != head else ""


def check_url(field: str, text: str):
    """UserError for a path with a scheme that cannot be used here: without its extra, unknown, or misspelt."""
    if not (found := re.match(r"\s*([A-Za-z][\w+.-]+):(?=/)|\s*(gs|s3):", text)):
        return
    if found[1] not in EXTRAS or not text.startswith(f"{found[1]}://"):
        problem = "begins with a blank" if text[0].isspace() else f"{found[0]} is not a scheme that is read here"
        raise UserError(field, text, problem, "use gs://, s3://, or a local path")
    module, extra = EXTRAS[found[1]]
    bucket, *names = text.partition("://")[2].rstrip("/").split("/")
    if not bucket or not {"", ".", ".."}.isdisjoint(names):
        problem = "names no bucket" if not bucket else "holds an empty name, . or .."
        raise UserError(field, text, problem, f"write it like {found[1]}://BUCKET/FOLDER")
    if importlib.util.find_spec(module) is None:
        raise UserError(field, text, f"{module} is not installed", f'pip install "cmd-jax[{extra}]"')


class BucketPath(PosixGPath):
    """An object or a prefix of a bucket, with the methods of pathlib.Path that make sense there.

    What is no local file must not pass for one: os.fspath, and thus open(), raise TypeError. Errors are OSError with
    errno, strerror and filename: FileNotFoundError, PermissionError, and Unavailable where the store could not be
    reached for stores.RETRY_SECONDS. Where there is no such bucket, to ask whether something exists is NoBucket too.
    """

    def __fspath__(self):
        raise TypeError(f"{self} is no local file")

    def with_segments(self, *segments):
        """By which pathlib, from Python 3.12 on, makes a path of others; etils' asks os.fspath for them."""
        return type(self)(*map(str, segments))

    @property
    def key(self) -> str:
        """BUCKET/NAME."""
        return "/".join(self.parts[2:])

    @property
    def scheme(self) -> str:
        return self.parts[1]

    @property
    def parent(self) -> "BucketPath":
        return super().parent if len(self.parts) > 3 else self

    def _do(self, action: Callable):
        return retrying(self.scheme, self, action)

    def _info(self) -> dict | None:
        try:
            return self._do(lambda fs: fs.info(self.key))
        except NoBucket:
            raise
        except FileNotFoundError:
            return None

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> SimpleNamespace:
        """st_size in bytes, st_mtime in seconds by the store's clock; version: changes with the object."""
        if (info := self._info()) is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return _status(info)

    def iterdir(self) -> Iterator["BucketPath"]:
        names = {info["name"].rstrip("/"): None for info in self._do(lambda fs: fs.ls(self.key, detail=True))}
        for name in names:
            if name != self.key:  # the object itself, or a marker of the folder
                yield self / name.rpartition("/")[2]

    def stats(self) -> dict[str, SimpleNamespace]:
        """{name: its `stat`} of the objects right below it, by one request for every thousand of them."""
        try:
            found = self._do(lambda fs: fs.ls(self.key, detail=True))
        except NoBucket:
            raise
        except FileNotFoundError:
            return {}
        return {info["name"].rpartition("/")[2]: _status(info) for info in found if info["type"] == "file"}

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """pattern: of names, one a level; the path itself is taken literally."""
        first, _, rest = pattern.partition("/")
        try:
            found = [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, first)]
        except NoBucket:
            raise
        except FileNotFoundError:
            return
        for path in found:
            yield from path.glob(rest) if rest else [path]

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """The objects below whose names match; there are no folders among them."""
        for name in self._below():
            if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) and not name.endswith("/"):
                yield self / name.removeprefix(f"{self.key}/")

    def _below(self) -> list[str]:
        """BUCKET/NAME of the objects below it, those among them that mark a folder."""
        found = self._do(lambda fs: _sync(fs, fs._do_list_objects if self.scheme == "gs" else fs._lsdir, self.key,
                                          delimiter=""))  # fmt: skip
        return [info["name"] for info in (found[0] if self.scheme == "gs" else found)]

    def open(self, mode: str = "r", encoding: str = "utf-8", **options):
        """To read, "r" or "rb"; what is sought is requested by its range, without reading ahead."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{mode}: an object is written whole, by write_bytes or files.atomic_path")
        file = io.BufferedReader(_Reader(self), 2**16)
        return file if mode == "rb" else io.TextIOWrapper(file, encoding=encoding, **options)

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`, which must not lie behind the object's."""
        if start >= end:
            return b""
        data = self._do(lambda fs: fs.cat_file(self.key, start=start, end=end))
        if len(data) != end - start:
            raise OSError(errno.EIO, f"{len(data)} bytes came, not {end - start}", str(self))
        return data

    def read_bytes(self) -> bytes:
        return self._do(lambda fs: fs.cat_file(self.key))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        put = _put if len(data) <= UPLOAD else lambda fs, *_: fs.pipe_file(self.key, bytes(data), chunksize=UPLOAD)
        self._do(lambda fs: put(fs, self, data))
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def touch(self):
        self.write_bytes(b"")

    def upload(self, file: Path):
        """Make it what a local file holds."""
        self._do(lambda fs: fs.put_file(str(file), self.key, chunksize=UPLOAD))

    def download(self, file: Path):
        """Make a local file what it holds."""
        with self.open("rb") as source, open(file, "wb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)

    def copy_to(self, other: "BucketPath"):
        """Within a store, without its bytes coming here."""
        self._do(lambda fs: fs.cp_file(self.key, other.key))

    def unlink(self, missing_ok: bool = False):
        if not missing_ok:
            self.stat()  # S3 would not tell
        if self.parent == self:
            raise IsADirectoryError(errno.EISDIR, "is a bucket", str(self))
        with contextlib.suppress(FileNotFoundError):
            self._do(lambda fs: fs.rm_file(self.key))

    def rmtree(self):
        """Remove the object, and every object below it."""
        if self.parent != self:
            self.unlink(missing_ok=True)
        names = self._below()
        for at in range(0, len(names), 1000):
            self._do(lambda fs, some=names[at : at + 1000]: _remove(fs, self.scheme, some))

    def mkdir(self, *_, **__):
        """Folders come with their objects."""

    def relative_to(self, other: "BucketPath") -> PurePosixPath:
        return PurePosixPath(*self.parts).relative_to(PurePosixPath(*other.parts))

    def expanduser(self) -> "BucketPath":
        return self

    absolute = resolve = expanduser


class _Reader(io.RawIOBase):
    """Random access to an object by range requests."""

    def __init__(self, path: BucketPath):
        self.path, self.size, self.at = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer) -> int:
        data = self.path.read_range(self.at, min(self.at + len(buffer), self.size))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class Versioned(NamedTuple):
    data: bytes
    version: str  # changes with each writing
    updated: float  # when it was written, seconds by the store's clock


def read_versioned(path: BucketPath) -> Versioned | None:
    """An object as it is at one moment; None if there is none."""
    for _ in range(10):  # it may be written between the two requests
        if (info := path._info()) is None or info["type"] != "file":
            return None
        try:
            data = path._do(lambda fs: _read_version(fs, path, _version(info)))
        except (FileNotFoundError, FileExistsError):  # 412
            continue
        return Versioned(data, _version(info), _updated(info))
    raise Unavailable(errno.EAGAIN, "changes whenever it is read", str(path))


def write_if(path: BucketPath, data: bytes, version: str | None) -> str | None:
    """Write an object if it is still of that version, None: if there is none -> its new version, None if it is not.

    data: like no other writer's, since what was written by a request whose answer got lost is known by it.
    """
    try:
        return path._do(lambda fs: _write_version(fs, path, data, version))
    except (FileExistsError, FileNotFoundError) as error:
        if version is None and isinstance(error, FileNotFoundError):  # there is no such bucket
            raise
        found = read_versioned(path)
        return found.version if found and found.data == data else None


def _read_version(fs, path: BucketPath, version: str) -> bytes:
    bucket, _, name = path.key.partition("/")
    if path.scheme == "gs":
        return fs.call("GET", "b/{}/o/{}", bucket, name, alt="media", generation=version)[1]

    async def read():
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=name, IfMatch=version)
        return await answer["Body"].read()

    return _precondition(lambda: _sync(fs, read))


def _write_version(fs, path: BucketPath, data: bytes, version: str | None) -> str:
    if path.scheme == "gs":
        return _put(fs, path, data, ifGenerationMatch=version or "0")
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    return _precondition(lambda: _put(fs, path, data, **condition))


def _put(fs, path: BucketPath, data: bytes, **condition) -> str:
    """Write an object by one request, with a sum by which the store sees that all has come -> its version."""
    bucket, _, name = path.key.partition("/")
    if path.scheme == "s3":
        return fs.call_s3("put_object", Bucket=bucket, Key=name, Body=bytes(data), **condition)["ETag"]
    line, kind = f"--{secrets.token_hex()}", "application/octet-stream"
    facts = {"name": name, "contentType": kind, "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode()}
    parts = ("application/json", json.dumps(facts).encode()), (kind, data)
    body = b"".join(f"{line}\r\nContent-Type: {kind}\r\n\r\n".encode() + part + b"\r\n" for kind, part in parts)
    headers = {"Content-Type": f"multipart/related; boundary={line[2:]}"}
    place, body = f"{fs._location}/upload/storage/v1/b/{bucket}/o", body + f"{line}--".encode()
    call = dict(uploadType="multipart", headers=headers, data=body, json_out=True)
    return fs.call("POST", place, **call, **condition)["generation"]


def _remove(fs, scheme: str, names: list[str]):
    """Remove objects, BUCKET/NAME; whether they are there or not."""
    if scheme == "gs":
        found = _sync(fs, fs._delete_files, names, 100)
        left = [e for e in found if isinstance(e, Exception) and not isinstance(e, FileNotFoundError)]
        left = [e for e in left if "No such object" not in str(e)]
    else:
        bucket, keys = names[0].partition("/")[0], [{"Key": name.partition("/")[2]} for name in names]
        found = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        from botocore.exceptions import ClientError

        left = [ClientError({"Error": error}, "DeleteObjects") for error in found.get("Errors", [])]
    if left:
        raise left[0]


def _precondition(action: Callable):
    """S3's 412 as FileExistsError, which gcsfs makes of it too."""
    try:
        return action()
    except OSError as error:
        if codes_of(error) & {"412", "ConditionalRequestConflict"}:
            raise FileExistsError(errno.EEXIST, "is of another version") from error
        raise


def _sync(fs, function: Callable, *arguments, **options):
    from fsspec import asyn

    return asyn.sync(fs.loop, function, *arguments, **options)


def _status(info: dict) -> SimpleNamespace:
    return SimpleNamespace(st_size=info["size"] or 0, st_mtime=_updated(info), version=_version(info))


def _version(info: dict) -> str:
    return info.get("generation") or info.get("ETag") or ""


def _updated(info: dict) -> float:
    when = info.get("mtime") or info.get("LastModified")
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    return when.timestamp() if when else 0.0
