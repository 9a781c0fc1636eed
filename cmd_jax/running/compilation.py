"""Programs that are compiled once: JAX's own cache of them, on by default below the folder of this machine's copies."""

import contextlib
import hashlib
import logging
import os
import platform
from pathlib import Path

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from cmd_jax.files import cache_root

log = logging.getLogger(__name__)
GIB = 2**30
LIMIT = 4 * GIB  # of the cache; the longest unused go first
SHORTEST = 0.2  # seconds of a compilation that is worth a file; JAX's default of 1 leaves out half of a sampler's start
ENTRY, USED = "-cache", "-atime"  # endings of JAX's files: a program, and when it was read last, which is written last
LOCK = ".lockfile"  # JAX's
PATIENCE = 10.0  # seconds


def keep_compiled():
    """Have JAX keep what it compiles, for the next process: call it once the devices are known.

    JAX_COMPILATION_CACHE_DIR and JAX's other variables are heeded: JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        # XLA:CPU forgets the order of the collectives of a program that it reads back from the cache: the devices meet
        # them in different orders, and wait for each other until they abort.
        jax.config.update("jax_enable_compilation_cache", False)
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder = cache_root() / "programs" / machine_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_torn(folder)
    except OSError as e:
        log.info("programs are compiled anew at each start: %s: %s", folder, e.strerror or e)
        return
    settings = {"compilation_cache_max_size": LIMIT, "persistent_cache_min_compile_time_secs": SHORTEST}
    for name, value in settings.items():
        if f"JAX_{name.upper()}" not in os.environ:
            jax.config.update(f"jax_{name}", value)
    jax.config.update("jax_compilation_cache_dir", str(folder))


@contextlib.contextmanager
def apart_from_the_cache():
    """Within, what is compiled is neither taken from JAX's cache nor put there: a program of XLA:CPU that was read back
    lacks its functions when it is written again."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # or JAX would go by what it was at its first use
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def remove_torn(folder: Path):
    """Remove programs whose writing was cut short by a kill or a full disk: JAX would neither read nor replace them,
    and fail to make room."""
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / LOCK, timeout=PATIENCE):
        names = {path.name for path in folder.iterdir()}
        for ending, other in ((ENTRY, USED), (USED, ENTRY)):
            for name in names:
                if name.endswith(ending) and name.removesuffix(ending) + other not in names:
                    (folder / name).unlink(missing_ok=True)


def machine_digest() -> str:
    """A name for all machines that can run each other's programs: those of a CPU use what that one has."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = {line for line in lines if line.partition(":")[0].strip() in ("flags", "Features", "model name")}
        return hashlib.sha256("\n".join([platform.machine(), *sorted(features)]).encode()).hexdigest()[:16]
    return hashlib.sha256("\n".join(platform.uname()).encode()).hexdigest()[:16]
