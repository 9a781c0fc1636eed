"""Arrays of the mesh on the hosts: whole copies of them, and a digest of their bytes."""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils


def whole(leaf) -> np.ndarray:
    """One array on every host. Every process must call it where the array is spread over several."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


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
