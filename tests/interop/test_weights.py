import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cmd_jax.errors import UserError
from cmd_jax.interop.weights import flatten, read_metadata, read_state_dict, unflatten, write_safetensors

# A writer of torch's zip files from their description, so that no test needs torch: opcodes of pickle protocol 2,
# tensors as calls of torch._utils._rebuild_tensor_v2 on persistent ids, the bytes of storage k in `data/k`.


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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pt"


def one_tensor(path, shape, stride, offset=0, size=None, numbers=6):
    file = TorchFile()
    storage = file.storage(np.arange(numbers, dtype=np.float32), size)
    return file.save(path, {"w": file.view(storage, offset, shape, stride)})


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_torch_dtypes_and_endings(tmp_path, dtype, suffix):
    array = np.array([[0, 1, 2], [3, 250, 7]]).astype(np.dtype(dtype))
    file = TorchFile()
    read = read_state_dict(file.save(tmp_path / f"w{suffix}", {"net.w": file.tensor(array)}))
    assert list(read) == ["net.w"] and read["net.w"].dtype == array.dtype
    np.testing.assert_array_equal(read["net.w"], array)


def test_torch_views_parameters_and_scalars(path):
    file = TorchFile()
    base = np.arange(24, dtype=np.float32)
    storage = file.storage(base)
    parameter = Call(
        Global("torch._utils", "_rebuild_parameter"), (file.view(storage, 2, (2, 2), (3, 1)), True, ORDERED_DICT)
    )
    tree = {
        "transposed": file.view(storage, 0, (4, 6), (1, 4)),
        "inner": file.view(storage, 5, (3, 2), (6, 2)),
        "expanded": file.view(storage, 3, (5, 2), (0, 1)),
        "scalar": file.view(storage, 23, (), ()),
        "empty": file.view(storage, 24, (0, 3), (3, 1)),
        "parameter": parameter,
    }
    read = read_state_dict(file.save(path, tree))
    np.testing.assert_array_equal(read["transposed"], base.reshape(6, 4).T)
    np.testing.assert_array_equal(read["inner"], [[5, 7], [11, 13], [17, 19]])
    np.testing.assert_array_equal(read["expanded"], [[3, 4]] * 5)
    np.testing.assert_array_equal(read["parameter"], [[2, 3], [5, 6]])
    assert read["scalar"].shape == () and read["scalar"] == 23
    assert read["empty"].shape == (0, 3)
    np.testing.assert_array_equal(jnp.asarray(read["transposed"]), base.reshape(6, 4).T)


def test_ordered_dict_with_metadata_as_state_dict_writes_it(path):
    file = TorchFile()
    items = tuple([name, file.tensor(np.full(2, i, np.float32))] for i, name in enumerate("ba"))
    tree = Call(Global("collections", "OrderedDict"), (list(items),), {"_metadata": {"": {"version": 1}}})
    read = read_state_dict(file.save(path, tree))
    assert {k: v.tolist() for k, v in read.items()} == {"b": [0, 0], "a": [1, 1]}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_file_without_tensors_lists_its_entries(path, protocol):
    data = pickle.dumps(OrderedDict(epoch=3, notes=["x", (1, 2.5, None, True)]), protocol)
    with pytest.raises(UserError, match=r"0 of the entries epoch, notes are state dicts"):
        read_state_dict(TorchFile().save_pickle(path, data))


def checkpoint(path, *entries):
    file = TorchFile()
    tree = {name: {"w": file.tensor(np.full(2, i, np.float32))} for i, name in enumerate(entries)}
    return file.save(path, tree | {"epoch": 3, "lr": 1e-4, "opt": {"state": {0: {"step": 1}}, "param_groups": [{}]}})


def test_the_only_entry_with_tensors_is_found(path):
    checkpoint(path, "state_dict")
    assert list(read_state_dict(path)) == ["w"]
    assert list(read_state_dict(path, key="state_dict")) == ["w"]


def test_a_choice_of_entries_is_the_users(path):
    checkpoint(path, "model", "ema")
    assert read_state_dict(path, key="ema")["w"].tolist() == [1, 1]
    with pytest.raises(UserError, match=r"^key=None: 2 of the entries .* choose one of model, ema$"):
        read_state_dict(path)
    with pytest.raises(UserError, match=r"^key=emma: .* choose one of ema, model$"):
        read_state_dict(path, key="emma")
    with pytest.raises(UserError, match=r"^key=opt: "):
        read_state_dict(path, key="opt")


def test_a_key_where_there_is_nothing_to_choose_is_refused(path, tmp_path):
    with pytest.raises(UserError, match="^key=model: weights.pt has no entries"):
        read_state_dict(one_tensor(path, (6,), (1,)), key="model")
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="^key=model: a safetensors"):
        read_state_dict(tmp_path / "w.safetensors", key="model")


def test_only_wanted_storages_are_read(path):
    checkpoint(path, "model", "ema")
    content = bytearray(path.read_bytes())
    place = content.index(np.full(2, 1, np.float32).tobytes())  # ema's numbers
    content[place] ^= 1
    path.write_bytes(content)
    assert read_state_dict(path, key="model")["w"].tolist() == [0, 0]
    with pytest.raises(UserError, match="damaged.*CRC"):  # and a flipped bit is noticed
        read_state_dict(path, key="ema")


@pytest.mark.parametrize("where", ["beside", "inside", "state"])
def test_code_in_a_pickle_is_refused_and_not_run(path, tmp_path, where):
    marker = tmp_path / "ran"
    file = TorchFile()
    weight = file.tensor(np.zeros(2, np.float32))
    attack = Call(Global("os", "system"), (f"touch {marker}",))
    tree = {
        "beside": {"model": {"w": weight}, "x": attack},
        "inside": attack,
        "state": Call(Global("collections", "OrderedDict"), (), attack),
    }[where]
    with pytest.raises(UserError, match=r"^path=.*its pickle asks for os\.system, .*refused"):
        read_state_dict(file.save(path, tree))
    assert not marker.exists()


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_is_refused_in_every_protocol(path, protocol):
    with pytest.raises(UserError, match=r"asks for (builtins|__builtin__)\.exec"):
        read_state_dict(TorchFile().save_pickle(path, pickle.dumps({"w": Attack()}, protocol)))


@pytest.mark.parametrize(
    "name",
    [
        "argparse.Namespace",
        "torch.load",
        "torch.nn.Linear",
        "torch._utils._rebuild_sparse_tensor",
        "collections.Counter",
    ],
)
def test_other_globals_are_named(path, name):
    with pytest.raises(UserError, match=f"asks for {name}, "):
        read_state_dict(TorchFile().save(path, {"w": Call(Global(*name.rsplit(".", 1)), ())}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}r\xff\xff\xff\xff.",  # a memo index of four thousand million
        b"\x80\x02" + opcodes(Call(Global("torch", "FloatStorage"), ())) + b".",
        b"\x80\x02" + opcodes(Call(Global("torch._utils", "_rebuild_tensor_v2"), (1, 0, (2,), (1,), 0, 0))) + b".",
        b"\x80\x02" + opcodes({"w": Persistent(("module", "x", "0", "cpu", 1))}) + b".",
        b"\x80\x02" + opcodes({"w": Persistent(("storage", "x", "0", "cpu", 1))}) + b".",
        b"\x80\x02" + opcodes([1, 2]) + b".",
        b"\x80\x02" + opcodes({}) + b".",
    ],
)
def test_odd_pickles_are_one_line_errors(path, data):
    with pytest.raises(UserError) as e:
        read_state_dict(TorchFile().save_pickle(path, data))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "layout",
    [
        {"shape": (7,), "stride": (1,)},
        {"shape": (2, 3), "stride": (4, 1)},
        {"shape": (2,), "stride": (1,), "offset": 5},
        {"shape": (2,), "stride": (-1,), "offset": 3},
        {"shape": (2,), "stride": (1,), "offset": -1},
        {"shape": (-2,), "stride": (1,)},
        {"shape": (2, 3), "stride": (1,)},
        {"shape": (2.0,), "stride": (1,)},
        {"shape": (12,), "stride": (1,), "size": 12},
    ],
)
def test_tensors_outside_their_storage_are_refused(path, layout):
    with pytest.raises(UserError, match="damaged"):
        read_state_dict(one_tensor(path, **layout))


def test_torch_files_of_other_kinds_are_explained(path):
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    with pytest.raises(UserError, match=r"before version 1\.6.*torch\.save\(torch\.load"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"):
            archive.writestr(name, b"")
    with pytest.raises(UserError, match="TorchScript"):
        read_state_dict(path)
    with pytest.raises(UserError, match="big-endian"):
        read_state_dict(TorchFile().save(path, {}, byteorder="big"))
    with pytest.raises(UserError, match="compressed"):
        read_state_dict(TorchFile().save(path, {}, compression=zipfile.ZIP_DEFLATED))


def test_torn_files_are_refused(path):
    whole = one_tensor(path, (6,), (1,)).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"^path=.*damaged or incomplete"):
            read_state_dict(path)


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", "x" * 300, "nul\0.pt"])
def test_a_missing_file_is_an_error_of_path(tmp_path, name):
    with pytest.raises(UserError, match="no such file") as e:
        read_state_dict(tmp_path / name)
    assert e.value.field == "path"


def test_a_folder_and_an_unknown_ending_are_refused(tmp_path):
    with pytest.raises(UserError, match="a folder"):
        read_state_dict(tmp_path)
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(UserError, match="not a kind of weights file"):
        read_state_dict(tmp_path / "w.npz")


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "big_endian": np.arange(3, dtype=">f4"),
        "half": np.arange(3, dtype=ml_dtypes.bfloat16),
        "scalar": np.int64(7),
        "flags": np.array([True, False]),
        "jax": jnp.ones((2, 0)),
    }
    write_safetensors(path, {"old": np.zeros(1)}, {})
    write_safetensors(path, tensors, {"step": "12", "note": "é\n"})
    read = read_state_dict(path)
    assert read.keys() == tensors.keys() and read["half"].dtype == ml_dtypes.bfloat16
    for name, value in tensors.items():
        assert read[name].shape == np.shape(value)
        np.testing.assert_array_equal(read[name], value)
    assert read_metadata(path) == {"step": "12", "note": "é\n"}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"w": np.ones(2, np.float32)})

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_safetensors(path, {"w": np.zeros(2, np.float32)})
    assert read_state_dict(path)["w"].tolist() == [1, 1] and len(list(tmp_path.iterdir())) == 1
    assert read_metadata(path) == {}


@pytest.mark.parametrize("parent", ["a-file", "a-file/below"])
def test_an_unwritable_place_is_an_error_of_path(tmp_path, parent):
    (tmp_path / "a-file").write_bytes(b"")
    with pytest.raises(UserError, match="^path=.*could not be written"):
        write_safetensors(tmp_path / parent / "w.safetensors", {"w": np.zeros(1)})


def header(**tensors):
    return json.dumps(tensors).encode()


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "length, text, body",
    [
        (2**62, header(a=entry([1], 0, 4)), 4),
        (90_000_000, header(a=entry([1], 0, 4)), 4),
        (None, header(a=entry([2], 0, 8), b=entry([2], 4, 12)), 12),  # overlapping
        (None, header(a=entry([2], 0, 8)), 4),  # truncated
        (None, header(a=entry([2**40, 2**40], 0, 8)), 8),
        (None, header(a=entry([2], 0, 8, dtype="F128")), 8),
        (None, b"{", 8),
        (None, b"", 0),
    ],
)
def test_broken_safetensors_are_refused(tmp_path, length, text, body):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(body))
    for read in (read_state_dict, read_metadata):
        with pytest.raises(UserError, match="^path=.*damaged or incomplete"):
            read(path)


def test_a_parameter_tree_goes_there_and_back(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(3, kernel_init=init, name="out")(nn.LayerNorm(name="norm")(x))

    params = Net().init(jax.random.key(0, impl="rbg"), jnp.ones((1, 2)))["params"]
    flat = flatten(params)
    assert set(flat) == {"norm/scale", "norm/bias", "out/kernel", "out/bias"}
    write_safetensors(tmp_path / "w.safetensors", flat)
    back = unflatten(read_state_dict(tmp_path / "w.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, back, nn.meta.unbox(params))


def test_a_name_that_is_array_and_branch_is_refused():
    with pytest.raises(UserError, match="^weights=a/b: .* branch of a/b/c"):
        unflatten({"a/b/c": np.zeros(1), "a/b": np.zeros(1)})
