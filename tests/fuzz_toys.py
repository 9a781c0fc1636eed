"""Kinds whose readers do wrong, to see that the harness sees it."""

import ctypes
import os
import pickle
import time
from pathlib import Path

import numpy as np
from fuzz import MARKER, Kind

from cmd_jax.errors import UserError


def read(path: Path):
    what = path.read_bytes()
    if what == b"refuse":
        raise UserError("path", path, "not good", "give another")
    if what == b"traceback":
        raise ValueError("no")
    if what == b"die":
        ctypes.string_at(0)
    if what == b"hang":
        time.sleep(1000)
    if what == b"bomb":
        np.ones(2**40)
    if what == b"execute":
        pickle.loads(b"cbuiltins\nopen\n(S'" + os.environ[MARKER].encode() + b"'\nS'w'\ntR.")


TOYS = Kind(
    lambda: [b"good", b"refuse", b"traceback", b"die", b"hang", b"bomb", b"execute"], lambda seed, *_: seed, read, ""
)
