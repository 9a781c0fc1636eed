"""What a checkpoint says of its run beside the arrays, and whether a run may go on from it."""

import jax
import numpy as np

from cmd_jax import keys
from cmd_jax.errors import UserError
from cmd_jax.files import COUNT, check_like, versions

# A position, for `check_like`. Checkpoints made before keys had a version lack it.
POSITION = {
    "step": COUNT, "examples": COUNT, "order": dict, "key": list, "keys?": COUNT,
    "devices": COUNT, "processes": COUNT, "versions": dict,
    "config": {"model": {"remat": str, ...: object}, "train": {"accumulate": COUNT, ...: object}, ...: object},
    ...: object,
}  # fmt: skip


def position(config, step: int, fingerprint: str) -> dict:
    """Where a run is after `step` steps: in the data of that fingerprint, under which key, config and versions."""
    return {
        "step": step,
        "examples": step * config.train.batch_size,  # position in the global order of clips
        "order": {"seed": config.seed, "batch_size": config.train.batch_size, "data": fingerprint},
        "key": np.asarray(jax.random.key_data(jax.random.key(config.seed))).tolist(),
        "keys": keys.VERSION,
        "config": config.to_dict(),
        "versions": versions(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def check_continues(earlier: dict, now: dict, console):
    """UserError if a checkpoint is of other draws or another order of clips; what else may change bits is told."""
    if problem := check_like(earlier, POSITION):
        raise UserError("checkpoint", now["step"], f"its run.json is damaged: {problem}", "bring back a copy of it")
    if "keys" not in earlier:
        console.print("saved before random keys had a version: if they were others, so are the draws from now on")
    for name in ("keys", "key", "order", "examples"):
        if earlier.get(name, now[name]) != now[name]:
            raise UserError(
                f"checkpoint.{name}", earlier[name], f"this run has {now[name]}",
                "resume with the seed, batch size, data and cmd_jax it was started with, or start anew in another "
                "--workdir",
            )  # fmt: skip
    earlier, now = (
        {name: run[name] for name in ("devices", "processes", "versions")}
        | {"model.remat": run["config"]["model"]["remat"], "train.accumulate": run["config"]["train"]["accumulate"]}
        for run in (earlier, now)
    )
    for name, value in earlier.items():
        if value != now[name]:
            what = "microbatches draw other noise" if name == "train.accumulate" else "the last bits may differ"
            console.print(f"saved with {name} {value}, resumed with {now[name]}: {what} from now on")
