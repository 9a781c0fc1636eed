"""PyTorch beside us: the same function at the same shapes, in one process, turn and turn about.

Where the peer computes what ours does, both have the same weights, and the largest difference of their outputs, as a
part of the largest output, is told with the times. torch and diffusers, of the extra `peers`, are imported by `run`.
"""

import gc
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from cmd_jax.bench.measure import GIB, program_bytes
from cmd_jax.bench.table import number
from cmd_jax.errors import UserError, choose
from cmd_jax.performance.memory import process_peak
from cmd_jax.performance.timing import LEAST_ROUNDS, in_turns, ratio
from cmd_jax.planning.costs import kinds_of, preset_runs

BATCHES = {  # of a forward pass and of a training step at full size; the VAE is frozen
    "autoencoder": {"forward": 1, "training": 1},
    "dit-content": {"forward": 2, "training": 2},
    "dit-motion": {"forward": 4, "training": 4},
    "unet": {"forward": 2, "training": 1},
    "unet-32": {"forward": 2, "training": 2},
    "vae": {"forward": 1},
    "modelscope": {"forward": 1},
}
STEPS = 50  # of both models, in the comparison with ModelScope
FRAMES = 16


def run(components: Iterable[str], which: str, options, dtype: str, emit: Callable[[dict], None]):
    """Emits a record for each component as soon as it is measured.

    components: of BATCHES, or "all". which: "forward", or "training": the gradient of the sum of the output's squares
    for all parameters, without an optimizer; where a component has no such pass it is left out. dtype: of parameters
    and arithmetic of both. options: peers_size "tiny" takes tiny networks, to try the path; rounds and budget.

    A record: component, batch, settings with the pass, p50_seconds and peer_seconds (medians), ratio = the median over
    turns of the peer's seconds to ours (above 1: ours is faster), all turns, a note on shapes and on how the functions
    differ, difference of the outputs, compile_seconds and program_gib of ours, peer_gib at most held by torch on a GPU,
    process_gib by both.
    UserError without torch and diffusers, and for unknown names.
    """
    components = list(BATCHES) if list(components) == ["all"] else components
    components = [choose("--peers", name, BATCHES) for name in components]
    torch = import_torch()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as JAX takes
    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX computes float32 on a GPU
    tiny = options.peers_size == "tiny"
    for name in components:
        if which in BATCHES[name]:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            batch = 1 if tiny else BATCHES[name][which]
            measured = _clip(options, dtype) if name == "modelscope" else _pair(name, which, batch, options, dtype)
            measured["settings"] = {"pass": which, "beside": measured["peer"], "size": options.peers_size}
            emit({"component": name, "clip": [], "batch": batch} | measured | conditions(torch, dtype))
        gc.collect()


def table(records: list[dict]) -> Table:
    """Records as a table for people."""
    shown = Table(box=None, pad_edge=False)
    columns = ("component", "pass", "batch", "ours s", "PyTorch s", "ratio", "difference", "compile s", "program GiB")
    for name in columns:
        shown.add_column(name, justify="left" if name in ("component", "pass") else "right", no_wrap=True)
    for r in records:
        seconds = [number(r[name]) for name in ("p50_seconds", "peer_seconds", "ratio")]
        difference = "" if r.get("difference") is None else f"{r['difference']:.0e}"
        more = difference, number(r["compile_seconds"]), number(r["program_gib"])
        shown.add_row(r["component"], r["settings"]["pass"], str(r["batch"]), *seconds, *more)
    return shown


def import_torch():
    """torch; UserError where it or diffusers is missing."""
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        problem = f"not installed: {' and '.join(missing)}"
        raise UserError("--peers", "torch", problem, "pip install 'cmd-jax[peers]', or leave --peers out")
    return importlib.import_module("torch")


def _pair(name: str, which: str, batch: int, options, dtype: str) -> dict:
    from cmd_jax.bench.peer_pairs import PAIRS

    pair = PAIRS[name](batch, options.peers_size == "tiny", dtype)
    ours, compiled = our_call(pair.ours, which)
    calls = {"ours": ours, "theirs": their_call(pair.theirs, which)}
    first, rounds = warm(calls, options)
    difference = None
    if which == "forward":
        expected = pair.as_ours(first["theirs"])
        difference = float(np.abs(np.asarray(first["ours"], np.float32) - expected).max() / np.abs(expected).max())
    del first
    times = in_turns(calls, rounds, warmup=0)
    return {
        "parameters": size_of(pair.ours),
        "p50_seconds": times["ours"].p50,
        "peer": pair.theirs.name,
        "peer_seconds": times["theirs"].p50,
        "ratio": ratio(times["ours"], times["theirs"]),
        "difference": difference,
        "turns": times["ours"].seconds,
        "peer_turns": times["theirs"].seconds,
        "note": pair.note,
        **compiled,
    }


def _clip(options, dtype: str) -> dict:
    """A clip of 16x256x256 against ModelScope's UNet3D, STEPS steps of each denoiser, all of them guided.

    In: denoisers, and the CMD decoder once. Out: text encoders, which are the same, and the VAE, which decodes the same
    latents for both; it is timed on one frame, and with it there is a ratio of its own. Presets: those of
    configs/webvid.py, against as many guided steps of the UNet3D as the preset takes, and against STEPS.
    """
    from cmd_jax.bench.peer_pairs import clip_256, vae

    tiny, compiled = options.peers_size == "tiny", {"compile_seconds": 0, "program_gib": 0}

    def measured(ours: dict, theirs) -> dict:
        calls = {"theirs": their_call(theirs, "forward")}
        for part, one in ours.items():
            calls[part], told = our_call(one, "forward")
            compiled["compile_seconds"] += told["compile_seconds"]
            compiled["program_gib"] = max(compiled["program_gib"], told["program_gib"])
        return in_turns(calls, warm(calls, options)[1], warmup=0)

    (ours, theirs), evaluations = clip_256(tiny, dtype), preset_evaluations()
    needed = {part for runs in evaluations.values() for run in runs.values() for part in run}
    ours = {part: one for part, one in ours.items() if part in needed or part == "decoder"}
    times, peer = measured(ours, theirs), theirs.name
    parameters = sum(size_of(ours[name]) for name in ("content", "motion", "decoder"))
    del ours, theirs
    gc.collect()
    pair = vae(1, tiny, dtype, side=32)
    frame = measured({"vae": pair.ours}, pair.theirs)
    times |= {"vae": frame["vae"], "peer_vae": frame["theirs"]}
    part = {name: each.p50 for name, each in times.items()}
    seconds = STEPS * (part["content"] + part["motion"]) + part["decoder"]
    peer_seconds = STEPS * part["theirs"]
    with_vae = seconds + FRAMES * part["vae"], peer_seconds + FRAMES * part["peer_vae"]
    presets = {}
    for preset, runs in evaluations.items():
        took = part["decoder"] + sum(part[which] for run in runs.values() for which in run)
        steps = max(map(len, runs.values()))
        ratios = {"ratio": steps * part["theirs"] / took, "ratio_to_all": peer_seconds / took}
        presets[preset] = {"steps": steps, "seconds": took, **ratios}
    return {
        "parameters": parameters,
        "p50_seconds": seconds,
        "peer": peer,
        "peer_seconds": peer_seconds,
        "ratio": peer_seconds / seconds,
        "seconds_with_vae": with_vae[0],
        "peer_seconds_with_vae": with_vae[1],
        "ratio_with_vae": with_vae[1] / with_vae[0],
        "presets": presets,
        "parts": part,
        "turns": {name: each.seconds for name, each in times.items()},
        "note": f"one clip of {FRAMES}x256x256, {STEPS} guided steps of each denoiser; parts: seconds of an evaluation "
        "of ours and a step of theirs, both with guidance, of the CMD decoder, and of the VAE for one frame; text "
        "encoders are left out",
        **compiled,
    }


def preset_evaluations() -> dict[str, dict[str, list[str]]]:
    """{preset: {"content": which evaluation each is, by the names of `clip_256`, "motion": ...}}."""
    found = {}
    for preset in ("balanced", "fast"):
        found[preset] = {}
        for name, run in preset_runs(preset).items():
            kinds = kinds_of(name, guided=True, **run)
            endings = [f"{'_reusing' * kind.reuses}{'_alone' * (not kind.guided)}" for kind in kinds]
            found[preset][name] = [name + ending for ending in endings]
    return found


def size_of(ours) -> int:
    return sum(x.size for x in jax.tree.leaves(ours.params))


def warm(calls: dict[str, Callable], options) -> tuple[dict, int]:
    """Each call once -> what they gave, and how many rounds the budget has room for, of those that are asked for."""
    begun = time.perf_counter()
    first = {name: call() for name, call in calls.items()}
    room = int(options.budget / (time.perf_counter() - begun))
    return first, min(options.rounds, max(LEAST_ROUNDS, room))


def our_call(ours, which: str) -> tuple[Callable, dict]:
    """-> (a call that waits for its result, which in training it drops, {compile_seconds, program_gib})."""

    def loss(params, *inputs):
        return jnp.sum(jnp.square(ours.apply(params, *inputs).astype(jnp.float32)))

    inputs = jax.tree.map(jnp.asarray, ours.inputs)
    begun = time.perf_counter()
    program = jax.jit(ours.apply if which == "forward" else jax.grad(loss)).lower(ours.params, *inputs).compile()
    told = {"compile_seconds": time.perf_counter() - begun, "program_gib": program_bytes(program) / GIB}

    def call():
        out = jax.block_until_ready(program(ours.params, *inputs))
        return out if which == "forward" else None  # gradients would be held while the peer's are computed

    return call, told


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
        theirs.call(theirs.model, *theirs.inputs).float().square().sum().backward()
        wait()
        theirs.model.zero_grad(set_to_none=True)

    return forward if which == "forward" else training


def conditions(torch, dtype: str) -> dict:
    """What a time depends on besides the function, and what was held."""
    on_gpu = torch.cuda.is_available()
    return {
        "dtype": dtype,
        "peer_device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "peer_threads": torch.get_num_threads(),
        "peer_versions": {name: importlib.import_module(name).__version__ for name in ("torch", "diffusers")},
        "peer_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "process_gib": process_peak() / GIB,
    }
