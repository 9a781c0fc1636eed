"""Saving and restoring a run.

A checkpoint is a folder `checkpoints/STEP`: the items of the state as Orbax writes them, run.json, and manifest.json
with the size and SHA-256 of every other file, written last. On a disk it is made under another name and renamed when
all of it is there; a bucket knows no rename, and what has no manifest is no step. So a step that is there is complete.
It is believed only when every byte agrees with its manifest: Orbax alone restores flipped bits in silence.

Orbax writes the arrays; barriers, commit and the removal of old steps are ours. Tried instead (orbax 0.12.8, two
processes): where one process of ocp.AsyncCheckpointer cannot write, it never comes to the barrier, and the others wait
for all of `timeout_secs` to hear of a time-out; with ocp.CheckpointManager it waits too, and hears of nothing else. The
post_finalization_callback comes before the rename, but _CHECKPOINT_METADATA is changed and commit_success.txt written
after it, so that no manifest can hold; an empty folder 9 counts as step 9, and a step 7 is then not saved. With a
handler whose futures never fail, a TemporaryPath of our own and no MetadataStore, AsyncCheckpointer did hold, in as
many lines as these, and kept the loop waiting no shorter: 0.33 to 0.39 s a save of 290 arrays, here 0.24 to 0.38.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import Unavailable, UserError
from cmd_jax.files import is_remote, read_json, write_text
from cmd_jax.running.array_store import (
    answering,
    as_unavailable,
    check_lengths,
    check_name,
    literal,
    make_handler,
    reason,
)
from cmd_jax.running.distributed import barrier, gather, leader_alone
from cmd_jax.running.hosts import check_tree
from cmd_jax.running.manifest import CutOff, Damaged, item_digest, read_manifest, verify, write_manifest
from cmd_jax.running.steps import steps_in
from cmd_jax.state import TrainState

ITEMS = ("step", "params", "ema", "opt_state")  # of a TrainState, each restorable by itself
RUN = "run.json"
RUN_LIKE = {"config?": {"model?": dict, ...: object}, ...: object}
GONE = "gone"  # what becomes of a step that a training removes
MERGED = "manifest.ocdbt"  # Orbax's, in the folder of an item, once it has merged what the processes wrote

log = logging.getLogger(__name__)
_saves = itertools.count()  # numbers the saves of this process, which all make together, for the names of barriers


def newest_digest(folder: Path | BucketPath, name: str) -> str:
    """The `digest` of the newest complete checkpoint by what its manifest says, of which no byte is compared; or ""."""
    steps = steps_in(folder)
    found = next(filter(steps.is_complete, steps.numbers()), None)
    with contextlib.suppress(CutOff, Damaged):
        return "" if found is None else item_digest(read_manifest(steps.folder / str(found)), name)
    return ""


class Checkpoints:
    """The checkpoints of one stage folder. Saves run in the background; `wait` and `close` wait for them.

    keep: how many of the newest are kept. read_only: for a folder in which another process may be training and saving.
    items: what is going to be restored; only of that every byte is compared with the manifest. before_commit: called
    by process 0, in the background, when all of a step but its manifest is written; its error fails the save. check:
    called there before anything is committed or removed; raises an OSError where that is not ours to do any more.
    With several processes, which all see the same files, every one calls latest, save, restore, restore_item and digest
    together, and each compares its share.
    """

    def __init__(
        self,
        folder: Path | BucketPath,
        keep: int = 2,
        read_only: bool = False,
        items: tuple[str, ...] = ITEMS,
        before_commit: Callable[[], None] | None = None,
        check: Callable[[], None] | None = None,
    ):
        check_name(folder)
        self._steps = steps_in(folder)
        self.folder = self._steps.folder
        self._before_commit, self._check = (call or (lambda: None) for call in (before_commit, check))
        self._keep, self._read_only, self._items = max(keep, 1), read_only, items
        self._first, self._looked, self._newest = jax.process_index() == 0, False, None
        self._saving = self._thread = self._error = None  # the step that is being saved, by which thread, how it failed
        self._handlers = {name: make_handler() for name in ITEMS}

    def latest(self) -> int | None:
        """The newest step whose checkpoint is whole, every byte of it compared once; None if none was ever completed.

        Newer ones that are not whole are told of and, unless read_only, moved to the folder `damaged`. UserError if
        some are damaged and none is whole: nothing starts from scratch in silence.
        """
        if not self._looked:
            self._newest, self._looked = self._newest_whole(), True
        return self._newest

    def save(self, state: TrainState, run: dict):
        """Start saving; the state may be donated when this returns. run: JSON to restore with it.

        UserError if the save before this one failed.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest():
            return
        folder, futures, errors, number = self._steps.place(step), [], [], next(_saves)
        try:
            self._begin(step, folder, number)
            with ThreadPoolExecutor(1) as pool:  # this thread may be running an event loop, as a notebook's does
                results = pool.submit(asyncio.run, self._start_writes(folder, state)).result()
            for result in results:
                errors.append(result) if isinstance(result, Exception) else futures.extend(result)
        except OSError as e:  # told by `wait`, when the other processes know too
            errors.append(e)
        arguments = (step, folder, json.dumps(run, sort_keys=True), futures, errors, number)
        self._saving, self._thread = step, threading.Thread(target=self._complete, args=arguments, name=f"save {step}")
        self._thread.start()

    def _begin(self, step: int, folder: Path | BucketPath, number: int):
        """Folders for the items; in a bucket, nothing may be there, with which Orbax would merge what it writes."""
        if not is_remote(folder):
            for name in ITEMS:
                (folder / name).mkdir(parents=True, exist_ok=True)
            return
        try:
            if self._first and any(folder.rglob("*")):  # one request, for which the loop waits
                self._check()
                self._steps.remove(step)
        finally:
            barrier(f"save-{number}-begun")

    async def _start_writes(self, folder: Path | BucketPath, state: TrainState) -> list:
        """Copy the state off the devices -> for each item a list of futures, or an error."""

        def write(name):
            args = ocp.args.PyTreeSave({"value": getattr(state, name)})
            return self._handlers[name].async_save(literal(folder / name), args=args)

        return await asyncio.gather(*map(write, ITEMS), return_exceptions=True)

    def _complete(self, step: int, folder: Path | BucketPath, run: str, futures: list, errors: list, number: int):
        """In the background: wait until all processes have written their shards, then process 0 makes a checkpoint."""
        done = [folder / f"process-{i}.done" for i in range(jax.process_count())]
        for future in futures:  # each to its end: nothing may be written any more to a folder that is removed
            try:
                future.result()
            except Exception as e:
                errors.append(e)
        try:
            if not errors:
                done[jax.process_index()].touch()
            barrier(f"save-{number}-written")
            if self._first:
                try:
                    if not errors:
                        self._commit(step, folder, run, done)
                except Exception as e:
                    errors.append(e)
                if errors:
                    self._abandon(step)
            barrier(f"save-{number}-committed")
        except Exception as e:  # a process is gone
            errors.append(e)
        try:
            if not errors and not self._steps.has(step):
                errors.append(self._failed("another process"))
        except OSError as e:
            errors.append(e)
        self._error = as_unavailable(errors[0], folder) if errors else None

    def _failed(self, who: str) -> Exception:
        """Why is known to the other process alone; of a bucket, whose rights are the same for all, it may well pass."""
        text = f"{who} failed to write its part"
        return Unavailable(None, text, str(self.folder)) if is_remote(self.folder) else RuntimeError(text)

    def _abandon(self, step: int):
        with contextlib.suppress(OSError):  # it belongs to another run, which removes what it finds, or made it anew
            self._check()
            self._steps.abandon(step)

    def _commit(self, step: int, folder: Path | BucketPath, run: str, done: list):
        missing = [i for i, path in enumerate(done) if not path.exists()]
        if missing:
            raise self._failed(f"process {', '.join(map(str, missing))}")
        for path in done:
            path.unlink()
        for name, handler in self._handlers.items():
            handler.finalize(literal(folder / name))
            # Where Orbax finds no parts to merge it is content, and what was written cannot be restored.
            if not (folder / name / MERGED).is_file():
                raise RuntimeError(f"the parts of {name} were not merged")
            if is_remote(folder):
                check_lengths(folder / name)
        write_text(folder / RUN, run + "\n", sync=False)  # the manifest's writer brings all to the disk
        self._before_commit()
        write_manifest(folder, step, self._check)
        self._steps.commit(step)
        try:
            self._check()
            self._retire(step)
        except OSError as e:
            log.warning("old checkpoints in %s cannot be removed (%s)", self.folder, e.strerror)

    def wait(self):
        """Until what was saved is on the disk, its manifest too. UserError if it could not be saved."""
        if self._thread is None:
            return
        self._thread.join()
        step, error = self._saving, self._error
        self._saving = self._thread = self._error = None
        if error is not None:
            before = self.latest()
            kept = "no step was saved before" if before is None else f"the previous step {before} is intact"
            problem = f"could not be saved ({reason(error)}); {kept}"
            mend = (
                "look after the bucket and the way to it" if is_remote(self.folder) else "free space or mend the disk"
            )
            remedy = f"{mend}, then run the same command again"
            raise UserError("checkpoint", step, problem, remedy) from error
        self._newest = step

    def close(self):
        try:
            self.wait()
        finally:
            for handler in self._handlers.values():
                handler.close()

    def restore(self, like: TrainState) -> tuple[TrainState, dict]:
        """The newest whole checkpoint, laid out as `like` (arrays or ShapeDtypeStructs with shardings), and its run."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        state = TrainState(**{name: self.restore_item(name, getattr(like, name)) for name in ITEMS})
        return state, read_json(self.folder / str(self.latest()) / RUN, "checkpoint", like=RUN_LIKE)

    def restore_item(self, name: str, like=None, part: bool = False, cast=None):
        """One item of the newest whole checkpoint; without `like`, as host arrays.

        UserError if there is none, or for the first array that is not as `like` wants it. part: `like` is a part of
        what `shapes` says; nothing else is read, or compared. cast: `like` in other dtypes, in which the arrays come.
        """
        if name not in self._items:
            raise ValueError(f"{name} is none of the items {self._items}, of which the bytes are compared")
        saved, folder = self.shapes(name), self._newest_folder()
        if like is None:
            like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), saved)
        config = read_json(folder / RUN, "checkpoint", like=RUN_LIKE).get("config")
        if not part:
            check_tree(f"checkpoint {folder.name}: {name}", saved, like, "use the config it was trained with", config)
        like = {"value": cast or like}
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=part)
        with answering(folder):
            return self._handlers[name].restore(literal(folder / name), args=args)["value"]

    def shapes(self, name: str):
        """Tree of ShapeDtypeStructs of one item of the newest whole checkpoint."""
        with answering(self.folder):
            saved = self._handlers[name].metadata(literal(self._newest_folder() / name)).tree["value"]
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)

    def digest(self, name: str) -> str:
        """What tells one item of the newest whole checkpoint from all others ever saved, by its manifest."""
        folder = self._newest_folder()
        return leader_alone(lambda: item_digest(read_manifest(folder), name))

    def _newest_folder(self) -> Path:
        step = self.latest()
        if step is None:
            raise UserError("checkpoints", self.folder, "holds no checkpoint", "train that stage first")
        return self.folder / str(step)

    def _look(self) -> list[int]:
        if not self._read_only:
            self._steps.clean()
        return self._steps.numbers()

    def _newest_whole(self) -> int | None:
        """The same in every process."""
        bad, found, again = {}, None, True
        while again:  # where steps vanish, which a training that goes on there removes, there are newer ones
            again = False
            for step in leader_alone(self._look):
                fault = self._fault(step)
                if fault is None:
                    found, again = step, False
                    break
                again |= fault[0] == GONE
                bad |= {step: fault} if fault[0] != GONE else {}
        return leader_alone(lambda: self._settle(found, bad))

    def _fault(self, step: int) -> list[str] | None:
        """What is wrong with a checkpoint, the same in every process: the name of the exception, or GONE, and why."""
        folder, complaints = self.folder / str(step), {}

        def judge(part: int = 0, parts: int = 1) -> list[str] | None:
            try:
                verify(folder, self._items, part, parts)
            except (CutOff, Damaged) as e:
                return [type(e).__name__ if self._steps.has(step) else GONE, str(e)]

        if jax.process_count() > 1:
            try:
                mine = judge(jax.process_index(), jax.process_count())
            except (UserError, OSError) as e:
                mine = ["", str(e)]
            complaints = {i: text for i, text in enumerate(gather(mine[1] if mine else "")) if text}
            if not complaints:
                return None
        fault = leader_alone(judge)  # damage is what process 0 sees: where another one has another disk, none is
        if complaints and fault is None:
            process, text = min(complaints.items())
            problem = f"process {process} sees another one than process 0: {text}"
            raise UserError("checkpoint", folder, problem, "let all processes see the same files")
        return fault

    def _settle(self, found: int | None, bad: dict[int, list[str]]) -> int | None:
        """Tell of what is not whole, and set it aside -> found; UserError where nothing but damage was found."""
        damaged = next((step for step, (kind, _) in bad.items() if kind == Damaged.__name__), None)
        if found is None and damaged is not None:
            remedy = f"bring back a copy of it, or move {self.folder} away to start from scratch"
            raise UserError("checkpoint", damaged, f"damaged: {bad[damaged][1]}; no other one is whole", remedy)
        instead = "there is no older one" if found is None else f"falling back to step {found}"
        for step, (_, why) in bad.items():
            moved = "" if self._read_only else f"; moved to {self._steps.set_aside(step)}"
            log.warning("checkpoint %d is not whole: %s; %s%s", step, why, instead, moved)
        return found

    def _retire(self, newest: int):
        """Remove what is older than the `keep` newest complete checkpoints up to step `newest`, those of earlier runs
        included."""
        steps = [step for step in self._steps.numbers() if step <= newest]
        complete = [step for step in steps if self._steps.is_complete(step)]
        for step in steps:
            if step < complete[: self._keep][-1]:
                self._steps.remove(step)
