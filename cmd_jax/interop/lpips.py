"""Weights of LPIPS on VGG16: those of the lpips package, or its heads and torchvision's VGG16; in, and back."""

from collections.abc import Iterable
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from cmd_jax.errors import UserError
from cmd_jax.interop.weights import read_state_dict, unflatten
from cmd_jax.models.vgg import BLOCKS, LPIPS, SCALE, SHIFT
from cmd_jax.running.hosts import check_tree

# Tensors of the lpips package's own state dicts that hold nothing of their own.
REPEATED = ("scaling_layer.shift", "scaling_layer.scale", *(f"lins.{k}.model.1.weight" for k in range(len(BLOCKS))))
TRUNK = "torchvision's VGG16 (vgg16-397923af.pth)"
HEADS = "the heads of LPIPS (lpips/weights/v0.1/vgg.pth of the PyPI package lpips)"


def load_lpips(path: str | Path, heads: str | Path = "") -> dict:
    """Parameters of `LPIPS` from loss.vgg, a file of ours or of torch, and loss.lpips_heads, where that lacks them."""
    state = _read("loss.vgg", path)
    if "tap1" in state:
        params = unflatten({name: array.astype(np.float32) for name, array in state.items()})
        check_tree("lpips", params, shapes(), "convert the original again")
        return params
    return lpips_params(with_heads(state, _read("loss.lpips_heads", heads) if heads else {}))


def _read(field: str, path: str | Path) -> dict[str, np.ndarray]:
    try:
        return read_state_dict(path)
    except UserError as e:
        raise UserError(field, e.value, e.problem, e.remedy) from e


def shapes() -> dict:
    """The parameters of `LPIPS` as a tree of ShapeDtypeStructs."""
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    return nn.unbox(jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"])


def with_heads(state: dict[str, np.ndarray], heads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of LPIPS from two: torchvision's names become those of lpips, its classifier is left out."""
    slices = {index: k for k, (_, indices) in enumerate(BLOCKS, start=1) for index in indices}
    named = {}
    for name, array in state.items():
        part, _, rest = name.partition(".")
        index, _, role = rest.partition(".")
        if part == "features" and index.isdecimal() and int(index) in slices:
            name = f"net.slice{slices[int(index)]}.{index}.{role}"
        if part != "classifier":
            named[name] = array
    if twice := sorted(named.keys() & heads.keys()):
        raise UserError("lpips", twice[0], "in both files", "leave the file of the heads out")
    return named | heads


def _places() -> dict[str, tuple]:
    """{torch name: (its shape, path of our parameter)}."""
    places, inputs = {}, 3
    for k, (channels, indices) in enumerate(BLOCKS):
        for i, index in enumerate(indices, start=1):
            name, conv = f"net.slice{k + 1}.{index}", f"conv{k + 1}_{i}"
            places[f"{name}.weight"] = (channels, inputs, 3, 3), ("vgg", conv, "kernel")
            places[f"{name}.bias"] = (channels,), ("vgg", conv, "bias")
            inputs = channels
        places[f"lin{k}.model.1.weight"] = (1, channels, 1, 1), (f"tap{k + 1}",)
    return places


def _copies(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the lpips package's own state dicts repeat: constants, and the taps under a second name."""
    constants = {"shift": SHIFT, "scale": SCALE}
    copies = {f"scaling_layer.{n}": np.array(v, np.float32).reshape(1, 3, 1, 1) for n, v in constants.items()}
    return copies | {f"lins.{k}.model.1.weight": state_dict[f"lin{k}.model.1.weight"] for k in range(len(BLOCKS))}


def lpips_params(state_dict: dict[str, np.ndarray]) -> dict:
    """Parameters of `LPIPS` from torch weights named `net.slice{K}.{I}.weight|bias` (OIHW) and `lin{K}.model.1.weight`.

    What the lpips package repeats in its state dicts, as REPEATED lists it, may be there and is compared.
    Raises UserError that names the tensors that are missing, left over, of another shape or not what they repeat.
    """
    places = _places()

    def refuse(names, problem, remedy="give the state dict of LPIPS with a VGG16 trunk"):
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UserError("lpips", shown, problem, remedy)

    if missing := sorted(places.keys() - state_dict.keys()):
        heads, trunk = ([name for name in missing if name.startswith(part)] for part in ("lin", "net"))
        if len(heads) == len(BLOCKS) and not trunk:
            refuse(missing, "missing from the weights", f"give {HEADS} too, as --heads or loss.lpips_heads")
        if len(trunk) == len(places) - len(BLOCKS) and not heads:
            refuse(missing, "missing from the weights", f"give {TRUNK}, and this as --heads or loss.lpips_heads")
        refuse(missing, "missing from the weights")
    if extra := sorted(state_dict.keys() - places.keys() - set(REPEATED)):
        refuse(extra, "not a tensor of LPIPS on VGG16")
    expected = {name: shape for name, (shape, _) in places.items()}
    if wrong := [f"{n} {state_dict[n].shape}, expected {s}" for n, s in expected.items() if state_dict[n].shape != s]:
        refuse(wrong, "of another shape")
    copies = {name: copy for name, copy in _copies(state_dict).items() if name in state_dict}
    # A file in half precision holds rounded constants.
    if other := [n for n, c in copies.items() if not np.allclose(state_dict[n].astype(np.float32), c, rtol=1e-2)]:
        refuse(other, "not what LPIPS on VGG16 repeats there")

    params = {}
    for name, (_, path) in places.items():
        value = np.asarray(state_dict[name], np.float32)
        ours = value.reshape(-1) if len(path) == 1 else value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        params[path] = ours
    return traverse_util.unflatten_dict(params)


def lpips_state(params, repeated: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """The torch weights that `lpips_params` would read as these, in their dtypes, and the named ones of REPEATED."""
    flat, state = traverse_util.flatten_dict(params), {}
    for name, (shape, path) in _places().items():
        value = np.asarray(flat[path])
        state[name] = (value.transpose(3, 2, 0, 1) if value.ndim == 4 else value).reshape(shape)
    copies = _copies(state)
    return state | {name: copies[name].astype(state["lin0.model.1.weight"].dtype) for name in repeated}
