"""Two real processes of four devices each: they train, agree, stop together, die, and resume."""

import json
import shutil
import signal
import time

import pytest
import tiny
from processes import Job, free_port, ledger, steps, train

from cmd_jax.files import as_path, read_json

pytestmark = pytest.mark.timeout(300)
grouped = pytest.mark.xdist_group("processes")  # by the run that they compare with
LONG = ("--config.train.steps=100000",)
MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
STEADY = ("--config.optimizer.decay=constant", "--config.optimizer.learning_rate=1e-3", *MESH)  # train.steps may change
STEADY += ("--config.data.validation=0.25",)


def checkpoints(folder):
    return sorted(int(p.parent.name) for p in folder.glob("checkpoints/*/manifest.json") if p.parent.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was left alone, but for three validations: 12 steps on 2 processes x 4 devices."""
    folder = tmp_path_factory.mktemp("whole")
    more = ("--config.train.steps=12", "--config.train.checkpoint_every=4", "--config.train.keep=3", *STEADY)
    more += ("--config.train.validate_every=4",)
    with Job(folder, *train(folder, "autoencoder", *more)) as job:
        assert job.wait() == [0, 0], job.out(0) + job.out(1)
    return folder


@grouped
@pytest.mark.parametrize("place", ["disk", pytest.param("gcs", marks=pytest.mark.slow)])
def test_killed_peer_is_named_and_the_job_resumes_bit_for_bit(whole, tmp_path, place, request):
    workdir = tmp_path if place == "disk" else as_path(f"{request.getfixturevalue(place)}/run")
    folder = workdir / "autoencoder"
    more = (
        "--config.train.steps=12",
        "--config.train.checkpoint_every=3",
        "--config.processes.peer_timeout=5",
        *STEADY,
    )
    slow = "--config.data.threads=1"
    with Job(tmp_path / "first", *train(workdir, "autoencoder", *more, slow)) as job:
        job.until(lambda: checkpoints(folder))
        job.processes[1].kill()
        killed = time.monotonic()
        code = job.processes[0].wait(timeout=60)
        if code == 0:
            pytest.fail("all 12 steps were done before the kill")
        assert code == 3, job.out(0)
        assert time.monotonic() - killed < 15
        (line,) = [line for line in job.out(0).splitlines() if line.startswith("processes=2: ")]
        assert "process 1 (host " in line and "last heard of" in line
    if place != "disk":
        assert read_json(folder / ".lock")["state"] == "free"  # the next start need not wait, wherever it is
    (record,) = folder.glob("flight/*lost-peer*")
    assert json.loads(record.read_text())
    begun = checkpoints(folder)[-1]
    with Job(tmp_path / "second", *train(workdir, "autoencoder", *more)) as job:
        assert job.wait() == [0, 0], job.out(0)
        assert f"resuming autoencoder at step {begun} of 12" in job.out(0)
    ended, wanted = (read_json(f / "autoencoder" / "summary.json") for f in (workdir, whole))
    assert ended["digests"] == wanted["digests"]
    lines = [json.loads(line) for line in (whole / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert [*losses] == [4, 8, 12] and losses[12] < losses[8] < losses[4]
    first = {line["step"]: line for line in steps(whole / "autoencoder")}
    assert all(first[line["step"]] == line for line in steps(folder))


@grouped
def test_a_save_of_two_is_gone_on_with_by_one_and_back_until_one_is_asked_to_stop(whole, tmp_path):
    """The same clips at each step, and the same loss but for the last bits, by one process with eight devices."""
    summary = read_json(whole / "autoencoder" / "summary.json")
    assert (summary["devices"], summary["processes"], summary["step"]) == (8, 2, 12)
    assert (whole / "autoencoder" / "ema.safetensors").exists()
    folder = tmp_path / "autoencoder"
    shutil.copytree(whole / "autoencoder", folder)
    for path in (folder / "checkpoints" / "8", folder / "checkpoints" / "12", folder / "ledger.jsonl"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    one = train(tmp_path, "autoencoder", "--config.train.steps=8", *STEADY)
    with Job(tmp_path / "one", *one, count=1, devices=8) as job:
        assert job.wait() == [0], job.out()
        assert "resuming autoencoder at step 4 of 8" in job.out()
    with Job(tmp_path / "two", *train(tmp_path, "autoencoder", *LONG, *STEADY)) as job:
        job.until(lambda: len(steps(folder)) > 8)
        sent = time.monotonic()
        job.processes[1].send_signal(signal.SIGTERM)
        assert job.wait() == [0, 0], job.out(0) + job.out(1)
        assert time.monotonic() - sent < 10
        step = checkpoints(folder)[-1]
        assert step >= 12 and f"stopped by a signal to another process after step {step}; saved" in job.out(0)
    assert [(line["processes"], line["start"]) for line in ledger(folder) if "start" in line] == [(1, 4), (2, 8)]
    alone, again = steps(whole / "autoencoder"), steps(folder)
    assert [line["step"] for line in alone] == list(range(12)) and len({line["ids"] for line in alone}) == 12
    assert [line["step"] for line in again] == list(range(4, step))
    assert [line["ids"] for line in again[:8]] == [line["ids"] for line in alone[4:]]
    losses = [[float.fromhex(line["loss"]) for line in run] for run in (again[:8], alone[4:])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


DIFFERENT = {
    "config": ({"own": {1: ["--config.seed=3"]}}, "seed=3: on process 1, but 0 on process 0; "),
    "version": (
        {"before": {1: "import cmd_jax; cmd_jax.__version__ = '9.9'"}},
        "versions.cmd_jax=9.9: on process 1, but 0.1.0 on process 0; ",
    ),
}


@pytest.mark.parametrize(("changes", "line"), DIFFERENT.values(), ids=DIFFERENT)
def test_processes_that_differ_are_told_before_the_first_step(tmp_path, changes, line):
    with Job(tmp_path / "logs", *train(tmp_path), **changes) as job:
        assert job.wait() == [2, 2]
        for i in (0, 1):
            (told,) = [shown for shown in job.out(i).splitlines() if shown.startswith(line)]
            assert told.endswith("start every process with the same command and the same installation")
    assert not (tmp_path / "autoencoder").exists()


UNREADABLE = """
import numpy as np
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.errors import UserError
whole = ShapesSource.clip
def clip(self, index, rng):
    clip.calls = getattr(clip, "calls", 0) + 1
    if clip.calls > 40:
        raise UserError("clip", index, "cannot be read any more", "look at the disk")
    return whole(self, index, rng)
ShapesSource.clip = clip
"""


def test_an_error_of_one_process_ends_both_with_its_line(tmp_path):
    """Process 1 can read no more clips; process 0 would wait for it in the next step for ever."""
    command = train(tmp_path, "autoencoder", *LONG, "--config.optimizer.decay=constant")
    with Job(tmp_path / "logs", *command, devices=1, before={1: UNREADABLE}) as job:
        assert job.wait() == [2, 2], job.out(0) + job.out(1)
        for i in (0, 1):
            (told,) = [line for line in job.out(i).splitlines() if line.startswith("clip=")]
            assert told.endswith(": cannot be read any more; look at the disk")


def test_only_one_of_two_processes_starts(tmp_path):
    more = train(tmp_path, "autoencoder", "--config.processes.start_timeout=4")
    with (
        Job(tmp_path / "0", *more, start=[0]) as first,
        Job(tmp_path / "1", *more, start=[1]) as second,  # of a job of its own
    ):
        for start, job in enumerate((first, second)):
            assert job.wait(60) == [2]
            (line,) = job.out(start).splitlines()[-1:]
            assert line.startswith(("processes.start_timeout=4: not all", "--coordinator=127.0.0.1:"))


# Each process says which samples it has on its host, as they are fetched.
TOLD = """
import cmd_jax.sampling.sampler
whole = cmd_jax.sampling.sampler._fetch
def fetch(*arguments):
    samples = whole(*arguments)
    assert all(len(x) == len(samples) for x in vars(samples).values() if x is not None)
    print("here:", *samples.index)
    return samples
cmd_jax.sampling.sampler._fetch = fetch
"""


def here(job, process) -> list[list[int]]:
    """The samples that a process had, batch by batch."""
    lines = [line.split()[1:] for line in job.out(process).splitlines() if line.startswith("here:")]
    return [[int(word) for word in words] for words in lines]


@pytest.mark.xdist_group("tiny")  # where the run it samples from is made anyway
def test_two_processes_make_the_same_videos_each_its_own(tmp_path):
    """Three content frames of three motions each, in a batch of eight, and one whose devices belong to both."""
    run = tiny.trained()
    arguments = ["sample", f"--config={tiny.CONFIG_FILE}:sample", "--config.sampling.batch_size=8"]
    arguments += ["--config.sampling.mode=vary-motion", "--config.sampling.num=3", "--config.sampling.motions=3"]
    arguments += [f"--workdir={run}"]
    names, told = {}, {}
    for count, devices in ((2, 2), (1, 4)):
        name = f"from-{count}-{free_port()}"
        more = {"count": count, "devices": devices, "before": dict.fromkeys(range(count), TOLD)}
        with Job(tmp_path / name, *arguments, f"--config.sampling.output={name}", **more) as job:
            assert set(job.wait()) == {0}, job.out() + job.out(count - 1)
            told[count] = [here(job, process) for process in range(count)]
        names[count] = run / name
    assert told == {1: [[[*range(8)], [8]]], 2: [[[0, 1, 2, 3], [8]], [[4, 5, 6, 7], []]]}
    files = [{path.name: path.read_bytes() for path in names[count].glob("*.*")} for count in (1, 2)]
    assert len(files[0]) == 9 * 3 + 7 and files[0].keys() == files[1].keys()
    different = {name for name, content in files[0].items() if files[1][name] != content}
    assert not {name for name in different if not name.endswith((".mp4", "summary.json", "config.json"))}
    assert read_json(names[2] / "summary.json")["processes"] == 2


@pytest.mark.xdist_group("tiny")
def test_two_processes_score_each_its_own_videos(tmp_path):
    run, name = tiny.trained(), f"scores-{free_port()}"
    arguments = ["evaluate", f"--config={tiny.CONFIG_FILE}:sample", "--config.sampling.batch_size=8"]
    arguments += [f"--config.evaluation.{key}=10" for key in ("videos", "clips")]
    arguments += [f"--workdir={run}", f"--config.sampling.output={name}"]
    with Job(tmp_path, *arguments, devices=1, before=dict.fromkeys(range(2), TOLD)) as job:
        assert job.wait() == [0, 0], job.out(0) + job.out(1)
        assert [here(job, i) for i in (0, 1)] == [2 * [[0, 1, 2, 3], [8]], 2 * [[4, 5, 6, 7], [9]]]
    scores = read_json(run / name / "summary.json")["scores"]
    assert scores["reconstruction_psnr"]["clips"] == scores["attributes"]["count"] == 10


@pytest.mark.xdist_group("tiny")
def test_an_error_of_one_process_ends_the_sampling_of_both_with_its_line(tmp_path):
    """Process 1 cannot read its clips; process 0 would wait for it in the first batch for ever."""
    run, name = tiny.trained(), f"broken-{free_port()}"
    arguments = ["sample", f"--config={tiny.CONFIG_FILE}:sample", "--config.sampling.batch_size=8"]
    arguments += ["--config.sampling.mode=reconstruct", "--config.sampling.num=8", f"--workdir={run}"]
    unreadable = UNREADABLE.replace("> 40", "> 0")
    more = {"devices": 1, "before": {1: unreadable}}
    with Job(tmp_path, *arguments, f"--config.sampling.output={name}", **more) as job:
        assert job.wait() == [2, 2], job.out(0) + job.out(1)
        for i in (0, 1):
            (told,) = [line for line in job.out(i).splitlines() if line.startswith("clip=")]
            assert told.endswith(": cannot be read any more; look at the disk")
    assert not list(run.glob(f"*{name}*"))
