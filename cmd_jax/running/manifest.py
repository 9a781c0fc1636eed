"""The manifest of a checkpoint folder: what is in it to the byte, and whether that can still be believed."""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmd_jax.buckets import CHUNK, BucketPath, write_if
from cmd_jax.errors import Unavailable, UserError
from cmd_jax.files import COUNT, check_like, is_remote, parse_json, sync_path, write_text
from cmd_jax.stores import patience, retry_seconds

MANIFEST = "manifest.json"
FORMAT = 1
LIKE = {"format": COUNT, "step": COUNT, "digest": str, "files": {...: {"size": COUNT, "sha256": str}}}
HASH_THREADS = 4
TRY_SECONDS = 2.0  # of the manifest's writing in a bucket


class CutOff(Exception):
    """A checkpoint of which nothing but an empty folder is there."""


class Damaged(Exception):
    """A checkpoint that is not what its manifest says."""


def _entry_of(path: Path | BucketPath, sync: bool = False) -> dict:
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(CHUNK if is_remote(path) else 2**18):  # a request each
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def digest_of(manifest: dict) -> str:
    """Of a manifest without its own digest. Later formats must keep this, so that they are known as such."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path | BucketPath, step: int, check: Callable[[], None] = lambda: None):
    """Bring every file of the folder to the disk, or read it back from a bucket, hash it, and write that down.

    check(): called before it is written; its error is raised. Unavailable where another run has written a manifest.
    """
    paths, on_disk = sorted(folder.rglob("*")), not is_remote(folder)
    files = [path for path in paths if not on_disk or path.is_file()]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        entries = list(pool.map(lambda path: _entry_of(path, sync=on_disk), files))
    names = [path.relative_to(folder).as_posix() for path in files]
    manifest = {"format": FORMAT, "step": step, "files": dict(zip(names, entries, strict=True))}
    text = json.dumps(manifest | {"digest": digest_of(manifest)}, sort_keys=True) + "\n"
    if not on_disk:
        _commit(folder / MANIFEST, text.encode(), check)
        return
    check()
    write_text(folder / MANIFEST, text)
    for path in (folder, *(path for path in paths if path.is_dir())):
        sync_path(path)


def _commit(path: BucketPath, data: bytes, check: Callable[[], None]):
    """Write the manifest, each try shorter than what is left of a lock that has just been checked."""
    end = time.monotonic() + retry_seconds()
    while True:
        check()
        try:
            with patience(TRY_SECONDS):
                written = write_if(path, data, None)
            break
        except Unavailable:
            if time.monotonic() > end:
                raise
    if written is None:
        raise Unavailable(errno.EEXIST, "another run has written it", str(path))


def read_manifest(folder: Path | BucketPath) -> dict:
    """The manifest of checkpoint `folder`. CutOff or Damaged, saying why, where there is none to be believed.

    UserError if a newer cmd_jax wrote it. Unavailable or PermissionError where a bucket shows nothing at all.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        if not any(folder.glob("*")):
            raise CutOff("is an empty folder") from None
        raise Damaged(f"has no {MANIFEST}") from None
    except OSError as e:
        raise _judged(e, folder, MANIFEST) from None
    try:
        manifest = parse_json(text, MANIFEST, folder, like={"format": COUNT, "digest": str, ...: object})
    except UserError as e:
        raise Damaged(f"{MANIFEST} is damaged: {e.problem}") from None
    if manifest["digest"] != digest_of(manifest):
        raise Damaged(f"{MANIFEST} is damaged")
    if manifest["format"] > FORMAT:
        problem = f"written in format {manifest['format']}, this cmd_jax reads up to {FORMAT}"
        raise UserError("checkpoint", folder, problem, "use the cmd_jax that wrote it, or a newer one")
    if problem := check_like(manifest, LIKE):
        raise Damaged(f"{MANIFEST} is damaged: {problem}")
    if str(manifest["step"]) != folder.name:
        raise Damaged(f"is that of step {manifest['step']} under another name")
    return manifest


def files_of(manifest: dict, item: str) -> dict[str, dict]:
    """{name: {"size", "sha256"}} of the files of one item, in order."""
    return {name: entry for name, entry in sorted(manifest["files"].items()) if name.startswith(f"{item}/")}


def item_digest(manifest: dict, item: str) -> str:
    """What tells an item from all others ever saved: SHA-256 over the names, sizes and hashes of its files."""
    return hashlib.sha256(json.dumps(files_of(manifest, item), sort_keys=True).encode()).hexdigest()


def _judged(error: OSError, folder: Path | BucketPath, name: str) -> Exception:
    """Damage, but what a store does not answer or does not allow says nothing of what is in it."""
    if isinstance(error, Unavailable) or is_remote(folder) and isinstance(error, PermissionError):
        return error
    return Damaged(f"{name} cannot be read ({error.strerror})")


def verify(folder: Path | BucketPath, items: Iterable[str], part: int = 0, parts: int = 1):
    """Compare the files of `items`, and those that belong to none, with the manifest of checkpoint `folder`.

    Of `parts` shares of about the same size only share `part`. CutOff, Damaged and UserError as of `read_manifest`;
    Damaged for the first file that is not what the manifest says.
    """
    manifest = read_manifest(folder)
    names = [name for name in manifest["files"] if "/" not in name or name.split("/")[0] in items]
    names.sort(key=lambda name: (-manifest["files"][name]["size"], name))

    def check(name: str):
        wanted = manifest["files"][name]
        try:
            found = _entry_of(folder / name)
        except OSError as e:
            raise _judged(e, folder, name) from None
        if found["size"] != wanted["size"]:
            raise Damaged(f"{name} has {found['size']} bytes, not {wanted['size']}")
        if found != wanted:
            raise Damaged(f"{name} has another SHA-256 than when it was written")

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        list(pool.map(check, names[part::parts]))
