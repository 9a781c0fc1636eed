"""Which evaluations of a denoiser a run makes, settled before it starts: with guidance or without, in full or in part.

A guidance interval (Kynkaanniemi et al. 2024) guides between two levels of noise only, and elsewhere asks for the
condition alone: half the work. A step cache lets listed evaluations reuse what is deep in the network from the last one
that ran all of it. Both are static, so that one jitted loop runs them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.diffusion.guidance import guide, interleave, separate
from cmd_jax.errors import UserError


class Kind(NamedTuple):
    """How one evaluation is made. guided: for the condition and for the null condition. reuses: in part only."""

    guided: bool
    reuses: bool


def evaluation_kinds(
    levels: np.ndarray, guided: bool, interval: tuple[float, float] = (0.0, 1.0), reuse: Sequence[int] = (),
    field: str = "reuse",
) -> list[Kind]:  # fmt: skip
    """The kind of each evaluation of a run.

    levels: float [evaluations] in 0..1, the share t/T of the noise at each, as the process's `levels` gives it. guided:
    whether the run is, which then happens where interval[0] <= level <= interval[1]. reuse: numbers of the evaluations
    that reuse, from 0, the noisiest.
    UserError (field) for a number that no evaluation has, and for one before which there is nothing to reuse.
    """
    low, high = interval
    inside = guided & (low <= np.asarray(levels)) & (np.asarray(levels) <= high)
    shown = ",".join(map(str, reuse))
    if beyond := [n for n in reuse if not 0 <= n < len(levels)]:
        raise UserError(field, shown, f"there is no evaluation {beyond[0]}", f"use numbers from 1 to {len(levels) - 1}")
    kinds = [Kind(bool(inside[n]), n in set(reuse)) for n in range(len(levels))]
    for guides in {kind.guided for kind in kinds}:  # also of the null condition something must have been kept
        first = next(n for n, kind in enumerate(kinds) if kind.guided >= guides)
        if kinds[first].reuses:
            problem = f"evaluation {first} is the first{' with guidance' * (guides and first > 0)}: nothing is kept yet"
            raise UserError(field, shown, problem, f"leave {first} out")
    return kinds


def parse_reuse(text: str, field: str) -> tuple[int, ...]:
    """The list of evaluations that a config writes as "3,4,6", rising; UserError (field) for anything else."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isdecimal() and len(word) < 8 for word in words) or len(set(map(int, words))) < len(words):
        raise UserError(field, text, "not different whole numbers separated by commas", "write it like 3,4,6")
    return tuple(sorted(map(int, words)))


def evaluation(
    apply: Callable, condition, content, guidance, null, learned_range: bool = False, apply_both: Callable | None = None
) -> Callable:  # fmt: skip
    """How a model is evaluated: a function (kind, memory, x [B,...], timesteps [B]) -> (memory, prediction [B,...]).

    apply: (x, timesteps, condition, content, **cache) -> prediction; cache: keep=True for (prediction, kept [B,...]),
    reuse=kept. apply_both: the same for rows of both conditions in turn, by default `apply`.
    guidance: of the guided kinds, away from the condition `null`; None where there are none.
    memory: () where nothing is to be kept, else what the last whole evaluation kept, of the condition and, where some
    are guided, of the null condition.
    """
    both = None
    if guidance is not None:
        # One call of 2B rows, in which both alternate: the batch axis stays outermost and keeps its layout on the mesh.
        both = interleave(condition, null), interleave(content, content)

    def evaluate(kind: Kind, memory: tuple, x, timesteps):
        run, given, cache = apply, (condition, content), {}
        if kind.guided:
            run, given = apply_both or apply, both
            x, timesteps = interleave(x, x), interleave(timesteps, timesteps)
        if kind.reuses:
            cache = {"reuse": interleave(*memory) if kind.guided else memory[0]}
        elif memory:
            cache = {"keep": True}
        out = run(x, timesteps, *given, **cache)
        if memory and not kind.reuses:
            out, kept = out
            memory = separate(kept) if kind.guided else (kept, *memory[1:])
        return memory, guide(*separate(out), guidance, learned_range) if kind.guided else out

    return evaluate


def empty_memory(kept: jax.ShapeDtypeStruct, kinds: Sequence[Kind]) -> tuple:
    """The memory of `evaluation` before the first of these kinds; kept: of one condition, [B,...]."""
    return (jnp.zeros(kept.shape, kept.dtype),) * (2 if any(kind.guided for kind in kinds) else 1)


class Measured(NamedTuple):
    """What `measuring` remembers.

    past: what the last evaluations kept, the newest first. changes: float32 [B, evaluations, back], of what each keeps
    the relative L1 distance from what was kept 1, 2, ... evaluations before; of the first ones without meaning.
    """

    past: tuple
    changes: jax.Array
    number: jax.Array


def measuring(evaluate: Callable, memory: tuple, evaluations: int, back: int) -> tuple[Callable, Measured]:
    """An `evaluation` whose kinds reuse nothing, and its empty memory -> the same, and the memory of one that measures
    how much of what it keeps changes."""
    rows = len(memory[0])

    def measured(kind: Kind, memory: Measured, x, timesteps):
        kept, out = evaluate(kind, memory.past[0], x, timesteps)
        new = kept if kind.guided else kept[:1]
        changes = jnp.stack([_relative_distance(before[: len(new)], new) for before in memory.past], axis=-1)
        past = kept, *memory.past[:-1]
        return Measured(past, memory.changes.at[:, memory.number].set(changes), memory.number + 1), out

    return measured, Measured((memory,) * back, jnp.zeros((rows, evaluations, back)), jnp.int32(0))


def _relative_distance(before, now):
    """Trees of arrays [B,...] -> sum of |now - before| over that of |now|: float32 [B]."""

    def size(tree):
        return sum(jnp.sum(jnp.abs(x.astype(jnp.float32)), axis=range(1, x.ndim)) for x in jax.tree.leaves(tree))

    return size(jax.tree.map(jnp.subtract, now, before)) / jnp.maximum(size(now), 1e-30)


class Planned:
    """A denoiser whose evaluations are of several kinds, and which remembers.

    evaluate: (kind, memory, x, timesteps) -> (memory, prediction). kinds: of each evaluation, in order. memory: a tree
    of arrays at the start, whose shapes stay.
    """

    def __init__(self, evaluate: Callable, kinds: Sequence[Kind], memory=()):
        used = sorted({*kinds})
        self.bodies, self.memory = [partial(evaluate, kind) for kind in used], memory
        # Of one kind there is nothing to choose: the loop is then that of a plain denoiser.
        self.table = np.array([used.index(kind) for kind in kinds], np.int32) if len(used) > 1 else None

    @classmethod
    def of(cls, denoise) -> "Planned":
        """A plain denoiser (x, timesteps) -> prediction as one of a single kind, without memory; others as they are."""
        if isinstance(denoise, Planned):
            return denoise
        return cls(lambda kind, memory, x, timesteps: (memory, denoise(x, timesteps)), [Kind(False, False)])

    def which(self, numbers: np.ndarray):
        """For a loop over steps, the kinds of the evaluations of these numbers; None without a choice."""
        return None if self.table is None else jnp.asarray(self.table[numbers])

    def __call__(self, memory, kind, x, timesteps):
        """One evaluation, `kind` as `which` gives it -> (memory, prediction)."""
        if kind is None:
            return self.bodies[0](memory, x, timesteps)
        return jax.lax.switch(kind, self.bodies, memory, x, timesteps)
