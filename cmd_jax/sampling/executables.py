"""Compiled programs in a folder, for the next process: it neither traces nor compiles what it reads there.

A file is a line of JSON, what it was compiled for and the SHA-256 of the rest, and the rest a pickle, as JAX has it: to
read one is to run what its writer wanted, so that the folder must be trusted as the code is. What was compiled for
anything else is compiled anew and replaced: other versions, code, devices, flags, or models. jax.export would keep the
lowered program instead, for other devices and later versions too, but that is then compiled at each start.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pickle
import platform
import types

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import serialize_executable

from cmd_jax.errors import UserError
from cmd_jax.files import COUNT, as_path, atomic_path, code_digest, parse_json, versions
from cmd_jax.running.compilation import machine_digest

log = logging.getLogger(__name__)
ENDING = ".executable"
HEADER = {"facts": {...: str}, "sha256": str, "bytes": COUNT}
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Settings of JAX that change no program: places, limits and what is told.
SILENT = ("cache", "log", "dump", "debug", "traceback", "profiler", "coordination", "distributed", "check_tracer_leaks")
ARGUMENTS = ("params", "frozen")  # attributes whose arrays a program is given


class Executables:
    """folder: of the files, made if it is missing. facts: all that a program of this process depends on, by name."""

    def __init__(self, folder, facts: dict[str, str], mesh):
        self.folder, self.facts, self.mesh = as_path(folder), facts, mesh
        self.refusal = ""
        if jax.process_count() > 1:
            self.refusal = "one process alone can write and read them"
        elif mesh.size > 1 and jax.default_backend() == "cpu":
            self.refusal = "XLA:CPU forgets the order of collectives in them"  # see running.compilation

    def load(self, name: str, asked: str):
        """The program `name` of what `asked` says, a text of all that it was compiled for beside the facts; or None."""
        path = self._path(name, asked)
        if self.refusal:
            return self._told(path, self.refusal)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return self._told(path, "not there yet")
        except OSError as e:
            return self._told(path, f"cannot be read ({e.strerror or e})")
        head, _, payload = content.partition(b"\n")
        try:
            header = parse_json(head, "executable", path, like=HEADER)
        except UserError:
            return self._told(path, "damaged")
        was, now = header["facts"], self.facts
        if other := next((name for name in now | was if was.get(name) != now.get(name)), None):
            return self._told(path, f"{other} was {_brief(was.get(other))}, and is {_brief(now.get(other))}")
        if len(payload) != header["bytes"] or hashlib.sha256(payload).hexdigest() != header["sha256"]:
            return self._told(path, "damaged")
        try:
            serialized, in_tree, out_tree = pickle.loads(payload)
            devices = list(self.mesh.devices.flat)
            return serialize_executable.deserialize_and_load(
                serialized, in_tree, out_tree, devices[0].client, execution_devices=devices
            )
        except Exception as e:  # whatever XLA says of a program that it does not take
            return self._told(path, f"XLA does not take it ({_brief(str(e))})")

    @contextlib.contextmanager
    def first_call(self, name: str, asked: str):
        """Of a program that was read: an error of XLA in it is told, and no more."""
        try:
            yield
        except jax.errors.JaxRuntimeError as e:
            self._told(self._path(name, asked), f"XLA cannot run it ({_brief(str(e))})")

    def save(self, name: str, asked: str, compiled):
        """Write a program for the next process; where that cannot be is told."""
        path = self._path(name, asked)
        if self.refusal:
            return
        try:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
            digest = hashlib.sha256(payload).hexdigest()
            header = {"facts": self.facts, "sha256": digest, "bytes": len(payload)}
            with atomic_path(path) as temporary:
                temporary.write_bytes(json.dumps(header).encode() + b"\n" + payload)
        except (OSError, ValueError, NotImplementedError, pickle.PicklingError) as e:
            log.warning("executable %s: cannot be written (%s)", path, e)

    def _path(self, name: str, asked: str):
        return self.folder / f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}{ENDING}"

    def _told(self, path, why: str) -> None:
        log.info("executable %s: %s; compiled anew", path, why)


def _brief(value: str | None) -> str:
    return "absent" if value is None else " ".join(value.split())[:60]


def facts_of(mesh, **closed_over) -> dict[str, str]:
    """What a program depends on beside its arguments and settings. closed_over: what else its functions refer to."""
    device = mesh.devices.flat[0]
    settings = {k: v for k, v in jax.config.values.items() if not any(word in k for word in SILENT)}
    where = {"machine": machine_digest(), "platform": f"{device.platform} {device.client.platform_version}"}
    shape = {"devices": f"{mesh.size} x {device.device_kind}", "mesh": f"{dict(mesh.shape)} {mesh.device_ids.tolist()}"}
    flags = {name: os.environ.get(name, "") for name in FLAGS}
    model = {"model": digest_of(closed_over), "settings of JAX": digest_of(settings)}
    return versions() | {"python": platform.python_version(), "code": code_digest()} | where | shape | flags | model


def digest_of(thing) -> str:
    """SHA-256 of all that is reachable from it, arrays by their numbers, but for ARGUMENTS. TypeError for a kind of
    thing of which it is not known what a program could take of it."""
    found = hashlib.sha256()
    for part in _parts(thing, ()):
        found.update(part + b"\0")
    return found.hexdigest()


def _parts(x, above: tuple):
    if any(x is one for one in above):
        yield b"circle"
        return
    above = (*above, x)
    yield type(x).__qualname__.encode()
    match x:
        case None | bool() | int() | float() | str() | bytes() | type() | np.dtype() | types.ModuleType():
            yield repr(x).encode()
        case np.ndarray() | np.generic() | jax.Array():
            is_key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(x) if is_key else x)
            yield f"{x.dtype} {array.shape}".encode() + array.tobytes()
        case dict() | types.MappingProxyType():
            for key, value in sorted(x.items(), key=lambda item: str(item[0])):
                yield str(key).encode()
                yield from _parts(value, above)
        case list() | tuple():
            for value in x:
                yield from _parts(value, above)
        case set() | frozenset():
            yield repr(sorted(map(repr, x))).encode()
        case functools.partial():
            yield from _parts((x.func, x.args, x.keywords), above)
        case types.FunctionType():
            yield f"{x.__module__}.{x.__qualname__}".encode()
            cells = [cell.cell_contents for cell in x.__closure__ or ()]
            yield from _parts([cells, x.__defaults__, x.__kwdefaults__], above)
        case types.MethodType():
            yield from _parts((x.__self__, x.__func__.__qualname__), above)
        case nn.Module():
            fields = [field.name for field in dataclasses.fields(x) if field.name not in ("parent", "name")]
            yield from _parts({name: getattr(x, name) for name in fields}, above)
        case _ if hasattr(x, "__dict__"):
            yield from _parts({name: v for name, v in vars(x).items() if name not in ARGUMENTS}, above)
        case _ if dataclasses.is_dataclass(x):
            yield from _parts({f.name: getattr(x, f.name) for f in dataclasses.fields(x)}, above)
        case _ if callable(x):
            yield repr(getattr(x, "__qualname__", None) or x).encode()
        case _:
            raise TypeError(f"{type(x)} in what a program is made of")
