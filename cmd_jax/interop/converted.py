"""Models whose parameters `cmd-jax convert` keeps in a safetensors file of our names: DiT, I3D, LPIPS.

The names are "a/b/c" of the parameter tree, channels last. The file's metadata say which model it is, its architecture,
and which of the tensors that torch's file may lack were there, so that it goes back without being told anything again.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmd_jax import __version__
from cmd_jax.errors import UserError, choose
from cmd_jax.files import parse_json
from cmd_jax.interop import cmd_config, cmd_release, i3d, lpips
from cmd_jax.interop.weights import read_metadata, read_state_dict, unflatten, write_safetensors
from cmd_jax.models.vgg import LPIPS
from cmd_jax.running.hosts import check_tree

KIND, ARCHITECTURE, OPTIONAL, VERSION = (f"cmd_jax.{what}" for what in ("kind", "architecture", "optional", "version"))


class Model(NamedTuple):
    """load: (architecture, state dict) -> (module, parameters). store: (architecture, parameters, names of the
    `optional` tensors to write) -> state dict. describe: architecture -> (module, tree of the parameters' shapes).
    architecture: (what is given, state dict) -> all of it. optional: tensors that hold nothing of their own, so that
    state dicts may lack them.
    """

    load: Callable
    store: Callable
    describe: Callable
    architecture: Callable[[dict, dict], dict]
    optional: tuple[str, ...] = ()


def _numbers(defaults: dict) -> Callable[[dict, dict], dict]:
    """The `architecture` of a model with these fields, all of them positive numbers."""

    def architecture(given: dict, _) -> dict:
        for key, value in given.items():
            if key not in defaults:
                raise UserError("config", key, "not a field of this model", f"use {', '.join(defaults)}")
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise UserError(f"config.{key}", value, "not a positive number", f"write it like {defaults[key]}")
        return defaults | given

    return architecture


MODELS = {
    "dit": Model(
        load=lambda sizes, state: cmd_release.load("content_dit", sizes, state),
        store=lambda sizes, params, _: cmd_release.state_dict("content_dit", sizes, params),
        describe=lambda sizes: cmd_release.model("content_dit", sizes),
        architecture=lambda given, state: cmd_config.complete("content_dit", given, state),
    ),
    "i3d": Model(
        load=lambda sizes, state: i3d.load(state, **sizes),
        store=lambda _, params, __: i3d.state_dict(params),
        describe=lambda sizes: i3d.model(**sizes),
        architecture=_numbers({"epsilon": 1e-5}),
    ),
    "lpips": Model(
        load=lambda _, state: (LPIPS(), lpips.lpips_params(state)),
        store=lambda _, params, repeated: lpips.lpips_state(params, repeated),
        describe=lambda _: lpips.model(),
        architecture=_numbers({}),
        optional=lpips.REPEATED,
    ),
}


def load_converted(path: Path | str, kind: str):
    """A converted file -> (module, float32 params) of a "dit", "i3d" or "lpips"; UserError if it is none."""
    architecture, params, _ = read_converted(path, kind)
    return MODELS[kind].describe(architecture)[0], params


def write_converted(path: Path, kind: str, architecture: dict, params: dict[str, np.ndarray], optional: list[str]):
    """params: {"a/b/c": array}. optional: those of the model's optional tensors that torch's file had."""
    texts = {KIND: kind, ARCHITECTURE: json.dumps(architecture), OPTIONAL: json.dumps(optional), VERSION: __version__}
    write_safetensors(path, params, texts)


def read_converted(path: Path | str, kind: str) -> tuple[dict, dict, list[str]]:
    """-> (architecture, float32 parameters, names of the optional tensors that torch's file had)."""
    choose("kind", kind, MODELS)
    texts = read_metadata(path)
    if "config" in texts:
        raise UserError("weights", path, "is a trained stage", "take it as a model of the CMD release, cmd-...")
    if not {KIND, ARCHITECTURE, OPTIONAL} <= texts.keys():
        remedy = "if it has torch's names, convert it first, without --to=torch"
        raise UserError("weights", path, f"states no {KIND}, so `cmd-jax convert` did not write it", remedy)
    if texts[KIND] != kind:
        raise UserError("kind", kind, f"{Path(path).name} holds a {texts[KIND]}", f"use {texts[KIND]}")
    try:
        architecture = MODELS[kind].architecture(parse_json(texts[ARCHITECTURE], "architecture", path), {})
        optional = parse_json(texts[OPTIONAL], "optional", path, like=[str])
        for name in optional:
            choose("optional", name, MODELS[kind].optional)
        wanted = MODELS[kind].describe(architecture)[1]
    except UserError as e:
        problem = f"its metadata are damaged: {e.field}={e.value}: {e.problem}"
        raise UserError("weights", path, problem, "convert the original again") from e
    params = unflatten({name: array.astype(np.float32) for name, array in read_state_dict(path).items()})
    check_tree("weights", params, wanted, "give the weights that belong to their architecture")
    return architecture, params, optional
