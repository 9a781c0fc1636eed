"""`cmd-jax doctor --data`: what it says of clips and of a run, and the picture of the first batch."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from data.clip_files import quarters, write_clip
from PIL import Image

from cmd_jax.data.pipeline import BatchPlan
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.data.splits import split_of
from cmd_jax.main import main
from cmd_jax.verbs import doctor_data as doctoring


@pytest.fixture
def examine(monkeypatch, capsys):
    """(argument of tiny.py, flags) -> ({first cell: second cell}, all that it prints)."""
    monkeypatch.setattr(doctoring, "SECONDS", 0.05)

    def run(argument, *flags):
        assert main(["doctor", "--data", f"--config={tiny.CONFIG_FILE}:{argument}", *map(str, flags)]) == 0
        out = capsys.readouterr().out
        cells = ([cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line)
        return dict(cells), out

    return run


def test_generated_clips_and_the_first_batch_as_a_picture(examine, tmp_path):
    rows, out = examine("autoencoder", f"--workdir={tmp_path}", "--config.data.validation=0.25")
    assert rows["clips"] == "48, of which 12 are held out"
    assert rows["frames of a clip"] == "4 to 4 frames, median 4"
    assert re.fullmatch(r"48, of 0 clips \(.*\) to 1 clips \(.*\); 12 have none to train on", rows["classes"])
    assert rows["captions"] == "48 of 48 clips: 5 to 5 words, median 5"
    assert re.fullmatch(r"uint8 4x16x24x3: \d+ to \d+, mean [\d.]+, deviation [\d.]+", rows["video"])
    told = re.match(r"([\d,.]+) clips/s by data.threads=2: ([\d,.]+) steps/s of 4 clips", rows["reading"])
    rate, steps = told.groups()
    assert float(rate.replace(",", "")) == pytest.approx(4 * float(steps.replace(",", "")), rel=0.01)
    assert {"the last run", "it waited for data"}.isdisjoint(rows)

    source, path = ShapesSource(clips=48, frames=4, height=16, width=24), tmp_path / "data-autoencoder.png"
    shown = np.asarray(Image.open(path))
    config = tiny.config_of("autoencoder", data__validation=0.25)
    ids = BatchPlan(split_of(config.data, source).train, 4, 0).ids(0)
    assert shown.shape == (4 * 16 * 8 + 6, 4 * 24 * 8 + 6, 3)
    for row, index in enumerate(ids):
        for column, frame in enumerate(source.clip(index)[0]):
            tile = shown[row * 130 :, column * 194 :][:128:8, :192:8]
            assert np.array_equal(tile, frame)
        assert f"{row + 1}: {source.name(index)}, {source.class_names[index]}, 'a {source.class_names[index]}'" in out


def test_a_run_is_compared_with(examine, tmp_path):
    """By its summary, or by its log where it has not ended; each process reads its part of a batch."""
    folder = tmp_path / "content"
    folder.mkdir()
    lines = [{"step": 1}, {"step": 2, "steps_per_second": 10.0, "data_wait": 0.5}]
    lines += [{"step": 3, "steps_per_second": 1e-6, "data_wait": 0.25}, {"step": 3, "validation_loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ste')
    rows, _ = examine("content", f"--workdir={tmp_path}")
    assert re.fullmatch(r"1e-06 steps/s; reading is [\d,.]+ times as fast", rows["the last run"])
    assert rows["it waited for data"] == "25.0% of its time"  # the slow stretch was nearly all of it
    (folder / "summary.json").write_text(json.dumps({"steps_per_second": 1e9, "processes": 4}))
    rows, _ = examine("content", f"--workdir={tmp_path}")
    told = r"1,000,000,000 steps/s by 4 processes, each .*; reading is .* times as fast: training waits for it"
    assert re.fullmatch(told, rows["the last run"])


def test_a_folder_of_videos(examine, tmp_path, monkeypatch):
    root = tmp_path / "clips"
    for number, length in enumerate((4, 6, 6, 9, 5)):
        write_clip(root / "walk" / f"{number}.avi", quarters(length))
    write_clip(root / "run" / "0.avi", quarters(4))
    (root / "run" / "1.avi").write_bytes(b"no video")
    monkeypatch.chdir(tmp_path)
    more = ("--config.data.source=folder", f"--config.data.root={root}", "--config.data.max_bad_fraction=0.5")
    rows, out = examine("autoencoder", *more)
    assert rows["clips"] == "6" and rows["frames of a clip"] == "4 to 9 frames, median 6"
    assert rows["left out"].startswith("1, the first: run/1.avi ")
    assert rows["classes"] == "2, of 1 clips (run) to 5 clips (walk); 0 have none to train on"
    assert "captions" not in rows
    low, high = map(int, re.search(r": (\d+) to (\d+),", rows["video"]).groups())
    assert low < 60 and high > 200
    assert (tmp_path / "data-autoencoder.png").is_file() and not (tmp_path / "probe.jsonl").exists()
    assert re.search(r"^1: (walk|run)/\d.avi, (walk|run)$", out, flags=re.M)


@pytest.mark.xdist_group("tiny")
def test_latents_are_read_from_their_store(examine):
    """Two of those of each clip are rows of eight: content frame and motion latent."""
    run = tiny.trained()
    rows, out = examine("content", f"--workdir={run}", "--config.data.validation=0.25")
    count = 36 * tiny.config_of("content").latents.starts
    assert rows["stored latents"] == f"{count} of clips to train on"
    assert re.match(r"float\d+ 16x24x3: ", rows["content"]) and re.match(r"float\d+ 4x10x4: ", rows["motion"])
    assert "video" not in rows and rows["it waited for data"].endswith("% of its time")
    path = run / "data-content.png"
    assert Image.open(path).size[0] == 2 * 24 * 8 + 2 and f"{path}: " in out
    path.unlink()
    gone = ("--config.data.source=folder", "--config.data.root=nowhere")
    rows, out = examine("content", f"--workdir={run}", *gone)
    assert "clips" not in rows and re.search(r"^1: \w+", out, flags=re.M)
    path.unlink()
    rows, _ = examine("content", "--config.latents.store=none")
    assert rows["stored latents"].startswith("none yet") and "video" in rows
    Path("data-content.png").unlink()


def test_captions_are_counted_in_the_tokens_of_the_model(examine, tmp_path):
    for number in range(4):
        write_clip(tmp_path / f"{number}.avi", quarters(4))
    texts = ["a", "a dog", "a dog " * 37, "a dog " * 38]
    lines = [json.dumps({"file_name": f"{number}.avi", "text": text}) for number, text in enumerate(texts)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    more = ("--config.data.source=folder", f"--config.data.root={tmp_path}", f"--workdir={tmp_path / 'run'}")
    rows, _ = examine("motion,kind=text", *more)
    told = re.fullmatch(r"4 of 4 clips: 3 to (\d+) tokens, median (\d+); (\d) are cut after 77", rows["captions"])
    words, shorter, cut = told.groups()
    assert int(words) == 2 + 76 and int(shorter) > 3 and cut == "1"


def test_there_is_nothing_to_look_at_for_sampling(capsys):
    assert main(["doctor", "--data", f"--config={tiny.CONFIG_FILE}:sample"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("config=sample: ")
