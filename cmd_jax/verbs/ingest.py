"""`cmd-jax ingest`: clips, decoded once, become a dataset in DIR/clips/1.0.0 that training and TFDS read."""

import argparse
import importlib.util

from cmd_jax import cache
from cmd_jax.config import load
from cmd_jax.data.store import KINDS
from cmd_jax.errors import UserError
from cmd_jax.files import as_path
from cmd_jax.ingest.engines import cores, part_of, run_pool
from cmd_jax.ingest.finish import finish
from cmd_jax.ingest.plan import make_plan, source_of
from cmd_jax.ingest.shard import Limits, all_finished
from cmd_jax.report.console import make_console
from cmd_jax.report.ingest import Note, report


def ingest(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Write the shards of the flags' part that are not there yet, and if then all are there, finish the split -> 0."""
    check_engine(flags)
    if flags.source:
        overrides = overrides | source_overrides(flags.source, flags.config, overrides)
    config, console = load(flags.config, overrides), make_console()
    out = as_path(flags.out).absolute()
    cache.use(config.data.cache_dir, config.data.cache_gib)
    plan = make_plan(config, out, keep_listing=flags.part is not None)
    shards, limits = part_of(flags.part, plan.shards.count), Limits(config.data.probe_timeout, config.data.probe_cap)
    missing = [k for k, done in zip(shards, all_finished(plan, shards), strict=True) if done is None]
    count = plan.shards.count
    console.print(
        f"{plan.folder}: split {plan.split}, {len(plan.entries):,} clips in {count:,} shards, {len(missing):,} to write"
    )
    if missing and flags.beam:
        from cmd_jax.ingest.beam import run_beam  # which many do not have

        run_beam(plan, missing, limits, flags.beam, flags.passed)
    elif missing:
        with Note(console, sum(len(plan.places(k)) for k in missing)) as note:
            run_pool(plan, missing, flags.workers or cores(), limits, note.clip)
    facts = finish(plan, config.data.max_bad_fraction, config.ingest.description, config.ingest.citation)
    if facts is None:
        left = sum(not plan.shards.facts_path(k).exists() for k in range(count))
        console.print(f"{left:,} of {count:,} shards are left to others; the last to end finishes the dataset")
    else:
        report(plan, facts, out, console)
    return 0


def check_engine(flags: argparse.Namespace):
    """UserError where the flags name two engines, or one that is not installed."""
    check_empty(flags)
    if not flags.out:
        raise UserError("--out", "", "missing", "see cmd-jax ingest --help")
    if flags.workdir:
        raise UserError("--workdir", flags.workdir, "is for --encode", "leave it out")
    if flags.workers < 0:
        raise UserError("--workers", flags.workers, "not a number of decoders", "give one, or leave it out")
    if flags.passed and not flags.beam:
        raise UserError("--beam", "", f"missing, and {flags.passed[0]} is for Beam", "give a runner, like FnApiRunner")
    if not flags.beam:
        return
    for name in ("part", "workers"):
        if getattr(flags, name):
            raise UserError(f"--{name}", getattr(flags, name), "is not for --beam", "leave out one of the two")
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("--beam", flags.beam, "Apache Beam is not installed", "pip install 'cmd-jax[beam]'")


def check_empty(flags: argparse.Namespace):
    """UserError for a flag without a value, as an unset variable of a shell makes it: it would read as left out."""
    for name in ("source", "part", "beam", "encode"):
        if getattr(flags, name) == "":
            raise UserError(f"--{name}", "", "is empty", "give a value, or leave it out")


def source_overrides(source: str, specification: str, overrides: dict[str, str]) -> dict[str, str]:
    """What --source sets of the config."""
    for name in ("data.source", "data.root"):
        if name in overrides:
            raise UserError("--source", source, f"--config.{name} is given too", "give one of the two")
    folder = {"data.source": "folder", "data.root": source}  # not what the config has, with which others may not go
    root, layout = source_of(source, load(specification, overrides | folder).data.split)
    return folder | {"data.root": root} | ({"data.layout": layout} if layout else {})


def encode_overrides(flags: argparse.Namespace, overrides: dict[str, str]) -> dict[str, str]:
    """With what the flags set of the config. UserError for flags that do not go together."""
    check_empty(flags)
    if not (stages := [stage for stage, kind in KINDS.items() if kind == flags.encode]):
        raise UserError("--encode", flags.encode, "no such latents", f"use {' or '.join(sorted({*KINDS.values()}))}")
    for name in ("part", "beam", "workers"):
        if getattr(flags, name):
            raise UserError(f"--{name}", getattr(flags, name), "is not for --encode", "start more processes instead")
    if not flags.workdir:
        raise UserError("--workdir", "", "missing", "give the folder of the trained autoencoder")
    if flags.source and flags.encode == "vae":
        problem = "straight from clips go only --encode=cmd"
        raise UserError("--source", flags.source, problem, "set --config.data.root instead")
    if flags.source:
        overrides = overrides | source_overrides(flags.source, flags.config, overrides)
    stage = load(flags.config, overrides).stage
    if stage not in stages:
        raise UserError("--encode", flags.encode, f"is not what the {stage} stage is trained on",
                        f"use --config=FILE:{stages[0]}")  # fmt: skip
    if flags.out:
        if "latents.store" in overrides:
            raise UserError("--out", flags.out, "--config.latents.store is given too", "give one of the two")
        overrides = overrides | {"latents.store": flags.out}
    return overrides
