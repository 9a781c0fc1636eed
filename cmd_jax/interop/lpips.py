"""Weights of LPIPS on VGG16: those of the lpips package, or its heads and torchvision's VGG16; in, and back."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.interop.tensors import LAYOUTS, Mismatch, Tensor, check, layer, shapes, to_params, to_state_dict
from cmd_jax.interop.weights import Weights, read_state_dict, unflatten
from cmd_jax.models.vgg import BLOCKS, LPIPS, SCALE, SHIFT
from cmd_jax.running.hosts import check_tree

# Tensors of the lpips package's own state dicts that hold nothing of their own.
REPEATED = ("scaling_layer.shift", "scaling_layer.scale", *(f"lins.{k}.model.1.weight" for k in range(len(BLOCKS))))
TRUNK = "torchvision's VGG16 (vgg16-397923af.pth)"
REMEDY = "give the state dict of LPIPS with a VGG16 trunk"
HEADS = "the heads of LPIPS (lpips/weights/v0.1/vgg.pth of the PyPI package lpips)"


def load_lpips(path: str | Path, heads: str | Path = "") -> dict:
    """Parameters of `LPIPS` from loss.vgg, a file of ours or of torch, and loss.lpips_heads, where that lacks them."""
    state = _read("loss.vgg", path)
    if "tap1" in state:
        params = unflatten({name: array.astype(np.float32) for name, array in state.items()})
        check_tree("lpips", params, model()[1], "convert the original again")
        return params
    return lpips_params(with_heads(state, _read("loss.lpips_heads", heads) if heads else {}))


def _read(field: str, path: str | Path) -> dict[str, np.ndarray]:
    try:
        return read_state_dict(path)
    except UserError as e:
        raise UserError(field, e.value, e.problem, e.remedy) from e


def model():
    """-> (module, its parameters as a tree of ShapeDtypeStructs)."""
    return LPIPS(), shapes(_tensors())


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


def _tensors() -> list[Tensor]:
    tensors, inputs = [], 3
    for k, (channels, indices) in enumerate(BLOCKS):
        for i, index in enumerate(indices, start=1):
            names = f"net.slice{k + 1}.{index}", f"vgg/conv{k + 1}_{i}"
            tensors += layer(*names, LAYOUTS[4], (channels, inputs, 3, 3))
            inputs = channels
        tensors.append(Tensor(f"tap{k + 1}", f"lin{k}.model.1.weight", (1, channels, 1, 1), "1 c 1 1 -> c"))
    return tensors


def _copies(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the lpips package's own state dicts repeat: constants, and the taps under a second name."""
    constants = {"shift": SHIFT, "scale": SCALE}
    copies = {f"scaling_layer.{n}": np.array(v, np.float32).reshape(1, 3, 1, 1) for n, v in constants.items()}
    return copies | {f"lins.{k}.model.1.weight": state_dict[f"lin{k}.model.1.weight"] for k in range(len(BLOCKS))}


def lpips_params(state_dict: dict[str, np.ndarray]) -> dict:
    """Parameters of `LPIPS` from torch weights named `net.slice{K}.{I}.weight|bias` (OIHW) and `lin{K}.model.1.weight`.

    What the lpips package repeats in its state dicts, as REPEATED lists it, may be there and is compared.
    UserError that names tensors that are missing, left over, of another shape or not what they repeat.
    """
    weights = Weights.of({name: array for name, array in state_dict.items() if name not in REPEATED})
    check(_tensors(), weights, _refusal)
    copies = {name: copy for name, copy in _copies(state_dict).items() if name in state_dict}
    for name, copy in copies.items():
        found = np.asarray(state_dict[name], np.float32)
        if found.shape != copy.shape or not np.allclose(found, copy, rtol=1e-2):  # half precision rounds constants
            raise UserError("lpips", name, "not what LPIPS on VGG16 repeats there", REMEDY)
    return to_params(_tensors(), weights)


def _refusal(mismatch: Mismatch) -> UserError:
    missing, remedy = set(mismatch.missing), REMEDY
    heads = {tensor.name for tensor in _tensors() if tensor.path.startswith("tap")}
    if missing == heads:
        remedy = f"give {HEADS} too, as --heads or loss.lpips_heads"
    elif missing == {tensor.name for tensor in _tensors()} - heads:
        remedy = f"give {TRUNK}, and this as --heads or loss.lpips_heads"
    return UserError("weights", "LPIPS", mismatch.problem, remedy)


def lpips_state(params, repeated: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """The torch weights that `lpips_params` would read as these, in their dtypes, and the named ones of REPEATED."""
    state = to_state_dict(_tensors(), params)
    copies = _copies(state)
    return state | {name: copies[name].astype(state["lin0.model.1.weight"].dtype) for name in repeated}
