"""Programs that are compiled once, by processes of their own: the cache belongs to a process."""

import os
import subprocess
import sys

from processes import ROOT, environment

from cmd_jax.running.compilation import ENTRY, USED, machine_digest

RUN = """
import jax, jax.monitoring
from cmd_jax.running.compilation import keep_compiled
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
jax.devices()
keep_compiled()
print(float(jax.jit(lambda x: x * 3 + 1)(2.0)), len(hits), jax.config.jax_compilation_cache_max_size)
"""


def run(cache, devices=1, **variables) -> list[str]:
    """-> [result, hits, limit]. Without what the tests have set of JAX's cache."""
    kept = {name: value for name, value in environment(devices).items() if not name.startswith(("JAX_C", "JAX_ENABLE"))}
    kept |= {"CMD_JAX_CACHE": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | variables
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, env=kept, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-2000:]
    return done.stdout.split()


def test_the_next_process_takes_it_and_what_was_cut_short_is_made_anew(tmp_path):
    cache = tmp_path / "cache"
    assert run(cache) == ["7.0", "0", str(4 * 2**30)]
    folder = cache / "programs" / machine_digest()
    (entry,) = folder.glob(f"*{ENTRY}")
    used = folder / (entry.name.removesuffix(ENTRY) + USED)
    assert used.exists() and run(cache)[:2] == ["7.0", "1"]
    # As a kill between the two writes leaves it, and a mark without a program.
    size = entry.stat().st_size
    os.truncate(entry, size // 2)
    used.unlink()
    (folder / f"other{USED}").write_bytes(bytes(8))
    assert run(cache)[:2] == ["7.0", "0"]
    assert entry.stat().st_size == size and used.exists() and not (folder / f"other{USED}").exists()


def test_what_the_user_says_is_heeded_and_several_cpu_devices_keep_nothing(tmp_path):
    other = tmp_path / "other"
    assert run(tmp_path / "a", JAX_COMPILATION_CACHE_DIR=str(other))[2] == "-1"
    assert [*other.glob(f"*{ENTRY}")] and not (tmp_path / "a").exists()
    run(tmp_path / "b", JAX_ENABLE_COMPILATION_CACHE="0")
    run(tmp_path / "c", devices=2)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}
