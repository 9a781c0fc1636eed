"""Files of weights as parameters of a dtype; what was cast once is kept on this machine and read from there.

A file is CACHE/weights/STEM-SHA256.safetensors. STEM is of where the weights came from and of all shapes and dtypes,
SHA-256 of the bytes, which are compared when it is read: a damaged file goes, and is made anew.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.files import atomic_path, cache_root, code_digest, is_remote
from cmd_jax.interop.folders import WeightFiles
from cmd_jax.interop.tensors import Mismatch, check, same, to_params
from cmd_jax.interop.weights import flatten, open_weights, write_safetensors

log = logging.getLogger(__name__)
SMALLEST = 2**26  # bytes that are worth a file
LIMIT = 64 * 2**30  # bytes of all files; the longest unused go first
STEM = 32  # digits


def identity_of(files: WeightFiles) -> list:
    """What changes with files of weights, without reading them."""
    stats = [(str(path) if is_remote(path) else os.path.realpath(path), path.stat()) for path in files.parts]
    return [[name, x.st_size, x.st_mtime, getattr(x, "version", "")] for name, x in stats]


def find(identity: list, like: dict) -> dict | None:
    """What was kept of these weights, laid out as `like`, a tree of ShapeDtypeStructs with shardings."""
    flat = flatten(like)
    for path in _folder().glob(f"{_stem(identity, flat)}-*.safetensors") if _is_worth_it(flat) else ():
        with contextlib.suppress(OSError, UserError):
            with open(path, "rb") as file:
                sound = hashlib.file_digest(file, "sha256").hexdigest() == path.stem.rpartition("-")[2]
            if sound:
                os.utime(path)
                with open_weights(WeightFiles(path, (path,))) as weights:
                    return to_params([same(name, x.shape) for name, x in flat.items()], weights, None, flat)
        log.warning("weights %s are damaged, and made anew", path)
        path.unlink(missing_ok=True)
    return None


def keep(identity: list, params: dict):
    """Keep parameters for `find`. A disk without room is no error."""
    flat = flatten(params)
    if not _is_worth_it(flat):
        return
    stem, folder = _stem(identity, flat), _folder()
    try:
        _make_room(folder, sum(x.nbytes for x in flat.values()))
        with atomic_path(folder / f"{stem}.making", sync=False) as temporary:
            write_safetensors(temporary, {name: np.asarray(x) for name, x in flat.items()})
            with open(temporary, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.link(temporary, folder / f"{stem}-{digest}.safetensors")
        (folder / f"{stem}.making").unlink(missing_ok=True)
    except (OSError, UserError) as e:
        log.info("the weights are read and cast at each start: %s cannot be written (%s)", folder, e)


def load_params(files: WeightFiles, init, tensor_of, dtype="float32", shardings=None, rename=str, blame=None) -> dict:
    """The parameters that init(key) would make, from files of weights; numpy arrays, or laid out by `shardings`.

    tensor_of: (our path, shape) -> Tensor. shardings: init -> tree of ShapeDtypeStructs with shardings, for example
    functools.partial(cmd_jax.sharding.abstract, mesh=mesh, rules=rules). rename: as of `open_weights`. blame:
    Mismatch -> the field of a config that is likely wrong, or None. UserError for tensors that do not fit.
    What is cast and laid out is kept on this machine for the next time.
    """
    like = shardings(init) if shardings else jax.eval_shape(lambda key: nn.unbox(init(key)), jax.random.key(0))
    like = flatten(like)
    tensors = sorted((tensor_of(path, leaf.shape) for path, leaf in like.items()), key=lambda tensor: tensor.name)

    def refuse(mismatch: Mismatch) -> UserError:
        likely = blame and blame(mismatch)
        remedy = "give weights and config.json of one model" + (f" (likely {likely} is wrong)" if likely else "")
        return UserError("weights", files.name, mismatch.problem, remedy)

    cast = {path: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding) for path, x in like.items()}
    is_cast = shardings is not None and jnp.dtype(dtype) != jnp.float32
    if is_cast and (params := find(identity_of(files), cast)) is not None:
        return params
    with open_weights(files, rename) as weights:
        check(tensors, weights, refuse)
        params = to_params(tensors, weights, dtype, like if shardings else None)
    if is_cast:
        keep(identity_of(files), params)
    return params


def _folder() -> Path:
    return cache_root() / "weights"


def _is_worth_it(flat: dict) -> bool:
    """Of a process alone, which holds all of them."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in flat.values())
    return jax.process_count() == 1 and size >= SMALLEST


def _stem(identity: list, flat: dict) -> str:
    told = [code_digest(), identity, sorted((name, list(x.shape), str(x.dtype)) for name, x in flat.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:STEM]


def _make_room(folder: Path, size: int):
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(((path.stat(), path) for path in folder.glob("*.safetensors")), key=lambda x: x[0].st_mtime)
    excess = sum(status.st_size for status, _ in there) + size - LIMIT
    for status, path in there:
        if excess > 0:
            path.unlink(missing_ok=True)
            excess -= status.st_size
