"""How the tests compile. Their programs are small and run once or twice: LLVM's costly passes are left out (XLA's own
stay), and what one worker or child process has compiled the others take from a folder."""

import os
import tempfile

import pytest

programs = tempfile.TemporaryDirectory(prefix="cmd-jax-programs-")  # of the first pytest; workers have its environment
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.fixture
def optimized(monkeypatch):
    """Compile as users do, here and in child processes: for tests that compute for minutes."""
    import jax

    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
