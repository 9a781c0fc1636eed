import logging
import pickle
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_writer import ORDERED_DICT, STORAGE, Call, Global, Persistent, TorchFile, opcodes

from cmd_jax.errors import UserError
from cmd_jax.interop.weights import read_state_dict


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
    checkpoint(path, "model", "averaged")
    assert read_state_dict(path, key="averaged")["w"].tolist() == [1, 1]
    with pytest.raises(UserError, match=r"^key=None: 2 of the entries .* choose one of model, averaged$"):
        read_state_dict(path)
    with pytest.raises(UserError, match=r"^key=modl: .* choose one of model, averaged$"):
        read_state_dict(path, key="modl")
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


def test_the_averaged_weights_are_taken_where_there_are_some(path, caplog):
    checkpoint(path, "mdiff_model", "ema")
    with caplog.at_level(logging.INFO):
        assert read_state_dict(path)["w"].tolist() == [1, 1]
    assert "ema" in caplog.text and "mdiff_model" in caplog.text
    assert read_state_dict(path, key="mdiff_model")["w"].tolist() == [0, 0]


@pytest.mark.parametrize("where", ["beside", "inside", "value", "state"])
def test_code_in_a_pickle_is_never_run(path, tmp_path, where):
    """What is read is refused with it; elsewhere it is a name that nobody asks for."""
    marker = tmp_path / "ran"
    file = TorchFile()
    weight = file.tensor(np.arange(2, dtype=np.float32))
    attack = Call(Global("os", "system"), (f"touch {marker}",))
    tree = {
        "beside": {"model": {"w": weight}, "x": attack},
        "inside": attack,
        "value": {"model": {"w": weight, "x": attack}},
        "state": Call(Global("collections", "OrderedDict"), ([["w", weight]],), attack),
    }[where]
    file.save(path, tree)
    if where in ("beside", "state"):
        assert read_state_dict(path)["w"].tolist() == [0, 1]
    else:
        with pytest.raises(UserError, match=r"^path=.*its pickle asks for os\.system, .*refused"):
            read_state_dict(path)
    assert not marker.exists()


X = b"\x8c\x01x"
ODD = {
    "BUILD": b"cos\nsystem\n(" + X + b"tR}" + X + b"K\x01sb",
    "SETITEMS": b"cos\nsystem\n(" + X + b"K\x02u",
    "APPENDS": b"cos\nsystem\n(K\x02e",
    "NEWOBJ": b"cos\nsystem\n(" + X + b"t\x81",
    "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93(" + X + b"tR",
}
UNWRITTEN = {  # by torch.save
    "INST": b"(" + X + b"ios\nsystem\n",
    "OBJ": b"(cos\nsystem\n" + X + b"o",
    "NEWOBJ_EX": b"cos\nsystem\n(" + X + b"t}\x92",
    "STRING": b"S'x'\n",
    "DUP": b"N20",
    "LONG4": b"\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20,
}


def beside(file, odd):
    """A pickle of {"model": {"w": [0, 1]}, "x": what the instructions make}."""
    model = opcodes({"w": file.tensor(np.arange(2, dtype=np.float32))})
    return b"\x80\x02}(" + opcodes("model") + model + opcodes("x") + odd + b"u."


@pytest.mark.parametrize("attack", ODD.values(), ids=ODD)
def test_no_instruction_makes_an_object(path, attack, monkeypatch):
    monkeypatch.setattr("os.system", lambda _: pytest.fail("called"))
    file = TorchFile()
    file.save_pickle(path, beside(file, attack))
    assert read_state_dict(path, key="model")["w"].tolist() == [0, 1]
    file.save_pickle(path, b"\x80\x02}" + opcodes("x") + attack + b"s.")
    with pytest.raises(UserError):
        read_state_dict(path)


@pytest.mark.parametrize("name", UNWRITTEN)
def test_instructions_that_torch_does_not_write_are_refused(path, name, monkeypatch):
    monkeypatch.setattr("os.system", lambda _: pytest.fail("called"))
    file = TorchFile()
    with pytest.raises(UserError, match=f"^path=.*the instruction {name}, "):
        read_state_dict(file.save_pickle(path, beside(file, UNWRITTEN[name])), key="model")


BOMBS = {
    "a hash of 2**100 steps": b")" + b"q\x00h\x00\x86" * 100,  # a tuple of two tuples of two tuples ...
    "shared lists": b"]" + b"q\x00](h\x00h\x00e" * 100,
    "a depth of 100,000": b"]" * 100_000 + b"a" * 99_999,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("odd", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("place", ["key", "value"])
def test_time_grows_as_the_file_does(path, odd, place):
    file, entry = TorchFile(), {"key": odd, "value": opcodes("x") + odd}[place]
    model = opcodes({"w": file.tensor(np.arange(2, dtype=np.float32))})
    entry += b"K\x01" if place == "key" else b""
    file.save_pickle(path, b"\x80\x02}(" + opcodes("model") + model + entry + b"u.")
    assert read_state_dict(path)["w"].tolist() == [0, 1]
    file.save_pickle(path, b"\x80\x02}(" + entry + b"u.")
    with pytest.raises(UserError):
        read_state_dict(path)


def test_parts_of_an_archive_may_not_overlap(path):
    """Each of 64 storages holds those after it: 30 kilobytes would unfold to a million."""
    file, content, places = TorchFile(), bytes(10_000), []
    for i in reversed(range(64)):
        info = zipfile.ZipInfo(f"archive/data/{i}")
        info.file_size, info.CRC = len(content), zipfile.crc32(content)
        content = info.FileHeader() + content
        places.append((info, len(content)))
    storages = [Persistent(("storage", Global("torch", "ByteStorage"), str(i), "cpu", info.file_size))
                for i, (info, _) in enumerate(reversed(places))]  # fmt: skip
    tree = {f"w{i}": file.view(storage, 0, (storage.pid[-1],), (1,)) for i, storage in enumerate(storages)}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes(tree) + b".")
        for info, length in places:
            info.header_offset, info.compress_size = archive.start_dir + len(content) - length, info.file_size
            archive.filelist.append(info)
        archive.fp.seek(archive.start_dir)
        archive.fp.write(content)
        archive.start_dir += len(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size > 10_000
        assert sum(info.file_size for info in archive.infolist()) > 20 * path.stat().st_size
    with pytest.raises(UserError, match="[Oo]verlap"):
        read_state_dict(path)


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_is_refused_in_every_protocol(path, protocol):
    with pytest.raises(UserError, match=r"asks for (builtins|__builtin__)\.exec"):
        read_state_dict(TorchFile().save_pickle(path, pickle.dumps({"w": Attack()}, protocol)))


@pytest.mark.parametrize("name", [
    "argparse.Namespace", "torch.load", "torch.nn.Linear", "torch._utils._rebuild_sparse_tensor", "collections.Counter",
])  # fmt: skip
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
        {"shape": (2**40,), "stride": (0,)},  # memory grows as the file does
        {"shape": (6, 6), "stride": (1, 0)},
        {"shape": (1,) * 10**4, "stride": (1,) * 10**4},
        {"shape": (2**62, 2**62, 0), "stride": (1, 1, 1), "size": 2**60},
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
def test_tensors_outside_their_storage_or_larger_than_it_are_refused(path, layout):
    with pytest.raises(UserError, match="damaged"):
        read_state_dict(one_tensor(path, **layout))


def test_torch_files_of_other_kinds_are_explained(path):
    path.write_bytes(b"".join(pickle.dumps(x, protocol=2) for x in ({"w": [1.0]}, 1, {})))
    with pytest.raises(UserError, match="not one of torch.save"):
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
