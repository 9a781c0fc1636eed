"""What a split of a dataset is to be: its clips in their listing's order, how they are cut, and who has which.

It lies in DIR/clips/1.0.0/.ingest/SPLIT: plan.json, and the listing as arrays beside it, so that any process anywhere
that sees the folder can write any shard (`cmd_jax.ingest.shard`), with the same bytes.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cmd_jax.buckets import scheme_of
from cmd_jax.data.dataset import NAME, indices, read_columns
from cmd_jax.data.draws import frames_needed
from cmd_jax.data.layouts import MANIFESTS, list_clips
from cmd_jax.data.packed import Entries, Listing
from cmd_jax.data.records import VERSION, Shards
from cmd_jax.data.roots import FROM_DISK, IN_BUCKET, Entry, check_root
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.data.sizes import as_text, sizes_of
from cmd_jax.data.webvid import is_list, lists_of
from cmd_jax.errors import UserError, choose
from cmd_jax.files import COUNT, read_json, write_json
from cmd_jax.ingest.decoder import Cut

FORMAT = 1  # raise it whenever the same clips give other records
CLIPS, SHARDS = 256, 64  # the clips of a shard, if there are enough of them for so many shards
MOST_SHARDS = 99_999
ELSEWHERE = "give another --out, or what it was begun with"
# What all splits of a dataset share.
SHARED = (*Cut._fields, "format", "class_names", "versions")
FIELDS = {"clips": COUNT, "shard_clips": range(1, 2**63), "class_names": [str], ...: object}
LIKE = {"id": str, "root": str, "fields": FIELDS}


@dataclass(frozen=True)
class Plan:
    """folder: DIR/clips/1.0.0. root: of the videos; "" for generated ones. fields: all that the records depend on.

    entries: the clips. id: a digest of the fields.
    """

    folder: Path
    split: str
    root: str
    fields: dict
    entries: Entries

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()

    @property
    def cut(self) -> Cut:
        return Cut(*(self.fields[name] for name in Cut._fields))

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.fields["class_names"])

    @property
    def bad(self) -> dict[str, str]:
        """What the listing already finds unusable: name -> reason."""
        return self.fields["bad"]

    @property
    def shards(self) -> Shards:
        return Shards(self.folder, self.split, -(-len(self.entries) // self.fields["shard_clips"]))

    def places(self, k: int) -> range:
        """Of the clips of shard k."""
        size = self.fields["shard_clips"]
        return range(k * size, min((k + 1) * size, len(self.entries)))

    def left_out(self, facts: list[dict]) -> dict[str, str]:
        """Name -> reason, of the listing and the facts of all shards."""
        return self.bad | {name: reason for fact in facts for name, reason in fact["bad"].items()}

    def used(self, facts: list[dict]) -> np.ndarray:
        """int64 [N]: the places of the clips that are in the dataset; facts: of all shards."""
        good = np.ones(len(self.entries), bool)
        for k, fact in enumerate(facts):
            good[np.array(fact["bad_places"], np.int64) + self.places(k).start] = False
        return np.flatnonzero(good)


def version_folder(out: Path) -> Path:
    return out / NAME / VERSION


def work_folder(folder: Path, split: str) -> Path:
    return Shards(folder, split, 0).work


def source_of(path: str, split: str) -> tuple[str, str | None]:
    """--source -> (data.root, data.layout or None): a folder of clips, or a list in it that its layout reads."""
    if scheme_of(path):
        raise UserError("--source", path, IN_BUCKET, FROM_DISK)
    if not os.path.isfile(path):
        return path, None
    folder, name = os.path.split(os.path.abspath(path))
    if name in MANIFESTS:
        return folder, "metadata"
    if is_list(path):
        if (lists := lists_of(folder, split)) != [name]:
            problem = f"the list of data.split={split} in its folder is {', '.join(lists)}"
            raise UserError("--source", path, problem, "give the folder, or the split of this list")
        return folder, "webvid"
    remedy = f"give a folder, {' or '.join(MANIFESTS)}, or WebVid's list"
    raise UserError("--source", path, "neither a folder nor a list of clips", remedy)


def make_plan(config, out: Path, keep_listing: bool = False) -> Plan:
    """The plan of a config's split in DIR = out, which is written there, or is already.

    keep_listing: of a plan that is there only what does not take a listing of the clips is compared.
    UserError for another plan in the same place, for splits that do not go together, and for a source without clips.
    """
    data, folder = config.data, version_folder(out)
    fields = _cut(config) | {"format": FORMAT, "split": data.split, "versions": _versions()}
    there = read_plan(folder, data.split)  # until somebody removes it: the index of a finished split has it too
    if data.source == "folder":
        root = check_root(data.root)
        fields |= {"source": "folder", "layout": data.layout, "fold": data.fold}
        listing = None if there and keep_listing else list_clips(root, data.layout, data.fold, data.split)
    else:
        root, listing = "", _generated_listing(generated(fields := fields | {"source": _generator(data)}))
    if listing is None:
        listing = Listing(there.entries, there.class_names, there.bad, there.fields["absent"])
    count = len(listing.entries)
    if not count:
        raise UserError("data.root", root, "none of its clips can be used", "mend or replace them")
    fields |= {
        "listing": there.fields["listing"] if there and listing.entries is there.entries else listing.entries.digest(),
        "clips": count,
        "shard_clips": config.ingest.shard_clips or max(min(CLIPS, -(-count // SHARDS)), -(-count // MOST_SHARDS)),
        "class_names": list(listing.class_names),
        "bad": dict(sorted(listing.bad.items())),
        "absent": listing.absent,
    }
    plan = Plan(folder, data.split, root, fields, listing.entries)
    if plan.shards.count > MOST_SHARDS:
        least = -(-count // MOST_SHARDS)
        problem = f"makes more than {MOST_SHARDS} shards"
        raise UserError("ingest.shard_clips", config.ingest.shard_clips, problem, f"give {least} or more")
    done = finished_plans(folder).get(data.split)
    for old in [*([there.fields] if there else []), *([done["fields"]] if done else [])]:
        _compare(out, old, fields, fields.keys() | old.keys(), "was planned")
    for split, other in other_fields(folder, data.split).items():
        _compare(out, other, fields, SHARED, f"holds the split {split}, planned")
    if there is None or there.root != root:
        _write(plan)
    return read_plan(folder, data.split)


def other_fields(folder: Path, split: str) -> dict[str, dict]:
    """The fields of the plans of a dataset's other splits, by split: planned, or finished."""
    planned = [read_plan(folder, path.parent.name) for path in folder.glob(".ingest/*/plan.json")]
    fields = {plan.split: plan.fields for plan in planned}
    fields |= {name: made["fields"] for name, made in finished_plans(folder).items()}
    return {name: fields[name] for name in sorted(fields) if name != split}


def finished_plans(folder: Path) -> dict[str, dict]:
    """Those in the indices of the finished splits: split -> {"id", "fields"}."""
    plans = {split: read_columns(path, ["plan"])["plan"] for split, path in indices(folder).items()}
    return {split: json.loads(plan.tobytes()) for split, plan in plans.items()}


def read_plan(folder: Path, split: str) -> Plan | None:
    """The plan of a split in DIR/clips/1.0.0, None where there is none."""
    work = work_folder(folder, split)
    if not (work / "plan.json").exists():
        return None
    value = read_json(work / "plan.json", "--out", remedy="remove the folder and begin anew", like=LIKE)
    plan = Plan(folder, split, value["root"], value["fields"], Entries.load(work / _listing_name(value["fields"])))
    if plan.id != value["id"]:
        raise UserError("--out", work / "plan.json", "was changed", "remove the folder and begin anew")
    return plan


def _listing_name(fields: dict) -> str:
    return f"listing-{fields['listing'][:16]}"


def _write(plan: Plan):
    """The listing, and then what refers to it: plan.json."""
    work = work_folder(plan.folder, plan.split)
    plan.entries.save(work / _listing_name(plan.fields))  # a name by its content: others write the same there
    write_json(work / "plan.json", {"id": plan.id, "root": plan.root, "fields": plan.fields})


def _cut(config) -> dict:
    data, ingest = config.data, config.ingest
    needed = frames_needed(data.frames, data.stride)
    if 0 < ingest.frames < needed:
        problem = f"fewer than the {needed} frames from which data.frames={data.frames} are drawn"
        raise UserError("ingest.frames", ingest.frames, problem, f"use at least {needed}, or 0 for all")
    quality = ingest.quality if ingest.codec == "jpeg" else 0
    buckets, fps = as_text(sizes_of(data)[1:]), float(data.fps)
    return Cut(
        data.height, data.width, buckets, fps, ingest.codec, quality, ingest.frames, needed, ingest.pixels
    )._asdict()  # fmt: skip


def _versions() -> dict[str, str]:
    """Of what decodes and encodes."""
    return {name: version(name) for name in ("av", "pillow")}


def _compare(out: Path, old: dict, new: dict, names, how: str):
    """UserError for the first field that differs."""
    for name in sorted(names):
        if old.get(name) != new.get(name):
            if name == "listing":
                problem = f"{how} of another listing of clips, {old['clips']} of them and not {new['clips']}"
            else:
                problem = f"{how} with {name}={_short(old.get(name))}, and not {_short(new.get(name))}"
            raise UserError("--out", out, problem, ELSEWHERE)


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


# Generated clips.


def _generator(data) -> dict:
    """What `generated` takes, of a config's `data`."""
    choose("data.source", data.source, ("folder", "shapes"))
    return {"name": data.source, "clips": data.clips, "seed": data.seed, "clip_frames": data.frames}


def generated(fields: dict):
    """The source of generated clips that a plan names, None of one of files."""
    source = fields["source"]
    if source == "folder":
        return None
    shape = {"frames": source["clip_frames"], "height": fields["height"], "width": fields["width"]}
    return ShapesSource(clips=source["clips"], seed=source["seed"], split=fields["split"], **shape)


def _generated_listing(source) -> Listing:
    names = source.class_names
    entries = [Entry(source.name(i), names[source.label(i)], source.texts(i)) for i in range(len(source))]
    return Listing.of(entries, tuple(names), {})
