"""What a store can do wrong, on both kinds: refused, cut and lost requests are made good; what lasts is an error of a
stated kind, in a stated time, and one line with its exit code."""

import contextlib
import errno
import random
import re
import time

import pytest
import tiny

from cmd_jax import buckets, stores
from cmd_jax.errors import Unavailable
from cmd_jax.files import as_path, atomic_path, local_file, remove_tree, write_json
from cmd_jax.main import main

BYTES = random.Random(0).randbytes(300_000)
ACTIONS = {
    "exists": lambda path: path.exists(),
    "list": lambda path: [*path.parent.iterdir()],
    "find": lambda path: [*path.parent.rglob("*")],
    "read": lambda path: path.read_bytes(),
    "open": lambda path: path.open("rb"),
    "write": lambda path: path.write_bytes(b"y"),
    "remove": lambda path: path.unlink(missing_ok=True),
    "read version": lambda path: buckets.read_versioned(path),
    "write version": lambda path: buckets.write_if(path, b"y", None),
}
READING = {"exists", "list", "find", "read", "open", "read version"}


@pytest.fixture(params=["gcs_stub", "s3"])
def bucket(request, monkeypatch):
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "20")
    return request.getfixturevalue(request.param)


def test_a_third_of_the_requests_go_wrong(bucket, tmp_path, monkeypatch):
    """Refused before, cut off before or after they are done: what is there in the end is as without faults."""
    if bucket.server.scheme == "gs":  # a large file goes in several requests; S3's have 5 MiB at least
        monkeypatch.setattr(buckets, "UPLOAD", 2**18)
    monkeypatch.setattr(stores, "LONGEST_PAUSE", 0.1)
    root, large = as_path(f"{bucket}/run"), BYTES * 3
    bucket.server.order(share=0.33, seed=3)
    for i in range(4):
        write_json(root / f"{i}.json", {"i": i})
    with atomic_path(root / "large") as file:
        file.write_bytes(large)
    (root / "copied").write_bytes(b"old")
    (root / "0.json").copy_to(root / "copied")
    assert sorted(path.name for path in root.iterdir()) == ["0.json", "1.json", "2.json", "3.json", "copied", "large"]
    assert [(root / f"{i}.json").read_text() for i in range(4)] == [f'{{\n  "i": {i}\n}}\n' for i in range(4)]
    with local_file(root / "large") as file:
        assert file.read_bytes() == large
    with (root / "large").open("rb") as file:
        file.seek(len(large) - 10)
        assert file.read() == large[-10:]
    (root / "1.json").unlink()
    version = None
    for i in range(8):  # of its own writing it never hears that another was quicker
        version = buckets.write_if(root / "lock", f"{i}".encode(), version)
        assert version and buckets.read_versioned(root / "lock")[:2] == (f"{i}".encode(), version)
    assert buckets.write_if(root / "lock", b"another", None) is None
    wrong = [status for *_, status in bucket.server.seen if status in (0, 429, 503)]
    assert {0, 429, 503} <= {*wrong} and len(wrong) > 10
    bucket.server.order()
    assert bucket.get("run/copied") == bucket.get("run/0.json") and bucket.get("run/lock") == b"7"
    assert "run/1.json" not in bucket.names()
    bucket.server.order(share=0.33, seed=4)
    remove_tree(root)
    assert not bucket.names()


@pytest.mark.parametrize("kind", ["503", "429", "drop", "cut"])
def test_a_fault_that_lasts_is_told_in_time(bucket, monkeypatch, kind):
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "0.2")
    bucket.put("run/x", b"x")
    bucket.server.order(share=1.0, kinds=(kind,))
    for name, action in ACTIONS.items() if kind == "503" else [(name, ACTIONS[name]) for name in ("read", "write")]:
        begun, asked = time.monotonic(), len(bucket.server.seen)
        with pytest.raises(Unavailable) as failure:
            action(as_path(f"{bucket}/run/x"))
        assert time.monotonic() - begun < 10 and len(bucket.server.seen) > asked + 1, name
        assert failure.value.filename.startswith(f"{bucket}/run") and "reached for 0.2 s" in failure.value.strerror


def test_a_server_that_accepts_and_never_answers(bucket, monkeypatch):
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "1")
    bucket.put("run/x", b"x")
    bucket.server.order(hang=True)
    begun, path = time.monotonic(), as_path(f"{bucket}/run/x")
    with pytest.raises(Unavailable):
        path.exists() if bucket.server.scheme == "s3" else path.write_bytes(BYTES)
    assert 0.9 < time.monotonic() - begun < 15
    bucket.server.order()
    assert as_path(f"{bucket}/run/x").read_bytes() == b"x"


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("deny", ["read", "write", "all"])
def test_without_the_right(bucket, deny, status):
    """Told at once, for nothing passes with time."""
    bucket.put("run/x", b"x")
    bucket.server.order(deny=deny, status=status)
    for name, action in ACTIONS.items():
        asked = len(bucket.server.seen)
        denied = deny in ("all", "read" if name in READING else "write")
        with pytest.raises(stores.Denied) if denied else contextlib.nullcontext() as failure:
            action(as_path(f"{bucket}/run/x"))
        assert len(bucket.server.seen) - asked <= 4, name
        if denied:
            assert failure.value.errno == errno.EACCES and failure.value.filename.startswith(f"{bucket}/run")
            words = failure.value.strerror  # S3 has names for its refusals, by which they are told apart
            assert words.startswith("no valid credentials" if status == 401 else "no right to it") and "\n" not in words


def test_without_credentials_and_with_others_of_amazon(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(stores.Denied, match="no valid credentials"):
        as_path(f"{s3}/x").read_bytes()
    assert [method for method, *_ in s3.server.seen] == ["PUT"]  # of the bucket, by the test


@pytest.mark.parametrize("size", [10, 700_000])
def test_a_truncated_upload_is_done_again(bucket, tmp_path, monkeypatch, size):
    """A store that is told the data's sum refuses them; where it keeps the half and says so, they are sent again."""
    if bucket.server.scheme == "gs":
        monkeypatch.setattr(buckets, "UPLOAD", 2**18)
    root, data = as_path(f"{bucket}/run"), (BYTES * 3)[:size]
    for write in ("bytes", "file", "version"):
        bucket.server.order(truncate=1)
        if write == "bytes":
            (root / write).write_bytes(data)
        elif write == "file":
            with atomic_path(root / write) as file:
                file.write_bytes(data)
        else:
            assert buckets.write_if(root / write, data, None)
        assert bucket.server.faults.truncate == 0 and bucket.get(f"run/{write}") == data


def test_a_clock_that_is_minutes_off(bucket):
    """Times are the store's, and versions don't care."""
    path = as_path(f"{bucket}/x")
    for skew in (600, -600):
        bucket.server.order(skew=skew)
        assert buckets.write_if(path, f"{skew}".encode(), None)
        for seconds in (buckets.read_versioned(path).updated, path.stat().st_mtime):
            assert abs(seconds - time.time() - skew) < 5
        path.unlink()


@pytest.fixture
def line(capsys, monkeypatch, tmp_path):
    """Run a command, which fails -> (its exit code, its one line)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "0.3")

    def run(*words):
        code = main(list(words))
        error = capsys.readouterr().err
        assert re.fullmatch(r"[^=\n]+=[^\n]*: [^\n]+; [^\n]+\n", error), error
        assert not [path for path in tmp_path.iterdir() if path.name != "cache"]  # above all none called gs:
        return code, error.strip()

    return run


FAULTS = {
    "unreachable": (dict(share=1.0, kinds=("503",)), 3, "run the same command again when the store answers"),
    "cut": (dict(share=1.0, kinds=("drop",)), 3, "run the same command again when the store answers"),
    "denied": (dict(deny="all"), 2, "log in on this host, or give its account the right to it"),
    "no bucket": ({}, 2, "make the bucket, or mend its name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_commands_end_with_one_line(bucket, line, fault):
    faults, code, remedy = FAULTS[fault]
    url = f"{bucket}-none" if fault == "no bucket" else str(bucket)
    stage, sample = (f"--config={tiny.CONFIG_FILE}:{name}" for name in ("autoencoder", "sample"))
    data = ["--config.data.source=dataset", f"--config.data.root={url}/data"]
    for words in (
        ["train", stage, f"--workdir={url}/run"],
        ["train", stage, f"--workdir={bucket}/run", *data],
        ["sample", sample, f"--workdir={url}/run"],
        ["sample", sample, f"--workdir={bucket}/run", f"--config.weights={url}/weights"],
        ["evaluate", sample, f"--workdir={url}/run"],
        ["doctor", "--data", stage, *data],
        ["convert", "i3d", f"{url}/i3d.pt", f"{bucket}/out.safetensors"],
    ):
        bucket.server.order(**faults)
        found, text = line(*words)
        assert (found, text.endswith(f"; {remedy}") or text) == (code, True)


@pytest.mark.parametrize("text", [
    "gs://", "s3:///x", "gs:/bkt/x", "GS://bkt/x", "S3://bkt/x", "gcs://bkt/x", "hdfs://host/x", "gs://bkt/../x", "s3://bkt//x",
])  # fmt: skip
def test_a_workdir_that_is_none_is_refused(line, text):
    code, told = line("train", f"--config={tiny.CONFIG_FILE}:autoencoder", f"--workdir={text}")
    assert code == 2 and told.startswith(f"--workdir={text}: ")


def test_settings_of_the_shell_that_cannot_be(bucket, line, monkeypatch):
    words = ["train", f"--config={tiny.CONFIG_FILE}:autoencoder", f"--workdir={bucket}/run"]
    if bucket.server.scheme == "s3":
        stores.filesystem.cache_clear()
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "127.0.0.1")  # without http://
            code, told = line(*words)
        stores.filesystem.cache_clear()
        assert code == 2 and "Invalid endpoint: 127.0.0.1" in told
    for wrong in ("a minute", "-1", "nan", "inf"):
        monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", wrong)
        code, told = line(*words)
        assert code == 2 and told.startswith(f"CMD_JAX_RETRY_SECONDS={wrong}: ")
