"""Saving and restoring a run, and reading a trained stage back for later stages and for sampling."""

import contextlib
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from cmd_jax import __version__
from cmd_jax.config import from_json
from cmd_jax.errors import UserError
from cmd_jax.interop.weights import flatten, read_metadata, read_state_dict, unflatten, write_safetensors
from cmd_jax.report.video import atomic_path
from cmd_jax.state import TrainState

ITEMS = ("step", "params", "ema", "opt_state")  # of a TrainState, each restorable by itself


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"cmd_jax": __version__} | {name: version(name) for name in names}


def write_json(path: Path, value):
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path):
    if not path.is_file():
        raise UserError("workdir", path, "no such file", "train that stage first, or give the right folder")
    return json.loads(path.read_text())


def digest(tree) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a tree of arrays."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.ascontiguousarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def check_tree(field: str, found, wanted, remedy: str):
    """UserError for the first array whose presence, shape or dtype differs between two trees of (abstract) arrays."""

    def shapes(tree):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(p, simple=True, separator="/"): (tuple(x.shape), str(x.dtype)) for p, x in leaves}

    found, wanted = shapes(found), shapes(wanted)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            problem = f"this config wants {wanted.get(key, 'no such array')}"
            raise UserError(f"{field}/{key}", found.get(key, "absent"), problem, remedy)


class Checkpoints:
    """The checkpoints of one stage folder. Saves run in the background; `close` waits for them.

    read_only: for a folder in which another process may be training and saving.
    """

    def __init__(self, folder: Path, keep: int = 2, read_only: bool = False):
        # Orbax's own read_only warns at each use; this is all of it that touches the folder before a save.
        writes = {"create": not read_only, "cleanup_tmp_directories": not read_only}
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, **writes)
        self.folder = (folder / "checkpoints").resolve()
        handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState):
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.StandardSave({"value": getattr(state, name)}) for name in ITEMS}
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, laid out as `like` (arrays or ShapeDtypeStructs with shardings)."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return TrainState(**{name: self.restore_item(name, getattr(like, name)) for name in ITEMS})

    def restore_item(self, name: str, like=None):
        """One item of the newest checkpoint; without `like`, as host arrays."""
        step = self.latest()
        if step is None:
            raise UserError("checkpoints", self.folder, "holds no checkpoint", "train that stage first")
        saved = self._manager.item_metadata(step)[name].tree["value"]
        if like is None:
            like = jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), saved)
        check_tree(f"checkpoint {step}: {name}", saved, like, "use the config it was trained with")
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore({"value": like})})
        return self._manager.restore(step, args=args)[name]["value"]

    def close(self):
        self._manager.wait_until_finished()
        self._manager.close()


class Trained(NamedTuple):
    """A trained stage: its resolved config, the EMA parameters on the host, and class_names, statistics, digests."""

    config: ConfigDict
    params: dict
    facts: dict


def load_trained(path: Path | str, stage: str) -> Trained:
    """The EMA parameters of a stage, from its workdir folder or from a weights file written by `export`."""
    path = Path(path)
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        if not {"config", "facts"} <= metadata.keys():
            raise UserError("weights", path, "holds no config of cmd_jax", "give a file that training exported")
        params = unflatten({k: v.astype(np.float32) for k, v in read_state_dict(path).items()})
        trained = Trained(from_json(metadata["config"]), params, json.loads(metadata["facts"]))
    else:
        if not (path / "config.json").is_file():
            raise UserError("workdir", path, f"holds no trained {stage} stage", f"train the {stage} stage there first")
        with contextlib.closing(Checkpoints(path, read_only=True)) as checkpoints:
            params = checkpoints.restore_item("ema")
        facts = read_json(path / "facts.json") | {"digest": digest(params)}
        trained = Trained(from_json((path / "config.json").read_text()), params, facts)
    if trained.config.stage != stage:
        raise UserError("weights", path, f"is a {trained.config.stage} stage", f"give one of the {stage} stage")
    return trained


def export(path: Path, trained: Trained, dtype=np.float32):
    """Write a stage as one safetensors file. `facts` keep the digest of the original also where `dtype` is narrower."""
    tensors = {k: np.asarray(v).astype(dtype) for k, v in flatten(trained.params).items()}
    config, facts = json.dumps(trained.config.to_dict(), sort_keys=True), json.dumps(trained.facts, sort_keys=True)
    write_safetensors(path, tensors, {"config": config, "facts": facts})
