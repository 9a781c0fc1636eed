import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from cmd_jax.errors import UserError
from cmd_jax.files import as_path, read_json
from cmd_jax.main import main
from cmd_jax.verbs import verify_resume as verifying
from cmd_jax.verbs.resume_trainings import PlannedKill, Training, plan_kills, with_devices
from cmd_jax.verbs.resume_verdicts import read_ledger, read_run
from cmd_jax.verbs.verify_resume import verify_resume

STEPS, INTERVAL = 12, 3


# When to kill.


def test_kills_are_planned_by_the_seed():
    plans = plan_kills(7, 20, 4, seed=1)
    assert plans == plan_kills(7, 20, 4, seed=1) != plan_kills(7, 20, 4, seed=2)
    assert [p.step for p in plans] == sorted(p.step for p in plans)
    assert sum(p.in_save for p in plans) == 4
    many = plan_kills(400, 20, 4, seed=0)
    assert {p.step for p in many if p.in_save} == {4, 8, 12, 16}
    assert {p.step for p in many if not p.in_save} == set(range(1, 17))
    assert all(0 <= p.delay < 1 for p in many)


@pytest.mark.parametrize(
    "platform, available, devices, expected",
    [
        ("cpu", 8, 2, {"XLA_FLAGS": "--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=2"}),
        ("gpu", 4, 2, {"CUDA_VISIBLE_DEVICES": "5,3"}),
        ("gpu", 4, 4, {}),
        ("tpu", 4, 4, {}),
    ],
)
def test_the_number_of_devices_is_set_by_the_platforms_own_means(platform, available, devices, expected):
    before = {
        "XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2",
        "CUDA_VISIBLE_DEVICES": "5,3,1,0",
    }
    assert with_devices(before, platform, available, devices) == before | expected


def test_all_gpus_are_visible_unless_said_otherwise():
    assert with_devices({}, "gpu", 8, 3) == {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    for platform, devices, remedy in (("gpu", 9, "use at most 8"), ("tpu", 4, "use 8, or leave --devices out")):
        with pytest.raises(UserError, match=f"--devices={devices}: .*; {remedy}"):
            with_devices({}, platform, 8, devices)


# Running trainings, with one that only writes what a real one would.

FAKE = """
import json, os, signal, sys, time
from pathlib import Path

STEPS, INTERVAL, FAULT = 12, 3, os.environ.get("FAULT", "")
workdir = Path(sys.argv[-1].removeprefix("--workdir="))
folder = workdir / sys.argv[1].rpartition(":")[2]  # --config=FILE:STAGE
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(workdir / "argv").write_text("\\n".join(sys.argv))
for path in (folder / "checkpoints").glob("*.saving"):
    path.rmdir()
saved = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
if FAULT == "crash" and saved:
    sys.exit("worse luck")
if FAULT == "refuse" and saved:
    print("train.x=1: is wrong; mend it", file=sys.stderr)
    sys.exit(2)
if FAULT == "lost" and saved:
    saved = saved[:-1]
start, stop = max(saved, default=0), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))

def write(record):
    with open(folder / "ledger.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")

def save(step):
    if step not in saved:
        temporary = folder / "checkpoints" / f"{step}.saving"
        temporary.mkdir()
        time.sleep(0.06)
        temporary.rename(folder / "checkpoints" / str(step))

write({"start": start, "devices": int(os.environ["XLA_FLAGS"].rpartition("=")[2]), "processes": 1})
for step in range(start, STEPS):
    time.sleep(0.02)
    resumed = bool(saved) and step == start
    loss = 1 / (step + 1) + 1e-9 * (FAULT == "loss" and resumed)
    write({"step": step, "ids": str(step + 99 * (FAULT == "ids" and resumed)), "loss": loss.hex()})
    if (step + 1) % INTERVAL == 0 or stop:
        save(step + 1)
    if stop:
        break
else:
    changed = "changed" if FAULT == "digest" and saved else ""
    digests = {name: name + changed * (name == "opt_state") for name in ("params", "ema", "opt_state")}
    (folder / "summary.json").write_text(json.dumps({"digests": digests}))
"""
CONFIG = f"{tiny.CONFIG_FILE}:autoencoder"
CHANGES = {"train.steps": str(STEPS), "train.checkpoint_every": str(INTERVAL)}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(Training, "PROGRAM", (sys.executable, str(script)))
    monkeypatch.setattr(verifying, "ask", lambda environment, specification, overrides, devices: ("cpu", devices))
    return tmp_path / "work"


def failed_claims(work: Path) -> list[str]:
    return [v["claim"] for v in read_json(work / "verify-resume" / "report.json")["verdicts"] if not v["holds"]]


def test_a_training_that_resumes_well(fake, capsys):
    assert verify_resume(CONFIG, CHANGES, fake, 4, (2, 1, 2)) == 0
    report = read_json(fake / "verify-resume" / "report.json")
    assert report["equal"] and failed_claims(fake) == []
    runs = report["runs"]
    assert (runs["whole"]["starts"], runs["killed"]["starts"], runs["devices"]["starts"]) == (1, 5, 3)
    kills = runs["killed"]["kills"]
    assert len(kills) == 4 and sum(kill["saving"] for kill in kills) >= 1
    assert runs["devices"]["devices"] == [2, 1, 2]
    assert [row["step"] for row in report["rows"]] == [3, 6, 9, 12]
    assert 0.02 < report["step_seconds"] < 0.2 and 0.03 < report["save_seconds"] < 0.3
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and "…" not in shown and "equal; " in shown
    arguments = (fake / "verify-resume" / "killed" / "argv").read_text().splitlines()
    assert f"--config={CONFIG}" in arguments and "--config.train.steps=12" in arguments
    assert not [path for path in fake.iterdir() if path.name != "verify-resume"]


@pytest.mark.parametrize(
    "fault, claims",
    [
        ("loss", ["same loss at every step, to the bit", "repeated steps gave the same clips and losses"]),
        ("ids", ["same clips at every step", "repeated steps gave the same clips and losses"]),
        ("digest", ["same params, ema, opt_state at the end, to the bit"]),
        ("lost", ["no kill cost a finished checkpoint, one in a save at most 3 steps before it"]),
    ],
)
def test_a_training_that_resumes_badly_is_found_out(fake, monkeypatch, capsys, fault, claims):
    monkeypatch.setenv("FAULT", fault)
    assert verify_resume(CONFIG, CHANGES, fake, 3, (2,)) == 1
    assert set(failed_claims(fake)) & {f"killed: {claim}" for claim in claims}
    shown = capsys.readouterr().out
    assert "FAIL  killed: " in shown and "NOT equal; " in shown


def test_a_training_that_cannot_resume_shows_the_end_of_its_log(fake, monkeypatch, capsys):
    monkeypatch.setenv("FAULT", "crash")
    assert verify_resume(CONFIG, CHANGES, fake, 0, (2, 1)) == 1
    shown = capsys.readouterr().out
    assert "worse luck\ndevices: a training ended with exit code 1; its output is in " in shown


def test_the_error_of_a_training_comes_through(fake, monkeypatch):
    monkeypatch.setenv("FAULT", "refuse")
    with pytest.raises(UserError, match="^train.x=1: is wrong; mend it$"):
        verify_resume(CONFIG, CHANGES, fake, 0, (2, 1))


def test_devices_that_jax_does_not_see_are_refused(fake, monkeypatch):
    monkeypatch.setattr(verifying, "ask", lambda *_: ("gpu", 2))
    with pytest.raises(UserError, match="--devices=1: JAX sees 2 devices then"):
        verify_resume(CONFIG, CHANGES, fake, 0, (2, 1))


def test_a_run_that_is_over_too_soon_to_be_killed_fails(fake, monkeypatch):
    monkeypatch.setattr(verifying, "plan_kills", lambda *_: [PlannedKill(99, False, 0.0)])
    assert verify_resume(CONFIG, CHANGES, fake, 1, (2,)) == 1
    assert failed_claims(fake) == ["killed: as often as asked"]


def test_a_second_call_starts_anew_in_its_own_folder_only(fake):
    folder = fake / "verify-resume"
    (folder / "killed").mkdir(parents=True)
    (folder / "killed" / "old").touch()
    (fake / "mine").touch()
    (fake / "probe.jsonl").write_text("{}")
    assert verify_resume(CONFIG, CHANGES, fake, 0, (2,)) == 0
    assert not (folder / "killed" / "old").exists() and (fake / "mine").exists()
    assert (folder / "whole" / "probe.jsonl").read_text() == "{}"
    (folder / "thesis.tex").touch()
    with pytest.raises(UserError, match="--workdir=.*holds thesis.tex"):
        verify_resume(CONFIG, CHANGES, fake, 0, (2,))
    assert (folder / "report.json").exists()


def test_two_at_a_time_in_one_folder_are_refused(fake):
    with verifying.fresh_folder(fake / "verify-resume"), pytest.raises(UserError, match="another process"):
        verify_resume(CONFIG, CHANGES, fake, 0, (2,))


def test_a_denoiser_finds_the_autoencoder_of_the_workdir(fake):
    specification = f"{tiny.CONFIG_FILE}:content"
    for changes in (CHANGES, CHANGES | {"latents.autoencoder": "elsewhere"}):
        assert verify_resume(specification, changes, fake, 0, (2,)) == 0
        arguments = (fake / "verify-resume" / "whole" / "argv").read_text().splitlines()
        (given,) = [a for a in arguments if a.startswith("--config.latents.autoencoder=")]
        assert given.partition("=")[2] == changes.get("latents.autoencoder", str(fake / "autoencoder"))


def test_no_training_is_left_behind_when_this_is_stopped(fake, tmp_path):
    script = f"""
import sys
from pathlib import Path
from cmd_jax.verbs import verify_resume as verifying
verifying.Training.PROGRAM = (sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
verifying.ask = lambda *_: ("cpu", 2)
verifying.verify_resume({CONFIG!r}, {CHANGES!r}, Path({str(fake)!r}), 0, (2,))
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    log, deadline = fake / "verify-resume" / "whole" / "log.txt", time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.parametrize(
    "changes, kills, devices, message",
    [
        ({}, -1, (), "--kills=-1: must not be negative"),
        ({}, 1, (2, 0), "--devices=2,0: must be positive"),
        ({"train.steps": "5"}, 1, (), "train.steps=5: less than two times train.checkpoint_every=3.*use at least 6"),
        ({"train.stepz": "5"}, 1, (), "did you mean config.train.steps"),
    ],
)
def test_bad_usage(tmp_path, changes, kills, devices, message):
    with pytest.raises(UserError, match=message):
        verify_resume(CONFIG, CHANGES | changes, tmp_path, kills, devices)
    assert list(tmp_path.iterdir()) == []


def test_a_sampling_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="config=sample: there is nothing to train"):
        verify_resume(f"{tiny.CONFIG_FILE}:sample", {}, tmp_path, 1, ())


# The real thing.


@pytest.fixture
def real(monkeypatch, tmp_path_factory):
    """Trainings without TensorBoard: TensorFlow would double the time of a start."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "clu.py").write_text("raise ImportError('not in this test')\n")
    monkeypatch.setenv("PYTHONPATH", str(hidden), prepend=os.pathsep)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_devices_that_the_batch_does_not_fit_are_refused_before_anything_is_trained(real, tmp_path):
    with pytest.raises(UserError, match="train.batch_size=4: not divisible by the 3 data x fsdp shards"):
        verify_resume(CONFIG, CHANGES, tmp_path, 1, (3,))
    assert not (tmp_path / "verify-resume" / "whole").exists()


def test_training_survives_a_kill(real, tmp_path, capsys):
    command = ["verify-resume", f"--config={CONFIG}", f"--workdir={tmp_path}", "--kills=1"]
    code = main([*command, "--config.train.steps=24", "--config.train.checkpoint_every=4"])
    assert code == 0, capsys.readouterr().out
    report = read_json(tmp_path / "verify-resume" / "report.json")
    assert report["equal"] and report["runs"]["killed"]["digests"] == report["runs"]["whole"]["digests"]
    assert (len(report["runs"]["killed"]["kills"]), report["runs"]["killed"]["starts"]) == (1, 2)


@pytest.mark.slow
def test_training_survives_kills_and_changing_devices(real, tmp_path, capsys):
    command = ["verify-resume", f"--config={CONFIG}", f"--workdir={tmp_path}", "--kills=1", "--devices=2,1"]
    code = main([*command, "--config.train.steps=24", "--config.train.checkpoint_every=4"])
    shown = capsys.readouterr().out
    assert code == 0, shown
    report = read_json(tmp_path / "verify-resume" / "report.json")
    assert report["equal"] and "FAIL" not in shown
    runs = report["runs"]
    assert runs["killed"]["digests"] == runs["whole"]["digests"]
    assert (len(runs["killed"]["kills"]), runs["killed"]["starts"]) == (1, 2)
    ledger = (tmp_path / "verify-resume" / "devices" / "autoencoder" / "ledger.jsonl").read_text().splitlines()
    starts = [json.loads(line) for line in ledger if "start" in json.loads(line)]
    assert [start["devices"] for start in starts] == [2, 1]
    assert starts[0]["start"] == 0 and 12 <= starts[1]["start"] < 24


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_fifty_kills_in_a_row(real, tmp_path, capsys):
    """The digests are those of a run that no one watched, and which compiled for itself."""
    changes = ["--config.train.steps=120", "--config.train.checkpoint_every=4"]
    code = main(["verify-resume", f"--config={CONFIG}", f"--workdir={tmp_path}", "--kills=50", *changes])
    shown = capsys.readouterr().out
    print(shown)
    assert code == 0, shown
    killed = read_json(tmp_path / "verify-resume" / "report.json")["runs"]["killed"]
    assert len(killed["kills"]) == 50 and sum(kill["saving"] for kill in killed["kills"]) >= 15

    segments = read_ledger(tmp_path / "verify-resume" / "killed" / "autoencoder" / "ledger.jsonl")
    assert len(segments) == 51
    for kill, segment in zip(killed["kills"], segments[1:], strict=True):
        # A save is begun when the one before it is complete: one that is cut off costs one interval.
        assert segment.start >= kill["newest"] - 4 and segment.start % 4 == 0

    train = [sys.executable, "-m", "cmd_jax.main", "train", f"--config={CONFIG}", f"--workdir={tmp_path / 'alone'}"]
    subprocess.run([*train, *changes], check=True, capture_output=True)
    assert killed["digests"] == read_json(tmp_path / "alone" / "autoencoder" / "summary.json")["digests"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_in_a_row_in_a_bucket(real, tmp_path, monkeypatch, capsys):
    """On the emulator, in a process of its own. A start that is killed has told the bucket of its first steps."""
    server = subprocess.Popen([sys.executable, "tests/buckets.py", "gcs"], stdout=subprocess.PIPE, text=True)
    try:
        while "EPATH" not in (line := server.stdout.readline()):
            if line.startswith("export "):
                monkeypatch.setenv(*line.removeprefix("export ").strip().split("=", 1))
        monkeypatch.setenv("CMD_JAX_CACHE", str(tmp_path / "cache"))
        changes = ["--config.train.steps=160", "--config.train.checkpoint_every=4"]
        code = main(["verify-resume", f"--config={CONFIG}", "--workdir=gs://bkt/run", "--kills=20", *changes])
        shown = capsys.readouterr().out
        print(shown)
        assert code == 0, shown
        folder = as_path("gs://bkt/run/verify-resume")
        runs = read_json(folder / "report.json")["runs"]
        assert len(runs["killed"]["kills"]) == 20 and sum(kill["saving"] for kill in runs["killed"]["kills"]) >= 6
        assert runs["killed"]["digests"] == runs["whole"]["digests"]
        whole, killed = (read_run(folder / name / "autoencoder") for name in ("whole", "killed"))
        assert killed.last() == whole.last() and len(killed.segments) == 21
        assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    finally:
        server.kill()
        server.wait()
