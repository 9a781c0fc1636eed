"""Small checkpoints for the tests, and processes that save, harm or look at them."""

import contextlib
import multiprocessing
import os

import jax.numpy as jnp
import numpy as np

from cmd_jax.running import manifest as manifests
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.hosts import digest
from cmd_jax.state import TrainState


def state_at(step, rows=16):
    """Arrays of numbers that do not compress, other ones at each step."""
    numbers = np.random.default_rng(step).normal(size=(rows, 8)).astype(np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(numbers)}, {"w": jnp.asarray(-numbers)}, (jnp.float32(step),))


def save(folder, *steps, rows=16, **options):
    with contextlib.closing(Checkpoints(folder, **options)) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step, rows), {"step": step})


def check_whole(folder, step, rows=16):
    """The newest good step is `step`, and holds what was saved."""
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        assert checkpoints.latest() == step
        state, run = checkpoints.restore(state_at(0, rows))
    assert digest(state) == digest(state_at(step, rows))
    assert run == {"step": step}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def largest(step):
    return max((path for path in step.rglob("*") if path.is_file() and path.parent != step), key=os.path.getsize)


def truncate(step):
    os.truncate(largest(step), largest(step).stat().st_size - 1)


@contextlib.contextmanager
def hashed():
    """The names of the files that are hashed meanwhile, each with its folder: "ema/manifest.ocdbt"."""
    names, real = [], manifests._entry_of

    def entry_of(path, *arguments, **options):
        names.append(path.as_posix().rpartition("/checkpoints/")[2].partition("/")[2])
        return real(path, *arguments, **options)

    manifests._entry_of = entry_of
    try:
        yield names
    finally:
        manifests._entry_of = real


def in_children(function, *argument_lists):
    """function(pipe, *arguments) in processes of their own -> [(process, our end of its pipe)]; loaded but once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cmd_jax.running.checkpoint"])
    children = []
    for arguments in argument_lists:
        ours, theirs = context.Pipe()
        process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        children.append((process, ours))
    return children


def answers(children, seconds=100):
    """What each child sent last before it ended, all of which it must by itself."""
    sent = []
    for process, pipe in children:
        assert pipe.poll(seconds), f"nothing from {process}"
        sent.append(pipe.recv())
        process.join(seconds)
        assert process.exitcode == 0
    return sent
