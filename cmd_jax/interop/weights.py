"""Weights as {name: array}: safetensors both ways, torch's own files in."""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import UserError
from cmd_jax.files import as_path, atomic_path, is_remote
from cmd_jax.interop.folders import TORCH_SUFFIXES, WeightFiles, is_file
from cmd_jax.interop.safetensors_files import Damaged, Stored, open_safetensors
from cmd_jax.interop.torch_files import read_torch

log = logging.getLogger(__name__)

DEEPEST = 32  # branches of a tree of weights

# What DistributedDataParallel and torch.compile put before names, and torch.compile of a part within them.
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")


def read_state_dict(path: str | Path, key: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors or torch file (.pt, .pth, .ckpt, .bin), in the file's dtypes and layout.

    key: which entry of a torch file {"model": ..., "ema": ...} to read; None takes "ema", or the only one that holds
    tensors, or the whole file if that is one state dict. What wrappers put before names is left out. Arrays of a torch
    file may be read-only, strided views.
    Raises UserError if there is no such file, if it is damaged, if what is read holds anything but tensors (nothing in
    a file is ever called, and objects elsewhere in it are passed over), or if `key` doesn't settle what is meant.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        if key is not None:
            raise UserError("key", key, "a safetensors file has no entries to choose from", "leave it out")
        with _telling("path", path), open_safetensors(path, "path") as (tensors, _):
            return _unwrapped(dict(Weights.of(tensors).whole()), path)
    if path.suffix in TORCH_SUFFIXES:
        with _telling("path", path):
            return _unwrapped(read_torch(path, key), path)
    known = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise UserError("path", path, "not a kind of weights file we read", f"give a file with one of the endings {known}")


def _unwrapped(tensors: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    found = sorted({match for name in tensors for match in WRAPPERS.findall(name)})
    if not found:
        return tensors
    names = {name: WRAPPERS.sub("", name) for name in tensors}
    if len(set(names.values())) < len(names):
        raise UserError("path", path, f"names differ by {', '.join(found)} alone", "give the weights of one model")
    log.info("%s: names without the prefix %s", path, ", ".join(found))
    return {names[name]: tensor for name, tensor in tensors.items()}


Part = tuple[str, tuple[slice, ...]]  # of a tensor, by its name


class Weights(NamedTuple):
    """Tensors by name, as they lie in files: arrays, or what is in open safetensors files; their shapes and dtypes."""

    tensors: dict[str, np.ndarray | Stored]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @classmethod
    def of(cls, tensors: dict) -> "Weights":
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(tensors, shapes, {name: str(tensor.dtype) for name, tensor in tensors.items()})

    def expect(self, parts: Iterable[Part]):
        """Tell what is going to be read, each part as often as it is named: that of a bucket is then fetched ahead."""
        spans = {tensor.file: [] for tensor in self.tensors.values() if isinstance(tensor, Stored)}
        for name, index in parts:
            if isinstance(tensor := self.tensors[name], Stored):
                spans[tensor.file].append(tensor.span(index))
        for file, expected in spans.items():
            file.expect(expected)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or [index] of it, in the dtype that it has in its file."""
        return np.asarray(self.tensors[name][(slice(None),) * len(self.shapes[name]) if index is None else index])

    def whole(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Name and tensor, one after the other; of all of them, or of these."""
        parts = [(name, (slice(None),) * len(self.shapes[name])) for name in names or self.tensors]
        self.expect(parts)
        for name, index in parts:
            yield name, self.read(name, index)


@contextlib.contextmanager
def open_weights(files: WeightFiles, rename: Callable[[str], str | None] = str) -> Iterator[Weights]:
    """The tensors of all files. rename: name in a file -> its name here, or None for one that is left out.

    UserError for what is damaged, also while reading, and for a tensor that is there twice.
    """
    with _telling("weights", files.name), contextlib.ExitStack() as stack:
        tensors, names = {}, {}
        for part in files.parts:
            for name, tensor in _tensors(part, stack).items():
                if (new := rename(name)) is None:
                    continue
                if new in tensors:
                    problem = f"{names[new]} and {name} are one tensor"
                    raise UserError("weights", part, problem, "fetch the whole folder again")
                tensors[new], names[new] = tensor, name
        yield Weights.of(tensors)


def _tensors(path: Path, stack: contextlib.ExitStack) -> dict:
    if path.suffix != ".safetensors":
        return read_state_dict(path)
    return stack.enter_context(open_safetensors(path, "weights"))[0]


@contextlib.contextmanager
def _telling(field: str, path):
    """What cannot be read as a UserError (field=path)."""
    try:
        yield
    except Damaged as e:
        raise UserError(field, path, f"damaged or incomplete ({str(e)[:200]})", "fetch or write the file again") from e
    except OSError as e:
        problem = f"cannot be read ({e.strerror or e})"
        raise UserError(field, path, problem, "mend that, or give another file") from e


def digest_weights(files: WeightFiles, rename: Callable[[str], str | None] = str) -> str:
    """SHA-256 over the tensors, in the order of their names: the same for the same numbers in files of other kinds.

    rename: as of `open_weights`.
    """
    content = hashlib.sha256()
    with open_weights(files, rename) as weights:
        for name, array in weights.whole(sorted(weights.tensors)):
            content.update(f"{name} {array.dtype} {array.shape}\n".encode())
            content.update(np.ascontiguousarray(array).view(np.uint8).data)
    return content.hexdigest()


def write_safetensors(path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes arrays (numpy or addressable jax ones, bfloat16 too) and texts; the file appears whole or not at all."""
    path = as_path(path)
    # The library writes an array's memory as it lies: without the C order a transposed array is stored wrongly.
    tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as e:
        problem = f"could not be written ({getattr(e, 'strerror', None) or e})"
        raise UserError("path", path, problem, "give a file in a folder with room and rights") from e


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts stored in a safetensors file beside its tensors."""
    path = _existing(path)
    with _telling("path", path), open_safetensors(path, "path") as (_, texts):
        return texts


def flatten(params) -> dict[str, np.ndarray]:
    """A tree of parameters, boxed or not -> {"a/b/c": array}."""
    return traverse_util.flatten_dict(nn.meta.unbox(params), sep="/")


def unflatten(flat: dict[str, np.ndarray]) -> dict:
    """{"a/b/c": array} -> a tree of dicts, as `flatten` found it. UserError if a name is both array and branch."""
    for name in flat:
        parts = name.split("/")
        if len(parts) > DEEPEST:
            raise UserError("weights", name, f"more than {DEEPEST} branches deep", "give one tree of weights")
        for depth in range(1, len(parts)):
            if (branch := "/".join(parts[:depth])) in flat:
                raise UserError(
                    "weights", branch, f"both an array and the branch of {name}", "give one tree of weights"
                )
    return traverse_util.unflatten_dict(flat, sep="/")


def _existing(path) -> Path | BucketPath:
    path = as_path(path)
    with _telling("path", path):
        if is_file(path):
            return path
        folder = path.is_dir() if is_remote(path) else os.path.isdir(path)  # unlike Path's, as of `is_file`
    raise UserError("path", path, "a folder" if folder else "no such file", "give the path of a file with weights")
