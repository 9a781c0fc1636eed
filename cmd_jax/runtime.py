"""Process settings that must hold before JAX starts its threads."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_freed_memory():
    """Tell glibc to keep freed buffers: handing them back after every op makes page faults dominate on a CPU.

    launch/env.sh says the same through GLIBC_TUNABLES, which also turns on huge pages; where it was
    used, this does nothing.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    for parameter, value in ((M_MMAP_THRESHOLD, 2**31 - 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
        mallopt(parameter, value)
