"""Trees of arrays of the mesh on the hosts: whole copies, a digest of their bytes, a comparison of their shapes."""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from cmd_jax.errors import UserError


def whole(leaf) -> np.ndarray:
    """One array on every host. Every process must call it where the array is spread over several."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def own_rows(batch: dict) -> tuple[np.ndarray, dict]:
    """Of a batch of arrays [B, ...] whose rows are laid out alike: the numbers of the rows whose first copy lies on
    this process's devices, int [n], and those rows, [n, ...] on the host. Each row is one process's, which of
    several must hold it whole."""

    def rows_of(x):
        if x.is_fully_addressable:
            return np.arange(len(x)), np.asarray(x)
        shards = {s.index[0].indices(len(x))[0]: s.data for s in x.addressable_shards if s.replica_id == 0}
        parts = [np.asarray(data) for _, data in sorted(shards.items())]
        numbers = [start + np.arange(len(data)) for start, data in sorted(shards.items())]
        if not parts:
            return np.zeros(0, int), np.zeros((0, *x.shape[1:]), x.dtype)
        return np.concatenate(numbers), parts[0] if len(parts) == 1 else np.concatenate(parts)

    found = {name: rows_of(x) for name, x in batch.items()}
    return next(iter(found.values()))[0], {name: rows for name, (_, rows) in found.items()}


def to_host(tree):
    """The tree as numpy arrays in process 0, None in the others; every process must call it. One array at a time."""
    keep = jax.process_index() == 0
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [whole if keep else None for whole in map(whole, leaves)]
    return jax.tree.unflatten(treedef, leaves) if keep else None


def digest(tree) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a tree of arrays, however they are laid out.

    Every process must call it where arrays are spread over several; all get the same.
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(whole(leaf))
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def check_tree(field: str, found, wanted, remedy: str, config: dict | None = None):
    """UserError for the first array whose presence, shape or dtype differs between two trees of (abstract) arrays.

    config: the one that `found` was made with; its model sizes that the shapes show are named.
    """

    def shapes(tree):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(p, simple=True, separator="/"): (tuple(x.shape), str(x.dtype)) for p, x in leaves}

    found, wanted = shapes(found), shapes(wanted)
    different = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    if different:
        pairs = [(found[key][0], wanted[key][0]) for key in different if key in found and key in wanted]
        sizes = {a for old, new in pairs for a, b in zip(old, new, strict=False) if a != b}
        model = (config or {}).get("model") or {}
        likely = [f"model.{k}={v}" for k, v in sorted(model.items()) if type(v) is int and v in sizes]
        remedy += f" (likely {', '.join(likely)})" if likely else ""
        problem = f"this config wants {wanted.get(different[0], 'no such array')}"
        raise UserError(f"{field}/{different[0]}", found.get(different[0], "absent"), problem, remedy)
