import json
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.interop.weights import flatten, read_metadata, read_state_dict, unflatten, write_safetensors


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
