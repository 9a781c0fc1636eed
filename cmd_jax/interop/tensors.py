"""Tensors of PyTorch's state dicts as parameters of ours, and back, by one description of both.

A family of models is a list of Tensors; `check` compares it with a state dict or with files, `to_params` reads it,
straight into shards if need be, and `to_state_dict` writes it.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cmd_jax.errors import UserError, some
from cmd_jax.interop.weights import Part, Weights, flatten, unflatten

FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")  # as safetensors and numpy say
# Torch's dimensions -> ours, by how many ours are: vectors, linear maps, 2-d convolutions.
LAYOUTS = {1: "o -> o", 2: "o i -> i o", 4: "o i h w -> h w i o"}
POINTWISE = "o i 1 1 -> i o"  # a 1x1 convolution, which is a linear map
NAMES_IN_ERROR = 3


class Tensor(NamedTuple):
    """A tensor of a state dict, and the parameter of ours that it holds, or holds a part of.

    path: ours, "a/b/c". name: torch's, where "{}" stands for the number of a layer. shape: torch's. pattern: how einops
    turns torch's dimensions into ours. part of parts: torch stacks that many parameters of equal shapes along its first
    dimension. layers: where it is not 0, our first dimension counts the layers, of which torch has one tensor each, and
    shape and pattern are about one of them. fields: the field of a config that each size follows from, for errors.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    pattern: str
    part: int = 0
    parts: int = 1
    layers: int = 0
    fields: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [self.name.format(i) for i in range(self.layers)] if self.layers else [self.name]

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the pattern's axes."""
        axes, _ = _axes(self.pattern)
        sizes = dict(zip(axes, self.shape, strict=True))
        return sizes | {axes[0]: self.shape[0] // self.parts} if axes else sizes

    @property
    def ours(self) -> tuple[int, ...]:
        """The shape of our parameter, or of one layer of it."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in _axes(self.pattern)[1])

    @property
    def whole(self) -> tuple[slice, ...]:
        """The index of all of our parameter."""
        return (slice(None),) * (len(self.ours) + (self.layers > 0))

    def parts_of(self, index: tuple[slice, ...]) -> list[Part]:
        """What is read for our parameter [index]: no more than that if the pattern merges no dimensions."""
        if self.layers:
            return [(name, self._bounds(index[1:])) for name in self.names[index[0]]]
        return [(self.name, self._bounds(index))]

    def read(self, weights: Weights, index: tuple[slice, ...]) -> np.ndarray:
        """Our parameter [index]."""
        arrays = [self._arranged(weights.read(*part), index[self.layers > 0 :]) for part in self.parts_of(index)]
        return np.stack(arrays) if self.layers else arrays[0]

    def _bounds(self, index) -> tuple[slice, ...]:
        (axes, groups), sizes = _axes(self.pattern), self.sizes
        alone = {group[0]: one for group, one in zip(groups, index, strict=True) if len(group) == 1}
        bounds = [alone.get(axis, slice(None)).indices(sizes[axis])[:2] for axis in axes]
        if self.parts > 1:
            bounds[0] = tuple(bound + self.part * sizes[axes[0]] for bound in bounds[0])
        return tuple(slice(*bound) for bound in bounds)

    def _arranged(self, array, index) -> np.ndarray:
        """Of what `_bounds` left in: ours."""
        array, groups = rearrange(array, self.pattern), _axes(self.pattern)[1]
        return array[tuple(slice(None) if len(group) == 1 else one for group, one in zip(groups, index, strict=True))]

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Our parameter, or one layer of it -> torch's tensor, or its part of that."""
        theirs, ours = self.pattern.split("->")
        sizes = {axis: size for axis, size in self.sizes.items() if axis != "1"}
        return rearrange(array, f"{ours} -> {theirs}", **sizes)


def _axes(pattern: str) -> tuple[list[str], list[list[str]]]:
    """ "o c p -> (p c) o" -> (["o", "c", "p"], [["p", "c"], ["o"]])"""
    theirs, ours = pattern.split("->")
    return theirs.split(), [(group or axis).split() for group, axis in re.findall(r"\(([^)]*)\)|(\S+)", ours)]


def tensor(path: str, ours: Sequence[int], name: str, pattern: str, part: int = 0, parts: int = 1, layered=False):
    """The Tensor of a parameter of shape `ours`, whose first dimension counts layers if it is `layered`."""
    axes, groups = _axes(pattern)
    sizes = dict(zip((axis for (axis,) in groups), ours[layered:], strict=True))
    shape = [sizes.get(axis, 1) for axis in axes]
    if parts > 1:
        shape[0] *= parts
    return Tensor(path, name, tuple(shape), pattern, part, parts, ours[0] if layered else 0)


def same(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that is called and laid out as the parameter is."""
    axes = " ".join(f"a{i}" for i in range(len(shape)))
    return Tensor(name, name, tuple(shape), f"{axes} -> {axes}")


def layer(name: str, paths: str, pattern: str, shape, fields=(), kernel="kernel", bias=0, layers=0) -> list[Tensor]:
    """Weight and bias of a torch layer, which are `kernel` and bias of ours.

    paths: of our layer, or of several, divided by blanks, that torch stacks. pattern, shape, fields: of the weight.
    bias: which of its dimensions the bias has.
    """
    one, paths = slice(bias, bias + 1), paths.split()
    kinds = ("weight", kernel, pattern, shape, fields), ("bias", "bias", LAYOUTS[1], shape[one], fields[one])
    return [
        Tensor(f"{path}/{ours}", f"{name}.{theirs}", tuple(shape), pattern, part, len(paths), layers, tuple(fields))
        for theirs, ours, pattern, shape, fields in kinds
        for part, path in enumerate(paths)
    ]


class Mismatch(NamedTuple):
    """What does not fit, by name: tensors that are missing, with the shapes they should have, and left over, with
    theirs; (shape, the right one); and dtypes that are no floats."""

    missing: dict[str, tuple]
    extra: dict[str, tuple]
    misshapen: dict[str, tuple[tuple, tuple]]
    dtypes: dict[str, str]
    wanted: int

    @property
    def problem(self) -> str:
        shapes = [f"{name} {list(has)}, expected {list(right)}" for name, (has, right) in self.misshapen.items()]
        told = (
            (f"{len(self.missing)} of {self.wanted} tensors are missing", self.missing),
            (f"the model has no place for {len(self.extra)}", self.extra),
            (f"{len(self.misshapen)} of another shape", shapes),
            (f"not of dtype {', '.join(FLOATS[:4])}", [f"{n} of {dtype}" for n, dtype in self.dtypes.items()]),
        )
        return "; ".join(f"{what}: {some(list(names), NAMES_IN_ERROR)}" for what, names in told if names)


def check(tensors: Iterable[Tensor], weights: Weights, refuse: Callable[[Mismatch], UserError]):
    """Raises refuse(mismatch) unless the weights are the tensors, no more and no less, and hold floats."""
    wanted, found = {name: tensor.shape for tensor in tensors for name in tensor.names}, weights.shapes
    mismatch = Mismatch(
        missing={name: shape for name, shape in wanted.items() if name not in found},
        extra={name: shape for name, shape in sorted(found.items()) if name not in wanted},
        misshapen={n: (found[n], shape) for n, shape in wanted.items() if n in found and found[n] != shape},
        dtypes={name: dtype for name, dtype in weights.dtypes.items() if dtype not in FLOATS},
        wanted=len(wanted),
    )
    if any(mismatch[:4]):
        raise refuse(mismatch)


def to_params(tensors: Iterable[Tensor], weights: Weights, dtype="float32", like: dict | None = None) -> dict:
    """The tree of parameters, of that dtype whatever the weights', from what `check` let pass; None: as of `like`.

    like: {"a/b/c": ShapeDtypeStruct with a sharding}: each process reads its own shards. Without it: numpy arrays.
    """

    place = {name: i for i, name in enumerate(weights.tensors)}
    tensors = sorted(tensors, key=lambda tensor: place[tensor.names[0]])  # as they lie in the files
    indices = {tensor.path: [tensor.whole] if like is None else _own(like[tensor.path]) for tensor in tensors}
    weights.expect(part for tensor in tensors for index in indices[tensor.path] for part in tensor.parts_of(index))

    def read(tensor: Tensor):
        parts = {
            str(index): np.asarray(tensor.read(weights, index), jnp.dtype(dtype or like[tensor.path].dtype), order="C")
            for index in indices[tensor.path]
        }
        if like is None:
            return parts[str(tensor.whole)]
        leaf = like[tensor.path]
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[str(index)])

    return unflatten({tensor.path: read(tensor) for tensor in tensors})


def _own(leaf: jax.ShapeDtypeStruct) -> list[tuple[slice, ...]]:
    """Which parts of an array this process's devices hold; several may hold the same one."""
    return list({str(i): i for i in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}.values())


def to_state_dict(tensors: Iterable[Tensor], params) -> dict[str, np.ndarray]:
    """The tree of host parameters -> {torch name: array}, in their dtypes."""
    flat, state = flatten(params), {}
    for tensor in tensors:
        array = np.asarray(flat[tensor.path])
        for name, one in zip(tensor.names, array if tensor.layers else [array], strict=True):
            state.setdefault(name, {})[tensor.part] = tensor.to_torch(one)
    return {
        name: np.concatenate([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]
        for name, parts in state.items()
    }


def state_dict_of(params, tensor_of) -> dict[str, np.ndarray]:
    """As `to_state_dict`, of the Tensors that tensor_of(our path, shape) tells."""
    return to_state_dict([tensor_of(path, np.shape(array)) for path, array in flatten(params).items()], params)


def shapes(tensors: Iterable[Tensor]) -> dict:
    """The tree of parameters as float32 ShapeDtypeStructs."""
    ours = {tensor.path: ((tensor.layers,) if tensor.layers else ()) + tensor.ours for tensor in tensors}
    return unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in ours.items()})
