"""PyTorch beside us: the same function at the same shapes, in one process, turn and turn about.

Where the peer computes what ours does, it hands its weights over (or takes ours), and the largest difference of the
outputs, relative to the largest output, is told with the times. Nothing but `run` needs torch and diffusers, which the
extra `peers` installs.
"""

import gc
import importlib
import importlib.util
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.errors import UserError, choose

PASSES = ("forward", "training")
BATCHES = {  # of each pass; the VAE is frozen
    "autoencoder": {"forward": 1, "training": 1},
    "dit-content": {"forward": 2, "training": 2},
    "dit-motion": {"forward": 4, "training": 4},
    "unet": {"forward": 2, "training": 1},
    "unet-32": {"forward": 2, "training": 2},
    "vae": {"forward": 1},
}
COMPONENTS = (*BATCHES, "modelscope")
STEPS = 50  # of both models, in the comparison with ModelScope
FRAMES = 16


def run(
    components: Iterable[str] = (),
    passes: Sequence[str] = PASSES,
    rounds: int = 3,
    small: bool = False,
    dtype: str = "float32",
    emit: Callable[[dict], None] = print,
):
    """Emits a record for each component and pass as soon as it is measured; without components: of all.

    A record: component, pass, seconds and peer_seconds (medians of `rounds` turns after one that warms up), ratio =
    peer_seconds / seconds (above 1: ours is faster), the turns, a note on shapes and on how the functions differ, the
    difference of outputs, compile_seconds and bytes of ours, peak bytes of the peer on a GPU, dtype, device, cores and
    versions. A training step is the gradient of the sum of the output's squares for all parameters; no optimizer.
    small: tiny models, to try the path. dtype: of parameters and arithmetic of both.
    UserError without torch and diffusers, and for unknown names.
    """
    components = [choose("peers", name, COMPONENTS) for name in components] or COMPONENTS
    passes = [choose("pass", name, PASSES) for name in passes]
    torch = import_torch()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as JAX takes
    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX computes float32 on a GPU
    for name in components:
        for which in passes:
            gc.collect()
            if (name, which) == ("modelscope", "forward"):
                emit(_clip(rounds, small, dtype))
            elif which in BATCHES.get(name, {}):
                emit(_measure(name, which, 1 if small else BATCHES[name][which], rounds, small, dtype))


def import_torch():
    """torch; UserError where it or diffusers is missing."""
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        problem = f"{' and '.join(missing)} are not installed"
        raise UserError("peers", "torch", problem, "pip install 'cmd-jax[peers]', or leave --peers out")
    return importlib.import_module("torch")


def _measure(name: str, which: str, batch: int, rounds: int, small: bool, dtype: str) -> dict:
    from cmd_jax.bench.peer_pairs import PAIRS

    pair = PAIRS[name](batch, small, dtype)
    with _Memory() as memory:
        ours, compiled = our_call(pair.ours, which)
        theirs = their_call(pair.theirs, which)
        first, second = ours(), theirs()
        difference = None
        if which == "forward" and pair.as_ours:
            difference = _difference(np.asarray(first, np.float32), pair.as_ours(second))
        del first, second
        turns = in_turns({"ours": ours, "theirs": theirs}, rounds)
    seconds = {who: statistics.median(times) for who, times in turns.items()}
    return {
        "component": name,
        "pass": which,
        "seconds": seconds["ours"],
        "peer": pair.theirs.name,
        "peer_seconds": seconds["theirs"],
        "ratio": seconds["theirs"] / seconds["ours"],
        "turns": turns["ours"],
        "peer_turns": turns["theirs"],
        "note": pair.note,
        "difference": difference,
        **compiled,
        **memory.record,
        **conditions(dtype),
    }


def _clip(rounds: int, small: bool, dtype: str) -> dict:
    """A clip of 16x256x256 against ModelScope's UNet3D, STEPS steps of each model, all of them guided.

    In: denoisers, and the CMD decoder once. Out: text encoders, which are the same, and the VAE, which decodes the same
    latents for both; it is timed on one frame, and with it there is a ratio of its own.
    """
    from cmd_jax.bench.peer_pairs import clip_256, vae

    ours, theirs = clip_256(small, dtype)
    with _Memory() as memory:
        calls, held = {}, 0
        for part, what in ours.items():
            calls[part], compiled = our_call(what, "forward")
            held += compiled["bytes"] or 0
        calls["theirs"] = their_call(theirs, "forward")
        for call in calls.values():
            call()
        turns = in_turns(calls, rounds)
        name = theirs.name
        del ours, theirs, calls, call, what
        gc.collect()
        pair = vae(1, small, dtype, side=32)
        frame = {"vae": our_call(pair.ours, "forward")[0], "peer_vae": their_call(pair.theirs, "forward")}
        for call in frame.values():
            call()
        turns |= in_turns(frame, rounds)
    parts = {part: statistics.median(times) for part, times in turns.items()}
    seconds = STEPS * (parts["content"] + parts["motion"]) + parts["decoder"]
    peer_seconds = STEPS * parts["theirs"]
    with_vae = seconds + FRAMES * parts["vae"], peer_seconds + FRAMES * parts["peer_vae"]
    return {
        "component": "modelscope",
        "pass": "forward",
        "seconds": seconds,
        "peer": name,
        "peer_seconds": peer_seconds,
        "ratio": peer_seconds / seconds,
        "seconds_with_vae": with_vae[0],
        "peer_seconds_with_vae": with_vae[1],
        "ratio_with_vae": with_vae[1] / with_vae[0],
        "parts": parts,
        "turns": turns,
        "note": f"one clip of {FRAMES}x256x256, {STEPS} guided steps of each denoiser; parts: seconds of a guided step "
        "of ours and theirs, of the CMD decoder, and of the VAE for one frame; text encoders are left out",
        "bytes": held,
        **memory.record,
        **conditions(dtype),
    }


def our_call(ours, which: str) -> tuple[Callable, dict]:
    """-> (a call that waits for its result, {compile_seconds, bytes: that the program needs at once})."""

    def loss(params, *inputs):
        return jnp.sum(jnp.square(ours.apply(params, *inputs).astype(jnp.float32)))

    inputs = jax.tree.map(jnp.asarray, ours.inputs)
    begun = time.perf_counter()
    program = jax.jit(ours.apply if which == "forward" else jax.grad(loss)).lower(ours.params, *inputs).compile()
    seconds, memory = time.perf_counter() - begun, program.memory_analysis()
    sizes = [getattr(memory, f"{kind}_size_in_bytes", 0) for kind in ("argument", "output", "temp")]
    told = {"compile_seconds": seconds, "bytes": sum(sizes) or None}
    return lambda: jax.block_until_ready(program(ours.params, *inputs)), told


def their_call(theirs, which: str) -> Callable:
    """A call that waits for its result."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def forward():
        with torch.inference_mode():
            out = theirs.call(theirs.model, *theirs.inputs)
        wait()
        return out

    def training():
        theirs.model.zero_grad(set_to_none=True)
        theirs.call(theirs.model, *theirs.inputs).float().square().sum().backward()
        wait()

    return forward if which == "forward" else training


def in_turns(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; all of a round run one after the other."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            out = call()
            seconds[name].append(time.perf_counter() - begun)
            del out
    return seconds


class _Memory:
    """Peak of the process on the host, and of torch on a GPU."""

    def __enter__(self):
        import torch

        self.torch, self.record = torch, {}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_):
        self.record["process_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        on_gpu = self.torch.cuda.is_available()
        self.record["peer_bytes"] = self.torch.cuda.max_memory_allocated() if on_gpu else None


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def conditions(dtype: str) -> dict:
    """What a time depends on besides the function."""
    import diffusers
    import torch

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    return {
        "dtype": dtype,
        "device": device.device_kind,
        "cores": cores,
        "peer_threads": torch.get_num_threads(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
