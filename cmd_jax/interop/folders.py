"""Folders of models as diffusers and transformers write them: which files hold a part's weights, and what is wrong."""

import functools
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import UserError
from cmd_jax.files import as_path, is_remote, read_json

# Ending of a file of weights -> the name before it. Both libraries prefer safetensors.
DIFFUSERS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
TRANSFORMERS = {"safetensors": "model", "bin": "pytorch_model"}
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SHARD = re.compile(r"-\d+-of-\d+\b")
KNOWN = {"diffusers": (0, 42), "transformers": (5, 24)}  # versions whose every field of a config is known here
FROM_FLAX = (
    "or write the folder anew with diffusers 0.35, transformers 4 and flax: "
    "StableDiffusionPipeline.from_pretrained(FOLDER, from_flax=True, safety_checker=None).save_pretrained(OTHER)"
)
OTHERS = (  # what else a folder may hold, and how to come by PyTorch's weights then
    (r".*flax_model.*\.msgpack", "Flax weights", f", {FROM_FLAX}"),
    (r"tf_model.*\.h5", "TensorFlow weights", " of the same model"),
    (r".*\.onnx|openvino_model.*", "a compiled graph", " of the model that it was made from"),
    (r".*\.gguf", "quantised weights", " of the model that was quantised"),
)
FROM_FILE = "write its folder with diffusers: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
SHOWN = 3
LARGEST = 2**20  # of any size; arrays of more would fill the memory

log = logging.getLogger(__name__)


class WeightFiles(NamedTuple):
    """name: the file of weights, or the index of several. parts: the files themselves, in the order of their names."""

    name: Path | BucketPath
    parts: tuple[Path | BucketPath, ...]


def is_file(path: Path | BucketPath) -> bool:
    """Unlike Path's, False for names that no file system takes."""
    return path.is_file() if is_remote(path) else os.path.isfile(path)


def find_weights(folder: str | Path, stems: dict[str, str]) -> WeightFiles:
    """The files that hold the weights of a part; stems: DIFFUSERS or TRANSFORMERS.

    The first that is there of STEM.safetensors, its shards, STEM.bin, its shards; else those of the only variant
    (STEM.fp16.safetensors, ...), in that order too. UserError for several variants and nothing plain; for files that
    an index names and that are not there; for a folder without PyTorch's weights, saying what it holds instead.
    """
    folder = as_path(folder)
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as e:
        raise UserError("weights", folder, f"cannot be read ({e.strerror})", "give a folder with weights") from e
    variants: dict[str, list[tuple[int, str]]] = {}
    for preference, pattern in enumerate(_patterns(stems)):
        for match in filter(None, map(pattern.fullmatch, names)):
            if not SHARD.search(match[0]):
                variants.setdefault(match["variant"] or "", []).append((preference, match[0]))
    if not variants:
        raise _no_weights(folder, names, f"{stems['safetensors']}.safetensors")
    firsts = {variant: min(found)[1] for variant, found in sorted(variants.items())}
    if "" not in firsts and len(firsts) > 1:
        ways = [f"{name} to {name.replace(f'.{variant}.', '.', 1)}" for variant, name in firsts.items()]
        problem = f"holds the variants {', '.join(firsts)}, and nothing plain"
        raise UserError("weights", folder, problem, f"rename the wanted one: {', or '.join(ways)}")
    variant = "" if "" in firsts else next(iter(firsts))
    chosen = folder / firsts[variant]
    if variant:
        log.info("%s: taken since there is no other; %s is a variant of the weights", chosen, variant)
    _check_there(chosen)
    return WeightFiles(chosen, _shards(chosen) if chosen.suffix == ".json" else (chosen,))


def _patterns(stems: dict[str, str]) -> list[re.Pattern]:
    """Names of weights, the preferred first; the third of each ending is an index as diffusers called it earlier."""
    patterns = []
    for ending, stem in stems.items():
        patterns.append(rf"{stem}(\.(?P<variant>.+))?\.{ending}")
        patterns.append(rf"{stem}\.{ending}\.index(\.(?P<variant>.+))?\.json")
        patterns.append(rf"{stem}\.{ending}\.(?P<variant>.+)\.index\.json")
    return list(map(re.compile, patterns))


def _shards(index: Path | BucketPath) -> tuple[Path | BucketPath, ...]:
    """The files that an index names, all there."""
    try:
        names = sorted(set(read_json(index, "weights")["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError("weights", index, "not an index of weight files", "fetch the file again") from e
    if outside or not names:
        problem = f"names {outside[0]}, outside its folder" if outside else "names no files"
        raise UserError("weights", index, problem, "fetch the file again")
    parts = tuple(index.parent / name for name in names)
    for part in parts:
        _check_there(part, f"missing, {index.name} names it")
    return parts


def _check_there(path: Path | BucketPath, missing: str = "not a file"):
    if is_file(path):
        return
    if not is_remote(path) and os.path.islink(path) and not os.path.exists(path):  # as of `is_file`
        problem, remedy = f"a link to {os.readlink(path)}, where nothing is", "copy what links lead to (cp -rL)"
        raise UserError("weights", path, problem, remedy)
    raise UserError("weights", path, missing, "fetch the whole folder")


def _no_weights(folder: Path | BucketPath, names: list[str], plain: str) -> UserError:
    for pattern, what, remedy in OTHERS:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return UserError("weights", folder, f"holds only {what} ({found[0]})", f"fetch {plain}{remedy}")
    found = [name for name in names if name.endswith((".safetensors", *TORCH_SUFFIXES))]
    if any(map(SHARD.search, found)):
        return UserError("weights", folder, f"holds {found[0]}, but no index of it", "fetch the whole folder")
    only = f", only {', '.join(found[:SHOWN])}" if found else ""
    return UserError("weights", folder / plain, f"no such file{only}", "fetch the whole folder, or give the right one")


def check_folder(field: str, path: str | Path, remedy: str, *indexes: str):
    """UserError for a path that is no folder, or plainly not the one meant, with the right one where that is near.

    remedy: what to give where nothing better can be said. indexes: files of which the right folder holds one.
    """
    path = as_path(path)

    def fits(folder: Path | BucketPath) -> bool:
        return any((folder / index).is_file() for index in indexes)

    if path.is_file():
        whole = path.suffix in (".safetensors", ".ckpt") and indexes == ("model_index.json",)
        raise UserError(field, path, "a file, not a folder", FROM_FILE if whole else remedy)
    if not path.is_dir():
        raise UserError(field, path, "no such folder", remedy)
    if fits(path):
        return
    for root in (path, *sorted(path.glob("models--*"))):
        if snapshots := _snapshots(root):
            found = [str(snapshot) for snapshot in snapshots if fits(snapshot)]
            problem, give = "a place in the Hugging Face hub's cache, not a model's folder", "give its snapshot "
            raise UserError(field, path, problem, give + " or ".join(found[:SHOWN]) if found else remedy)
    found = [near for near in (path.parent, *sorted(path.iterdir())) if fits(near)]
    if len(found) == 1:
        raise UserError(field, path, f"holds no {' or '.join(indexes)}", f"give {found[0]}, which does")


def _snapshots(root: Path | BucketPath) -> list[Path | BucketPath]:
    """Of a model in the hub's cache, by its folder `models--A--B` or the `snapshots` in it; main's comes first."""
    folder = root if root.name == "snapshots" else root / "snapshots"
    try:
        main = (folder.parent / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        main = ""
    return sorted(folder.glob("*/"), key=lambda snapshot: (snapshot.name != main, snapshot.name))


def is_size(value) -> bool:
    """Whether a field of a config can be a size of an array, or a number of layers."""
    return type(value) is int and 0 < value <= LARGEST


def check_class(field: str, found, wanted: str, remedy: str):
    """UserError unless a file states the class `wanted`."""
    if found == f"Flax{wanted}":
        raise UserError(field, found, "a model of Flax", f"fetch one with PyTorch's weights, {FROM_FLAX}")
    if found != wanted:
        raise UserError(field, found, f"not a {wanted}", remedy)


def note_unknown(place: str, config: dict, known, library: str = "diffusers"):
    """Log, once a process, the fields of a config that are none of `known` and that nothing here depends on.

    The library passes them over just so: trainings leave settings there, an EMA's for example. Only those of a later
    version may mean something, which is said.
    """
    names = tuple(sorted(name for name in config if name not in known and not name.startswith("_")))
    if names:
        note(place, names, library, str(config.get(f"_{library}_version", config.get(f"{library}_version", ""))))


@functools.cache
def note(place: str, names: tuple[str, ...], library: str, version: str):
    newest = ".".join(map(str, KNOWN[library]))
    number = re.match(r"(\d+)\.(\d+)", version)
    later = number and tuple(map(int, number.groups())) > KNOWN[library]
    log.warning(
        "%s: %s: no fields that %s %s has; not used%s", place, ", ".join(names), library, newest,
        f", although {version}, which wrote them, may" if later else "",
    )  # fmt: skip
