"""The one description of torch's tensors and ours: reading whole and in shards, writing, and what does not fit."""

import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.interop.tensors import LAYOUTS, POINTWISE, Tensor, check, layer, shapes, tensor, to_params, to_state_dict
from cmd_jax.interop.weights import Weights, flatten

TENSORS = {
    "a vector": (Tensor("x", "t", (5,), LAYOUTS[1]), (5,)),
    "a number": (Tensor("x", "t", (), "->"), ()),
    "a linear map": (Tensor("x", "t", (3, 4), LAYOUTS[2]), (4, 3)),
    "a convolution": (Tensor("x", "t", (6, 5, 3, 2), LAYOUTS[4]), (3, 2, 5, 6)),
    "a 1x1 convolution": (Tensor("x", "t", (3, 4, 1, 1), POINTWISE), (4, 3)),
    "a position table": (Tensor("x", "t", (1, 5, 4), "1 n d -> n d"), (5, 4)),
    "patches": (Tensor("x", "t", (6, 5, 3, 2), "o c p q -> (p q c) o"), (30, 6)),
    "the second of three": (Tensor("x", "t", (12, 5), LAYOUTS[2], part=1, parts=3), (5, 4)),
    "layers": (Tensor("x", "t.{}", (3, 4), LAYOUTS[2], layers=2), (2, 4, 3)),
    "second parts of layers": (Tensor("x", "t.{}", (6, 4), LAYOUTS[2], part=1, parts=2, layers=3), (3, 4, 3)),
}


def weights_of(*tensors):
    rng = np.random.default_rng(0)
    return Weights.of({name: rng.random(t.shape, np.float32) for t in tensors for name in t.names})


@pytest.mark.parametrize("kind", TENSORS)
def test_a_shard_is_a_part_of_the_whole(kind):
    tensor, shape = TENSORS[kind]
    weights, rng = weights_of(tensor), np.random.default_rng(1)
    whole = to_params([tensor], weights)["x"]
    assert whole.shape == shapes([tensor])["x"].shape == shape and whole.dtype == np.float32
    for _ in range(5):
        bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
        index = tuple(slice(*map(int, b)) for b in bounds)
        np.testing.assert_array_equal(tensor.read(weights, index), whole[index])
        read = []
        tensor.read(weights._replace(tensors={n: Recorder(a, read) for n, a in weights.tensors.items()}), index)
        assert sum(read) == whole[index].size or "patches" in kind  # no more of the file is read


class Recorder:
    """An array that counts the numbers that are taken of it."""

    def __init__(self, array, read):
        self.array, self.read = array, read

    def __getitem__(self, index):
        self.read.append(self.array[index].size)
        return self.array[index]


def test_layouts_are_torchs():
    patches, _ = TENSORS["patches"]
    weights = weights_of(patches)
    ours = to_params([patches], weights)["x"].reshape(3, 2, 5, 6)
    np.testing.assert_array_equal(ours, weights.read("t").transpose(2, 3, 1, 0))
    stacked = layer("q.{}", "query key value", LAYOUTS[2], (9, 4), layers=2)
    weights = weights_of(*stacked)
    params = to_params(stacked, weights)
    np.testing.assert_array_equal(params["key"]["kernel"][1], weights.read("q.1.weight")[3:6].T)
    np.testing.assert_array_equal(params["value"]["bias"][0], weights.read("q.0.bias")[6:])
    again = tensor("key/kernel", (2, 4, 3), "q.{}.weight", LAYOUTS[2], part=1, parts=3, layered=True)
    assert again == stacked[1]


def test_all_go_there_and_back():
    kinds = {kind: t for kind, (t, _) in TENSORS.items() if t.parts == 1}
    tensors = [t._replace(path=f"a/{kind}", name=f"{kind} {t.name}") for kind, t in kinds.items()]
    tensors += layer("q", "query key", LAYOUTS[2], (6, 4))
    tensors += layer("u", "up", "i c p q -> i (p q c)", (4, 2, 3, 3), bias=1)
    weights = weights_of(*tensors)
    check(tensors, weights, AssertionError)
    params = to_params(tensors, weights, "float16")
    assert {a.dtype for a in flatten(params).values()} == {np.dtype(np.float16)}
    assert {p: a.shape for p, a in flatten(params).items()} == {p: a.shape for p, a in flatten(shapes(tensors)).items()}
    back = to_state_dict(tensors, to_params(tensors, weights))
    assert back.keys() == weights.tensors.keys()
    assert all(np.array_equal(back[name], array) for name, array in weights.tensors.items())


def test_what_does_not_fit_is_listed():
    tensors = layer("a", "a", LAYOUTS[2], (3, 4)) + layer("b.{}", "b", LAYOUTS[2], (3, 4), layers=5)
    state = dict(weights_of(*tensors).tensors)
    for i in range(4):
        del state[f"b.{i}.bias"]
    state |= {"a.weight": np.zeros((4, 3)), "more": np.zeros(2), "a.bias": np.zeros(3, int)}
    with pytest.raises(UserError) as e:
        check(tensors, Weights.of(state), lambda mismatch: UserError("weights", "x", mismatch.problem, "mend it"))
    assert e.value.problem == (
        "4 of 12 tensors are missing: b.0.bias, b.1.bias, b.2.bias and 1 more; the model has no place for 1: more; "
        "1 of another shape: a.weight [4, 3], expected [3, 4]; not of dtype F64, F32, F16, BF16: a.bias of int64"
    )
