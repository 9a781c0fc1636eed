"""500 damaged video files through the door of a training: the supervised test of each, then draws of what passed."""

import json
import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from data.clip_files import CODECS, LOSSLESS, numbered, write_clip
from processes import ROOT, environment

from cmd_jax.data import supervised
from cmd_jax.data.folder import FolderSource

COUNT, PATIENCE = 500, 60.0  # seconds
SHAPE = {"frames": 4, "height": 24, "width": 32}
# Box and chunk names, whose sizes stand before them (mp4, big-endian) or behind them (avi, little-endian), and the
# element ids of webm, whose sizes stand behind them. Counts and frame sizes stand in the bytes that follow.
PLACES = {
    "mp4": re.compile(
        b"ftyp|moov|mdat|trak|mdia|minf|stbl|stsd|avc1|avcC|stts|ctts|stss|stsc|stsz|stco|elst|tkhd|mdhd"
    ),
    "avi": re.compile(b"RIFF|LIST|avih|strh|strf|idx1|JUNK|movi|00dc"),
    "webm": re.compile(b"\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x16\x54\xae\x6b|\x1f\x43\xb6\x75|\xae|\xe0|\xa3|\xb0|\xba"),
}
EDGES = (0, 1, 7, 8, 16, 0x7FFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)


def samples(folder) -> list[tuple[str, bytes]]:
    """(kind, a sound file of it): B-frames, a rotated one, times of an uneven rate, the codecs that people have."""
    noise = np.random.default_rng(0).integers(-20, 20, (20, 48, 64, 3))
    video = np.clip(numbered(20).astype(int) + noise, 0, 255).astype(np.uint8)
    uneven = [40 * i + 13 * (i % 3) for i in range(20)]
    h264, mpeg4, vp9 = ({**LOSSLESS[CODECS[kind]], "g": "5"} for kind in ("mp4", "avi", "webm"))  # key frames to seek
    files = [
        write_clip(folder / "a.mp4", video, options=h264),
        write_clip(folder / "b.mp4", video, rotation=90),
        write_clip(folder / "c.mp4", video, times=uneven, options=h264),
        write_clip(folder / "d.avi", video, options=mpeg4),
        write_clip(folder / "e.avi", video, codec="libx264", options=h264),
        write_clip(folder / "f.webm", video, options=vp9),
    ]
    return [(path.suffix[1:], path.read_bytes()) for path in files]


def flip(rng, data, kind, other):
    for _ in range(rng.choice((1, 3, 20, 200))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_in_the_header(rng, data, kind, other):
    for _ in range(rng.choice((1, 3, 10))):
        start = len(data) - 2000 if kind == "mp4" and rng.random() < 0.8 else 0  # the moov box stands last
        data[start + rng.randrange(2000)] ^= 1 << rng.randrange(8)


def cut(rng, data, kind, other):
    del data[rng.randrange(len(data)) :]


def cut_out(rng, data, kind, other):
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 4, 100, 5000))]


def zero(rng, data, kind, other):
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 8, 200, 5000)))
    data[start:stop] = bytes(stop - start)


def resize(rng, data, kind, other):
    """Another size, count or side in a box, chunk or element."""
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.choice(list(PLACES[kind].finditer(bytes(data))) or [re.match(b"", b"")])
        start = max(0, rng.choice((place.start() - 4, place.end(), place.end() + 4, place.end() + 8)))
        value = rng.choice((*EDGES, rng.randrange(1 << 32)))
        data[start : start + 4] = value.to_bytes(4, "big" if kind == "mp4" else "little")


def splice(rng, data, kind, other):
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]


def swap_headers(rng, data, kind, other):
    size = rng.choice((4, 12, 64, 500, 3000))
    data[:size] = other[:size]


def repeat(rng, data, kind, other):
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.choice((8, 300, 5000))] * rng.choice((1, 20))


MUTATIONS = (flip, flip_in_the_header, cut, cut_out, zero, resize, resize, splice, swap_headers, repeat)


def mutate(rng, sound) -> tuple[str, bytes]:
    """-> (kind, damaged bytes)."""
    (kind, data), (_, other) = rng.choice(sound), rng.choice(sound)
    data = bytearray(data)
    for change in rng.sample(MUTATIONS, rng.choice((1, 1, 2))):
        if len(data) > 4000:
            change(rng, data, kind, other)
    return kind, bytes(data)


def write_damaged(root, count: int, rng, sound) -> set[str]:
    """So many damaged files of three classes -> their names."""
    names = set()
    for index in range(count):
        kind, data = mutate(rng, sound)
        path = root / f"class{index % 3}" / f"{index:04d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        names.add(path.relative_to(root).as_posix())
    return names


def timed(monkeypatch) -> list[float]:
    """Grows by the seconds of each answer of a child."""
    seconds, ask = [], supervised.Child.ask

    def asked(self, *arguments, **options):
        begun = time.monotonic()
        try:
            return ask(self, *arguments, **options)
        finally:
            seconds.append(time.monotonic() - begun)

    monkeypatch.setattr(supervised.Child, "ask", asked)
    return seconds


# What a training does with the files that passed: a line for each draw.
DRAW = """
import json, resource, sys, time
import numpy as np
from cmd_jax.data.folder import FolderSource
from cmd_jax.errors import UserError
root, cache, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
source, rng = FolderSource(root, cache=cache, **options), np.random.default_rng(0)
for index in range(len(source)):
    print(json.dumps({"name": source.name(index)}), flush=True)
    for _ in range(3):
        begun = time.monotonic()
        try:
            video, label, _ = source.clip(index, rng)
            answer = {"shape": video.shape, "label": label}
        except UserError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer | {"seconds": time.monotonic() - begun}), flush=True)
print(json.dumps({"name": ""}))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damaged_videos_are_read_or_named(tmp_path, monkeypatch):
    root, seconds = tmp_path / "clips", timed(monkeypatch)
    names = write_damaged(root, COUNT, random.Random(0), samples(tmp_path / "sound"))
    options = {**SHAPE, "layout": "classes", "max_bad_fraction": 1.0}
    source = FolderSource(root, cache=tmp_path / "probe.json", **options)
    usable = {source.name(index) for index in range(len(source))}
    assert usable | source.bad.keys() == names and not usable & source.bad.keys()
    assert len(seconds) >= COUNT and max(seconds) <= PATIENCE
    assert all(reason and reason.isprintable() and "Traceback" not in reason for reason in source.bad.values())
    assert len(usable) > COUNT / 10 and len(source.bad) > COUNT / 10  # neither door is shut

    command = [sys.executable, "-c", DRAW, str(root), str(tmp_path / "probe.json"), json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=3000)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{[x for x in lines if 'name' in x][-1:]}: {done.returncode}\n{done.stderr[-3000:]}"
    assert {line["name"] for line in lines if "name" in line} == usable | {""}
    draws = [line for line in lines if "name" not in line]
    assert len(draws) == 3 * len(usable) and max(draw["seconds"] for draw in draws) <= PATIENCE
    read = [draw for draw in draws if "error" not in draw]
    assert all(draw["shape"] == [4, 24, 32, 3] and draw["label"] in range(3) for draw in read)
    assert len(read) > 0.99 * len(draws)  # what its test took is there in the training
    refused = [draw["error"] for draw in draws if "error" in draw]
    crashed, slowest = sum("crash" in reason for reason in source.bad.values()), max(draw["seconds"] for draw in draws)
    print(f"{len(usable)} usable, {len(source.bad)} bad, {crashed} by a crash; slowest test {max(seconds):.1f} s;")
    print(f"{len(draws)} draws, slowest {slowest:.2f} s, {len(refused)} refused {refused[:2]}")
