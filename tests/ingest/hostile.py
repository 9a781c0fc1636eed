"""A tree in UCF-101's layout of 200 clips of real footage, 20 of them hostile, and why these are left out."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
from data.clip_files import numbered, write_clip, write_huge_header, write_sound
from processes import ROOT

CLIPS, FRAMES, NEEDED = 200, 24, 16
# In PYTHONPATH, this makes the decoding child crash or hang on files of such names, as no file of ours does to FFmpeg.
SITE = """
import os, sys, time
if "cmd_jax.ingest.decoder" in sys.orig_argv:
    from cmd_jax.data import video
    open_video = video.open_video
    def hostile(path, *rest):
        if "segfault" in path:
            os.kill(os.getpid(), 11)
        while "hang" in path:
            time.sleep(1)
        return open_video(path, *rest)
    video.open_video = hostile
"""


def damage(root: Path, good: Path) -> dict[str, str]:
    """Write 20 hostile files: name -> a part of the reason."""
    data, folder = good.read_bytes(), root / "Bikes"

    def put(name: str, content: bytes = data) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    put("empty.avi", b"")
    put("text.avi", b"not a video\n" * 100)
    put("random.mp4", random.Random(0).randbytes(20_000))
    put("pointer.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    put("header.avi", data[:600])
    put("half.avi", data[: len(data) // 2])
    put("damaged.avi", data[: len(data) // 3] + bytes(len(data) // 2) + data[len(data) * 5 // 6 :])
    put("concat.mp4", b"ffconcat version 1.0\nfile /etc/hostname\n")
    put("playlist.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n")
    write_sound(folder / "sound.mp4")
    write_clip(folder / "one.avi", numbered(1))
    write_clip(folder / "short.mp4", numbered(NEEDED - 1))
    write_huge_header(folder / "huge.avi", 100_000, 100_000)
    write_huge_header(folder / "large.avi", 16_000, 16_000)
    first, second = (write_clip(root.parent / f"{side}.m1v", numbered(12, side, side)) for side in (48, 96))
    put("grows.m1v", first.read_bytes() + second.read_bytes())
    (folder / "lost.avi").symlink_to("nowhere.avi")
    (folder / "folder.avi").mkdir()
    os.mkfifo(folder / "pipe.avi")
    put("segfault.avi")
    put("hang.avi")
    return {
        "empty.avi": "is empty (zero bytes)",
        "text.avi": "is not a video",
        "random.mp4": "is not a video",
        "pointer.mp4": "is not a video",
        "header.avi": "",
        "half.avi": "is truncated",
        "damaged.avi": "is truncated",
        "concat.mp4": "is not a video",
        "playlist.mp4": "is not a video",
        "sound.mp4": "has no video stream (audio only)",
        "one.avi": "has only 1 frame; 16 are needed",
        "short.mp4": "has only 15 frames; 16 are needed",
        "huge.avi": "",
        "large.avi": "",
        "grows.m1v": "changes its frame size on the way (48x48 to 96x96)",
        "lost.avi": "is missing",
        "folder.avi": "is not a regular file",
        "pipe.avi": "is not a regular file",
        "segfault.avi": "crashes the decoder (signal SIGSEGV)",
        "hang.avi": "hangs the decoder",
    }


def tree(folder: Path) -> tuple[Path, dict[str, str]]:
    """-> (root, name -> a part of the reason why it is left out)."""
    root = folder / "ucf"
    cut = [sys.executable, ROOT / "launch/real_clips.py", "--out", root, "--frames", str(FRAMES), "--step", "1"]
    subprocess.run([*cut, "--size", "96"], check=True, stdout=subprocess.DEVNULL)
    lists = root / "ucfTrainTestlist"
    train, good = lists / "trainlist01.txt", []
    bad = {f"Bikes/{name}": why for name, why in damage(root, root / "Bikes/v_Bikes_g01_c01.avi").items()}
    good = train.read_text().splitlines()[: CLIPS - len(bad)]
    assert len(good) == CLIPS - len(bad) == 180
    number = {line.split("/")[0]: line.split()[1] for line in good}["Bikes"]
    rows = good + [f"{name} {number}" for name in bad]
    order = np.random.default_rng(0).permutation(len(rows))
    train.write_text("".join(f"{rows[i]}\n" for i in order))
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(SITE)
    return root, bad
