"""Weights as {name: array}: safetensors both ways, torch's zip files read without torch and without running pickles."""

import math
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from cmd_jax.errors import UserError, nearest
from cmd_jax.files import atomic_path

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_state_dict(path: str | Path, key: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors or torch zip file (.pt, .pth, .ckpt, .bin), in the file's dtypes and layout.

    key: which entry of a torch file {"model": ..., "ema": ...} to read; None takes the only one that holds tensors, or
    the whole file if that is one state dict. Arrays of a torch file may be read-only, strided views.
    Raises UserError if there is no such file, if it is damaged, if its pickle names anything but tensors in plain
    containers (nothing in it is ever called), or if `key` doesn't settle what is meant.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        if key is not None:
            raise UserError("key", key, "a safetensors file has no entries to choose from", "leave it out")
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path, key)
    known = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise UserError("path", path, "not a kind of weights file we read", f"give a file with one of the endings {known}")


def write_safetensors(path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes arrays (numpy or addressable jax ones, bfloat16 too) and texts; the file appears whole or not at all."""
    path = Path(path)
    # The library writes an array's memory as it lies: without the C order a transposed array is stored wrongly.
    tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as e:
        raise UserError(
            "path", path, f"could not be written ({e})", "give a file in a folder with room and rights"
        ) from e


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts stored in a safetensors file beside its tensors."""
    path = _existing(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise _damaged(path, e) from e


def flatten(params) -> dict[str, np.ndarray]:
    """A tree of parameters, boxed or not -> {"a/b/c": array}."""
    return traverse_util.flatten_dict(nn.meta.unbox(params), sep="/")


def unflatten(flat: dict[str, np.ndarray]) -> dict:
    """{"a/b/c": array} -> a tree of dicts, as `flatten` found it. UserError if a name is both array and branch."""
    for name in flat:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            if (branch := "/".join(parts[:depth])) in flat:
                raise UserError(
                    "weights", branch, f"both an array and the branch of {name}", "give one tree of weights"
                )
    return traverse_util.unflatten_dict(flat, sep="/")


def _existing(path) -> Path:
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, False for names no file system takes
        problem = "a folder" if os.path.isdir(path) else "no such file"
        raise UserError("path", path, problem, "give the path of a file with weights")
    return path


def _damaged(path: Path, reason) -> UserError:
    text = str(reason).encode("unicode_escape").decode()[:200]
    return UserError("path", path, f"damaged or incomplete ({text})", "fetch or write the file again")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, TypeError, ValueError) as e:  # Type- and ValueError: a dtype numpy lacks
        raise _damaged(path, e) from e


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _Tensor(NamedTuple):
    """Where a tensor lies; read only once it is known to be wanted (an optimiser's state may be in the file too)."""

    storage: _Storage
    offset: int
    shape: tuple
    stride: tuple


class _RebuildTensor:
    __slots__ = ()  # nothing that a pickle could set on it

    def __call__(self, storage, offset, shape, stride, requires_grad, hooks):
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        return _Tensor(storage, offset, shape, stride)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, tensor, requires_grad, hooks):
        return tensor


class _Forbidden(Exception):
    pass


# Python's own unpickler, not the C one, whose memo takes as much memory as the largest index that a file names.
class _Unpickler(pickle._Unpickler):
    """Builds plain containers and tensors; every other global is refused by name, before anything is called."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if module == "torch" and name in STORAGES:
            return name
        raise _Forbidden(f"{module}.{name}")

    def persistent_load(self, pid):
        kind, storage, key, _device, size = pid
        if kind != "storage":
            raise pickle.UnpicklingError("a reference to something other than a storage")
        return _Storage(np.dtype(STORAGES[storage]), str(key), size)


def _read_torch(path: Path, key: str | None) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            legacy = file.read(1) == b"\x80"  # how a pickle begins
        if not legacy:
            raise _damaged(path, "neither a zip file nor a pickle")
        raise UserError(
            "path",
            path,
            "torch's format from before version 1.6, which can't be read without running its pickles",
            "where torch is installed, run torch.save(torch.load(path, weights_only=True), path)",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path, key)
    except UserError:
        raise
    except _Forbidden as e:
        name = str(e).encode("unicode_escape").decode()[:100]
        raise UserError(
            "path",
            path,
            f"its pickle asks for {name}, which no plain state dict needs, and was refused",
            "if you trust the file, save its state dict alone: torch.save(model.state_dict(), path)",
        ) from None
    except Exception as e:  # a hostile or torn pickle can fail in any way
        raise _damaged(path, f"{type(e).__name__}: {e}") from e


def _read_archive(archive: zipfile.ZipFile, path: Path, key: str | None) -> dict[str, np.ndarray]:
    members = {}
    for info in archive.infolist():
        members[info.filename.partition("/")[2]] = info  # every name is below one folder, called as the file was
    if "constants.pkl" in members:
        raise UserError(
            "path", path, "a TorchScript program, not a state dict", "save its state_dict() with torch.save"
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise UserError(
            "path", path, "compressed, which torch.save never does", "unpack and zip it without compression"
        )
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise UserError("path", path, "written on a big-endian machine", "save it again on a little-endian one")
    with archive.open(members["data.pkl"]) as file:
        tree = _Unpickler(file, encoding="utf-8").load()

    storages = {}

    def array(tensor: _Tensor) -> np.ndarray:
        storage, offset, shape, stride = tensor
        info = members[f"data/{storage.key}"]
        if info.file_size != storage.size * storage.dtype.itemsize:
            raise ValueError(f"storage {storage.key} has {info.file_size} bytes, not {storage.size} {storage.dtype}")
        if storage.key not in storages:
            storages[storage.key] = archive.read(info)
        flat = np.frombuffer(storages[storage.key], storage.dtype)
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if min(offset, *shape, *stride, 0) < 0 or (math.prod(shape) and last >= flat.size):
            raise ValueError(f"a tensor of shape {shape}, stride {stride} leaves its storage of {flat.size}")
        return np.lib.stride_tricks.as_strided(
            flat[offset:], shape, [s * flat.itemsize for s in stride], writeable=False
        )

    return {name: array(tensor) for name, tensor in _choose_state_dict(tree, path, key).items()}


def _is_state_dict(tree) -> bool:
    if not isinstance(tree, dict) or not tree:
        return False
    return all(isinstance(k, str) and isinstance(v, _Tensor) for k, v in tree.items())


def _choose_state_dict(tree, path: Path, key: str | None) -> dict[str, _Tensor]:
    if not isinstance(tree, dict):
        raise UserError("path", path, "holds no dict of tensors", "save model.state_dict()")
    entries = [k for k, v in tree.items() if _is_state_dict(v)]
    if key is None:
        if _is_state_dict(tree):
            return tree
        if len(entries) == 1:
            return tree[entries[0]]
        problem = f"{len(entries)} of the entries {_listed(tree)} are state dicts"
        raise UserError(
            "key", "None", problem, f"choose one of {_listed(entries)}" if entries else "save model.state_dict()"
        )
    if key in entries:
        return tree[key]
    if not entries:
        raise UserError("key", key, f"{path.name} has no entries with tensors of their own", "leave it out")
    raise UserError(
        "key", key, f"not a state dict of {path.name}", f"choose one of {_listed(nearest(key, entries, 12))}"
    )


def _listed(names) -> str:
    names = [str(n).encode("unicode_escape").decode()[:60] for n in names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
