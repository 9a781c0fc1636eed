"""Weights of I3D-400 in the names of its usual PyTorch port: in, and back."""

import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.interop.tensors import LAYOUTS, Mismatch, Tensor, check, layer, shapes, to_params, to_state_dict
from cmd_jax.interop.weights import Weights
from cmd_jax.models.i3d import BRANCHES, CLASSES, I3D, INCEPTION, STEM

KERNEL = "o i t h w -> t h w i o"
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
COUNTER = ".num_batches_tracked"  # of BatchNorm while it was trained


def load(state_dict: dict[str, np.ndarray], epsilon: float = 1e-5) -> tuple[I3D, dict]:
    """-> (module, params). epsilon: of BatchNorm, which the weights don't tell.

    UserError that names tensors that are missing, left over or of another shape.
    """
    weights = Weights.of({name: array for name, array in state_dict.items() if not name.endswith(COUNTER)})
    check(_tensors(), weights, _refusal)
    return I3D(epsilon), to_params(_tensors(), weights)


def _refusal(mismatch: Mismatch) -> UserError:
    return UserError("kind", "i3d", mismatch.problem, "give the whole weights of such a model, or the right kind")


def state_dict(params) -> dict[str, np.ndarray]:
    """The torch weights that `load` would read as these params, in their dtypes; without BatchNorm's counters."""
    return to_state_dict(_tensors(), params)


def model(epsilon: float = 1e-5):
    """-> (module, its parameters as a tree of ShapeDtypeStructs)."""
    return I3D(epsilon), shapes(_tensors())


def _tensors() -> list[Tensor]:
    tensors, inputs = [], 3
    for name, *sizes in STEM + INCEPTION:
        if name.startswith("conv"):
            side, _, channels = sizes
            tensors += _unit(f"Conv3d{name[4:]}_{side}x{side}", name, side, inputs, channels)
            inputs = channels
        elif name.startswith("mixed"):
            tensors += _inception(name, inputs, dict(zip(BRANCHES, *sizes, strict=True)))
            inputs = sum(size for branch, size in zip(BRANCHES, *sizes, strict=True) if branch not in ("b1a", "b2a"))
    return tensors + layer("logits.conv3d", "logits", "o i 1 1 1 -> i o", (CLASSES, inputs, 1, 1, 1))


def _inception(name: str, inputs: int, channels: dict[str, int]) -> list[Tensor]:
    tensors = []
    for branch, outputs in channels.items():
        before = {"b1b": channels["b1a"], "b2b": channels["b2a"]}
        side = 3 if branch in before else 1
        tensors += _unit(f"M{name[1:]}.{branch}", f"{name}/{branch}", side, before.get(branch, inputs), outputs)
    return tensors


def _unit(name: str, path: str, side: int, inputs: int, outputs: int) -> list[Tensor]:
    kernel = Tensor(f"{path}/conv/kernel", f"{name}.conv3d.weight", (outputs, inputs, side, side, side), KERNEL)
    norm = {ours: f"{name}.bn.{theirs}" for theirs, ours in NORM.items()}
    return [kernel, *(Tensor(f"{path}/norm/{ours}", theirs, (outputs,), LAYOUTS[1]) for ours, theirs in norm.items())]
