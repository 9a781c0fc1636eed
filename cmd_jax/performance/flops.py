"""How much arithmetic a program is, counted from its jaxpr; nothing is allocated or compiled."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from cmd_jax.performance.apart import apart
from cmd_jax.performance.known import CALLS, Known, inner_jaxprs

# Where a value comes from; an elementwise result comes from the greatest of its operands.
CONSTANT, WEIGHT, ACTIVATION = range(3)
# Products of cuDNN's attention of one size, by primitive: forward two, backward five.
FUSED_ATTENTION = {
    f"dot_product_attention_{way}{x}": n for way, n in (("fwd", 2), ("bwd", 5)) for x in ("", "_wrapper")
}


@dataclass(frozen=True)
class Flops:
    """Multiply-adds (a multiply-add is one) of matrix products and convolutions, by what is multiplied.

    linear: a parameter with anything else. convolution: the same, with a parameter as the kernel.
    attention: two activations. other: with constants only, or two parameters.
    """

    linear: int = 0
    convolution: int = 0
    attention: int = 0
    other: int = 0

    @property
    def layers(self) -> int:
        """Multiply-adds as papers count them: linear and convolution layers only."""
        return self.linear + self.convolution

    @property
    def total(self) -> int:
        """Floating-point operations: two for each multiply-add of every kind."""
        return 2 * sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> "Flops":
        return Flops(*(getattr(self, f.name) * times for f in fields(self)))


def count(fn: Callable, *args, params: tuple[int, ...] = (0,)) -> Flops:
    """Arithmetic of fn(*args), where args are pytrees of arrays or jax.ShapeDtypeStruct; `params` are the positions of
    those that hold parameters.

    Counted as the jaxpr says: the body of a scan times its length, mapped axes in full, inserted zeros of transposed
    convolutions not, padding like any value. Of the branches of a switch, that which an index made of constants chooses
    in each turn of the scans around it (`known`); else the dearest. A kernel counts in each place of its grid, and what
    each device does under shard_map once a device. A rematerialised block counts once in a forward pass, and in a
    gradient as often as it runs there. Elementwise work, norms and softmax are left out.
    A gradient multiplies two activations for each weight, which falls under attention: of gradients read `total`.
    Arrays that fn closes over are constants. ValueError: products in a loop of unknown length.
    """
    origins = [WEIGHT if i in params else ACTIVATION for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    return _count(jax.make_jaxpr(fn)(*args), origins)


def operations(jaxpr: ClosedJaxpr) -> int:
    """Floating-point operations of a traced function, as `count(...).total` has them."""
    return _count(jaxpr, [ACTIVATION] * len(jaxpr.jaxpr.invars)).total


def _count(jaxpr: ClosedJaxpr, origins: list[int]) -> Flops:
    return apart(_walk, Known(jaxpr, [lambda: None] * len(origins), runs=1), origins)[1]


def _walk(known: Known, origins: list[int]) -> tuple[list[int], Flops]:
    """A jaxpr with what is known in it, and the origins of its inputs -> (origins of its outputs, its arithmetic in
    all of its runs)."""
    of = dict.fromkeys(known.jaxpr.constvars, CONSTANT) | dict(zip(known.jaxpr.invars, origins, strict=True))
    origin = lambda v: CONSTANT if isinstance(v, Literal) else of[v]  # noqa: E731
    total = Flops()
    for equation in known.jaxpr.eqns:
        out, flops = _equation(equation, [origin(v) for v in equation.invars], known)
        of.update(zip(equation.outvars, out, strict=True))
        total += flops
    return [origin(v) for v in known.jaxpr.outvars], total


def _equation(equation, origins: list[int], known: Known) -> tuple[list[int], Flops]:
    name, options, outputs = equation.primitive.name, equation.params, len(equation.outvars)
    inner, unknown = inner_jaxprs(equation), [lambda: None] * len(origins)
    if name == "dot_general":
        return _product(origins, _dot_size(equation) * known.runs, "linear")
    if name == "conv_general_dilated":
        return _product(origins, _convolution_size(equation) * known.runs, "convolution")
    if name in FUSED_ATTENTION:
        return [ACTIVATION] * outputs, Flops(attention=_attention_size(equation) * known.runs)
    if name == "scan":
        return _scan(options, origins, known.scanned(equation))
    if name == "cond":
        return _branches(equation, origins[1:], known)
    if name in CALLS and len(inner) == 1:
        return _walk(Known(inner[0], known.inputs(equation), known.runs), origins)
    if name == "shard_map":
        devices = math.prod(options["mesh"].shape[axis] for axis in options["newly_manual_axes"])
        return _walk(Known(inner[0], unknown, known.runs * devices), origins)
    if name == "pallas_call":  # a kernel, of references to its operands and results
        kernel, places = options["jaxpr"], math.prod(options["grid_mapping"].grid)
        references = len(kernel.invars)
        _, flops = _walk(Known(kernel, [lambda: None] * references, known.runs * places), [ACTIVATION] * references)
        return [ACTIVATION] * outputs, flops
    for body in inner:
        variables = len(getattr(body, "jaxpr", body).invars)
        if _walk(Known(body, [lambda: None] * variables, 1), [ACTIVATION] * variables)[1].total:
            raise ValueError(f"cannot count the products in a {name}: how often it runs them is not known")
    # Looked-up rows of a table of parameters are what an embedding layer puts out.
    looked_up = name == "gather" and origins[0] == WEIGHT
    return [ACTIVATION if looked_up else max(origins, default=CONSTANT)] * outputs, Flops()


def _product(origins: list[int], size: int, layer: str) -> tuple[list[int], Flops]:
    """A product of `size` multiply-adds with origins (left, right; of a convolution: values, kernel)."""
    left, right = origins
    if left == right == ACTIVATION and layer == "linear":
        return [ACTIVATION], Flops(attention=size)
    weights = (right,) if layer == "convolution" else origins
    if WEIGHT in weights and left != right:
        return [ACTIVATION], Flops(**{layer: size})
    return [max(origins)], Flops(other=size)


def _dot_size(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution_size(equation) -> int:
    """Kernel entries that meet one output value, times output values; the kernel's input channels are of one group."""
    options, kernel = equation.params, equation.invars[1].aval.shape
    _, inputs, *window = options["dimension_numbers"].rhs_spec
    taps = math.prod(kernel[axis] for axis in (inputs, *window))
    return math.prod(equation.outvars[0].aval.shape) * taps // math.prod(options["lhs_dilation"])


def _attention_size(equation) -> int:
    """Of cuDNN's attention: queries with keys and weights with values; backwards five products of that size, of which
    the first repeats the scores."""
    queries, keys = (v.aval.shape for v in equation.invars[:2])  # [B, T, heads, width] or [B, heads, T, width]
    tokens = keys[2 if equation.params["layout"] else 1]
    return math.prod(queries) * tokens * FUSED_ATTENTION[equation.primitive.name]


def _scan(options, origins: list[int], body: Known) -> tuple[list[int], Flops]:
    consts, carried = options["num_consts"], options["num_carry"]
    while True:
        out, flops = _walk(body, origins)
        # What is carried around may come from more than it did at the start.
        carry = [max(pair) for pair in zip(origins[consts : consts + carried], out, strict=False)]
        if carry == origins[consts : consts + carried]:
            return out, flops
        origins = [*origins[:consts], *carry, *origins[consts + carried :]]


def _branches(equation, origins: list[int], known: Known) -> tuple[list[int], Flops]:
    branches, index = equation.params["branches"], known(equation.invars[0])
    runs = [index == number for number in range(len(branches))] if index is not None else [np.ones(known.runs, bool)]
    runs = runs if index is not None else runs * len(branches)
    walked = [
        _walk(Known(branch, known.inputs(equation, rows)[1:], int(rows.sum())), origins)
        for branch, rows in zip(branches, runs, strict=True)
    ]
    outputs = [max(each) for each in zip(*(out for out, _ in walked), strict=True)]
    if index is not None:
        return outputs, sum((flops for _, flops in walked), Flops())
    return outputs, max((flops for _, flops in walked), key=lambda flops: flops.total)
