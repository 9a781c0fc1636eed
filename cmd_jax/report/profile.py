"""A JAX trace of some steps of a training."""

import contextlib
import logging
import shutil
from pathlib import Path

import jax

from cmd_jax.buckets import BucketPath
from cmd_jax.files import atomic_path, scratch_folder

log = logging.getLogger(__name__)


class Profile:
    """Traces the steps in `steps` (counted from 0; None: no trace), to FOLDER/profile, from the first of them that this
    run makes on. For one process: what it sees of its devices, all see of theirs.

    The devices are idle at the start and at the end of it, so that what they do in it is these steps. The trace is
    written to this machine and then, whole, to its place. What fails of it is told, and left out.
    """

    def __init__(self, folder: Path | BucketPath, steps: range | None, console):
        self.folder, self.steps, self.console = folder / "profile", steps, console
        self._first = self._last = None  # steps of the trace that is being made
        self._scratch = contextlib.ExitStack()

    def begins(self, step: int) -> bool:
        return self.steps is not None and self._first is None and step in self.steps

    def start(self, step: int, state):
        """state: from which `step` will start."""
        jax.block_until_ready(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would be an event, and slow the steps
        try:
            self._place = self._scratch.enter_context(scratch_folder())
            jax.profiler.start_trace(self._place, profiler_options=options)
            self._first = step
        except (OSError, RuntimeError) as e:
            self._give_up(e)

    def ends(self, step: int) -> bool:
        """Whether the trace ends after `step`; told of each one."""
        self._last = step
        return self._first is not None and step + 1 == self.steps.stop

    def stop(self, state=None):
        """state: that the last of the steps has led to."""
        jax.block_until_ready(state)
        try:
            jax.profiler.stop_trace()
            for path in filter(Path.is_file, self._place.rglob("*")):
                with atomic_path(self.folder / str(path.relative_to(self._place))) as made:
                    shutil.copyfile(path, made)
            self.console.print(f"traced steps {self._first} to {self._last}: {self.folder}")
        except (OSError, RuntimeError) as e:
            self._give_up(e)
        self.steps = self._first = None
        self._scratch.close()

    def close(self):
        """Of a run that ends within its trace, what there is of it is written."""
        if self._first is not None:
            self.stop()

    def _give_up(self, e: Exception):
        log.warning("no profile: %s: %s", type(e).__name__, e)
        self.steps = None
