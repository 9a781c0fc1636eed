"""Datasets as cmd-jax ingest makes them, of any frames."""

import json

import numpy as np
from PIL import Image

from cmd_jax.data.codecs import encoded
from cmd_jax.data.dataset import NAME
from cmd_jax.data.examples import example
from cmd_jax.data.records import VERSION, Shards, write_shard
from cmd_jax.data.splits import keys_of


def video_of(frames, codec) -> list[bytes]:
    """uint8 [T,H,W,3] -> the feature `video` of a record."""
    parts = [encoded(Image.fromarray(frame), codec, 95) for frame in frames]
    return [b"".join(parts)] if codec == "raw" else parts


def write_records(out, clips, class_names=(), *, codec="raw", split="train", shards=3, finished=True, plan=None):
    """clips: (frames uint8 [T,H,W,3], number of a class or -1, name, texts) each, of one size. Returns the folder."""
    shape = clips[0][0].shape[1:3] if clips else (1, 1)
    made = Shards(out / NAME / VERSION, split, shards)
    parts = [clips[k * len(clips) // shards : (k + 1) * len(clips) // shards] for k in range(shards)]
    facts = []
    for k, part in enumerate(parts):
        records = (
            example({"video": video_of(v, codec), "label": label, "name": name, "texts": texts, "fps": []})
            for v, label, name, texts in part
        )
        facts.append(write_shard(made, k, records, dict))
    fields = {"height": shape[0], "width": shape[1], "buckets": "", "fps": 0.0, "codec": codec}
    fields["class_names"] = list(class_names)
    plan = {"id": "0" * 64, "fields": fields | {"clips": len(clips), "bad": {}} | (plan or {})}
    index = {
        "counts": np.array([len(part) for part in parts]),
        "sizes": np.array([fact["bytes"] for fact in facts]),
        "sha256": np.array([list(bytes.fromhex(fact["sha256"])) for fact in facts], np.uint8),
        "length": np.array([len(v) for v, *_ in clips], np.int32),
        "bucket": np.zeros(len(clips), np.uint8),
        "label": np.array([label for _, label, *_ in clips], np.int32),
        "key": keys_of(name for _, _, name, _ in clips),
        "text_count": np.array([len(texts) for *_, texts in clips], np.int32),
        "plan": np.frombuffer(json.dumps(plan).encode(), np.uint8),
    }
    np.savez(made.index, **index)
    if finished:
        (made.folder / "dataset_info.json").write_text("{}")
    return made.folder
