"""Ground: files that appear whole or never, and the one door for JSON that somebody else may have written."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

from cmd_jax import __version__
from cmd_jax.buckets import BucketPath, check_url, scheme_of
from cmd_jax.errors import UserError

AT_A_TIME = 16  # objects of a bucket that are read or written
LARGEST_JSON = 2**28  # bytes
DEEPEST_JSON = 64  # levels; what is honest needs a tenth of it
AGAIN = "fetch or write the file again"
POINTER = b"version https://git-lfs.github.com/spec/"


def as_path(text: str | os.PathLike) -> Path | BucketPath:
    """A path that a user gave: of this machine, with its ~, or of a bucket."""
    if isinstance(text, BucketPath):
        return text
    return BucketPath(text) if scheme_of(str(text)) else _at_home(Path(text))


def _at_home(path: Path) -> Path:
    """With what its ~ stands for. UserError where there is no such user, or no home is known."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError("path", path, "its ~ is nobody's home", "write the folder out") from None


def local_path(text: str) -> Path:
    """A path of this machine, as argparse's type; ValueError for a URL, which would become a folder of that name."""
    if re.match(r"[A-Za-z][\w+.-]+:/", text):
        raise ValueError(f"{text}: not a path of this machine")
    return _at_home(Path(text))


def is_remote(path) -> bool:
    return isinstance(path, BucketPath)


@contextlib.contextmanager
def atomic_path(path, sync: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` upon success and vanishes upon failure.

    Missing parent folders are made. sync: it is on the disk, its name too, when this returns. An OSError of it names
    `path`. For a bucket it is a file of this machine, which is uploaded.
    """
    path = as_path(path)
    if is_remote(path):
        with _scratch_file(path) as temporary:
            yield temporary
            path.upload(temporary)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{temporary_prefix()}{path.name}"
    try:
        with _naming(path, temporary):
            yield temporary
            if sync:
                sync_path(temporary)
            os.replace(temporary, path)
            if sync:
                sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path, temporary: Path):
    """OSErrors of a temporary file, or of a write, whose errors name no file, name the file that it stands for."""
    try:
        yield
    except OSError as e:
        if e.filename in (None, str(temporary)):
            e.filename = str(path)
        raise


@contextlib.contextmanager
def _scratch_file(path: BucketPath) -> Iterator[Path]:
    with scratch_folder() as folder:
        temporary = folder / path.name
        with _naming(folder.parent, temporary):  # the disk is what failed, not the bucket
            yield temporary


@contextlib.contextmanager
def local_file(path: Path | BucketPath) -> Iterator[Path]:
    """A file of this machine with what `path` holds: itself, or for an object a copy that lasts as long as this."""
    if not is_remote(path):
        yield path
        return
    with _scratch_file(path) as temporary:
        path.download(temporary)
        yield temporary


def cache_root() -> Path:
    """The folder of this machine for copies of what lies in buckets: CMD_JAX_CACHE, or ~/.cache/cmd_jax."""
    given = os.environ.get("CMD_JAX_CACHE") or "~/.cache/cmd_jax"
    check_url("CMD_JAX_CACHE", given)
    if is_remote(path := as_path(given)):
        raise UserError("CMD_JAX_CACHE", path, "is itself in a bucket", "give a folder of a local disk")
    return path.absolute()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder of this machine for what is on its way to a bucket, or from one; what dead processes left goes."""
    folder = cache_root() / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    for path in leftovers(folder):
        remove_tree(path)
    with tempfile.TemporaryDirectory(prefix=temporary_prefix(), dir=folder, ignore_cleanup_errors=True) as made:
        yield Path(made)


def leftovers(folder: Path, name: str = "") -> Iterator[Path]:
    """Temporary files of `name`, or of any, whose processes, of this machine, are dead."""
    for path in folder.glob(f"{temporary_prefix('*')}{glob.escape(name) or '*'}"):
        pid = path.name.removeprefix(".tmp-").partition("@")[0]
        with contextlib.suppress(PermissionError):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                yield path


def remove_tree(path: Path | BucketPath):
    """Remove a file or a folder and all below it, as far as that goes; no error if it does not."""
    if is_remote(path):
        with contextlib.suppress(OSError):
            path.rmtree()
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def temporary_prefix(pid: int | str | None = None) -> str:
    """With which the names of temporary files begin of this process, or of another one of this machine.

    Containers and hosts that share a folder may well have processes of the same number.
    """
    host = os.uname().nodename.replace("-", "_").replace("/", "_")
    return f".tmp-{os.getpid() if pid is None else pid}@{host}-"


def each(folder: Path | BucketPath, function: Callable, items: Iterable) -> list:
    """function(item) of all items, in their order; several at a time where each waits for the bucket of `folder`."""
    if not is_remote(folder):
        return list(map(function, items))
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(function, items))


def sync_path(path: Path):
    """Bring a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path | BucketPath, text: str, sync: bool = True):
    if is_remote(path):
        path.write_text(text)
        return
    with atomic_path(path, sync) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value, sync: bool = True):
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n", sync)


def check_content(source: Path | BucketPath | bytes, field: str, place=None):
    """UserError for the text that git leaves in place of a large file where git-lfs is not installed.

    source: a file, or the content of one that was read from `place`.
    """
    if not isinstance(source, bytes):
        with source.open("rb") as file:
            source, place = file.read(len(POINTER)), source
    if source.startswith(POINTER):
        remedy = "run `git lfs pull` where it was cloned, or download the file"
        raise UserError(field, place, "a git-lfs pointer, not the file itself", remedy)


# What JSON may be, as `check_like` takes it: bool, int, float (a finite number), str, list, dict, None, or object for
# anything; range(a, b), a whole number within; a tuple, any one of its likes; [like], a list of such; [like, like], so
# many items; {key: like}, an object with these keys, "key?" if it may lack it, and `...` for all others.
Like = type | range | tuple | list | dict | None
COUNT = range(2**63)
KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", list: "a list",
         dict: "an object", object: ""}  # fmt: skip


def parse_json(text: str | bytes, field: str, place, remedy: str = AGAIN, like: Like = dict):
    """The JSON that a text of any origin holds. UserError (field=place) if it is not `like`, too large or too deep."""
    if len(text) > LARGEST_JSON:
        raise UserError(field, place, f"JSON of {len(text)} bytes, more than any such file needs", remedy)
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        reason = str(e) if isinstance(e, ValueError) else "nested too deep"
        raise UserError(field, place, f"not readable as JSON ({reason[:200]})", remedy) from e
    if like is dict and not isinstance(value, dict):
        raise UserError(field, place, "not a JSON object", remedy)
    level = [value]
    for _ in range(DEEPEST_JSON):
        level = [x for x in level if isinstance(x, dict | list)]
        if not level:
            break
        level = [x for values in level for x in (values.values() if isinstance(values, dict) else values)]
    else:
        raise UserError(field, place, f"JSON nested more than {DEEPEST_JSON} levels deep", remedy)
    if problem := check_like(value, like):
        raise UserError(field, place, problem, remedy)
    return value


def check_like(value, like: Like, name: str = "") -> str:
    """What is wrong with a value of JSON, a part of which is called `name`; "" if it is `like`."""
    if isinstance(like, tuple):
        problems = [check_like(value, one, name) for one in like]
        return "" if "" in problems else problems[0]
    if isinstance(like, dict) and isinstance(value, dict):
        known = {key.rstrip("?"): one for key, one in like.items() if key is not ...}
        for key in like:
            if key is not ... and not key.endswith("?") and key not in value:
                return f"{name or 'it'} lacks {key}"
        for key, inner in value.items():
            if key not in known and ... not in like:
                return f"{name or 'it'} has {_shown(key)}, which nothing here is called"
            if problem := check_like(inner, known[key] if key in known else like[...], f"{name}.{key}".lstrip(".")):
                return problem
        return ""
    if isinstance(like, list) and isinstance(value, list):
        if len(like) > 1 and len(value) != len(like):
            return f"{name or 'it'} has {len(value)} items, not {len(like)}"
        likes = like if len(like) > 1 else like * len(value)
        pairs = enumerate(zip(value, likes, strict=True))
        return next(filter(None, (check_like(inner, one, f"{name}[{i}]") for i, (inner, one) in pairs)), "")
    match like:
        case None:
            fits, kind = value is None, "nothing"
        case range():
            fits, kind = type(value) is int and value in like, f"a whole number from {like.start} to {like.stop - 1}"
        case type():
            wanted = (int, float) if like is float else (like,)
            fits = type(value) in wanted and (like is not float or abs(value) <= sys.float_info.max) or like is object
            kind = KINDS[like]
        case _:
            fits, kind = False, KINDS[type(like)]
    return "" if fits else f"{name or 'it'} is {_shown(value)}, not {kind}"


def like_of(kind) -> Like:
    """The JSON of a type, for `check_like`: a dataclass is an object, whose fields with a default it may lack.

    Other types are those that `check_like` knows, tuple[X, ...], dict[str, X], unions, and Annotated[type, Like].
    """
    if dataclasses.is_dataclass(kind):
        hints, fields = get_type_hints(kind, include_extras=True), dataclasses.fields(kind)
        return {f.name + "?" * (f.default is not dataclasses.MISSING): like_of(hints[f.name]) for f in fields}
    match get_origin(kind), get_args(kind):
        case types.UnionType, kinds:
            return tuple(like_of(x) for x in kinds if x is not types.NoneType)
        case origin, (inner, _) if origin is tuple:
            return [like_of(inner)]
        case origin, (_, inner) if origin is dict:
            return {...: like_of(inner)}
        case origin, (_, like) if origin is Annotated:
            return like
    return kind


def from_json(kind, value):
    """The value of a type that JSON stands for, once `check_like` found it to be `like_of` that type."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: from_json(hints[name], inner) for name, inner in value.items()})
    if isinstance(kind, types.UnionType):  # of None and another
        return from_json(next((x for x in get_args(kind) if dataclasses.is_dataclass(x) or get_origin(x)), None), value)
    if get_origin(kind) is tuple:
        return tuple(from_json(get_args(kind)[0], inner) for inner in value)
    return value


def as_json(value):
    """What `from_json` makes the same dataclass of; fields that are None are left out."""
    if dataclasses.is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: as_json(inner) for name, inner in named.items() if inner is not None}
    return [as_json(inner) for inner in value] if isinstance(value, tuple) else value


def _shown(value) -> str:
    """Short, whatever it is."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_json(
    path: Path, field: str = "path", missing: str = "fetch or make it first", remedy: str = AGAIN, like: Like = dict
):
    """The JSON that a file holds. UserError (field=path) if there is no file, or if it is not `like`.

    missing: what to do about no file.
    """
    path = as_path(path)
    try:
        if not is_remote(path) and path.exists() and not path.is_file():  # to open a named pipe would wait for ever
            raise UserError(field, path, "not a file", missing)
        if is_remote(path) and path.stat().st_size <= LARGEST_JSON:
            text = path.read_bytes()  # by one request: it may be written anew at any time
        else:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                # The room is taken before it is known how much there is to read.
                text = file.read(min(size, LARGEST_JSON) + 1)
    except FileNotFoundError:
        raise UserError(field, path, "no such file", missing) from None
    except OSError as e:
        raise UserError(field, path, f"cannot be read ({e.strerror})", missing) from e
    check_content(text, field, path)
    return parse_json(text, field, path, remedy, like)


@functools.cache
def code_digest() -> str:
    """Of the source of this package, which a version number tells apart only where it was released."""
    found, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Of what the bits of a run depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"cmd_jax": __version__} | {name: version(name) for name in names}
