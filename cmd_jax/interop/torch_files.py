"""torch.save's files as {name: array}, without torch and without running a pickle; those from before 1.6 too.

A pickle is a program for a stack machine, which can import and call anything. Ours does with the stack what the opcodes
say, and neither imports nor calls: it knows the few globals that tensors are made of, and whatever else a file asks for
(a training's `args`) stays a name. No value of the file is hashed or printed before its type is known: to hash a tuple
of tuples can take for ever. So time and memory grow as the file does.
"""

import logging
import math
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from cmd_jax.errors import UserError, nearest, printable
from cmd_jax.files import check_content, local_file

log = logging.getLogger(__name__)

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
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
PREFERRED = "ema"  # of several entries
MOST_OPCODES = 10_000_000  # a training state of 5,000 tensors has half a million
MOST_DIMENSIONS = 32
MOST_COPIES = 4  # of a storage's numbers in all tensors together: tied weights are views of one storage
AGAIN = "fetch or write the file again"


class Foreign(NamedTuple):
    """A global, or what came of one that we don't know: never imported, called or filled."""

    name: str


class Pairs(list):
    """The items of a dict, in order."""

    __slots__ = ()


class Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int  # numbers


class Tensor(NamedTuple):
    """Where a tensor lies; read only once it is known to be wanted (an optimizer's state may be in the file too)."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch(path: Path, key: str | None) -> dict[str, np.ndarray]:
    """The tensors of the entry `key`, as `read_state_dict` tells it."""
    with local_file(path) as local:
        check_content(local, "path", path)
        return _read(local, path, key)


def _read(local: Path, path, key: str | None) -> dict[str, np.ndarray]:
    try:
        with open(local, "rb") as file:
            magic = file.read(4)
            file.seek(0)
            if not magic.startswith((b"PK", b"\x80")):
                raise ValueError("neither a zip file nor a pickle")
            tree, bytes_of = (_open_zip if magic.startswith(b"PK") else _open_legacy)(file, path)
            return _arrays(_choose(tree, path, key), bytes_of)
    except UserError:
        raise
    except Exception as e:  # a hostile or torn file can fail in any way
        raise UserError("path", path, f"damaged or incomplete ({type(e).__name__}: {str(e)[:200]})", AGAIN) from e


# The two layouts: -> (what the pickle holds, function Storage -> its bytes).


def _open_zip(file: BinaryIO, path: Path) -> tuple[object, Callable[[Storage], bytes]]:
    archive, members = zipfile.ZipFile(file), {}
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
    if sum(info.file_size for info in members.values()) > os.fstat(file.fileno()).st_size:
        raise ValueError("its parts overlap or leave it")
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise UserError("path", path, "written on a big-endian machine", "save it again on a little-endian one")

    def bytes_of(storage: Storage) -> bytes:
        return archive.read(members[f"data/{storage.key}"])

    with archive.open(members["data.pkl"]) as pickled:
        return unpickle(pickled), bytes_of


def _open_legacy(file: BinaryIO, path: Path) -> tuple[object, Callable[[Storage], bytes]]:
    """Five pickles: magic, version, machine, content, keys of the storages; then each storage, its length first."""
    magic, version, machine = (unpickle(file) for _ in range(3))
    if (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION):
        raise UserError("path", path, "a pickle, but not one of torch.save", "save a state dict with torch.save")
    if not isinstance(machine, Pairs) or ("little_endian", True) not in machine:
        raise UserError("path", path, "written on a big-endian machine", "save it again on a little-endian one")
    storages = {}
    tree, keys = unpickle(file, storages), unpickle(file)
    places = {}
    for key in map(_text, keys):
        numbers, storage = int.from_bytes(file.read(8), "little"), storages[key]
        places[key] = file.tell(), numbers * storage.dtype.itemsize
        file.seek(places[key][1], 1)
    if file.tell() > os.fstat(file.fileno()).st_size:
        raise ValueError("shorter than its storages")

    def bytes_of(storage: Storage) -> bytes:
        place, length = places[storage.key]
        file.seek(place)
        return file.read(length)

    return tree, bytes_of


# The stack machine. Its instructions are those that torch.save's protocols 2 to 4 write for a training's state.

VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE",
          "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"}  # fmt: skip
NEW = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
       "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_DICT": Pairs}  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def unpickle(file: BinaryIO, storages: dict[str, Storage] | None = None):
    """What a pickle builds, of None, bool, int, float, str, bytes, tuple, list (of sets too), Pairs, Tensor, Foreign.

    storages: filled with the storages that tensors lie in, by their keys. Raises what it may for what is no pickle.
    """
    stack, marks, memo, storages = [], [], {}, {} if storages is None else storages

    def above(start: int) -> list:
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count >= MOST_OPCODES:
            raise ValueError(f"a pickle of more than {MOST_OPCODES} instructions")
        if name in VALUES:
            stack.append(argument)
        elif name in NEW:
            stack.append(NEW[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in TUPLES:
            stack.append(tuple(above(-TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(above(marks.pop())))
        elif name in ("APPEND", "SETITEM"):
            items = above(-1 if name == "APPEND" else -2)
            _extend(stack[-1], items if name == "APPEND" else _paired(items))
        elif name in ("APPENDS", "ADDITEMS", "SETITEMS"):
            items = above(marks.pop())
            _extend(stack[-1], _paired(items) if name == "SETITEMS" else items)
        elif name == "GLOBAL":
            stack.append(Foreign(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            module, attribute = above(-2)
            stack.append(Foreign(f"{_text(module)}.{_text(attribute)}"))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_made(*above(-2)))
        elif name == "BUILD":
            above(-1)  # attributes: of a state dict its versions, of no use here
        elif name == "BINPERSID":
            stack.append(storage := _storage(stack.pop()))
            if isinstance(storage, Storage):
                storages[storage.key] = storage
        elif name == "STOP":
            break
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"a pickle with the instruction {name}, which torch.save does not write")
    return stack[-1]


def _text(value) -> str:
    if type(value) is not str:
        raise ValueError(f"a name that is a {type(value).__name__}")
    return value


def _paired(items: list) -> Iterable[tuple]:
    return Pairs(zip(items[::2], items[1::2], strict=True))


def _extend(container, items: Iterable):
    if isinstance(container, list):
        container.extend(items)
    elif not isinstance(container, Foreign):
        raise ValueError(f"items for a {type(container).__name__}")


def _made(maker, arguments):
    """What a call of a global would make."""
    if not isinstance(maker, Foreign) or not isinstance(arguments, tuple):
        raise ValueError(f"a call of a {type(maker).__name__}")
    match maker.name, arguments:
        case "collections.OrderedDict", ():
            return Pairs()
        case "collections.OrderedDict", (list() as items,):
            return Pairs((key, value) for key, value in items)
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", (storage, offset, shape, stride, *_):
            return storage if isinstance(storage, Foreign) else _tensor(storage, offset, shape, stride)
        case "torch._utils._rebuild_parameter", (Tensor() | Foreign() as data, *_):
            return data
    return maker


def _storage(reference) -> Storage | Foreign:
    kind, storage, *rest = reference
    if type(kind) is not str or kind not in ("storage", "module") or not isinstance(storage, Foreign):
        raise ValueError("a reference to something other than a storage")
    if kind == "module":  # the class of a whole model, with its source
        return storage
    key, _device, size, *view = rest
    module, _, name = storage.name.rpartition(".")
    if module != "torch" or name not in STORAGES or view not in ([], [None]):
        return storage
    return Storage(np.dtype(STORAGES[name]), _text(key), *_sizes((size,)))


def _tensor(storage, offset, shape, stride) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor without a storage or a shape")
    return Tensor(storage, *_sizes((offset,)), _sizes(shape), _sizes(stride))


def _sizes(numbers: tuple) -> tuple[int, ...]:
    if len(numbers) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError("sizes that no tensor has")
    return numbers


# What is wanted of it.


def _is_state_dict(tree) -> bool:
    """Names of tensors, which something foreign may stand among."""
    return (
        isinstance(tree, Pairs)
        and any(isinstance(v, Tensor) for _, v in tree)
        and all(type(k) is str and isinstance(v, Tensor | Foreign) for k, v in tree)
    )


def _choose(tree, path: Path, key: str | None) -> dict[str, Tensor]:
    entries = tree if isinstance(tree, Pairs) else Pairs()
    named = [name if type(name) is str else type(name).__name__ for name, _ in entries]
    states = {name: value for name, value in entries if type(name) is str and _is_state_dict(value)}
    if key is None and _is_state_dict(tree):
        chosen = tree
    elif key in states:
        chosen = states[key]
    elif key is not None and not states:
        raise UserError("key", key, f"{path.name} has no entries with tensors of their own", "leave it out")
    elif key is not None:
        remedy = f"choose one of {_listed(nearest(key, states, 12))}"
        raise UserError("key", key, f"not a state dict of {path.name}", remedy)
    elif PREFERRED in states or len(states) == 1:
        name = PREFERRED if PREFERRED in states else next(iter(states))
        chosen, others = states[name], [other for other in named if other != name]
        beside = f"; passed over beside it: {_listed(others)}" if others else ""
        log.info("%s: the weights of its entry %s%s", path, _listed([name]), beside)
    else:
        _refuse_foreign(path, [tree, *(value for _, value in entries)])
        if not entries:
            raise UserError("path", path, "holds no dict of tensors", "save model.state_dict()")
        problem = f"{len(states)} of the entries {_listed(named)} are state dicts"
        raise UserError(
            "key", "None", problem, f"choose one of {_listed(states)}" if states else "save model.state_dict()"
        )
    _refuse_foreign(path, [value for _, value in chosen])
    return dict(chosen)


def _refuse_foreign(path: Path, values: list):
    """What is read must be tensors alone."""
    if foreign := next((value for value in values if isinstance(value, Foreign)), None):
        problem = f"its pickle asks for {_listed([foreign.name])}, which no plain state dict needs, and was refused"
        remedy = "if you trust the file, save its state dict alone: torch.save(model.state_dict(), path)"
        raise UserError("path", path, problem, remedy)


def _arrays(tensors: dict[str, Tensor], bytes_of: Callable[[Storage], bytes]) -> dict[str, np.ndarray]:
    """Read-only views of the storages, each of which is read once."""
    storages = {tensor.storage for tensor in tensors.values()}
    if len({storage.key for storage in storages}) < len(storages):
        raise ValueError("a storage of two kinds")
    numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if numbers > MOST_COPIES * sum(storage.size for storage in storages):
        raise ValueError(f"tensors of {numbers} numbers, many times what is stored")
    content = {storage: np.frombuffer(bytes_of(storage), storage.dtype) for storage in storages}

    def array(tensor: Tensor) -> np.ndarray:
        storage, offset, shape, stride = tensor
        flat = content[storage]
        if flat.size != storage.size:
            raise ValueError(f"storage {storage.key} has {flat.size} numbers, not {storage.size}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= flat.size:
            raise ValueError(f"a tensor of shape {shape}, stride {stride} leaves its storage of {flat.size}")
        strides = [s * flat.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, strides, writeable=False)

    return {name: array(tensor) for name, tensor in tensors.items()}


def _listed(names: Iterable[str]) -> str:
    names = [printable(name[:100]) for name in names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
