"""What grows, in a bucket."""

import contextlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from cmd_jax.errors import Unavailable
from cmd_jax.files import as_path
from cmd_jax.report import mirror
from cmd_jax.report.training import Metrics


@pytest.fixture(params=["gcs_stub", "gcs", "s3"])
def bucket(request):
    return request.getfixturevalue(request.param)


def lines(bucket, name):
    return [json.loads(line) for line in bucket.get(f"run/{name}").splitlines()]


def train(folder, steps, start=0):
    with contextlib.closing(Metrics(folder, start)) as metrics:
        for step in range(start, start + steps):
            metrics.account(step, np.arange(2), 0.5)
            metrics.scalars(step + 1, {"loss": 0.5, "wall_seconds": float(step)})
        metrics.preview(step + 1, {"x": np.zeros((1, 2, 4, 4, 3), np.uint8)})
    return metrics


def test_a_run_goes_on_where_its_files_in_the_bucket_end(bucket, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    folders = local, as_path(f"{bucket}/run")
    for start, steps in ((0, 5), (3, 4)):  # the second time on a machine that has none of the files
        there, here = (train(folder, steps, start) for folder in reversed(folders))
        assert here.wall_seconds == there.wall_seconds == max(0.0, start - 1.0)
        assert not list((tmp_path / "cache" / "tmp").iterdir())
    for name in ("metrics.jsonl", "ledger.jsonl", "goodput.jsonl"):
        assert bucket.get(f"run/{name}") == (local / name).read_bytes()
    assert [line["step"] for line in lines(bucket, "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert [line.get("step", "start") for line in lines(bucket, "ledger.jsonl")] == ["start", 0, 1, 2, 3, 4] + [
        "start", 3, 4, 5, 6,
    ]  # fmt: skip
    names = bucket.names("run/")
    events = [name for name in names if ".tfevents." in name]
    assert len(events) == len(list(local.glob("*.tfevents.*"))) == 2
    assert all(b"loss" in bucket.get(name) for name in events)
    previews = {str(path.relative_to(local)) for path in local.glob("previews/*")}
    assert {name.removeprefix("run/") for name in names} - set(previews) == {
        "metrics.jsonl", "ledger.jsonl", "goodput.jsonl", *(Path(name).name for name in events),
    } and len(previews) == 2  # fmt: skip


def test_it_is_uploaded_as_it_grows_and_only_then(gcs_stub, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY", 0.05)
    monkeypatch.setattr(Metrics, "_open_events", lambda self: None)
    server = gcs_stub.server
    with contextlib.closing(Metrics(as_path(f"{gcs_stub}/run"), 0)) as metrics:
        for step in range(2):
            metrics.account(step, np.arange(2), 0.5)
            end = time.monotonic() + 5
            while "run/ledger.jsonl" not in gcs_stub.names("run/") or len(lines(gcs_stub, "ledger.jsonl")) < step + 2:
                assert time.monotonic() < end
                time.sleep(0.02)
        time.sleep(0.2)  # the end of that upload
        asked = len(server.seen)
        time.sleep(0.2)
        assert len(server.seen) == asked


def test_an_upload_that_fails_is_warned_of_once_and_made_up_for(gcs_stub, monkeypatch, caplog):
    monkeypatch.setattr(mirror, "EVERY", 0.05)
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "0.05")
    server = gcs_stub.server
    with contextlib.closing(Metrics(as_path(f"{gcs_stub}/run"), 0)) as metrics:
        server.order(share=1.0, kinds=("503",))
        metrics.account(0, np.arange(2), 0.5)
        time.sleep(0.4)
        with pytest.raises(Unavailable):  # which fails the save that it was for
            metrics.upload()
        server.order()
        metrics.upload()
        assert [line["step"] for line in lines(gcs_stub, "ledger.jsonl")[1:]] == [0]
    (line,) = (r.getMessage() for r in caplog.records)
    assert "cannot be uploaded" in line and f"{gcs_stub}/run/" in line


def test_an_upload_whose_answer_got_lost_was_no_other_s(gcs_stub, monkeypatch, caplog):
    def unheard(*arguments):
        write(*arguments)
        raise Unavailable(None, "cut off", str(arguments[0]))

    write = mirror.write_if
    with contextlib.closing(Metrics(as_path(f"{gcs_stub}/run"), 0)) as metrics:
        metrics.upload()
        for step in range(2):
            metrics.account(step, np.arange(2), 0.5)
            metrics.scalars(step, {"loss": 0.5})
            monkeypatch.setattr(mirror, "write_if", unheard)
            with pytest.raises(Unavailable):
                metrics.upload()
            monkeypatch.setattr(mirror, "write_if", write)
        metrics.upload()
        assert len(lines(gcs_stub, "ledger.jsonl")) == 3 and len(lines(gcs_stub, "metrics.jsonl")) == 2
    assert not caplog.records


def test_what_somebody_removed_is_written_again(bucket, caplog):
    uploads = mirror.Mirror(as_path(f"{bucket}/run"), (), lambda: None)
    with contextlib.closing(uploads):
        for text in ("one\n", "one\ntwo\n"):
            (uploads.folder / "ledger.jsonl").write_text(text)
            uploads.upload()
            assert bucket.get("run/ledger.jsonl") == text.encode()
            bucket.delete("run/ledger.jsonl")
    assert not caplog.records


def test_what_somebody_else_writes_is_left_to_him(gcs_stub, caplog):
    """A process that slept while its run went on elsewhere does not write over it."""
    with contextlib.closing(Metrics(as_path(f"{gcs_stub}/run"), 0)) as metrics:
        metrics.upload()
        gcs_stub.put("run/ledger.jsonl", b"another's")
        metrics.account(0, np.arange(2), 0.5)
        metrics.scalars(1, {"loss": 0.5})
        metrics.upload()
        metrics.account(1, np.arange(2), 0.5)
    assert gcs_stub.get("run/ledger.jsonl") == b"another's" and len(lines(gcs_stub, "metrics.jsonl")) == 1
    (line,) = (r.getMessage() for r in caplog.records)
    assert line.startswith(f"{gcs_stub}/run/ledger.jsonl is no longer written")
