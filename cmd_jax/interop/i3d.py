"""Weights of I3D-400 in the names of its usual PyTorch port: in, and back."""

import numpy as np

from cmd_jax.interop.state_dicts import Reader, Tensor, layer, shapes, to_params, to_state_dict
from cmd_jax.interop.weights import flatten, unflatten
from cmd_jax.models.i3d import BRANCHES, CLASSES, I3D, INCEPTION, STEM

KERNEL = "o i t h w -> t h w i o"
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
COUNTER = ".num_batches_tracked"  # of BatchNorm while it was trained


def load(state_dict: dict[str, np.ndarray], epsilon: float = 1e-5) -> tuple[I3D, dict]:
    """-> (module, params). epsilon: of BatchNorm, which the weights don't tell.

    UserError that names the first tensor that is missing, left over or of another shape.
    """
    read = Reader("i3d", {}, {name: v for name, v in state_dict.items() if not name.endswith(COUNTER)})
    params = to_params(_tensors(), read)
    read.refuse_rest()
    return I3D(epsilon), unflatten(params)


def state_dict(params) -> dict[str, np.ndarray]:
    """The torch weights that `load` would read as these params, in their dtypes; without BatchNorm's counters."""
    return to_state_dict(_tensors(), flatten(params))


def model(epsilon: float = 1e-5):
    """-> (module, its parameters as a tree of ShapeDtypeStructs)."""
    return I3D(epsilon), unflatten(shapes(_tensors()))


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
    fixed = [("kind", size) for size in (CLASSES, inputs, 1, 1, 1)]
    return tensors + layer("logits.conv3d", ("logits",), "o i 1 1 1 -> i o", fixed)


def _inception(name: str, inputs: int, channels: dict[str, int]) -> list[Tensor]:
    tensors = []
    for branch, outputs in channels.items():
        before = {"b1b": channels["b1a"], "b2b": channels["b2a"]}
        side = 3 if branch in before else 1
        tensors += _unit(f"M{name[1:]}.{branch}", f"{name}/{branch}", side, before.get(branch, inputs), outputs)
    return tensors


def _unit(name: str, path: str, side: int, inputs: int, outputs: int) -> list[Tensor]:
    fixed = tuple(("kind", size) for size in (outputs, inputs, side, side, side))
    norms = [Tensor(f"{name}.bn.{n}", fixed[:1], (f"{path}/norm/{ours}",), "o -> o") for n, ours in NORM.items()]
    return [Tensor(f"{name}.conv3d.weight", fixed, (f"{path}/conv/kernel",), KERNEL), *norms]
