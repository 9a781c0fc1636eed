"""Values of a program that its constants alone decide, like the entries of a table that a scan runs over."""

import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Primitives that run the one jaxpr in their parameters once, on their own operands.
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
LARGEST = 2**24  # values of a variable, all runs together; what is larger is no index

Values = Callable[[], np.ndarray | None]  # -> an array [runs, ...], or None where it is not known


def inner_jaxprs(equation) -> list[Jaxpr | ClosedJaxpr]:
    return [value for value in equation.params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]


class Known:
    """The variables of a jaxpr, which runs so many times: known(variable) is their values [runs, ...], or None.

    inputs: those of its inputs. made_by: {variable: equation}, where it was made before.
    Nothing is computed before it is asked for.
    """

    def __init__(self, jaxpr: Jaxpr | ClosedJaxpr, inputs: list[Values], runs: int, made_by: dict | None = None):
        self.jaxpr, self.runs = getattr(jaxpr, "jaxpr", jaxpr), runs
        constants = [partial(self._every, value) for value in getattr(jaxpr, "consts", ())]
        constants += [lambda: None] * (len(self.jaxpr.constvars) - len(constants))
        self._given = dict(zip(self.jaxpr.constvars, constants, strict=True))
        self._given |= dict(zip(self.jaxpr.invars, inputs, strict=True))
        self._made_by = made_by or {v: equation for equation in self.jaxpr.eqns for v in equation.outvars}
        self._values, self._scans = {}, {}

    def __call__(self, variable) -> np.ndarray | None:
        if isinstance(variable, Literal):
            return self._every(variable.val)
        if variable not in self._values:
            given = self._given.get(variable)
            self._values[variable] = given() if given else self._compute(variable, self._made_by[variable])
        return self._values[variable]

    def inputs(self, equation, rows=slice(None)) -> list[Values]:
        """Of the jaxpr that an equation runs on all its operands; rows: in which of the runs."""

        def one(variable):
            values = self(variable)
            return None if values is None else values[rows]

        return [partial(one, variable) for variable in equation.invars]

    def scanned(self, equation) -> "Known":
        """What is known in the body of a scan, which runs `length` times in each run."""
        if id(equation) not in self._scans:
            self._scans[id(equation)] = self._scanned(equation)
        return self._scans[id(equation)]

    def _scanned(self, equation) -> "Known":
        options = equation.params
        body, length, consts, carried = (options[k] for k in ("jaxpr", "length", "num_consts", "num_carry"))
        given = self.inputs(equation)
        constant, start, over = given[:consts], given[consts : consts + carried], given[consts + carried :]
        order = slice(None, None, -1 if options["reverse"] else 1)
        one_by_one = {}  # the body's values in its first, second ... turn

        def each(values):
            return None if (x := values()) is None else np.repeat(x, length, axis=0)

        def turns(values):
            return None if (x := values()) is None else x[:, order].reshape(-1, *x.shape[2:])

        def turn(i: int) -> Known:
            if i not in one_by_one:
                at = lambda values: None if (x := values()) is None else x[:, order][:, i]  # noqa: E731
                carry = start if i == 0 else [partial(turn(i - 1), v) for v in turn(0).jaxpr.outvars[:carried]]
                inputs = [*constant, *carry, *(partial(at, values) for values in over)]
                made_by = one_by_one[0]._made_by if i else None
                one_by_one[i] = Known(body, inputs, self.runs, made_by)
            return one_by_one[i]

        def carry(place: int):
            found = []
            for i in range(length):
                found.append(turn(i)(turn(i).jaxpr.invars[consts + place]))
                if found[-1] is None:
                    return None
            return np.stack(found, axis=1).reshape(-1, *found[0].shape[1:]) if found else None

        inputs = [partial(each, values) for values in constant]
        inputs += [partial(carry, place) for place in range(carried)]
        inputs += [partial(turns, values) for values in over]
        return Known(body, inputs, self.runs * length)

    def _of_scan(self, equation, place: int) -> np.ndarray | None:
        """A result of a scan: a last carry, or what its turns give out."""
        body, options = self.scanned(equation), equation.params
        values = body(body.jaxpr.outvars[place]) if options["length"] else None
        if values is None:
            return None
        values = values.reshape(self.runs, options["length"], *values.shape[1:])
        if place < options["num_carry"]:
            return values[:, -1]
        return values[:, ::-1] if options["reverse"] else values

    def _every(self, value) -> np.ndarray | None:
        if not _is_plain(value) or self.runs * np.size(value) > LARGEST:
            return None
        return np.broadcast_to(np.asarray(value), (self.runs, *np.shape(value)))

    def _compute(self, variable, equation) -> np.ndarray | None:
        inner, place = inner_jaxprs(equation), equation.outvars.index(variable)
        if equation.primitive.name == "scan":
            return self._of_scan(equation, place)
        if equation.primitive.name in CALLS and len(inner) == 1:
            called = Known(inner[0], self.inputs(equation), self.runs)
            return called(called.jaxpr.outvars[place])
        sizes = [math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")]
        nested = inner or "branches" in equation.params
        placed = not equation.invars and equation.primitive.name != "iota"  # by where it runs, like program_id
        if nested or placed or equation.effects or self.runs * sum(sizes) > LARGEST or not _is_plain(variable.aval):
            return None
        values = [self(v) for v in equation.invars]
        if any(x is None for x in values):
            return None
        out = _evaluate(equation, values)
        return self._every(out[place]) if not values else np.asarray(out[place])


def _is_plain(x) -> bool:
    """Whether numpy can hold it: no key, no reference."""
    return hasattr(x, "dtype") and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) or np.isscalar(x)


def _evaluate(equation, values: list[np.ndarray]) -> list:
    """The outputs of an equation in each run; without operands, of one."""
    primitive = partial(equation.primitive.bind, **equation.params)
    with jax.ensure_compile_time_eval():
        out = jax.vmap(primitive)(*values) if values else primitive()
    return out if equation.primitive.multiple_results else [out]
