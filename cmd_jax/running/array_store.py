"""What Orbax and TensorStore, which hold the arrays of a checkpoint, must be told before they save here."""

import glob
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from cmd_jax.errors import UserError

# Orbax raises the first error of its threads, which is where we tell of it. It logs it too, with two tracebacks; leaves
# other tasks behind, whose errors asyncio logs with one each, or that never began, of which Python warns; and closes
# event loops that TensorStore still answers to.
NOISE = {"absl": ("_SignalingThread.run() raised",), "asyncio": ("/orbax/", " OCDBT database ")}
for _logger, _noise in NOISE.items():
    logging.getLogger(_logger).addFilter(lambda record, noise=_noise: not any(x in record.getMessage() for x in noise))
warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning)


def _unraisable(told, before=sys.unraisablehook):
    if told.object is not None or str(told.exc_value) != "Event loop is closed":
        before(told)


sys.unraisablehook = _unraisable


def make_handler() -> ocp.PyTreeCheckpointHandler:
    """What writes and reads one tree of arrays."""
    # Orbax cuts an array that several devices hold whole into as many slices, to write each from another one. For small
    # arrays that costs far more than it saves: four seconds for 300 arrays on 8 devices.
    of_devices = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**22)
    of_host = ocp.type_handlers.NumpyHandler()
    kinds = ocp.type_handlers.create_type_handler_registry((jax.Array, of_devices), (np.ndarray, of_host))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=kinds)


class LiteralPath(type(epath.Path())):
    """A path whose `glob` takes no character of the path itself for a pattern; Orbax looks for its own files so."""

    def glob(self, pattern: str):
        return map(type(self), glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


def literal(path: Path) -> LiteralPath:
    return LiteralPath(os.path.realpath(path))  # Orbax drops LINK/.. by itself, which may lead elsewhere


def check_name(folder: Path):
    """UserError for a folder that TensorStore cannot name, or that Orbax takes for one of a bucket."""
    path, problem = os.path.realpath(folder), ""
    if path != path.encode(errors="replace").decode():
        problem = "is not UTF-8"
    elif re.match("/(gs|s3|az|hf)/", f"{path}/"):  # as etils has it
        problem = f"would be taken for {path[1:3]}://"
    elif wrong := re.search(r"gs:(?=/)|\\", f"{path}/"):
        problem = f"holds {wrong[0]}"
    if problem:
        raise UserError("workdir", folder, f"{problem}, where Orbax cannot save", "rename it, or give another folder")


def reason(error: BaseException) -> str:
    """What went wrong in one short line; TensorStore's messages carry source locations."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    system = re.search(r"([^:]*) \[os_error_code=", text)
    return system[1].strip() if system else text[:200]
