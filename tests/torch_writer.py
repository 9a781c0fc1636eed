"""torch.save's zip files from their description, so that no test needs torch.

Opcodes of pickle protocol 2, tensors as calls of torch._utils._rebuild_tensor_v2 on persistent ids, the bytes of
storage k in `data/k`.
"""

import struct
import zipfile
from typing import NamedTuple


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: object
    arguments: tuple
    state: object = None


class Persistent(NamedTuple):
    pid: tuple


def opcodes(x) -> bytes:
    match x:
        case Global():
            return f"c{x.module}\n{x.name}\n".encode()
        case Call():
            built = opcodes(x.state) + b"b" if x.state is not None else b""
            return opcodes(x.function) + opcodes(x.arguments) + b"R" + built
        case Persistent():
            return opcodes(x.pid) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if x else b"\x89"
        case int():
            return b"\x8a\x08" + struct.pack("<q", x)
        case float():
            return b"G" + struct.pack(">d", x)
        case str():
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        case tuple():
            return b"(" + b"".join(map(opcodes, x)) + b"t"
        case list():
            return b"](" + b"".join(map(opcodes, x)) + b"e"
        case dict():
            return b"}(" + b"".join(opcodes(k) + opcodes(v) for k, v in x.items()) + b"u"
    raise TypeError(x)


ORDERED_DICT = Call(Global("collections", "OrderedDict"), ())
STORAGE = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class TorchFile:
    """Collects storages while a tree is written down; `save` makes the archive."""

    def __init__(self):
        self.storages = []

    def storage(self, array, size=None) -> Persistent:
        self.storages.append(array.tobytes())
        kind = Global("torch", STORAGE[array.dtype.name])
        return Persistent(("storage", kind, str(len(self.storages) - 1), "cpu", array.size if size is None else size))

    def view(self, storage, offset, shape, stride) -> Call:
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, stride, False, ORDERED_DICT))

    def tensor(self, array) -> Call:
        stride = tuple(s // array.itemsize for s in array.strides)
        return self.view(self.storage(array), 0, array.shape, stride)

    def save(self, path, tree, byteorder="little", compression=zipfile.ZIP_STORED):
        return self.save_pickle(path, b"\x80\x02" + opcodes(tree) + b".", byteorder, compression)

    def save_pickle(self, path, data, byteorder="little", compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/byteorder", byteorder)
            for i, content in enumerate(self.storages):
                archive.writestr(f"archive/data/{i}", content)
            archive.writestr("archive/version", "3\n")
        return path
