"""How the tests compile. Their programs are small and run once or twice: LLVM's costly passes are left out (XLA's own
stay), and what one worker or child process has compiled the others take from a folder."""

import os
import tempfile

import pytest

pytest_plugins = "buckets"  # fixtures: gcs, s3, gcs_stub

# What starts processes, or compiles most, goes first, so that no worker is left with it at the end.
LONGEST = (
    "test_processes", "test_text_to_video", "test_train", "test_devices", "test_verify_resume", "test_eight_devices",
    "test_data_parallel", "test_unet", "test_diffusers_peer", "test_autoencoder", "test_clip", "test_dit", "test_vae",
    "test_stages", "test_sd_runs", "test_costs",
)  # fmt: skip

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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """The tests of a file share what they compile, so one worker has them all, unless they name a wider group."""
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
