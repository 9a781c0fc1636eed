"""What ten million clips take: listing, planning, opening and the first batch, of their names and lengths alone."""

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cmd_jax import defaults
from cmd_jax.data import packed, webvid
from cmd_jax.data.dataset import NAME, DatasetSource
from cmd_jax.data.packed import Entries, Listing
from cmd_jax.data.pipeline import BatchPlan
from cmd_jax.data.records import VERSION, Shards
from cmd_jax.data.roots import Entry
from cmd_jax.ingest import plan as planning

WEBVID = 10_700_000
HEADER = "videoid,contentUrl,duration,page_dir,name\n"


def listing(clips: int) -> Listing:
    names = (Entry(f"videos/{i // 50:06d}_{i // 50 + 50:06d}/{1_000_000 + i}.mp4") for i in range(clips))
    return Listing(Entries.of(names), (), {})


def planned(folder: Path, clips: int) -> np.ndarray:
    """The ids of the first batch of a dataset of so many clips, which ingest plans, and of which only the index is."""
    folder.mkdir(parents=True, exist_ok=True)
    planning.list_clips = lambda *_: listing(clips)
    config = defaults.stage("autoencoder")
    config.data.update(source="folder", root=str(folder))
    plan = planning.make_plan(config, folder)
    assert len(plan.entries) == clips and sum(len(plan.places(k)) for k in range(plan.shards.count)) == clips
    write_index(Shards(folder / NAME / VERSION, "train", 1), plan)
    shape = {"frames": 16, "height": config.data.height, "width": config.data.width}
    source = DatasetSource(folder, **shape)
    assert len(source) == clips and source.name is not None
    return BatchPlan(len(source), 256, seed=0).ids(0)


def write_index(shards: Shards, plan):
    clips, none = len(plan.entries), np.zeros(1, np.uint8)
    shards.path(0).write_bytes(none.tobytes())
    length = (16 + np.arange(clips, dtype=np.uint64) * 7919 % 400).astype(np.int32)
    told = np.frombuffer(json.dumps({"id": plan.id, "fields": plan.fields}).encode(), np.uint8)
    np.savez(
        shards.index, counts=np.array([clips]), sizes=np.array([1]), sha256=np.zeros((1, 32), np.uint8), length=length,
        label=np.full(clips, -1, np.int32), key=np.arange(clips, dtype=np.uint64),
        bucket=np.zeros(clips, np.uint8), text_count=np.zeros(clips, np.int32), plan=told,
    )  # fmt: skip
    (shards.folder / "dataset_info.json").write_text("{}")


def peak(work, clips: int) -> float:
    """Bytes a clip at the worst moment."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / clips
    finally:
        tracemalloc.stop()


def test_a_clip_takes_some_bytes_when_it_is_planned_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "list_clips", None)
    planned(tmp_path / "imports", 300)
    clips, name = 20_000, len("videos/000001_000051/1000050.mp4")
    assert peak(lambda: planned(tmp_path / "many", clips), clips) < name + 90


@pytest.mark.parametrize("twice", [False, True])
def test_a_row_of_webvid_takes_its_text_and_some_bytes(tmp_path, monkeypatch, twice):
    rows, text = 5_000, "a red boat on a lake seen from above in the evening"
    lines = [f"{10**6 + i},u,PT1S,p,{text} {i:06d}\n" for i in range(rows)]
    for name in ("results_10M_train.csv", "results_2M_train.csv")[: 1 + twice]:
        (tmp_path / name).write_text(HEADER + "".join(lines))
    (tmp_path / "p").mkdir()
    listdir, found = webvid.os.listdir, []
    held = lambda path: [f"{10**6 + i}.mp4" for i in range(rows)] if path.endswith("/p") else listdir(path)  # noqa: E731
    monkeypatch.setattr(webvid.os, "listdir", held)
    monkeypatch.setattr(packed, "BLOCK", 128)  # whose room does not grow with the rows
    taken = peak(lambda: found.append(webvid.read(str(tmp_path), "train")), rows * (1 + twice))
    entries = found[0].entries
    assert len(entries) == rows and entries[7] == Entry("p/1000007.mp4", None, (f"{text} 000007",))
    assert taken < len(text) + 7 + len("p/1000007.mp4") + 190


@pytest.mark.slow
def test_webvid_is_planned_and_its_first_batch_known_within_a_minute_and_2_gib(tmp_path):
    code = (
        "import pathlib, resource, sys; sys.path.insert(0, 'tests'); from data.test_scale import WEBVID, planned; "
        f"print(len(planned(pathlib.Path({str(tmp_path)!r}), WEBVID)), "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    begun = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, (rows, gib) = time.perf_counter() - begun, map(float, ran.stdout.split())
    print(f"{seconds:.1f} s, {gib:.2f} GiB")
    assert rows == 256 and seconds < 60 and gib < 2
