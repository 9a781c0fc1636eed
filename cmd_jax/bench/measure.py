"""A program measured: how long it compiles and runs, what it computes and holds."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
from jax.experimental.compilation_cache import compilation_cache

from cmd_jax.performance.flops import count
from cmd_jax.performance.memory import device_memory
from cmd_jax.performance.peak import device_peak
from cmd_jax.performance.timing import repeated

GIB = 2**30


@dataclass
class Component:
    """A part of a run, as a program of its own: function(*arguments), of which the first are the parameters.

    clips: of one call. dtype: of its matrix products. settings: what else it depends on, by name. options: of jax.jit.
    again(output, arguments): the arguments of the next call, where a call takes them (donated). counted: a function of
    the same arguments whose operations count, without those that are only repeated to save memory. forward: of a
    training step, the part of it whose layers a paper counts.
    """

    name: str
    function: Callable
    arguments: tuple
    clips: int
    dtype: str
    settings: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    again: Callable | None = None
    counted: Callable | None = None
    forward: Callable | None = None

    def jitted(self):
        """The program; not compiled yet, unless the function is itself one that was called before."""
        if hasattr(self.function, "lower"):
            return self.function
        return jax.jit(lambda *arguments: self.function(*arguments), **self.options)

    def flops(self) -> tuple[int, int]:
        """-> (multiply-adds of its layers in a forward pass, operations in all)."""
        flops = count(self.counted or self.function, *shapes(self.arguments))
        return (count(self.forward, *shapes(self.arguments)) if self.forward else flops).layers, flops.total


def shapes(tree):
    """The shapes of a tree of arrays, with their places."""

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

    return jax.tree.map(shape, tree)


def compiled(component: Component) -> tuple[Callable, dict]:
    """-> (the executable, {"trace_seconds", "cold_compile_seconds", "warm_compile_seconds"}).

    Cold: nothing of it was ever compiled. Warm: as in another process that finds it in the persistent cache; None where
    there is none. The cache's own folder is left alone, so that what lies there makes nothing look fast.
    """
    with empty_cache() as cached:
        executable, traced, cold = _compile(component)
        warm = None
        if cached:
            jax.clear_caches()
            executable, _, warm = _compile(component)
    return executable, {"trace_seconds": traced, "cold_compile_seconds": cold, "warm_compile_seconds": warm}


def _compile(component) -> tuple[Callable, float, float]:
    begun = time.perf_counter()
    lowered = component.jitted().lower(*component.arguments)
    between = time.perf_counter()
    return lowered.compile(), between - begun, time.perf_counter() - between


@contextlib.contextmanager
def empty_cache() -> Iterator[bool]:
    """An empty persistent cache of compiled programs in place of the one that is on -> whether one is."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    if not (before[names[0]] and jax.config.jax_enable_compilation_cache):
        yield False
        return
    with tempfile.TemporaryDirectory(prefix="cmd-jax-bench-", ignore_cleanup_errors=True) as folder:
        try:
            _use_cache(dict(zip(names, (folder, 0.0), strict=True)))
            yield True
        finally:
            _use_cache(before)


def _use_cache(values: dict):
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def measure(component: Component, rounds: int, budget: float) -> tuple[dict, object]:
    """-> (what a record says of a component, see docs/benchmark.md; what its last call gave)."""
    layers, operations = component.flops()
    executable, record = compiled(component)
    arguments, out = component.arguments, None

    def call():
        nonlocal arguments, out
        out = None  # whose memory the next one may need
        out = executable(*arguments)
        if component.again:
            arguments = component.again(out, arguments)
        return out

    times = repeated(call, rounds, budget)
    each = operations / times.p50 / jax.device_count()
    peak = device_peak(component.dtype)
    record |= {
        "rounds": len(times.seconds),
        "p50_seconds": times.p50,
        "p95_seconds": times.p95,
        "clips_per_second": component.clips / times.p50,
        "clips_per_second_per_device": component.clips / times.p50 / jax.device_count(),
        "layers_macs": layers,
        "operations": operations,
        "tflops_per_device": each / 1e12,
        "peak_tflops": peak / 1e12,
        "mfu": each / peak,
        "program_gib": program_bytes(executable) / GIB,
        "peak_gib": device_memory()["peak_bytes"] / GIB,
        "peak_of": device_memory()["of"],
    }
    return record, out


def program_bytes(executable) -> int:
    """What a program holds on each device while it runs: arguments, results and temporaries."""
    analysis = executable.memory_analysis()
    together = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return together - analysis.alias_size_in_bytes
