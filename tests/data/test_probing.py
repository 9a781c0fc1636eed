"""Files are tested in child processes, which may die, hang or be slow; what came out is kept."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from data.folders import ANSWER, names, source

from cmd_jax.data import outcomes, probe, supervised
from cmd_jax.errors import UserError

# Child processes

CHILD = """
    import json, os, sys, time
    parent = os.getppid()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        path = os.path.basename(json.loads(line)["path"])
        with open(os.path.join(os.path.dirname(__file__), "asked"), "a") as file:
            file.write(path + "\\n")
        if "crash" in path:
            os.abort()
        if "leave" in path:
            os._exit(3)
        while "hang" in path and os.getppid() == parent:
            time.sleep(0.05)
        for i in range(20):
            if "slow" in path or "endless" in path:
                time.sleep(0.06)
                print(json.dumps({"decoded": i}), flush=True)
        if "babble" in path:
            print("not json", flush=True)
        if "strange" in path:
            print('{"frames": "many"}', flush=True)
        print('ANSWER', flush=True)
"""


@pytest.fixture
def child(tmp_path):
    """(command of a child that crashes or hangs on files of such names, function -> the files it was asked about)."""
    script, asked = tmp_path / "child.py", tmp_path / "asked"
    script.write_text(textwrap.dedent(CHILD).replace("ANSWER", ANSWER))
    return [sys.executable, str(script)], lambda: sorted(asked.read_text().split()) if asked.exists() else []


def test_files_that_crash_or_hang_the_decoder_are_quarantined(put, child):
    command, asked = child
    good = [f"c/{i}.avi" for i in range(6)]
    root = put(*good, "c/crash.avi", "c/hang.avi", "c/leave.avi", "c/babble.avi", "c/strange.avi")
    began = time.monotonic()
    got = source(root, probe_command=command, probe_timeout=1.5)
    assert time.monotonic() - began < 30
    assert names(got) == good
    assert got.bad["c/crash.avi"] == "crashes the decoder (signal SIGABRT)"
    assert got.bad["c/leave.avi"] == "crashes the decoder (exit code 3)"
    assert "crashes the decoder" in got.bad["c/babble.avi"]
    assert "crashes the decoder" in got.bad["c/strange.avi"]
    assert got.bad["c/hang.avi"] == "hangs the decoder (no further frame for data.probe_timeout=1.5 s)"
    assert asked().count("hang.avi") == 1
    assert asked().count("crash.avi") == 2  # the second time by a child that had read nothing else


def test_a_file_may_take_long_as_long_as_frames_come(put, child):
    command, asked = child
    root = put("c/slow.avi", "c/hang.avi", "c/1.avi")
    settings = {"probe_command": command, "probe_timeout": 0.8}
    assert names(source(root, **settings)) == ["c/1.avi", "c/slow.avi"]  # 1.2 s
    bad = source(root, probe_cap=0.7, **settings).bad
    assert bad["c/slow.avi"] == "takes too long to decode (more than data.probe_cap=0.7 s)"
    assert asked().count("slow.avi") == 2


def test_a_child_that_does_not_start_is_no_fault_of_the_files(put):
    command = [sys.executable, "-c", "raise ImportError('no decoder here')"]
    with pytest.raises(UserError, match="does not start .*no decoder here"):
        source(put("c/a.avi"), probe_command=command)


def test_children_end_with_the_probing(put, child, monkeypatch):
    command, _ = child
    started = []

    class Recorded(supervised.Child):
        def __init__(self, command):
            super().__init__(command)
            started.append(self.process)

    monkeypatch.setattr(supervised, "Child", Recorded)
    paths = [str(put("c/a.avi", "c/hang.avi") / "c" / name) for name in ("a.avi", "hang.avi")]
    outcomes = probe.probe(paths, 600, command)
    path, facts = next(outcomes)
    assert (path, facts["frames"]) == (paths[0], 20)
    outcomes.close()  # while a child hangs
    assert started
    assert all(process.poll() is not None for process in started)


def test_outcomes_are_remembered(put, child, tmp_path):
    command, asked = child
    cache = tmp_path / "workdir/probe.jsonl"
    root = put("c/a.avi", "c/b.avi", "c/crash.avi", "c/hang.avi", "c/endless.avi")
    settings = {"probe_command": command, "probe_timeout": 0.6, "probe_cap": 0.8, "cache": cache}
    first = source(root, **settings)
    count = len(asked())
    second = source(root, **settings, stride=2)  # another need of frames, the same facts
    assert len(asked()) == count
    assert (names(second), second.bad) == (names(first), first.bad)
    os.utime(root / "c/a.avi", ns=(1, 1))
    source(root, **settings)
    assert asked()[:2] == ["a.avi", "a.avi"]
    assert len(asked()) == count + 1
    source(root, **{**settings, "probe_timeout": 0.7})  # more patience: the hung file gets another chance
    assert len(asked()) == count + 2
    got = source(root, **{**settings, "probe_timeout": 0.7, "probe_cap": 0})  # any time: so does the one that took long
    assert len(asked()) == count + 3
    assert names(got) == ["c/a.avi", "c/b.avi", "c/endless.avi"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [],
        lambda lines: ["{broken"],
        lambda lines: ['{"format": 1, "files": {}}'],
        lambda lines: [*lines[:2], *lines[3:], lines[2][:20]],  # torn by a kill
        lambda lines: [*lines[:2], lines[2][:20] + lines[3], ""],  # and gone on with
        lambda lines: [
            *lines[:2],
            "[" * 100_000,
            '{"name": 3}',
            '{"name": "c/b.avi", "key": [1, 2], "frames": 20}',
            "",
        ],
        lambda lines: [*lines[:2], lines[2].replace("20", '"20"'), ""],
        lambda lines: [*lines[:2], lines[2].replace("[]", f"[[48, 1, {2**63}]]"), ""],
        lambda lines: [*lines[:2], *lines[2:-1] * 3, ""],
    ],
)
def test_outcomes_that_cannot_be_read_are_found_again(put, child, tmp_path, spoil):
    command, asked = child
    cache, root = tmp_path / "probe.jsonl", put("c/a.avi", "c/b.avi", "c/c.avi")
    settings = {"probe_command": command, "cache": cache}
    first = source(root, **settings)
    whole = cache.read_text().split("\n")
    assert [json.loads(line).get("name") for line in whole[:-1]].count(None) == 1
    cache.write_text("\n".join(spoil(whole)))
    put("c/d.avi")
    assert names(source(root, **settings)) == [*names(first), "c/d.avi"]
    count = len(asked())
    again = cache.read_text().split("\n")
    assert json.loads(again[0])["format"] == 2 and again[-1] == ""
    assert sorted(json.loads(line)["name"] for line in again[1:-1]) == ["c/a.avi", "c/b.avi", "c/c.avi", "c/d.avi"]
    source(root, **settings)
    assert len(asked()) == count
    assert [path.name for path in tmp_path.glob("*probe*")] == ["probe.jsonl"]


def test_another_decoder_tests_files_again(put, child, tmp_path, monkeypatch):
    command, asked = child
    settings = {"probe_command": command, "cache": tmp_path / "probe.jsonl"}
    root = put("c/a.avi", "c/b.avi")
    for _ in range(2):
        source(root, **settings)
    assert len(asked()) == 2
    monkeypatch.setattr(outcomes, "HEADER", outcomes.HEADER | {"av": "another"})
    source(root, **settings)
    assert len(asked()) == 4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_learnt_survives_the_end_of_the_process(put, child, tmp_path, number):
    """At any moment, without any word of farewell: training ends so when it is asked to stop before its first step."""
    command, asked = child
    cache, root = tmp_path / "probe.jsonl", put(*(f"c/{i}.avi" for i in range(4)), "c/z-hang-1.avi", "c/z-hang-2.avi")
    code = (
        "import sys; from cmd_jax.data.folder import FolderSource; FolderSource(sys.argv[1], frames=8, height=24, "
        "width=32, cache=sys.argv[2], probe_timeout=600, probe_command=sys.argv[3:])"
    )
    with subprocess.Popen([sys.executable, "-c", code, root, cache, *command]) as process:
        end = time.monotonic() + 30
        while not (cache.exists() and cache.read_bytes().count(b"\n") == 5) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
    (root / "c/z-hang-1.avi").unlink()
    (root / "c/z-hang-2.avi").unlink()
    before = [name for name in asked() if "hang" not in name]
    assert before == ["0.avi", "1.avi", "2.avi", "3.avi"]
    assert len(source(root, probe_command=command, cache=cache)) == 4
    assert [name for name in asked() if "hang" not in name] == before


def test_an_unwritable_cache_is_a_warning(put, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(source(put("c/a.avi"), cache=tmp_path / "file/cache.json")) == 1
    assert "not kept" in caplog.text


def test_the_child_imports_no_jax():
    code = "import sys, cmd_jax.data.probe, cmd_jax.data.video; print({'jax', 'tensorflow', 'flax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"set()"
