"""Tensors of PyTorch weight files as parameters of ours: read into their shards one at a time, and back.

place: init -> tree of ShapeDtypeStructs with shardings, where init(key) makes a module's boxed parameters; for example
functools.partial(cmd_jax.state.abstract, mesh=mesh, rules=rules).
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from cmd_jax.errors import UserError
from cmd_jax.files import check_content
from cmd_jax.interop.folders import WeightFiles
from cmd_jax.interop.weights import flatten, read_state_dict, unflatten

FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")  # as safetensors and numpy say
ORDERS = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}  # of Tensor: kernels are [in, out] and [height, width, in, out]
NAMES_IN_ERROR = 3


class Tensor(NamedTuple):
    """Where a parameter lies in a torch file.

    order: our dimension i is torch's order[i]. ones: how many dimensions of length 1 torch has after those.
    part of parts: torch stacks that many parameters of equal shapes along its first dimension.
    layers: our first dimension counts layers, of which torch has one tensor each; `name` has {} for the layer's number,
    and all the rest is about one layer.
    """

    name: str
    order: tuple[int, ...]
    ones: int = 0
    part: int = 0
    parts: int = 1
    layers: bool = False

    def names(self, ours: tuple[int, ...]) -> list[str]:
        """The tensors that make a parameter of that shape."""
        return [self.name.format(i) for i in range(ours[0])] if self.layers else [self.name]

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Torch's shape, given that of the parameter, or of one layer of it."""
        sizes = [ours[i] for i in np.argsort(self.order)]
        if self.parts > 1:
            sizes[0] *= self.parts
        return (*sizes, *(1,) * self.ones)

    def index(self, ours: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The part of torch's tensor that holds part `ours` of a parameter, or of a layer, of that shape."""
        ranges = [ours[i].indices(shape[i])[:2] for i in np.argsort(self.order)]
        if self.parts > 1:
            offset = self.part * shape[self.order.index(0)]
            ranges[0] = tuple(bound + offset for bound in ranges[0])
        return (*(slice(*r) for r in ranges), *(slice(0, 1),) * self.ones)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(array.shape[: len(self.order)]).transpose(self.order)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        array = array.transpose(np.argsort(self.order))
        return array.reshape(array.shape + (1,) * self.ones)


class Weights(NamedTuple):
    """Open files. shapes, dtypes: of all tensors, by name. read: (name, slices) -> array in the file's dtype."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[str, tuple[slice, ...]], np.ndarray]


@contextlib.contextmanager
def open_weights(files: WeightFiles) -> Iterator[Weights]:
    """The tensors of all files. UserError for what is damaged, also while reading, and for a name in two files."""
    try:
        with contextlib.ExitStack() as stack:
            tensors = {}
            for part in files.parts:
                more = _tensors(part, stack)
                if twice := tensors.keys() & more.keys():
                    raise UserError("weights", part, f"{min(twice)} is in another file too", "fetch the folder again")
                tensors |= more
            facts = {name: _facts(tensor) for name, tensor in tensors.items()}
            shapes, dtypes = ({name: fact[i] for name, fact in facts.items()} for i in range(2))
            yield Weights(shapes, dtypes, lambda name, index: np.asarray(tensors[name][index]))
    except (SafetensorError, OSError) as e:
        raise UserError("weights", files.name, f"damaged or incomplete ({e})", "fetch or write the file again") from e


def _tensors(path: Path, stack: contextlib.ExitStack) -> dict:
    """By name: arrays, or slices of a safetensors file that is read as they are."""
    if path.suffix != ".safetensors":
        return read_state_dict(path)
    check_content(path, "weights")
    file = stack.enter_context(safe_open(path, framework="numpy"))
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118


def _facts(tensor) -> tuple[tuple[int, ...], str]:
    if isinstance(tensor, np.ndarray):
        return tensor.shape, str(tensor.dtype)
    return tuple(tensor.get_shape()), tensor.get_dtype()


def digest_weights(files: WeightFiles, rename=str) -> str:
    """SHA-256 over the tensors, in the order of their names: the same for the same numbers in files of other kinds.

    rename: as of `load_params`.
    """
    content = hashlib.sha256()
    with open_weights(files) as weights:
        for new, name in sorted((rename(name), name) for name in weights.shapes if rename(name) is not None):
            array = weights.read(name, (slice(None),) * len(weights.shapes[name]))
            content.update(f"{new} {array.dtype} {array.shape}\n".encode())
            content.update(np.ascontiguousarray(array).view(np.uint8).data)
    return content.hexdigest()


def load_params(files: WeightFiles, init, tensor_of, dtype="float32", place=None, rename=str, blame=None) -> dict:
    """The parameters that init(key) would make, from files of weights; numpy arrays, or laid out as `place` says.

    tensor_of: (our path, number of dimensions) -> Tensor. dtype: of the arrays, whatever the file's. rename: name in
    the file -> name of a Tensor, or None for one that is no parameter. blame: (names that are missing or left over,
    {name of another shape: (its shape, the right one)}) -> what may be wrong, or None. Only the parts for devices here
    are read. UserError for tensors that do not fit, of all three kinds, and for those that hold no floats.
    """
    like = place(init) if place else jax.eval_shape(lambda key: nn.meta.unbox(init(key)), jax.random.key(0))
    like = flatten(like)
    layout = {ours: tensor_of(ours, leaf.ndim) for ours, leaf in like.items()}
    names = {ours: tensor.names(like[ours].shape) for ours, tensor in layout.items()}
    path = files.name
    with open_weights(files) as weights:
        stored = {}
        for name in weights.shapes:
            if (new := rename(name)) is None:
                continue
            if (other := stored.setdefault(new, name)) != name:
                raise UserError("weights", path, f"{other} and {name} are one tensor", "fetch the file again")
            if weights.dtypes[name] not in FLOATS:
                problem = f"{name} is of dtype {weights.dtypes[name]}"
                raise UserError("weights", path, problem, f"give weights in one of {', '.join(FLOATS[:4])}")
        found = {name: weights.shapes[original] for name, original in stored.items()}
        shapes = {ours: tensor.shape(like[ours].shape[tensor.layers :]) for ours, tensor in layout.items()}
        _compare(path, found, {name: shapes[ours] for ours in like for name in names[ours]}, blame)

        def read(ours, leaf):
            tensor, shape = layout[ours], leaf.shape[layout[ours].layers :]

            def one(name, index):
                array = weights.read(stored[name], tensor.index(index, shape))
                return np.asarray(tensor.to_ours(array), jnp.dtype(dtype), order="C")

            def part(index):
                if tensor.layers:
                    return np.stack([one(name, index[1:]) for name in names[ours][index[0]]])
                return one(tensor.name, index)

            if place is None:
                return part((slice(None),) * leaf.ndim)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

        return unflatten({ours: read(ours, leaf) for ours, leaf in like.items()})


def _compare(path: Path, found: dict, wanted: dict, blame):
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misshapen = {n: (found[n], wanted[n]) for n in sorted(found.keys() & wanted.keys()) if found[n] != wanted[n]}
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} tensors are missing: {_some(missing)}")
    if extra:
        problems.append(f"the model has no place for {len(extra)}: {_some(extra)}")
    if misshapen:
        shown = [f"{name} {list(has)}, expected {list(right)}" for name, (has, right) in misshapen.items()]
        problems.append(f"{len(misshapen)} of another shape: {_some(shown)}")
    if problems:
        likely = blame and blame([*missing, *extra], misshapen)
        remedy = "give weights and config.json of one model" + (f" (likely {likely} is wrong)" if likely else "")
        raise UserError("weights", path, "; ".join(problems), remedy)


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_IN_ERROR
    return ", ".join(names[:NAMES_IN_ERROR]) + (f" and {more} more" if more > 0 else "")


def torch_state(params, tensor_of) -> dict[str, np.ndarray]:
    """Host parameters -> {torch name: array in torch's layout}, in their dtypes."""
    parts = {}
    for ours, array in flatten(params).items():
        tensor, array = tensor_of(ours, np.ndim(array)), np.asarray(array)
        for name, one in zip(tensor.names(array.shape), array if tensor.layers else [array], strict=True):
            parts.setdefault(name, {})[tensor.part] = tensor.to_torch(one)
    return {
        name: np.concatenate([found[i] for i in sorted(found)]) if len(found) > 1 else found[0]
        for name, found in sorted(parts.items())
    }
