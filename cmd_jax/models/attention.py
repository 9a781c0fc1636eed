"""Scaled dot-product attention by the kernel that suits where it runs, and rotary positions."""

import contextlib
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.errors import UserError, choose
from cmd_jax.models import attention_kernels as kernels
from cmd_jax.models.layout import splits, with_own_queries

KERNELS = ("auto", "plain", "blocked", "cudnn", "flash")
# Up to so many queries, or keys, all scores exist at once: on a CPU as measured (docs/performance.md), elsewhere the
# scores of fewer fit a device's memory.
WHOLE_TOKENS_CPU, WHOLE_TOKENS = 128, 1024
# The kernel of a platform, and how many queries and keys there must be more of: 16 frames fill a part of a tile.
FUSED = {"cuda": ("cudnn", 64), "tpu": ("flash", 1024)}
log = logging.getLogger(__name__)


class Device(NamedTuple):
    """What kernels depend on. platform: "cpu", "cuda", "rocm", "tpu" or another. capability: of an NVIDIA GPU."""

    platform: str
    capability: float = 0.0

    @classmethod
    def of(cls, device: jax.Device) -> "Device":
        platform = device.platform
        if platform == "gpu":
            platform = "rocm" if "rocm" in device.client.platform_version else "cuda"
        return cls(platform, float(device.compute_capability) if platform == "cuda" else 0.0)


class Case(NamedTuple):
    """One kind of attention: N queries and M keys of some heads."""

    device: Device
    dtype: str
    queries: int
    keys: int
    width: int  # of a head

    def __str__(self) -> str:
        shape = f"{self.queries}x{self.keys} tokens, heads of {self.width}"
        return f"{shape}, {self.dtype} on {self.device.platform}"


# What is asked for, and where it runs; a part of what jit's caches go by.
_ASKED = jax.make_user_context(None)
_told: set[tuple[Case, str]] = set()


@contextlib.contextmanager
def asked(attention: str, device: jax.Device):
    """Within it `attend` takes that kernel of KERNELS, for a device like this one; UserError where there is none."""
    kind = Device.of(device)
    if problem := elsewhere(choose("attention", attention, KERNELS), kind):
        raise UserError("attention", attention, problem, "use auto, plain or blocked")
    with _ASKED((attention, kind)):
        yield


def attend(query, key, value, axes=("act_batch", "act_token")):
    """Softmax attention over the token axis: query [..., N, heads, head_dim], key and value [..., M, heads, head_dim]
    -> [..., N, heads, head_dim].

    Logits and softmax are float32 whatever the inputs' dtype. Where both N and M are many, scores exist by tiles,
    forward and backward, so that memory grows with N + M and not with N * M: 8,192 tokens of 5 heads have 1.3 GB of
    scores. axes: logical ones of the queries' dimensions up to N; where the mesh splits more than the batch, each
    device takes its own queries, and all keys and values of theirs.

    Which kernel computes it `asked` says, else `auto`; UserError where that one cannot.
    """
    wanted, device = _ASKED.value or ("auto", Device.of(jax.devices()[0]))
    case = Case(device, jnp.dtype(query.dtype).name, query.shape[-3], key.shape[-3], query.shape[-1])
    kernel, reason = choice(wanted, case)
    if (case, kernel) not in _told:
        _told.add((case, kernel))
        log.info("attention of %s: %s, %s", case, kernel, reason)
    # XLA can split the products of plain attention by itself, but not what runs head after head, nor a kernel.
    alone = splits("act_token", "act_time") if kernel == "plain" else splits("heads", *filter(None, axes))
    compute = {
        "plain": kernels.plain,
        "blocked": lambda *arrays: kernels.blocked(*arrays, device.platform == "cpu"),
        "cudnn": kernels.cudnn,
        "flash": kernels.flash,
    }[kernel]
    return with_own_queries(compute, query, key, value, axes) if alone else compute(query, key, value)


def choice(wanted: str, case: Case) -> tuple[str, str]:
    """-> (the kernel, why); UserError (attention) where the wanted one cannot compute this."""
    if wanted != "auto":
        if problem := unable(wanted, case):
            raise UserError("attention", wanted, f"{problem}; asked for {case}", "use auto")
        return wanted, "as asked"
    few = min(case.queries, case.keys)
    fused, least = FUSED.get(case.device.platform, ("", 0))
    problem = unable(fused, case)
    if fused and not problem and few > least:
        return fused, f"more than {least} queries and keys"
    because = f"; not {fused}: {problem}" if problem else ""
    whole = WHOLE_TOKENS_CPU if case.device.platform == "cpu" else WHOLE_TOKENS
    if few <= whole:
        return "plain", f"at most {whole} queries or keys{because}"
    return "blocked", f"more than {whole} queries and keys{because}"


def elsewhere(kernel: str, device: Device) -> str:
    """Where a kernel runs instead, "" if it does here."""
    where = {"cudnn": ("cuda", "NVIDIA GPUs"), "flash": ("tpu", "TPUs")}
    platform, name = where.get(kernel, (device.platform, ""))
    return "" if platform == device.platform else f"it is for {name}, this is {device.platform}"


def unable(kernel: str, case: Case) -> str:
    """Why a kernel cannot compute this, "" if it can."""
    if problem := elsewhere(kernel, case.device):
        return problem
    if kernel == "cudnn":
        widest = 256 if case.device.capability >= 9 else 128
        if case.dtype not in ("float16", "bfloat16"):
            return f"it takes float16 and bfloat16, not {case.dtype}"
        if case.width % 8 or case.width > widest:
            return f"it takes heads of a multiple of 8 up to {widest} channels, not {case.width}"
    return ""


def rotary_table(positions, pairs: int, base: float = 10000.0) -> np.ndarray:
    """Cosines and sines of the rotations at integer positions [N] -> [2, N, pairs]; wavelengths rise geometrically
    up to 2 pi base."""
    frequencies = base ** (-np.arange(pairs) / pairs)
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def rotate(x, table):
    """Turn channel pairs of queries or keys: [..., N, heads, head_dim], rotary table [2, N, head_dim / 2] -> same.

    Pair i is made of channels i and i + head_dim / 2.
    """
    cos, sin = jnp.asarray(table)[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
