"""Sampling into a bucket: an output is there whole or is none, and nothing is left on this machine."""

import errno
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import tiny
from processes import Job
from samplers import check_gallery, command, stirred

from cmd_jax.config import STAGES
from cmd_jax.data.prompts import read_prompts
from cmd_jax.errors import UserError
from cmd_jax.files import as_path, read_json
from cmd_jax.loading import load_sampler
from cmd_jax.main import main
from cmd_jax.report import collect
from cmd_jax.report import samples as writing
from cmd_jax.report.notebook import Videos
from cmd_jax.report.samples import UNFINISHED, OutputFolder
from cmd_jax.report.video import write_png
from cmd_jax.trained import export, load_trained
from cmd_jax.verbs import evaluate as evaluating
from cmd_jax.verbs import sample as sampling
from cmd_jax.verbs.requests import read_image

pytestmark = pytest.mark.xdist_group("tiny")


@pytest.fixture
def sampler(monkeypatch):
    for verb in (sampling, evaluating):
        monkeypatch.setattr(verb, "open_sampler", lambda *_: stirred())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder; afterwards nothing is in it, and nothing but empty folders in the cache."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == [] and not [x for x in tmp_path.rglob("*") if x.is_file()]


def exported(bucket, *stages: str) -> str:
    """The weights of the tiny run -> where they are."""
    for stage in stages or STAGES:
        export(as_path(f"{bucket}/weights/{stage}.safetensors"), load_trained(tiny.trained() / stage, stage))
    return f"{bucket}/weights"


def test_weights_and_videos_in_a_bucket(s3, here, capsys):
    """As from a workdir of this machine, byte by byte."""
    assert command("sample", f"{s3}/run", num=2, seed=5, weights=exported(s3)) == 0
    page, _ = check_gallery(as_path(f"{s3}/run/samples"), 2)
    assert f"2 videos: {s3}/run/samples/index.html\n" in capsys.readouterr().out
    assert {name.split("/")[0] for name in s3.names()} == {"weights", "run"}
    local = tiny.trained() / "beside"
    assert command("sample", tiny.trained(), num=2, seed=5, output=local.name) == 0
    for name in ("0000.mp4", "0001.gif", "0001_content.png", "grid.png", "samples.json", "index.html"):
        assert s3.get(f"run/samples/{name}") == (local / name).read_bytes(), name


def test_the_stages_of_a_workdir_in_a_bucket(gcs, here):
    """Their checkpoints, that is."""
    trained = load_sampler(tiny.trained())
    for stage in STAGES:
        gcs.put_folder(tiny.trained() / stage, f"run/{stage}")
    read = load_sampler(f"{gcs}/run")
    assert jax.tree.all(jax.tree.map(np.array_equal, read.params, trained.params))
    assert read.class_names == trained.class_names


def test_evaluate_and_a_page_of_several_outputs(gcs, here, sampler):
    assert command("evaluate", f"{gcs}/run", evaluation__videos=3, title="evaluated") == 0
    assert command("sample", f"{gcs}/run", mode="reconstruct", num=1, title="clips") == 0
    summary = json.loads(gcs.get("run/samples/summary.json"))
    assert summary["scores"]["attributes"]["count"] == 3 and "run/samples/0001.mp4" in gcs.names()
    page, folders = f"{gcs}/run/index.html", [f"{gcs}/run/{name}" for name in ("samples", "samples-2")]
    assert collect.main([page, *folders]) == 0
    text = gcs.get("run/index.html").decode()
    assert 'src="samples/0001.mp4"' in text and 'src="samples-2/0000.mp4"' in text and "evaluated" in text
    gcs.delete("run/samples/0001.mp4")
    assert collect.main([page, *folders]) == 2


def test_a_failure_while_writing_leaves_nothing(gcs_stub, here, sampler, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.EIO, "the server's own fault", "index.html")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_gallery", fail)
        assert command("sample", f"{gcs_stub}/run", num=1) == 2
    assert gcs_stub.names() == []
    gcs_stub.server.order(deny="write")
    assert command("sample", f"{gcs_stub}/run", num=1) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"workdir={gcs_stub}/run: cannot be written (no right")
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "0.2")
    gcs_stub.server.order(share=1.0)
    assert command("sample", f"{gcs_stub}/run", num=1) == 3
    gcs_stub.server.order(share=0.1, seed=1)
    monkeypatch.delenv("CMD_JAX_RETRY_SECONDS")
    assert command("sample", f"{gcs_stub}/run", num=1) == 0
    gcs_stub.server.order()
    check_gallery(as_path(f"{gcs_stub}/run/samples"), 1)


def test_a_name_is_claimed_by_one(gcs_stub, here):
    """Of eight that start at once; an output with its mark is not done."""
    outputs = [OutputFolder(as_path(f"{gcs_stub}/run"), "samples") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(OutputFolder._make, outputs))
    assert sorted(made) == sorted(f"{gcs_stub}/run/samples{n}" for n in ("", *(f"-{i}" for i in range(2, 9))))
    assert gcs_stub.names() == sorted(f"run/{path.rpartition('/')[2]}/{UNFINISHED}" for path in made)


def test_videos_of_a_notebook(s3, here):
    folder = Videos(np.zeros((1, 4, 16, 24, 3), np.uint8), ["a text"]).save(f"{s3}/clips")
    assert s3.names() == ["clips/0000.mp4", "clips/metadata.csv"] and str(folder) == f"{s3}/clips"


def test_prompts_and_an_image_of_a_bucket(gcs, here):
    gcs.put("prompts.csv", "prompt,class\na dög runs,dog\n".encode())
    assert read_prompts(f"{gcs}/prompts.csv") == [("a dög runs", "dog")]
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    write_png(as_path(f"{gcs}/image.png"), picture)
    np.testing.assert_allclose(read_image(f"{gcs}/image.png", 16, 24), picture / 127.5 - 1, atol=1e-6)
    for read in (read_prompts, lambda path: read_image(path, 16, 24)):
        with pytest.raises(UserError, match=f"={gcs}/none.txt: cannot be read"):
            read(f"{gcs}/none.txt")


@pytest.mark.slow
def test_two_processes_write_their_own(gcs, tmp_path):
    weights = exported(gcs, "autoencoder")
    arguments = ["sample", f"--config={tiny.CONFIG_FILE}:sample", f"--workdir={gcs}/run", f"--config.weights={weights}"]
    arguments += ["--config.sampling.batch_size=4", "--config.sampling.num=4", "--config.sampling.mode=reconstruct"]
    with Job(tmp_path / "logs", *arguments, devices=2) as job:
        assert job.wait() == [0, 0], job.out(0) + job.out(1)
    check_gallery(as_path(f"{gcs}/run/samples"), 4)
    assert read_json(as_path(f"{gcs}/run/samples/summary.json"))["processes"] == 2
    assert {name.split("/")[1] for name in gcs.names("run/")} == {"samples"}
    assert not [x for x in (tmp_path / "cache").rglob("*") if x.is_file()]


def test_a_signal_in_the_middle_leaves_nothing(gcs, tmp_path):
    """Of the uploads that are under way too."""
    arguments = ["sample", f"--config={tiny.CONFIG_FILE}:sample", f"--workdir={gcs}/run", "--num=100000"]
    arguments += [f"--config.weights={exported(gcs)}", "--config.sampling.batch_size=8"]
    with Job(tmp_path / "logs", *arguments, count=1, devices=1) as job:
        job.until(lambda: len(gcs.names("run/")) > 20)
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.wait(30) == [0], job.out()
    assert job.out().splitlines()[-1] == "stopped by a signal; nothing was written" and gcs.names("run/") == []


def test_what_is_missing_is_one_line(gcs, here, capsys):
    for verb in ("sample", "evaluate"):
        assert command(verb, f"{gcs}/none") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"workdir={gcs}/none/autoencoder: holds no trained autoencoder stage; train ")
    for stage, problem in (("sample", "no such file"), ("content", "holds no trained autoencoder stage")):
        given = "--config.weights" if stage == "sample" else "--config.latents.autoencoder"
        assert main(["doctor", f"--config={tiny.CONFIG_FILE}:{stage}", f"{given}={gcs}/none"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"={gcs}/none" in line and problem in line
    with pytest.raises(UserError, match=f"^path={gcs}/weights/autoencoder.safetensors: no such file; "):
        sampling.open_sampler(tiny.config_of("sample", weights=f"{gcs}/weights"), None)
    assert gcs.names() == []
