"""The flight record: what a run knew when something went wrong, and where values that are not finite came from."""

import datetime
import json
import logging
import math
import os
import socket
import sys
import threading
import traceback
from collections import deque
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from cmd_jax.buckets import BucketPath
from cmd_jax.files import cache_root, is_remote, versions, write_text
from cmd_jax.sharding import replicated
from cmd_jax.state import TrainState, train_step
from cmd_jax.stores import patience

PATIENCE = 10.0  # seconds in which a bucket is tried
LINE = 120  # characters of a line of the file, where its parts allow it

log = logging.getLogger(__name__)


class FlightRecord:
    """The last `length` steps of a run in memory; `write` puts them in FOLDER/flight/ when something goes wrong.

    Where a bucket cannot be written, which may be what went wrong, they go to CACHE/flight/BUCKET/NAME of this machine.
    """

    def __init__(self, folder: Path | BucketPath, process: int = 0, length: int = 20):
        self.folder, self.process = folder / "flight", process
        self._steps, self._lock = deque(maxlen=length), threading.Lock()

    def note(self, step: int, values: dict[str, float], ids: list[int]):
        """Remember a step, its metrics and the clips of its batch."""
        with self._lock:
            self._steps.append({"step": step, "metrics": values, "ids": ids})

    def write(self, reason: str, **facts) -> Path | BucketPath | None:
        """Write STEP-REASON-processI.json, from any thread; STEP is the last one noted, or "start" before the first.

        reason: "nan", "error", or "stall" and "lost-peer", which add the Python stacks of all threads. Values that are
        not finite become strings. None, after a warning, if the file cannot be written: the fault itself comes first.
        """
        with self._lock:
            steps = list(self._steps)
        record = {
            "reason": reason,
            "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "process": self.process,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "versions": versions(),
            "facts": facts,
            "steps": steps,
        }
        if reason in ("stall", "lost-peer"):
            record["threads"] = stacks()
        step = f"{steps[-1]['step']:07d}" if steps else "start"
        name, text = f"{step}-{reason}-process{self.process}.json", lay_out(plain(record)) + "\n"
        folders = [self.folder]
        if is_remote(self.folder):
            folders.append(cache_root() / "flight" / self.folder.key)
        for folder in folders:
            path = folder / name
            try:
                with patience(PATIENCE):
                    write_text(path, text)
            except OSError as e:
                log.warning("no flight record: %s cannot be written: %s", path, e)
                continue
            if folder is not self.folder:
                log.warning("the flight record is %s", path)
            return path
        return None


def stacks() -> dict[str, list[str]]:
    """Where each thread of this process is, outermost call first: {"NAME (IDENT)": ["FILE:LINE FUNCTION: CODE"]}."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, '?')} ({ident})": [
            f"{f.filename}:{f.lineno} {f.name}: {f.line}" for f in traceback.extract_stack(frame)
        ]
        for ident, frame in sys._current_frames().items()
    }


def plain(value):
    """What JSON can hold: numbers that are not finite, which it has no words for, become "nan", "inf" or "-inf"."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def lay_out(value, indent: int = 0) -> str:
    """Indented JSON in which whatever fits in a line, and a list of numbers, is one line."""
    line, inner = json.dumps(value), " " * (indent + 2)
    numbers = isinstance(value, list) and not any(isinstance(v, str | list | dict) for v in value)
    if not isinstance(value, list | dict) or len(line) + indent <= LINE or numbers:
        return line
    if isinstance(value, list):
        begin, items, end = "[", [lay_out(v, indent + 2) for v in value], "]"
    else:
        begin, items, end = "{", [f"{json.dumps(k)}: {lay_out(v, indent + 2)}" for k, v in value.items()], "}"
    return begin + ",".join(f"\n{inner}{item}" for item in items) + f"\n{' ' * indent}{end}"


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _floats(tree) -> dict:
    """{name: array} of the arrays that can hold values that are not finite."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): x for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}


def _stacked(boxed) -> frozenset[str]:
    """Names of the parameters that hold one layer a row."""
    leaves = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))[0]
    return frozenset(_name(path) for path, x in leaves if getattr(x, "names", ())[:1] == ("layers",))


def _measure(tree, rows) -> dict:
    """{name: (values that are not finite, largest size of the others)}, for those in `rows` one a row."""

    def one(x, axes):
        finite = jnp.isfinite(x)
        return jnp.sum(~finite, axes), jnp.max(jnp.where(finite, jnp.abs(x), 0), axes)

    return {name: one(x, tuple(range(int(name in rows), x.ndim))) for name, x in _floats(tree).items()}


def _fetch(function, *arguments):
    """The arrays that `function` makes, computed on the devices and brought whole to every process."""
    shardings = [x.sharding for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    jitted = jax.jit(function, out_shardings=None if mesh is None else replicated(mesh))
    return jax.device_get(jitted(*arguments))


def _counts(measured, tree) -> dict:
    """The entries of `_measure` that count anything."""
    sizes = {name: x.size for name, x in _floats(tree).items()}
    return {
        name: {"count": int(count.sum()), "of": sizes[name]} | ({"layers": count.tolist()} if count.ndim else {})
        for name, (count, _) in measured.items()
        if count.any()
    }


def _largest(measured) -> dict:
    """The sizes of `_measure` to three digits, which is what one reads of them."""

    def short(x):
        return [short(y) for y in x] if isinstance(x, list) else float(f"{x:.3g}")

    return {name: short(largest.tolist()) for name, (_, largest) in measured.items()}


def nonfinite(tree, boxed=None) -> dict:
    """{"blocks/query/kernel": {"count": n, "of": size, "layers": [n of each layer]}} where anything is not finite.

    boxed: the tree with its logical axes (`jax.eval_shape(stage.init, key)`), which says what has layers. The arrays
    may be split over processes; then all of them call this.
    """
    rows = _stacked(boxed)
    return _counts(_fetch(lambda tree: _measure(tree, rows), tree), tree)


@jax.custom_vjp
def _watch(x, tap):
    """x itself; the "gradient" of tap [3] counts calls, calls with a bad output, calls with a bad gradient of it."""
    return x


def _any_bad(x):
    return ~jnp.isfinite(x).all()


_watch.defvjp(
    lambda x, tap: (x, _any_bad(x)),
    lambda bad, gradient: (gradient, jnp.stack([True, bad, _any_bad(gradient)]).astype(jnp.float32)),
)


def _tapping(tap):
    """An interceptor of flax that replaces what each module returns by tap(name, array)."""
    active = []

    def intercept(method, arguments, options, context):
        active.append(context.module)
        try:
            output = method(*arguments, **options)
            name = "/".join((type(active[0]).__name__, *context.module.path))
        finally:
            active.pop()
        if context.method_name != "__call__":
            return output
        return jax.tree.map(lambda x: tap(name, x) if jnp.issubdtype(x.dtype, jnp.floating) else x, output)

    return nn.intercept_methods(intercept)


def explain(loss_fn, state: TrainState, frozen, batch, key, boxed, accumulate: int = 1) -> dict:
    """The step that `train_step` refused, computed again with the same key -> what was not finite in it, and where.

    loss: as computed;
    batch: {clip id: {array: count}}, by batch["id"] int32 [B];
    parameters, gradients: as `nonfinite` tells them;
    modules: in the order of their calls, those with an output, or a gradient with respect to it, that is not finite:
        in how many of their calls (one a layer and microbatch). What is behind a stop_gradient is not seen;
    max_abs: of each array of the batch, parameter and gradient the largest size among its finite values, of each layer
        where there are layers.
    The arrays may be split over processes; then all of them call this, within `partitioning`.
    """
    rows, names = _stacked(boxed), {}

    def collected(*arguments):
        with _tapping(lambda name, x: names.setdefault(name) or x):
            return loss_fn(*arguments)

    jax.eval_shape(collected, state.params, frozen, batch, key)

    def tapped(both, *arguments):
        params, taps = both
        with _tapping(lambda name, x: _watch(x, taps[name])):
            return loss_fn(params, *arguments)

    def again(state, frozen, batch, key):
        found = {}

        def update(gradients, opt_state, params):
            found["gradients"], found["modules"] = gradients
            return gradients, opt_state

        # The true step, for its keys and microbatches; the optimizer is where the gradients come by.
        both = state.params, {name: jnp.zeros(3) for name in names}
        _, metrics = train_step(
            TrainState(state.step, both, both, ()), frozen, batch, state.step, key, loss_fn=tapped,
            optimizer=optax.GradientTransformation(None, update), ema_decay=0.0, accumulate=accumulate,
        )  # fmt: skip
        measured = {"parameters": _measure(state.params, rows), "gradients": _measure(found["gradients"], rows)}
        return metrics["loss"], measured, found["modules"], _measure(batch, batch.keys()), batch["id"]

    loss, measured, taps, clips, ids = _fetch(again, state, frozen, batch, key)
    calls = {name: np.rint(taps[name] * accumulate).astype(int).tolist() for name in names}
    bad = {}
    for row, id in enumerate(ids):
        counts = {name: int(count[row]) for name, (count, _) in clips.items() if count[row]}
        if counts:
            bad[int(id)] = counts
    return {
        "loss": float(loss),
        "batch": bad,
        "parameters": _counts(measured["parameters"], state.params),
        "modules": {
            name: {"calls": total, "outputs": outputs, "gradients": gradients}
            for name, (total, outputs, gradients) in calls.items()
            if outputs or gradients
        },
        "gradients": _counts(measured["gradients"], state.params),
        "max_abs": {
            "batch": {name: max(sizes) for name, sizes in _largest(clips).items()},
            "parameters": _largest(measured["parameters"]),
            "gradients": _largest(measured["gradients"]),
        },
    }
