"""How much memory was taken."""

import resource

import jax


def process_peak() -> int:
    """The most memory that this process has held so far, bytes of the host."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_memory() -> dict:
    """{"peak_bytes", "limit_bytes", "of"}: the most that was held so far, and how much there is.

    of: "devices" for the fullest of this process' devices, with the smallest limit; "process" on a CPU, which has no
    memory of its own: what the process held, with no limit (None).
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("peak_bytes_in_use" in each for each in stats):
        return {"peak_bytes": process_peak(), "limit_bytes": None, "of": "process"}
    limits = [each["bytes_limit"] for each in stats if "bytes_limit" in each]
    peak = max(each["peak_bytes_in_use"] for each in stats)
    return {"peak_bytes": peak, "limit_bytes": min(limits, default=None), "of": "devices"}
