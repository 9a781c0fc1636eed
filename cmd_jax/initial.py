"""Warm starts: the parameters that a run begins with where another one of its stage has trained them."""

import fnmatch
from collections.abc import Callable
from pathlib import Path

from cmd_jax.errors import UserError, nearest, some
from cmd_jax.files import as_path
from cmd_jax.interop.weights import flatten, unflatten
from cmd_jax.state import overlay
from cmd_jax.trained import Metadata, open_params, read_stage

LABEL_TABLE = "label/embedding"  # of a DiT: a row a class, and one for none
NAMED = 4  # parameters, or patterns, that one line names
# Values of a model's config that matter to speed or to a fresh start alone.
FREE = ("remat", "dtype", "label_init")


def given_params(config, stage, metadata: Metadata, shardings: Callable, console) -> dict | None:
    """Parameters that a stage begins with, or a part of them, laid out by `shardings`; None: all are random.

    Those in config.init, but for what config.init_skip names and, where it has other classes than this run's
    `metadata`, the label table; these are what they would be without it: random, or those of a pretrained image model.
    UserError for the weights of another stage, for parameters that are missing, too many, or of another shape, and for
    a pattern that no parameter has.
    """
    if not config.init:
        return stage.pretrained(shardings)
    path, wanted = as_path(config.init), flatten(shardings(stage.init))
    try:
        earlier, facts = read_stage(path, config.stage)
    except UserError as e:
        below = path / config.stage
        raise UserError("init", e.value, e.problem, f"give {below}" if below.is_dir() else e.remedy) from e
    with open_params(path) as (shapes, read):
        found = flatten(shapes)
        skipped = _matching(config.init_skip, wanted.keys() | found.keys())
        if LABEL_TABLE in wanted and facts.class_names != metadata.class_names:
            order = set(facts.class_names) == set(metadata.class_names)
            console.print(
                f"init: {path} has {'the same classes in another order' if order else 'other classes'}: the label "
                f"table {LABEL_TABLE} is drawn anew"
            )  # fmt: skip
            skipped.add(LABEL_TABLE)
        _check_fits(path, found, wanted, skipped)
        fitting = {name: like for name, like in wanted.items() if name not in skipped}
        if not fitting:
            raise UserError("init_skip", config.init_skip, f"leaves nothing of {path}", "leave out less, or init")
        given = read(unflatten(fitting))
    fresh = [name for name in wanted if name in skipped]
    told = f"starting from {path}: {len(fitting)} of {len(wanted)} arrays"
    console.print(told + (f"; not {some(fresh, NAMED)}" if fresh else ""))
    for line in _differences(earlier, config, facts, metadata):
        console.print(f"init: {line}")
    own = stage.pretrained(shardings) if fresh else None
    return given if own is None else overlay(own, given)


def _matching(patterns: str, names: set[str]) -> set[str]:
    """The names that any of the patterns, separated by commas, matches; dots in these stand for slashes."""
    matched = set()
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        found = fnmatch.filter(names, pattern.replace(".", "/"))
        if not found:
            choices = names | {f"{branch}/*" for name in names for branch in _branches(name)}
            problem, remedy = "no parameter is named so", f"did you mean {nearest(pattern, sorted(choices))[0]}"
            raise UserError("init_skip", pattern, problem, remedy)
        matched.update(found)
    return matched


def _check_fits(path: Path, found: dict, wanted: dict, skipped: set[str]):
    """UserError for what is not in both trees {name: array} with the same shape, unless it is skipped."""

    def shape(tree, name):
        return list(tree[name].shape) if name in tree else None

    names = sorted((found.keys() | wanted.keys()) - skipped)
    misfits = [name for name in names if shape(found, name) != shape(wanted, name)]
    if not misfits:
        return
    first, patterns = misfits[0], {}
    there, here = (shape(tree, first) or "absent" for tree in (found, wanted))
    for name in misfits:
        # The whole of a branch that one of the two lacks, like a discriminator.
        other = wanted if name in found else found
        branches = {branch for known in other for branch in _branches(known)} if name not in other else ()
        lacking = [f"{branch}/*" for branch in _branches(name) if branches and branch not in branches]
        patterns[lacking[0] if lacking else name] = None
    more = f", and {len(misfits) - 1} more do not fit" if len(misfits) > 1 else ""
    remedy = "give weights of this model"
    if len(patterns) <= NAMED:
        remedy += f", or leave them out: init_skip={','.join(patterns)}"
    else:
        remedy += "; what is meant to be new is named by init_skip"
    raise UserError("init", path, f"{first} is {there} there and {here} in this model{more}", remedy)


def _branches(name: str) -> list[str]:
    """a/b/c -> a, a/b."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _differences(earlier, config, facts: Metadata, metadata: Metadata) -> list[str]:
    """Lines on what no shape shows: what the same numbers meant there, and mean here."""
    groups = [group for group in ("model", "diffusion") if group in earlier and group in config]
    different = [
        f"{group}.{key}={earlier[group][key]} there and {config[group][key]} here"
        for group in groups
        for key in sorted({*earlier[group]} & {*config[group]})
        if earlier[group][key] != config[group][key] and key not in FREE
    ]
    if facts.autoencoder and facts.autoencoder.params != metadata.autoencoder.params:
        different.append("trained on the latents of another autoencoder")
    return sorted(different)
