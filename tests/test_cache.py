"""Copies of objects on a disk: made once, whole, sound, within a limit, and kept while they are read."""

import hashlib
import os
import resource
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from cmd_jax import cache as caches
from cmd_jax.cache import Cache
from cmd_jax.errors import UserError


class Object:
    """Stands for a BucketPath. reads: how often it was read from its beginning. during(): called when it is."""

    def __init__(self, name: str, data: bytes, version: str = "1"):
        self.name, self.data, self.version, self.reads, self.during = name, data, version, 0, lambda: None

    def __str__(self) -> str:
        return f"gs://bkt/{self.name}"

    def stat(self):
        return SimpleNamespace(st_size=len(self.data), st_mtime=0.0, version=self.version)

    def read_range(self, start: int, end: int) -> bytes:
        self.reads += start == 0
        self.during()
        return self.data[start:end]

    @property
    def facts(self):
        return self, len(self.data), hashlib.sha256(self.data).hexdigest()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(caches, "CHUNK", 64)


def objects(count: int, size: int = 100) -> list[Object]:
    return [Object(f"{i}", bytes([i]) * size) for i in range(count)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def held(folder: Path) -> set[int]:
    """The numbers of the objects whose copies are there."""
    return {(folder / name).read_bytes()[0] for name in names(folder)}


def test_a_copy_is_made_once_whoever_asks(tmp_path):
    cache, (thing,) = Cache(tmp_path), objects(1)
    thing.during = lambda: time.sleep(0.02)
    with ThreadPoolExecutor(8) as pool:
        leases = [*pool.map(lambda _: cache.fetch(*thing.facts), range(16))]
    assert thing.reads == 1 and {lease.path.read_bytes() for lease in leases} == {thing.data}
    assert Cache(tmp_path).fetch(*thing.facts).path == leases[0].path and thing.reads == 1
    assert names(tmp_path) == {leases[0].path.name}


FETCH = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from test_cache import Object, Cache
    thing = Object("x", b"x" * 500)
    def during():
        with open({log!r}, "a") as log:
            log.write("read\\n")
        time.sleep({pause})
    thing.during = during
    with Cache(Path({folder!r})).fetch(*thing.facts) as path:
        assert path.read_bytes() == thing.data
""")


def test_processes_share_copies_and_what_a_killed_one_left_goes(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "cache"

    def start(pause: float):
        code = FETCH.format(tests=str(Path(__file__).parent), log=str(log), folder=str(folder), pause=pause)
        return subprocess.Popen([sys.executable, "-c", code])

    first = start(60)
    while not log.exists():
        time.sleep(0.02)
    (thing,) = objects(1)
    Cache(folder).fetch(*thing.facts)
    assert len(names(folder)) == 2  # what is in the making stays
    second = start(0.1)
    time.sleep(0.1)
    first.kill()
    first.wait()
    third = start(0.1)
    assert [second.wait(20), third.wait(20)] == [0, 0]
    assert log.read_text() == "read\n" * 2 and len(names(folder)) == 2
    (folder / "left.part").write_bytes(b"x")
    (other,) = objects(1, 120)
    Cache(folder).fetch(*other.facts)
    assert len(names(folder)) == 3 and "left.part" not in names(folder)


def test_the_longest_unused_goes_where_a_limit_would_be_passed(tmp_path):
    cache, things = Cache(tmp_path, 350), objects(6)
    paths = [cache.fetch(*thing.facts).path for thing in things[:3]]
    for path, age in zip(paths, (100, 300, 200), strict=True):
        os.utime(path, (time.time() - age,) * 2)
    cache.fetch(*things[3].facts)
    assert held(tmp_path) == {0, 2, 3}
    cache.fetch(*things[2].facts)
    cache.fetch(*things[4].facts)
    assert held(tmp_path) == {2, 3, 4}


def test_what_is_open_stays_and_the_limit_holds(tmp_path, monkeypatch):
    cache, things = Cache(tmp_path, 350), objects(6)
    leases = [cache.fetch(*thing.facts) for thing in things[:3]]
    monkeypatch.setattr(caches, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="all of it is in use") as error:
        Cache(tmp_path, 350).fetch(*things[3].facts)
    assert error.value.field == "data.cache_gib" and held(tmp_path) == {0, 1, 2}
    asked = []

    def spare() -> bool:
        asked.append(leases.pop(1).close())
        return True

    with cache.fetch(*things[3].facts, spare) as path:
        assert path.read_bytes() == things[3].data
    assert len(asked) == 1 and held(tmp_path) == {0, 2, 3}


def test_who_waits_for_a_copy_gives_room_to_who_makes_it(tmp_path):
    """They would wait for each other else."""
    ours, theirs, things = Cache(tmp_path, 350), Cache(tmp_path, 350), objects(4)
    leases = [ours.fetch(*thing.facts) for thing in things[:3]]
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(theirs.fetch, *things[3].facts)
        while not (tmp_path / caches.WANTED).exists():
            time.sleep(0.005)
        found = ours.fetch(*things[3].facts, lambda: bool(leases) and leases.pop(0).close() is None)
        assert made.result(10).path == found.path and things[3].reads == 1


def test_a_limit_below_one_object_is_told(tmp_path):
    with pytest.raises(UserError, match="0 alone has 9.31e-08 GiB") as error:
        Cache(tmp_path, 99).fetch(*objects(1)[0].facts)
    assert error.value.field == "data.cache_gib" and not names(tmp_path)


def test_an_object_that_is_not_what_its_facts_say_is_fetched_again_once(tmp_path):
    cache, (thing,) = Cache(tmp_path), objects(1)
    _, size, sha256 = thing.facts
    for data, reads, problem in ((b"\1" * size, 2, "SHA-256"), (b"\0" * 50, 0, "has 50 bytes, not 100")):
        thing.data, thing.reads = data, 0
        with pytest.raises(UserError, match=problem) as error:
            cache.fetch(thing, size, sha256)
        assert (error.value.field, error.value.value, thing.reads) == ("shard", thing, reads)
    assert not names(tmp_path)
    right, thing.data = b"\0" * size, b"\1" * size
    thing.during = lambda: setattr(thing, "data", right if thing.reads == 2 else thing.data)
    assert cache.fetch(thing, size, sha256).path.read_bytes() == right


def test_a_copy_that_was_damaged_is_made_anew(tmp_path):
    (thing,) = objects(1)
    path = Cache(tmp_path).fetch(*thing.facts).path
    for damaged in (b"\0" * 99 + b"\1", b"\0" * 99):
        path.write_bytes(damaged)
        assert Cache(tmp_path).fetch(*thing.facts).path.read_bytes() == thing.data
    assert thing.reads == 3


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80, before[1]))  # stands for it
    try:
        with pytest.raises(UserError, match="too large") as error:
            Cache(tmp_path).fetch(*objects(1)[0].facts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (error.value.field, error.value.value) == ("data.cache_dir", tmp_path) and not names(tmp_path)


def test_an_object_that_was_written_anew_is_fetched_anew(tmp_path):
    cache, (thing,) = Cache(tmp_path), objects(1)
    assert [cache.fetch_newest(thing).path.read_bytes() for _ in range(2)] == [thing.data] * 2 and thing.reads == 1
    thing.data, thing.version = b"\1" * 100, "2"
    assert cache.fetch_newest(thing).path.read_bytes() == b"\1" * 100 and thing.reads == 2

    def during():
        if thing.version == "3":
            thing.data, thing.version = b"\2" * 70 + b"\3" * 30, "4"

    thing.version, thing.during = "3", during  # it changes while it is read
    assert cache.fetch_newest(thing).path.read_bytes() == thing.data and len(names(tmp_path)) == 3


def test_the_cache_itself_is_on_a_disk(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=f"data.cache_dir={tmp_path}/file/objects: Not a directory; "):
        Cache(tmp_path / "file/objects").fetch_newest(objects(1)[0])
    with pytest.raises(UserError, match="data.cache_dir=gs://bkt/x: is itself in a bucket"):
        caches.use("gs://bkt/x", 0)
