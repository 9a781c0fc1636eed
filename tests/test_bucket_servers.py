"""The servers that stand in for buckets: what gcsfs, s3fs and TensorStore write to them is there, whole; who knows
preconditions; and that faults come as they are ordered."""

import errno
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import buckets
import fsspec
import numpy as np
import pytest
import tensorstore as ts

BOTH = ("gcs", "gcs_stub")
BYTES = random.Random(0).randbytes(300_001)


@pytest.fixture
def gs(request):
    """The bucket of the fixture that is named."""
    return request.getfixturevalue(request.param)


def gcsfs(**options):
    return fsspec.filesystem("gs", token="anon", use_listings_cache=False, skip_instance_cache=True, **options)


def s3fs(**options):
    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True, **options)


def kvstore(bucket, prefix: str = ""):
    spec = {"driver": "gcs" if bucket.startswith("gs") else "s3", "bucket": bucket.name, "path": prefix}
    if bucket.startswith("s3"):
        spec |= {"endpoint": bucket.server.url, "aws_region": "us-east-1"}
    return ts.KvStore.open(spec).result()


@pytest.mark.parametrize("gs", BOTH, indirect=True)
@pytest.mark.parametrize("tail", [b"", b"\r", b"\n", b"\r\n", b"--==0==--"])
def test_gcsfs_gets_back_what_it_put(gs, tail):
    """Of any bytes: the parts of an upload are told apart by lines."""
    gcsfs(consistency="md5").pipe_file(f"{gs}/a b/ü#?%.bin", BYTES + tail)
    assert gs.objects() == {"a b/ü#?%.bin": BYTES + tail}
    assert gcsfs().cat_file(f"{gs}/a b/ü#?%.bin", start=300_000) == BYTES[300_000:] + tail


@pytest.mark.parametrize("gs", BOTH, indirect=True)
def test_gcsfs_lists_copies_and_deletes(gs):
    fs = gcsfs()
    for name in ("run/a", "run/b/c", "run/b/d", "run", "other", "empty"):
        fs.pipe_file(f"{gs}/{name}", b"" if name == "empty" else name.encode())
    assert fs.ls(f"{gs}/run", detail=False) == [f"{gs.name}/{x}" for x in ("run/a", "run/b")]
    assert fs.find(f"{gs}/run/") == [f"{gs.name}/{x}" for x in ("run/a", "run/b/c", "run/b/d")]
    assert fs.info(f"{gs}/other")["size"] == 5 and fs.isdir(f"{gs}/run/b") and gs.get("empty") == b""
    fs.cp_file(f"{gs}/run/a", f"{gs}/run/e")
    fs.rm_file(f"{gs}/run/a")
    assert gs.names("run/") == ["run/b/c", "run/b/d", "run/e"] and gs.get("run/e") == b"run/a"
    with pytest.raises(FileNotFoundError):
        fs.rm_file(f"{gs}/run/a")


@pytest.mark.parametrize("gs", BOTH, indirect=True)
def test_gcsfs_uploads_in_chunks(gs):
    gcsfs(consistency="md5").pipe_file(f"{gs}/large", BYTES * 3, chunksize=2**18)
    with gcsfs().open(f"{gs}/written", "wb", block_size=2**18) as file:
        file.write(BYTES)
        file.write(BYTES)
    assert gs.objects() == {"large": BYTES * 3, "written": BYTES * 2}


@pytest.mark.parametrize("gs", [*BOTH, "s3"], indirect=True)
def test_tensorstore_keeps_values_and_arrays(gs):
    store = kvstore(gs, "store/")
    store.write("a/b", BYTES).result()
    assert gs.objects() == {"store/a/b": BYTES} and bytes(store.read("a/b").result().value) == BYTES
    assert store.read("c").result().state == "missing" and store.list().result() == [b"a/b"]
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": {**store.spec().to_json(), "path": "arrays/"}}}
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    ts.open(spec, create=True, dtype=ts.float32, shape=array.shape).result().write(array).result()
    assert any(name.startswith("arrays/d/") for name in gs.names())
    np.testing.assert_array_equal(ts.open(spec).result().read().result(), array)
    gs.flip("store/a/b", byte=7, bit=3)
    assert [x ^ y for x, y in zip(store.read("a/b").result().value, BYTES, strict=True) if x != y] == [8]
    store.delete_range(ts.KvStore.KeyRange("", "")).result()
    assert not gs.names("store/")


def test_generations_are_conditions_of_the_stub(gcs_stub):
    """With TensorStore's driver, and with gcsfs, which can only say that the object must not be there."""
    store, fs = kvstore(gcs_stub), gcsfs()
    first = store.write("lock", b"1").result().generation
    second = store.write("lock", b"2", if_equal=first).result().generation
    assert store.write("lock", b"3", if_equal=first).result().generation == b"" and gcs_stub.get("lock") == b"2"
    assert store.read("lock", if_not_equal=second).result().state == "unspecified"
    assert store.read("lock").result().stamp.generation == second
    store.write("lock", None, if_equal=first).result()
    assert gcs_stub.names() == ["lock"]
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{gcs_stub}/lock", b"4", mode="create")
    store.write("lock", None, if_equal=second).result()
    fs.pipe_file(f"{gcs_stub}/lock", b"4", mode="create")
    assert gcs_stub.objects() == {"lock": b"4"}


def test_the_emulator_lacks_conditions(gcs):
    """When this fails, the tests of locks can move from the stub to it."""
    fs = gcsfs()
    fs.pipe_file(f"{gcs}/lock", b"1")
    fs.pipe_file(f"{gcs}/lock", b"2", mode="create")
    assert gcs.get("lock") == b"2"


def test_s3fs_on_moto_and_its_conditions(s3):
    fs = s3fs()
    fs.pipe_file(f"{s3}/a b/ü#?%.bin", BYTES + b"\r")
    assert s3.objects() == {"a b/ü#?%.bin": BYTES + b"\r"}
    assert fs.cat_file(f"{s3}/a b/ü#?%.bin", start=300_000) == BYTES[300_000:] + b"\r"
    fs.pipe_file(f"{s3}/lock", b"1", mode="create")
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{s3}/lock", b"2", mode="create")
    tag = fs.info(f"{s3}/lock")["ETag"]
    fs.pipe_file(f"{s3}/lock", b"3", IfMatch=tag)
    with pytest.raises(OSError) as failure:
        fs.pipe_file(f"{s3}/lock", b"4", IfMatch=tag)
    assert failure.value.errno == errno.EINVAL and s3.get("lock") == b"3"


def ask(bucket, path: str, method: str = "GET", data: bytes | None = None):
    """-> (status, its headers, its body), 0 for a connection that was cut."""
    request = urllib.request.Request(f"{bucket.server.url}{path}", data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.headers, e.read()
    except OSError:
        return 0, {}, b""
    except Exception as e:
        assert type(e).__name__ in ("IncompleteRead", "RemoteDisconnected"), e
        return 0, {}, b""


def test_faults_come_as_ordered_and_by_their_seed(gcs_stub):
    server, path = gcs_stub.server, f"/storage/v1/b/{gcs_stub.name}/o/x?alt=media"
    gcs_stub.put("x", BYTES)

    def statuses(**faults):
        server.order(**faults)
        return [ask(gcs_stub, path)[0] for _ in range(200)]

    first = statuses(share=0.3, seed=1)
    assert first == statuses(share=0.3, seed=1) != statuses(share=0.3, seed=2)
    assert 40 < sum(status != 200 for status in first) < 80 and {0, 200, 429, 503} == {*first}
    assert {*statuses(share=1.0, only="^POST")} == {200}
    server.order(share=1.0)
    assert gcs_stub.objects() == {"x": BYTES}  # the test's own requests


def test_an_answer_that_is_cut_was_to_something_done(gcs_stub):
    path = f"/upload/storage/v1/b/{gcs_stub.name}/o?uploadType=media&ifGenerationMatch=0&name="
    for kind, done in (("cut", True), ("drop", False), ("503", False)):
        gcs_stub.server.order(share=1.0, kinds=(kind,))
        ask(gcs_stub, path + kind, "POST", b"data")
        assert (kind in gcs_stub.names()) == done
    gcs_stub.server.order()
    assert ask(gcs_stub, path + "cut", "POST", b"data")[0] == 412  # as one who tries again finds


def test_the_other_faults_of_the_stub(gcs_stub):
    server, base = gcs_stub.server, f"/storage/v1/b/{gcs_stub.name}/o"
    upload = f"/upload{base}?uploadType=media&name="
    server.order(truncate=1)
    answer = ask(gcs_stub, f"{upload}half", "POST", b"12345678")[2]
    assert b'"size": "4"' in answer and gcs_stub.get("half") == b"1234"
    ask(gcs_stub, f"{upload}whole", "POST", b"12345678")
    assert gcs_stub.get("whole") == b"12345678"
    for deny, reads, writes in (("read", 403, 200), ("write", 200, 403), ("all", 403, 403)):
        server.order(deny=deny)
        assert ask(gcs_stub, f"{base}/whole")[0] == reads
        assert ask(gcs_stub, f"{upload}new", "POST", b"")[0] == writes
    server.order(skew=-600)
    gcs_stub.put("old", b"")
    status, headers, body = ask(gcs_stub, f"{base}/old")
    ten_minutes_ago = time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - 600)).encode()
    assert ten_minutes_ago in body and time.strftime("%H:%M:", time.gmtime(time.time() - 600)) in headers["Date"]
    server.order()
    assert ask(gcs_stub, "/storage/v1/b/nobody/o/x")[0] == 404
    assert ask(gcs_stub, f"{base}/whole?ifGenerationMatch=1")[0] == 412


def test_the_server_as_a_process_of_its_own():
    file = Path(buckets.__file__)
    with subprocess.Popen([sys.executable, file, "--fault-share", "1"], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            assert process.stdout.readline().strip() == f"export STORAGE_EMULATOR_HOST={url}"
            server = buckets.Gcs(url)
            server.put("bkt", "x", b"data")  # no fault befalls the test's own
            assert server.objects("bkt") == {"x": b"data"}
            with pytest.raises(Exception, match="503|429|closed|Incomplete"):
                urllib.request.urlopen(f"{url}/storage/v1/b/bkt/o/x?alt=media", timeout=5).read()
        finally:
            process.terminate()
    assert os.environ.get("STORAGE_EMULATOR_HOST") != url
