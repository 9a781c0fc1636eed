import errno
import json

import numpy as np
import pytest
import tiny
from PIL import Image
from samplers import SETTINGS, check_gallery, command, config_of, difference, request_of, stirred, together

from cmd_jax.data.shapes import CLASS_NAMES, ShapesSource
from cmd_jax.errors import UserError
from cmd_jax.files import read_json
from cmd_jax.report import samples as writing
from cmd_jax.trained import export, load_trained
from cmd_jax.verbs import requests
from cmd_jax.verbs import sample as sampling

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture(scope="module")
def sampler():
    return stirred()


# The modes.


def make(sampler, **changes):
    """-> (what was drawn, the classes that its captions name, the captions)"""
    captions, stream = sampling.make_samples(sampler, config_of(**changes), tiny.trained())
    return together(stream), np.array([CLASS_NAMES.index(caption.split(",")[0]) for caption in captions]), captions


def test_generate_takes_classes_in_turn(sampler):
    out, labels, captions = make(sampler, num=3, classes="0, red circle moving right")
    assert labels.tolist() == [0, 1, 0]
    assert captions == ["red circle moving left", "red circle moving right", "red circle moving left"]
    drawn = together(sampler.generate(request_of(), SETTINGS))
    assert difference(out["video"][0], drawn["video"][0]) <= 1e-4


def test_vary_motion_names_its_motions(sampler):
    out, labels, captions = make(sampler, mode="vary-motion", num=2, motions=3, classes="0,5")
    assert labels.tolist() == [0, 0, 0, 5, 5, 5] and len(out["video"]) == 6
    assert captions[:2] == [f"{CLASS_NAMES[0]}, motion 1", f"{CLASS_NAMES[0]}, motion 2"]


def test_reconstruct_returns_the_clips_too(sampler):
    out, labels, captions = make(sampler, mode="reconstruct", num=3)
    source = ShapesSource(clips=48, frames=4, height=16, width=24, split="test")
    clips = np.stack([source.clip(i)[0] for i in (0, 16, 32)])  # spread over the data, whose classes may be sorted
    assert np.array_equal(np.round((out["original"] + 1) * 127.5), clips)
    assert out["video"].shape == out["original"].shape
    assert labels.tolist() == [0, 16, 32] and captions == [CLASS_NAMES[i] for i in labels]


def test_animate_an_image_of_another_shape(sampler, tmp_path):
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:, 20:] = 255
    Image.fromarray(picture).save(tmp_path / "image.png")
    out, labels, captions = make(sampler, mode="animate", image=tmp_path / "image.png", num=3, classes="4")
    assert out["content"].shape == (3, 16, 24, 3) and (out["content"] == out["content"][:1]).all()
    assert (out["content"][0, :, :8] == -1).all() and (out["content"][0, :, -8:] == 1).all()
    assert all(difference(out["motion"][i], out["motion"][j]) > 1e-2 for i in range(3) for j in range(i))
    assert labels.tolist() == [4, 4, 4] and captions == [CLASS_NAMES[4]] * 3


def test_animate_the_content_frames_of_clips(sampler):
    out, labels, _ = make(sampler, mode="animate", num=3)
    clips = requests.open_clips(config_of(), tiny.trained(), 3)
    assert difference(out["content"], together(sampler.reconstruct(clips.videos, SETTINGS))["content"]) <= 1e-5
    assert np.array_equal(labels, clips.labels)
    assert make(sampler, mode="animate", num=3, classes="9")[1].tolist() == [9, 9, 9]
    assert len(make(sampler, mode="animate", num=5, data__clips=2)[2]) == 2


def test_models_of_classes_take_no_texts(sampler):
    for changes in ({"prompt": "a"}, {"negative": "a"}, {"prompts_file": "a.txt"}):
        with pytest.raises(UserError, match="=a.*: the model was trained on classes, not on texts; name sampling.cl"):
            make(sampler, **changes)


# The verb.


@pytest.fixture
def workdir(tmp_path, sampler, monkeypatch):
    """An empty workdir for verbs that get the sampler of this module, whatever their config says."""
    monkeypatch.setattr(sampling, "open_sampler", lambda *_: sampler)
    return tmp_path


def test_sample_writes_a_gallery_from_the_stages_of_the_workdir(capsys):
    """And from their weights files alone, in a folder of their own."""
    workdir, weights, gallery = tiny.trained(), tiny.scratch() / "exported", "gallery [bold]x :smile: %d"
    assert command("sample", workdir, num=3, seed=5, output=gallery) == 0
    page, section = check_gallery(workdir / gallery, 3)
    assert CLASS_NAMES[2] in page and section["items"][2]["caption"] == CLASS_NAMES[2]
    told = capsys.readouterr().out
    assert f"3 videos: {workdir / gallery}/index.html\n" in told and "0000.mp4, until all are there\n" in told
    summary = read_json(workdir / gallery / "summary.json")
    assert set(summary["start"]) == {"imports", "weights", "trace", "lower", "compile", "load", "compute", "writing"}
    assert summary["first_video_seconds"] == pytest.approx(sum(summary["start"].values()), abs=0.1)
    assert (summary["samples"], summary["seed"], summary["devices"]) == (3, 5, 1)
    config = json.loads((workdir / gallery / "config.json").read_text())
    assert config["sampling"]["output"] == gallery and config["seed"] == 5

    weights.mkdir(exist_ok=True)
    for stage in ("autoencoder", "content", "motion"):
        export(weights / f"{stage}.safetensors", load_trained(workdir / stage, stage))
    assert command("sample", weights / "new" / "folder", num=3, seed=5, weights=weights) == 0
    for name in ("0000.mp4", "0002.gif", "0001_content.png"):
        assert (weights / "new" / "folder" / "samples" / name).read_bytes() == (workdir / gallery / name).read_bytes()


def test_reconstructions_are_shown_beside_their_clips(workdir):
    assert command("sample", workdir, mode="reconstruct", num=2, title="clips <and> theirs") == 0
    page, section = check_gallery(workdir / "samples", 2)
    assert section["title"] == "clips <and> theirs" and "clips &lt;and&gt; theirs" in page
    with (
        Image.open(workdir / "samples" / "0000.gif") as both,
        Image.open(workdir / "samples" / "0000_content.png") as one,
    ):
        assert one.size == (24, 16)
        assert both.size[0] / both.size[1] == 2 * 24 / 16


def test_a_taken_output_folder_gets_a_number(workdir):
    assert (
        command("sample", workdir, num=1) == command("sample", workdir, num=2) == command("sample", workdir, num=1) == 0
    )
    assert {p.name: len(list(p.glob("*.mp4"))) for p in workdir.iterdir()} == {
        "samples": 1,
        "samples-2": 2,
        "samples-3": 1,
    }


def test_a_failure_while_writing_leaves_no_folder(workdir, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "index.html")

    monkeypatch.setattr(writing, "write_gallery", fail)
    assert command("sample", workdir, num=1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("file=index.html: No space left on device; free space ")
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"content_steps": 0}, "sampling.content_steps=0: must be positive"),
        ({"motion_steps": -1}, "sampling.motion_steps=-1: must be positive"),
        ({"num": 0}, "sampling.num=0: must be positive"),
        ({"motions": 0}, "sampling.motions=0: must be positive"),
        ({"guidance": "nan"}, "sampling.guidance=nan: not a finite number"),
        ({"guidance": "inf"}, "sampling.guidance=inf: not a finite number"),
        ({"guidance": -1}, "sampling.guidance=-1.0: "),
        ({"seed": -1}, "seed=-1: must not be negative"),
        ({"mode": "dream"}, "sampling.mode=dream: not one of the choices; use one of generate, "),
        ({"output": "../other"}, "sampling.output=../other: not the name of a new folder"),
        ({"output": ""}, "sampling.output=: not the name of a new folder"),
        ({"output": "content"}, "sampling.output=content: not the name of a new folder"),
        ({"output": "x" * 5000}, "cannot be written"),
        ({"classes": "red circle moving lef"}, "no such class; did you mean one of: red circle moving left, "),
        ({"mode": "animate", "image": "missing.png"}, "sampling.image=missing.png: cannot be read as an image"),
        ({"mode": "animate", "image": tiny.CONFIG_FILE}, "cannot be read as an image"),
    ],
)
def test_wrong_requests_are_one_line(workdir, capsys, changes, said):
    assert command("sample", workdir, **changes) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert list(workdir.iterdir()) == []
