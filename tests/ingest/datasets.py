"""Datasets for the tests: a small folder of clips, sound ones and hostile ones, and its ingestion."""

import json

from cmd_jax import config as configs
from cmd_jax.data.codecs import decoded
from cmd_jax.data.examples import parse
from cmd_jax.data.records import Records
from cmd_jax.ingest import engines
from cmd_jax.ingest.finish import finish
from cmd_jax.ingest.plan import make_plan
from cmd_jax.ingest.shard import Limits

SHAPE = {"data.frames": 4, "data.height": 24, "data.width": 32}
LIMITS = Limits(20.0, 0.0)


def config(root, **overrides):
    """Of the folder, for frames of 24x32."""
    values = SHAPE | {"data.root": root, "data.max_bad_fraction": 0.9, "model.patch": 4}
    return configs.load("folder:autoencoder", values | {key.replace("__", "."): x for key, x in overrides.items()})


def ingested(config, out, workers=1):
    """-> (plan, facts of its shards)."""
    plan = make_plan(config, out)
    engines.run_pool(plan, range(plan.shards.count), workers, LIMITS)
    return plan, finish(plan, config.data.max_bad_fraction)


def records_of(plan, facts) -> list[dict]:
    """All records, parsed."""
    paths = [plan.shards.path(k) for k in range(plan.shards.count)]
    records = Records(paths, [f["bytes"] for f in facts], [f["records"] for f in facts])
    return [parse(records[i]) for i in range(len(records))]


def frames_of(record, codec="raw"):
    """uint8 [T,24,32,3]."""
    length = len(record["video"]) if codec != "raw" else len(record["video"][0]) // (24 * 32 * 3)
    return decoded(record["video"], codec, length, (24, 32), range(length))


def digests(out) -> dict[str, str]:
    """The SHA-256 of each shard as its facts have it, by split and number."""
    return {
        f"{path.parent.name}/{path.stem}": json.loads(path.read_text())["sha256"]
        for path in sorted(out.glob("clips/1.0.0/.ingest/*/?????.json"))
    }
