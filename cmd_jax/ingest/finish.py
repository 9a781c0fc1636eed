"""The end of a split: when all shards are there, its index, and what TFDS wants to know of all finished splits."""

import json
import zipfile
from pathlib import Path

import numpy as np

from cmd_jax.data.dataset import read_columns
from cmd_jax.data.records import write_dataset
from cmd_jax.data.roots import check_bad
from cmd_jax.data.splits import keys_of
from cmd_jax.files import atomic_path
from cmd_jax.ingest.plan import Plan, finished_plans
from cmd_jax.ingest.shard import all_finished

DESCRIPTION = "Clips, decoded and cut by cmd-jax ingest."


def finish(plan: Plan, max_bad_fraction: float, description: str = "", citation: str = "") -> list[dict] | None:
    """The facts of all shards, once the split is whole and on the disk as such; None while shards are missing.

    Whoever finds all shards finished may call it, several at once too: all write the same. UserError where more than
    max_bad_fraction of the clips were left out; the shards stay.
    """
    facts = all_finished(plan, range(plan.shards.count))
    if None in facts:
        return None
    if bad := plan.left_out(facts):
        total, (name, reason) = len(plan.entries) + len(plan.bad), min(bad.items())
        check_bad(plan.root, len(bad), total, max_bad_fraction, f", the first: {name} {reason}")
    write_arrays(plan.shards.index, index_of(plan, facts))
    while True:
        plans = finished_plans(plan.folder)
        _write_metadata(plan, plans, description, citation)
        if plans == finished_plans(plan.folder):  # unless another split was finished in between
            return facts


def index_of(plan: Plan, facts: list[dict]) -> dict[str, np.ndarray]:
    """The columns of a split (see `cmd_jax.data.dataset`), in the order of the listing."""
    places, entries = plan.used(facts), plan.entries
    return {
        "counts": np.array([fact["records"] for fact in facts], np.int64),
        "sizes": np.array([fact["bytes"] for fact in facts], np.int64),
        "sha256": np.array([list(bytes.fromhex(fact["sha256"])) for fact in facts], np.uint8).reshape(-1, 32),
        "length": np.array([n for fact in facts for n in fact["lengths"]], np.int32),
        "bucket": np.array([b for fact in facts for b in fact["buckets"]], np.uint8),
        "label": np.asarray(entries.label, np.int32)[places],
        "key": keys_of(map(entries.names.__getitem__, places.tolist())),
        "text_count": np.diff(entries.text_edges)[places].astype(np.int32),
        "plan": np.frombuffer(json.dumps({"id": plan.id, "fields": plan.fields}).encode(), np.uint8),
    }


def write_arrays(path: Path, arrays: dict[str, np.ndarray]):
    """An .npz, of the same bytes for the same arrays."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name, array in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def features_of(plan: Plan):
    """tfds.features of a record."""
    import tensorflow_datasets as tfds

    cut, text = plan.cut, tfds.features.Text()
    kind, shape = tfds.features, (None, None, 3) if cut.buckets else (cut.height, cut.width, 3)
    if cut.codec == "raw":
        video = kind.Tensor(shape=(None, *shape), dtype=np.uint8, encoding="bytes")
    else:
        video = kind.Sequence(kind.Image(shape=shape, encoding_format=cut.codec))
    names = [name.replace("\n", " ") for name in plan.class_names]
    label = kind.ClassLabel(names=names) if names else kind.Scalar(np.int64)
    return kind.FeaturesDict(
        {"video": video, "label": label, "name": text, "texts": kind.Sequence(text), "fps": kind.Scalar(np.float32)}
    )


def _write_metadata(plan: Plan, plans: dict[str, dict], description: str, citation: str):
    """Of the finished splits: plans: as of `finished_plans`."""
    splits, told = {}, {}
    for split, made in plans.items():
        index = read_columns(plan.shards._replace(split=split).index, ["counts", "sizes", "length"])
        splits[split] = index["counts"].tolist(), int(index["sizes"].sum())
        told[split] = {"plan": made["id"], "clips": len(index["length"]), "listed": made["fields"]["clips"]}
    metadata = {"class_names": list(plan.class_names), "cut": plan.cut._asdict(), "splits": told}
    text = {"description": description or DESCRIPTION, "citation": citation}
    write_dataset(plan.folder, features_of(plan), splits, metadata=metadata, **text)
