import errno
import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from PIL import Image
from processes import Job

from cmd_jax.data.pipeline import to_global
from cmd_jax.data.shapes import CLASS_NAMES, ShapesSource
from cmd_jax.errors import UserError
from cmd_jax.files import read_json
from cmd_jax.main import main
from cmd_jax.report import samples as writing
from cmd_jax.sharding import BATCH_AXES, partitioning
from cmd_jax.trained import export, load_trained
from cmd_jax.verbs import evaluate as evaluating
from cmd_jax.verbs import requests
from cmd_jax.verbs import sample as sampling

pytestmark = pytest.mark.xdist_group("tiny")
LABELS = np.array([0, 5, 17, 30, 47], np.int32)


def config_of(**changes):
    """The sample config; changes are keys of `sampling`, or `group__key`."""
    return tiny.config_of("sample", **{k if "__" in k else f"sampling__{k}": v for k, v in changes.items()})


def build(**changes):
    """The sampler of the tiny run, its denoisers stirred: six steps of training hardly make them heed the class."""
    sampler = sampling.load_sampler(config_of(**changes), tiny.trained())
    rng = np.random.default_rng(0)
    for stage in ("content", "motion"):
        stir = lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32)  # noqa: E731
        sampler.params[stage] = jax.tree.map(stir, sampler.params[stage])
    return sampler


@pytest.fixture(scope="module")
def sampler():
    return build()


def request_of(labels=LABELS, first=0):
    index = np.arange(first, first + len(labels), dtype=np.int32)
    return {"index": index, "variant": np.zeros_like(index), "label": np.asarray(labels, np.int32)}


@pytest.fixture(scope="module")
def drawn(sampler):
    """Five samples in batches of two."""
    return sampler.generate(request_of())


def difference(a, b):
    return np.abs(a - b).max()


# The programs.


def test_samples_have_the_shapes_of_the_clips_and_differ(drawn):
    assert drawn["video"].shape == (5, 4, 16, 24, 3)
    assert drawn["content"].shape == (5, 16, 24, 3)
    assert drawn["motion"].shape == (5, 4, 10, 4)
    assert all(np.isfinite(x).all() for x in drawn.values())
    assert np.abs(drawn["video"]).max() <= 1
    for name in drawn:
        assert all(difference(drawn[name][i], drawn[name][j]) > 1e-2 for i in range(5) for j in range(i))


def test_a_sample_does_not_depend_on_its_batch(sampler, drawn):
    """Neither on the batch size (1, 2 or 4, the last batch filled up or not) nor on the other samples."""
    for size in (1, 4):
        other = build(batch_size=size).generate(request_of())
        assert all(difference(other[name], drawn[name]) <= 1e-4 for name in drawn)
    labels = LABELS.copy()
    labels[[0, 1, 3]] = 7
    other = sampler.generate(request_of(labels))
    assert difference(other["video"][[2, 4]], drawn["video"][[2, 4]]) <= 1e-4
    assert all(difference(other["video"][i], drawn["video"][i]) > 1e-2 for i in (0, 1, 3))
    alone = sampler.generate(request_of(LABELS[2:3], first=2))
    assert difference(alone["video"][0], drawn["video"][2]) <= 1e-4


def test_seed_decides(sampler, drawn, monkeypatch):
    assert all(np.array_equal(sampler.generate(request_of())[name], drawn[name]) for name in drawn)
    monkeypatch.setattr(sampler, "seed", 1)
    other = sampler.generate(request_of())
    assert all(difference(other["video"][i], drawn["video"][i]) > 1e-2 for i in range(5))


def test_generating_is_one_program_with_both_samplers_inside(monkeypatch):
    sampler, decoded = build(batch_size=1), []
    finish = sampler._finish
    monkeypatch.setattr(sampler, "_finish", lambda *latents: decoded.append(1) or finish(*latents))
    sampler.generate(request_of())
    sampler.generate(request_of(LABELS[:2]))
    assert decoded == [1]  # seven batches, traced once

    arguments = sampler.params, {k: v[:1] for k, v in request_of().items()}, jax.random.key(0), jnp.float32(2)
    with partitioning(sampler.mesh, sampler.rules):
        program = jax.make_jaxpr(sampler._generate)(*arguments)
    scans = [e.params["length"] for e in program.eqns if e.primitive.name == "scan"]
    assert scans[:2] == [3, 4]  # steps of content and motion; what follows are blocks of the decoder
    content, image, motion, video = (v.aval.shape for v in program.jaxpr.outvars)
    assert (content, motion, video) == ((1, 16, 24, 3), (1, 4, 10, 4), (1, 4, 16, 24, 3)) and image == content


def test_results_are_laid_out_over_the_batch_axes(sampler):
    rows = {i: {k: v[i] for k, v in request_of().items()} for i in range(2)}
    with partitioning(sampler.mesh, sampler.rules):
        batch = to_global(rows, 2, sampler.mesh)
        out = sampler._programs["generate"](sampler.params, batch, jax.random.key(0), sampler.guidance)
    assert {x.sharding.spec for x in out.values()} == {PartitionSpec(BATCH_AXES)}


def test_guidance_of_one_is_none(drawn):
    unguided = build(guidance=1)
    assert unguided.guidance is None
    plain = unguided.generate(request_of())
    weighed = unguided._in_batches("generate", request_of(), jax.random.key(0), jnp.float32(1))
    assert all(difference(plain[name], weighed[name]) <= 1e-4 for name in plain)
    assert all(difference(plain[name], drawn[name]) > 1e-2 for name in plain)


def test_gaussian_models_of_half_precision_sample():
    """eps with a learned range; content clipped to [-1, 1]. With eta = 1 noise is added, from keys of the sample."""
    weights = {"weights": str(tiny.gaussian_weights())}

    def build(**changes):
        config = config_of(**changes)
        config.update(weights)
        return sampling.load_sampler(config, Path("nowhere"))

    ddim = build().generate(request_of())
    assert all(np.isfinite(x).all() for x in ddim.values())
    assert np.abs(ddim["content"]).max() <= 1
    noisy, alone = (build(eta=1.0, batch_size=size).generate(request_of()) for size in (2, 1))
    assert all(difference(noisy[name], ddim[name]) > 1e-2 for name in ddim)
    assert all(difference(noisy[name], alone[name]) <= 1e-4 for name in ddim)
    with pytest.raises(UserError, match="sampling.content_steps=21: more than the 20 training steps"):
        build(content_steps=21)
    with pytest.raises(UserError, match="sampling.motion_solver=heun: not one of the choices; use one of ddim, ddpm"):
        build(motion_solver="heun")
    with pytest.raises(UserError, match="sampling.eta=2.0: outside 0 to 1"):
        build(eta=2.0).generate(request_of())


def test_eta_is_refused_where_the_solver_has_none():
    with pytest.raises(UserError, match="sampling.eta=0.5: the content solver is euler, not ddim; set it to 0.0"):
        build(eta=0.5)


# The modes.


def make(sampler, **changes):
    """-> (what was drawn, the classes that its captions name, the captions)"""
    out, captions = sampling.make_samples(sampler, config_of(**changes), tiny.trained())
    return out, np.array([CLASS_NAMES.index(caption.split(",")[0]) for caption in captions]), captions


def test_generate_takes_classes_in_turn(sampler, drawn):
    out, labels, captions = make(sampler, num=3, classes="0, red circle moving right")
    assert labels.tolist() == [0, 1, 0]
    assert captions == ["red circle moving left", "red circle moving right", "red circle moving left"]
    assert difference(out["video"][0], drawn["video"][0]) <= 1e-4


def test_vary_motion_keeps_the_content_frames(sampler, drawn):
    out, labels, captions = make(sampler, mode="vary-motion", num=2, motions=3, classes="0,5")
    assert labels.tolist() == [0, 0, 0, 5, 5, 5]
    assert captions[:2] == [f"{CLASS_NAMES[0]}, motion 1", f"{CLASS_NAMES[0]}, motion 2"]
    content = out["content"].reshape(2, 3, 16, 24, 3)
    assert (content == content[:, :1]).all()
    assert difference(content[:, 0], drawn["content"][:2]) <= 1e-4
    for name in ("motion", "video"):
        assert difference(out[name][[0, 3]], drawn[name][:2]) <= 1e-4  # the first motion is that of `generate`
        assert all(difference(out[name][i], out[name][j]) > 1e-2 for i in range(3) for j in range(i))


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


def test_labels_of_clips_are_matched_to_the_model_s_by_name():
    """The held-out part may lack classes, and a class that has no usable clip is none of the data's."""
    clips = requests.Clips(np.zeros(4), np.array([1, 0, 1, 2]), None, ("b", "d"))
    assert requests.labels_of(clips, ("a", "b", "c", "d"), "here").tolist() == [3, 1, 3, 4]  # the last has no class
    assert requests.labels_of(clips, (), "here").tolist() == [0, 0, 0, 0]
    with pytest.raises(UserError, match="^data=here: .*: d; name sampling.classes$"):
        requests.labels_of(clips, ("a", "b"), "here")
    with pytest.raises(UserError, match="^data=here: .* it has none; name sampling.classes$"):
        requests.labels_of(clips._replace(labels=np.zeros(4, int), class_names=()), ("a",), "here")


def test_animate_the_content_frames_of_clips(sampler):
    out, labels, _ = make(sampler, mode="animate", num=3)
    clips = requests.read_clips(config_of(), tiny.trained(), 3)
    assert np.array_equal(out["content"], sampler.reconstruct({"video": clips.videos})["content"])
    assert np.array_equal(labels, clips.labels)
    assert make(sampler, mode="animate", num=3, classes="9")[1].tolist() == [9, 9, 9]
    config = config_of(mode="animate", num=5, data__clips=2)
    assert sampling.make_samples(sampler, config, tiny.trained())[0]["video"].shape[0] == 2


def test_classes_by_name_and_number():
    names = ("10", "cat", "dog, big", "1")
    assert requests.choose_labels("", names, 6).tolist() == [0, 1, 2, 3, 0, 1]
    assert requests.choose_labels(" cat ,0,", names, 3).tolist() == [1, 0, 1]
    assert requests.choose_labels("10,1", names, 2).tolist() == [0, 3]  # a name goes before a number
    assert requests.choose_labels("", (), 2).tolist() == [0, 0]
    for wrong in ("4", "-1", "cta", "9" * 5000, "²", "🐈"):
        with pytest.raises(UserError, match="no such class; did you mean one of: ") as error:
            requests.choose_labels(wrong, names, 1)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean one of: cat, "):
        requests.choose_labels("cta", names, 1)
    with pytest.raises(UserError, match="without classes"):
        requests.choose_labels("cat", (), 1)


def test_models_of_classes_take_no_texts():
    for changes in ({"prompt": "a"}, {"negative": "a"}, {"prompts_file": "a.txt"}):
        with pytest.raises(UserError, match="=a.*: the model was trained on classes, not on texts; name sampling.cl"):
            build(**changes)


# The verbs.


@pytest.fixture
def workdir(tmp_path, sampler, monkeypatch):
    """An empty workdir for verbs that get the sampler of this module, whatever their config says."""
    for verb in (sampling, evaluating):
        monkeypatch.setattr(verb, "load_sampler", lambda *_: sampler)
    return tmp_path


def command(verb, workdir, **changes):
    arguments = [verb, f"--config={tiny.CONFIG_FILE}:sample", f"--workdir={workdir}"]
    changes = {k if "__" in k or k in ("seed", "weights") else f"sampling__{k}": v for k, v in changes.items()}
    return main(arguments + [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()])


def check_gallery(folder, count):
    names = [f"{i:04d}{end}" for i in range(count) for end in (".mp4", ".gif", "_content.png")]
    names += ["grid.gif", "grid.png", "content_grid.png", "index.html", "samples.json", "summary.json", "config.json"]
    assert {p.name for p in folder.iterdir()} == set(names)
    assert all((folder / name).stat().st_size > 30 for name in names)
    page = (folder / "index.html").read_text()
    linked = re.findall(r'src="([^"]+)"', page)
    assert len(linked) == 2 * count and all((folder / name).is_file() for name in linked)
    assert not re.search(r"https?://", page)
    section = read_json(folder / "samples.json")
    assert [item["video"] for item in section["items"]] == [f"{i:04d}.mp4" for i in range(count)]
    return page, section


def test_sample_writes_a_gallery_from_the_stages_of_the_workdir(capsys):
    """And from their weights files alone, in a folder of their own."""
    workdir, weights, gallery = tiny.trained(), tiny.scratch() / "exported", "gallery [bold]x :smile: %d"
    assert command("sample", workdir, num=3, seed=5, output=gallery) == 0
    page, section = check_gallery(workdir / gallery, 3)
    assert CLASS_NAMES[2] in page and section["items"][2]["caption"] == CLASS_NAMES[2]
    assert f"3 videos: {workdir / gallery}/index.html\n" in capsys.readouterr().out
    summary = read_json(workdir / gallery / "summary.json")
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


def test_wrong_stages_are_one_line(tmp_path, capsys):
    def said(workdir, **changes):
        assert command("sample", workdir, **changes) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith(("WARNING", "I0000"))]
        return line

    assert "holds no trained autoencoder stage; train the autoencoder stage there first" in said(tmp_path)
    assert "no such file" in said(tmp_path, weights=tmp_path / "missing")
    exported = {stage: tiny.trained() / stage / "ema.safetensors" for stage in ("autoencoder", "content", "motion")}
    for stage, path in exported.items():
        (tmp_path / f"{stage}.safetensors").symlink_to(path)
    assert "data.height=20: the weights are for 16" in said(tmp_path, weights=tmp_path, data__height=20)
    assert "sampling.content_solver=ddim: not one of the choices; use one of euler, heun" in said(
        tmp_path, weights=tmp_path, content_solver="ddim"
    )
    (tmp_path / "motion.safetensors").unlink()
    (tmp_path / "motion.safetensors").symlink_to(exported["content"])
    assert "is a content stage; give one of the motion stage" in said(tmp_path, weights=tmp_path)
    content = load_trained(exported["content"], "content")
    (tmp_path / "motion.safetensors").unlink()
    (tmp_path / "motion.safetensors").symlink_to(exported["motion"])
    # Of other numbers, or of the same ones in another model.
    known = content.metadata.autoencoder
    for changes in ({"digest": "another", "params": "another"}, {"config": known.config | {"model.heads": 4}}):
        (tmp_path / "content.safetensors").unlink()
        metadata = replace(content.metadata, autoencoder=replace(known, **changes))
        export(tmp_path / "content.safetensors", content._replace(metadata=metadata))
        assert "trained with another autoencoder" in said(tmp_path, weights=tmp_path)
    content.config.model.width = 32
    export(tmp_path / "content.safetensors", content)
    line = said(tmp_path, weights=tmp_path)
    assert line.startswith("weights content.safetensors/") and "this config wants ((" in line


# Scores.


def real_clips(labels):
    """Clips of the dataset itself, larger than the tiny stages make them so that the oracle can read them."""
    source = ShapesSource(clips=48 * 3, split="test")
    clips = np.stack([source.clip(label + 48 * (i % 3))[0] for i, label in enumerate(labels)])
    return {"video": clips / np.float32(127.5) - 1, "image": clips[:, 0] / np.float32(127.5) - 1}


def test_evaluate_scores_real_clips_right(workdir, sampler, monkeypatch, capsys):
    monkeypatch.setattr(sampler, "generate", lambda batch: real_clips(batch["label"]))
    assert command("evaluate", workdir, evaluation__videos=96, title="real clips") == 0
    summary = read_json(workdir / "samples" / "summary.json")
    scores = summary["scores"]["attributes"]
    assert scores["count"] == summary["samples"] == 96
    out = capsys.readouterr().out
    for name, chance in (("color", 1 / 4), ("direction", 1 / 4), ("shape", 1 / 3), ("all", 1 / 48)):
        assert scores[name]["correct"] >= 0.99 * 96
        assert scores[name]["accuracy"] == scores[name]["correct"] / 96
        assert scores[name]["chance"] == pytest.approx(chance)
        assert f"{scores[name]['correct']}/96" in out and f"{chance:.1%}" in out
    reconstruction = summary["scores"]["reconstruction_psnr"]
    assert np.isfinite(reconstruction["mean"]) and reconstruction["clips"] == 3
    assert f"{reconstruction['mean']:.2f} dB PSNR over 3 clips" in out
    _, section = check_gallery(workdir / "samples", 2)
    assert section["table"][1][0] == "reconstruction PSNR" and len(section["table"]) == 6
    assert section["title"] == "real clips"


def test_evaluate_scores_clips_of_other_classes_at_chance(workdir, sampler, monkeypatch):
    shuffled = np.random.default_rng(0).permutation(96)
    monkeypatch.setattr(sampler, "generate", lambda batch: real_clips(batch["label"][shuffled]))
    assert command("evaluate", workdir, evaluation__videos=96) == 0
    scores = read_json(workdir / "samples" / "summary.json")["scores"]["attributes"]
    assert scores["all"]["accuracy"] < 0.1
    for name in ("color", "direction", "shape"):
        assert abs(scores[name]["accuracy"] - scores[name]["chance"]) < 0.15


def test_evaluate_generates_as_many_as_asked(workdir):
    assert command("evaluate", workdir, evaluation__videos=3) == 0
    summary = read_json(workdir / "samples" / "summary.json")
    assert summary["scores"]["attributes"]["count"] == 3
    check_gallery(workdir / "samples", 2)


def test_evaluate_scores_generated_videos_only(workdir, capsys):
    assert command("evaluate", workdir, mode="reconstruct") == 2
    assert "evaluate scores generated videos; use sampling.mode=generate" in capsys.readouterr().err


def test_a_signal_in_the_middle_of_evaluate_leaves_nothing_half_done(tmp_path):
    """It has nothing to save; what it has written so far is removed."""
    run = tiny.trained()
    more = ["--config.evaluation.videos=100000", "--config.sampling.output=stopped"]
    arguments = ["evaluate", f"--config={tiny.CONFIG_FILE}:sample", f"--workdir={run}", *more]
    with Job(tmp_path, *arguments, count=1, devices=1) as job:
        job.until(lambda: list(run.glob(".tmp-*-stopped")))
        sent = time.monotonic()
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.wait(30) == [0], job.out()
        assert time.monotonic() - sent < 10
    assert job.out().splitlines()[-1] == "stopped by a signal; nothing was written"
    assert not list(run.glob("*stopped*")) and not list(run.glob(".tmp*"))
