"""gs:// and s3:// as paths: on all servers, what pathlib says of a folder of files is said of a bucket."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import PurePosixPath

import pytest

from cmd_jax import buckets, files, stores
from cmd_jax.errors import UserError
from cmd_jax.files import as_path

NAMES = [
    "plain", "a b", "ü", "a+b", "a%20b", "a#1", "what?", "[x]", "*", "a&b=c", "~", "a\\b", "'\"", "x" * 200, ".hidden",
    "a:b", "e\u0301", "\u00e9", "100%", "#", "a@b", "a,b", "$x", "{y}", "!",
]  # fmt: skip


@pytest.fixture(params=["gcs", "gcs_stub", "s3"])
def bucket(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def root(bucket):
    return as_path(f"{bucket}/run")


def test_an_object_by_every_name(bucket, root):
    """Each name is one object of that name, read, listed, found, told from its neighbours, and removed."""
    for name in NAMES:
        (root / name).write_bytes(name.encode())
    assert {n.removeprefix("run/"): data for n, data in bucket.objects().items()} == {n: n.encode() for n in NAMES}
    assert sorted(path.name for path in root.iterdir()) == sorted(NAMES)
    assert sorted(path.name for path in root.rglob("*")) == sorted(NAMES)
    for name in NAMES:
        path = root / name
        assert path.is_file() and not path.is_dir() and path.stat().st_size == len(name.encode())
        assert path.read_bytes() == name.encode() and path.read_text() == name
        with path.open("rb") as file:
            assert file.read() == name.encode()
        assert buckets.read_versioned(path).data == name.encode()
        path.unlink()
        assert not path.exists()
    assert not bucket.objects() and not root.exists()


def test_an_object_and_a_folder_of_one_name(bucket, root):
    for name in ("a", "a/b", "a/c/d", "ab"):
        bucket.put(f"run/{name}", name.encode())
    assert (root / "a").read_bytes() == b"a" and (root / "a").is_file()
    assert sorted(x.name for x in (root / "a").iterdir()) == ["b", "c"]
    assert [x.name for x in root.iterdir()] == ["a", "ab"]
    assert [str(x.relative_to(root)) for x in (root / "a").rglob("*")] == ["a/b", "a/c/d"]
    files.remove_tree(root / "a")
    assert bucket.names() == ["run/ab"]


def test_folders_with_markers(bucket, root):
    """What a console makes as an empty folder is an object "folder/" of no bytes."""
    for name in ("", "empty/", "full/", "full/x"):
        bucket.put(f"run/{name}", b"")
    assert sorted(path.name for path in root.iterdir()) == ["empty", "full"]
    assert [path.name for path in (root / "full").iterdir()] == ["x"] and not [*(root / "empty").iterdir()]
    assert root.is_dir() and (root / "empty").is_dir() and not (root / "empty").is_file()
    assert [str(path.relative_to(root)) for path in root.rglob("*")] == ["full/x"]
    files.remove_tree(root)
    assert not bucket.names()


def test_what_is_missing(bucket, root):
    bucket.put("run/x", b"x")
    nowhere = as_path(f"{bucket}-none")
    for path in (root / "y", root / "x" / "z"):
        assert not path.exists() and not path.is_file() and not path.is_dir() and not [*path.glob("*")]
        assert not [*path.rglob("*")] and buckets.read_versioned(path) is None
        for action in (path.read_bytes, path.stat, path.unlink, path.open, lambda path=path: [*path.iterdir()]):
            with pytest.raises(FileNotFoundError) as failure:
                action()
            assert failure.value.filename == str(path) and failure.value.errno == errno.ENOENT
        path.unlink(missing_ok=True)
        files.remove_tree(path)
    assert bucket.names() == ["run/x"]
    files.remove_tree(nowhere / "x")
    for path in (nowhere, nowhere / "x"):
        listings = (path.iterdir, lambda path=path: path.glob("*"), lambda path=path: path.rglob("*"))
        actions = [path.exists, path.is_dir, path.stat, *(lambda listing=listing: [*listing()] for listing in listings)]
        for action in (*actions, (nowhere / "x").touch, lambda: buckets.write_if(nowhere / "x", b"", None)):
            with pytest.raises(stores.NoBucket) as failure:
                action()
            assert failure.value.filename.startswith(str(nowhere))


def test_a_bucket_is_not_removed(bucket):
    path = as_path(bucket)
    assert path.is_dir() and path.exists()
    with pytest.raises(OSError):
        path.unlink(missing_ok=True)
    (path / "x").touch()
    files.remove_tree(path)
    assert bucket.objects() == {} and path.exists()


def test_empty_objects_and_ranges(root):
    (root / "empty").touch()
    (root / "data").write_bytes(bytes(range(256)) * 1000)
    assert (root / "empty").read_bytes() == b"" and (root / "empty").stat().st_size == 0
    with (root / "empty").open("rb") as file:
        assert file.read() == b""
    with (root / "data").open("rb") as file:
        file.seek(1000)
        assert file.read(5) == bytes([232, 233, 234, 235, 236])
        file.seek(-2, 2)
        assert file.read() == bytes([254, 255]) and file.read(1) == b""
    assert (root / "data").read_range(256, 258) == b"\0\1" and (root / "data").read_range(3, 3) == b""
    with pytest.raises(OSError):
        (root / "data").read_range(255_990, 256_010)


@pytest.mark.parametrize("kind", ["gcs_stub", "s3"])
def test_many_objects_in_one_folder(request, kind):
    """Three pages of a listing, found and removed to the last one."""
    bucket, names = request.getfixturevalue(kind), [f"{i:04}" for i in range(2200)]
    for name in names:  # not by a request each
        bucket.server.plant(bucket.name, f"run/{name}", b"x")
    root = as_path(f"{bucket}/run")
    assert [path.name for path in root.iterdir()] == [path.name for path in root.rglob("*")] == names
    assert len([*root.glob("*7")]) == 220 and root.is_dir()
    root.rmtree()
    assert not bucket.names()


def test_what_is_written_is_seen_by_others_at_once(bucket, root):
    """No cache of listings: another process lists, and reads, what is there now."""
    assert not [*root.glob("*")]
    bucket.put("run/x", b"1")
    assert [path.name for path in root.iterdir()] == ["x"] and (root / "x").read_bytes() == b"1"
    bucket.put("run/x", b"22")
    assert (root / "x").read_bytes() == b"22" and (root / "x").stat().st_size == 2
    bucket.delete("run/x")
    assert not (root / "x").exists() and not [*root.glob("*")]


@pytest.mark.parametrize("kind", ["gcs_stub", "s3"])
def test_a_version_is_written_once(request, kind):
    path = as_path(f"{request.getfixturevalue(kind)}/lock")
    first = buckets.write_if(path, b"one", None)
    assert first and buckets.write_if(path, b"two", None) is None
    second = buckets.write_if(path, b"three", first)
    assert second and second != first and buckets.write_if(path, b"four", first) is None
    found = buckets.read_versioned(path)
    assert (found.data, found.version) == (b"three", second)
    path.unlink()
    assert buckets.write_if(path, b"five", second) is None and buckets.read_versioned(path) is None


@pytest.mark.parametrize("text, problem", [
    ("gs://", "names no bucket"), ("s3:///x", "names no bucket"), ("gs:/bucket/x", "gs: is not"),
    ("GS://bkt/x", "GS: is not"), ("gcs://bkt/x", "gcs: is not"), ("http://host/x", "http: is not"),
    ("file:///x", "file: is not"), ("gs:bkt/x", "gs: is not"), ("s3:bkt", "s3: is not"), (" gs://bkt/x", "a blank"),
    ("gs://bkt/../x", "an empty name, . or .."), ("s3://bkt/a//b", "an empty name"),
    ("gs://bkt/./x", "an empty name"),
])  # fmt: skip
def test_what_is_no_path_of_a_bucket_is_refused(text, problem):
    with pytest.raises(UserError) as e:
        buckets.check_url("--workdir", text)
    assert (e.value.field, e.value.value) == ("--workdir", text) and problem in e.value.problem


@pytest.mark.parametrize(
    "text", ["gs://bkt", "gs://bkt/", "s3://bkt/a/b/", "a:b", "relative/a:/b", "/x/gs://y", "C:\\"]
)
def test_what_is_a_path_is_not_refused(text):
    buckets.check_url("--workdir", text)


def test_a_path_of_a_bucket_stays_one():
    path = as_path("gs://bkt/run/")
    assert str(path) == f"{path}" == "gs://bkt/run" and str(path / "a" / "b") == "gs://bkt/run/a/b"
    assert str(path.parent) == "gs://bkt" == str(path.parent.parent) and (path / "a.b.c").suffix == ".c"
    assert str((path / "a.b").with_suffix(".json")) == "gs://bkt/run/a.json" and path.name == "run"
    assert str((path / "x").with_name("y")) == "gs://bkt/run/y" and path.absolute() == path == path.resolve()
    assert as_path(str(path)) == path and {path: 1}[as_path("gs://bkt/run")] == 1 and path != as_path("s3://bkt/run")
    assert str(path / PurePosixPath("a/b")) == str(path.joinpath("a", "b")) == "gs://bkt/run/a/b"
    assert pickle.loads(pickle.dumps(path)) == path and type(path.with_segments(path, "x")) is type(path)
    assert str(path.with_segments(path, "x")) == "gs://bkt/run/x"  # pathlib's way from Python 3.12 on
    with pytest.raises(TypeError):
        os.open(path, os.O_RDONLY)


def test_json_that_grows_shorter_while_it_is_read(gcs_stub, monkeypatch):
    path, stat = as_path(f"{gcs_stub}/x.json"), buckets.BucketPath.stat
    path.write_text('{"step": 10}')

    def stat_and_change(self):
        found = stat(self)
        path.write_text('{"step": 9}')
        return found

    monkeypatch.setattr(buckets.BucketPath, "stat", stat_and_change)
    assert files.read_json(path) == {"step": 9}


def test_a_child_process_sees_the_bucket_too(root):
    (root / "x").write_text("from here")
    code = f"from cmd_jax.files import as_path; p = as_path('{root}'); (p / 'y').write_text((p / 'x').read_text()[5:])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stderr) == (0, "") and (root / "y").read_text() == "here"
