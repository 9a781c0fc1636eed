"""The folders of steps, `checkpoints/STEP`: how they appear, go, and are set aside, on a disk and in a bucket."""

import itertools
import logging
import os
import re
import shutil
from pathlib import Path

from cmd_jax.buckets import BucketPath
from cmd_jax.files import each, is_remote, remove_tree, sync_path
from cmd_jax.running.manifest import MANIFEST

SAVING, DELETING = ".saving", ".deleting"  # endings of folders that are no checkpoints yet, or no longer
STEP, BEGUN = "step", "begun"

log = logging.getLogger(__name__)


class DiskSteps:
    """A step is made under another name and renamed when it is whole; a rename is also how it begins to go."""

    def __init__(self, folder: Path):
        self.folder = folder

    def look(self) -> tuple[list[int], list[int]]:
        """Those that are there, and those that are being written, or were when a process was killed; newest first."""
        there, begun = [], []
        for path in self.folder.glob("*"):
            if re.fullmatch("0|[1-9][0-9]*", name := path.name.removesuffix(SAVING)) and (kind := self._kind(path)):
                (there if kind == STEP else begun).append(int(name))
        return sorted(there, reverse=True), sorted(begun, reverse=True)

    def _kind(self, path: Path) -> str:
        """STEP, BEGUN, or "" for what is nothing of ours."""
        return "" if not path.is_dir() else BEGUN if path.suffix == SAVING else STEP

    def numbers(self) -> list[int]:
        return self.look()[0]

    def has(self, step: int) -> bool:
        return self._kind(self.folder / str(step)) == STEP

    def is_complete(self, step: int) -> bool:
        return (self.folder / str(step) / MANIFEST).is_file()

    def place(self, step: int) -> Path:
        """Where a step is written before it is one."""
        return self.folder / f"{step}{SAVING}"

    def commit(self, step: int):
        """Make a step of what was written, its manifest last."""
        os.rename(self.place(step), self.folder / str(step))
        sync_path(self.folder)

    def abandon(self, step: int):
        """Remove what was written of a step that is none, as far as that goes."""
        remove_tree(self.place(step))

    def clean(self):
        """Remove what killed processes have left."""
        for path in self.folder.glob("*"):
            if path.suffix in (SAVING, DELETING):
                remove_tree(path)

    def remove(self, step: int):
        removed = self.folder / f"{step}{DELETING}"
        os.rename(self.folder / str(step), removed)
        shutil.rmtree(removed)

    def set_aside(self, step: int) -> Path:
        """Move a step to the folder `damaged` beside the steps -> its new path."""
        path = self._free(step)
        path.parent.mkdir(exist_ok=True)
        os.rename(self.folder / str(step), path)
        return path

    def _free(self, step: int) -> Path:
        place = self.folder.parent / "damaged"
        names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(1)))
        return next(place / name for name in names if not (place / name).exists())


class BucketSteps(DiskSteps):
    """A step is what has a manifest, the last object that is written of it and the first that is removed.

    A kill in between leaves objects without one, which are no step, and which the next run removes.
    """

    folder: BucketPath

    def _kind(self, path: BucketPath) -> str:
        if path.suffix:  # STEP.saving, copied from a disk, is not STEP
            return ""
        return STEP if (path / MANIFEST).is_file() else BEGUN if path.is_dir() else ""

    is_complete = DiskSteps.has

    def place(self, step: int) -> BucketPath:
        return self.folder / str(step)

    def commit(self, step: int):
        """The manifest was it."""

    def abandon(self, step: int):
        try:
            self.remove(step)
        except OSError as e:
            log.warning("what was written of step %d in %s cannot be removed (%s)", step, self.folder, e.strerror)

    def clean(self):
        for step in self.look()[1]:
            log.warning("%s has no %s: what an unfinished save left there is removed", self.place(step), MANIFEST)
            remove_tree(self.place(step))

    def remove(self, step: int):
        (self.place(step) / MANIFEST).unlink(missing_ok=True)
        self.place(step).rmtree()

    def set_aside(self, step: int) -> BucketPath:
        """Copied, then removed: a kill in between leaves the step, which is set aside again, or leaves no step."""
        source, target = self.place(step), self._free(step)
        each(source, lambda path: path.copy_to(target / path.relative_to(source)), source.rglob("*"))
        self.remove(step)
        return target


def steps_in(folder: Path | BucketPath) -> DiskSteps:
    """Those of a stage folder."""
    checkpoints = (folder / "checkpoints").absolute()
    return BucketSteps(checkpoints) if is_remote(folder) else DiskSteps(checkpoints)
