"""PyTorch state dicts as parameters of ours, and back, by one description of both.

For weights that one host reads whole; torch_layout reads what Stable Diffusion's folders hold, a shard at a time.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cmd_jax.errors import UserError


class Tensor(NamedTuple):
    """A tensor of a state dict, and the parameters of ours that it holds.

    name: torch's; with "{}" in it, that of one of `layers` tensors, which lie in ours along a first dimension.
    dims: (config field, size) of each dimension; field "kind" where the size is fixed.
    paths: of our parameters, "a/b/c"; where there are several, torch has them one after the other along its first
    dimension.
    pattern: how one of them and one layer is rearranged, torch's dimensions -> ours, as einops writes it.
    """

    name: str
    dims: tuple[tuple[str, int], ...]
    paths: tuple[str, ...]
    pattern: str
    layers: int = 0

    @property
    def names(self) -> list[str]:
        return [self.name.format(i) for i in range(self.layers)] if self.layers else [self.name]

    @property
    def part(self) -> tuple[int, ...]:
        """Torch's shape of one path and one layer."""
        first, *rest = (size for _, size in self.dims)
        return first // len(self.paths), *rest

    def to_ours(self, part):
        return rearrange(part, self.pattern)

    def to_torch(self, part):
        torch, ours = self.pattern.split(" -> ")
        sizes = {axis: size for axis, size in zip(torch.split(), self.part, strict=True) if axis != "1"}
        return rearrange(part, f"{ours} -> {torch}", **sizes)


def layer(name: str, paths: tuple[str, ...], pattern: str, dims, bias=None, layers: int = 0) -> list[Tensor]:
    """Weight and bias of a torch layer, kernels and biases of ours; bias: its dimension where it is not the first."""
    return [
        Tensor(f"{name}.weight", dims, tuple(f"{path}/kernel" for path in paths), pattern, layers),
        Tensor(f"{name}.bias", (bias or dims[0],), tuple(f"{path}/bias" for path in paths), "o -> o", layers),
    ]


class Reader:
    """Hands out tensors of a state dict as float32, each checked against the shape that the config implies."""

    def __init__(self, kind: str, config: dict, state_dict: dict[str, np.ndarray]):
        self.kind, self.config, self.names, self.rest = kind, config, tuple(state_dict), dict(state_dict)

    def __contains__(self, name):
        return name in self.rest

    def __call__(self, name: str, *dims: tuple[str, int]) -> np.ndarray:
        """The tensor with one (config field, size) for each of its dimensions; field "kind" for a fixed size."""
        expected = tuple(size for _, size in dims)
        if name not in self.rest:
            raise self._error(self._field(name), f"the weights lack {name} {expected}")
        value = self.rest.pop(name)
        if value.shape != expected:
            pairs = zip(expected, value.shape, strict=False)
            wrong = [i for i, (e, n) in enumerate(pairs) if e != n] if value.ndim == len(dims) else []
            fields = [dims[i][0] for i in wrong] or ["kind"]
            raise self._error(fields[0], f"{name} has shape {tuple(value.shape)}, expected {expected}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise self._error("kind", f"{name} is of dtype {value.dtype}")
        return np.asarray(value, np.float32)

    def refuse_rest(self):
        if self.rest:
            name, *others = self.rest
            more = f" and {len(others)} more tensors" if others else ""
            shown = f"{name} {tuple(self.rest[name].shape)}{more}"
            raise self._error(self._field(name), f"the model has no place for {shown}")

    def _field(self, name):
        """The config field that decides whether there is such a tensor."""
        if not self.config:
            return "kind"
        if name.startswith("y_embedder."):
            return "num_classes"
        block = re.match(r"(?:(?:en|de)coder\.layers|blocks)\.(\d+)\.", name)
        if block is None:
            return "kind"
        present = any(n.startswith(block[0]) for n in self.names)
        return "kind" if present and int(block[1]) < self.config["depth"] else "depth"

    def _error(self, field, problem):
        if field == "kind":
            return UserError("kind", self.kind, problem, "give the whole weights of such a model, or the right kind")
        return UserError(f"config.{field}", self.config.get(field), problem, f"set {field} as the weights were trained")


def to_params(tensors: Iterable[Tensor], read: Reader) -> dict[str, np.ndarray]:
    """-> {"a/b/c": float32 array}, which may share the state dict's memory."""
    params = {}
    for tensor in tensors:
        layers = [np.split(read(name, *tensor.dims), len(tensor.paths)) for name in tensor.names]
        for path, *parts in zip(tensor.paths, *layers, strict=True):
            parts = [tensor.to_ours(part) for part in parts]
            params[path] = np.stack(parts) if tensor.layers else parts[0]
    return params


def to_state_dict(tensors: Iterable[Tensor], params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"a/b/c": array} of the shapes that `shapes` tells -> {torch name: array}, in their dtypes."""
    state = {}
    for tensor in tensors:
        for i, name in enumerate(tensor.names):
            parts = [params[path][i] if tensor.layers else params[path] for path in tensor.paths]
            state[name] = np.concatenate([tensor.to_torch(np.asarray(part)) for part in parts])
    return state


def shapes(tensors: Iterable[Tensor]) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters that tensors hold, {"a/b/c": shape and float32}."""
    found = {}
    for tensor in tensors:
        one = jax.eval_shape(tensor.to_ours, jax.ShapeDtypeStruct(tensor.part, np.float32))
        shape = (tensor.layers, *one.shape) if tensor.layers else one.shape
        found |= dict.fromkeys(tensor.paths, jax.ShapeDtypeStruct(shape, np.float32))
    return found
