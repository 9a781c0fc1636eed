"""How much arithmetic a program is, counted from its jaxpr; nothing is allocated or compiled."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Where a value comes from; an elementwise result comes from the greatest of its operands.
CONSTANT, WEIGHT, ACTIVATION = range(3)
# Primitives that run the one jaxpr in their parameters once, on their own operands.
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


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

    Counted as the jaxpr says: the body of a scan times its length, of two branches the dearer, mapped axes in full,
    inserted zeros of transposed convolutions not, padding like any value. A rematerialised block counts once in a
    forward pass, and in a gradient as often as it runs there. Elementwise work, norms and softmax are left out.
    A gradient multiplies two activations for each weight, which falls under attention: of gradients read `total`.
    Arrays that fn closes over are constants. ValueError: products in a loop of unknown length or in a kernel.
    """
    closed = jax.make_jaxpr(fn)(*args)
    origins = [WEIGHT if i in params else ACTIVATION for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    return _walk(closed, origins)[1]


def _walk(jaxpr: Jaxpr | ClosedJaxpr, origins: list[int]) -> tuple[list[int], Flops]:
    """A jaxpr and the origins of its inputs -> (origins of its outputs, its arithmetic)."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    known = dict.fromkeys(jaxpr.constvars, CONSTANT) | dict(zip(jaxpr.invars, origins, strict=True))
    origin = lambda v: CONSTANT if isinstance(v, Literal) else known[v]  # noqa: E731
    total = Flops()
    for equation in jaxpr.eqns:
        out, flops = _equation(equation, [origin(v) for v in equation.invars])
        known.update(zip(equation.outvars, out, strict=True))
        total += flops
    return [origin(v) for v in jaxpr.outvars], total


def _equation(equation, origins: list[int]) -> tuple[list[int], Flops]:
    name, options, outputs = equation.primitive.name, equation.params, len(equation.outvars)
    if name == "dot_general":
        return _product(origins, _dot_size(equation), "linear")
    if name == "conv_general_dilated":
        return _product(origins, _convolution_size(equation), "convolution")
    if name == "scan":
        return _scan(options, origins)
    if name == "cond":
        return _dearest([_walk(branch, origins[1:]) for branch in options["branches"]])
    inner = [value for value in options.values() if isinstance(value, (Jaxpr, ClosedJaxpr))]
    if name in CALLS and len(inner) == 1:
        return _walk(inner[0], origins)
    if any(_walk(body, [ACTIVATION] * len(getattr(body, "jaxpr", body).invars))[1].total for body in inner):
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


def _scan(options, origins: list[int]) -> tuple[list[int], Flops]:
    consts, carried = options["num_consts"], options["num_carry"]
    while True:
        out, flops = _walk(options["jaxpr"], origins)
        # What is carried around may come from more than it did at the start.
        carry = [max(pair) for pair in zip(origins[consts : consts + carried], out, strict=False)]
        if carry == origins[consts : consts + carried]:
            return out, flops * options["length"]
        origins = [*origins[:consts], *carry, *origins[consts + carried :]]


def _dearest(branches: list[tuple[list[int], Flops]]) -> tuple[list[int], Flops]:
    origins = [max(each) for each in zip(*(out for out, _ in branches), strict=True)]
    return origins, max((flops for _, flops in branches), key=lambda flops: flops.total)
