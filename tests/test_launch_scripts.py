"""The launch scripts, with stand-ins for the programs that they call."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_ins import LAUNCH, ROOT, TRAIN, await_file, ended, script, stand_in

from cmd_jax.config import load


@pytest.fixture
def quickstart(tmp_path):
    """Start quickstart.sh in a folder of its own, installed already; its cmd-jax and its python only write down calls.

    A training ends as ending says, if there is a file of its stage's name with a command in it.
    """
    shutil.copytree(LAUNCH, tmp_path / "launch")
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    digest = subprocess.run(
        "cat pyproject.toml requirements.txt | sha256sum | cut -c1-16",
        shell=True, cwd=tmp_path, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / ".venv" / f"installed-{digest}-").touch()
    stand_in(
        tmp_path,
        "cmd-jax",
        'echo "$* | ${XLA_FLAGS:-} | $(grep Cpus_allowed_list /proc/self/status | cut -f2)" >> calls\n'
        'call="$*"; stage="${call#*quickstart.py:}"; stage="${stage%% *}"; [ "$1" = train ] || exit 0\n'
        'mkdir -p "runs/quickstart/$stage"; echo "progress of $stage"; if [ -e "$stage" ]; then . "./$stage"; fi\n'
        'touch "runs/quickstart/$stage/summary.json"',
    )
    stand_in(tmp_path, "python", f'case "$1" in -m) echo "$*" >> calls ;; *) exec "{sys.executable}" "$@" ;; esac')

    def start(*arguments):
        return script(tmp_path, "bash", str(tmp_path / "launch" / "quickstart.sh"), *arguments, XLA_FLAGS="")

    return start


def calls(folder: Path) -> list[list[str]]:
    """What was called since the last time -> [words, XLA_FLAGS, cores]; motion's call, which has no order, last."""
    path = folder / "calls"
    rows = [line.split(" | ") for line in path.read_text().splitlines()]
    path.unlink()
    return sorted(rows, key=lambda row: "quickstart.py:motion" in row[0])


@pytest.mark.parametrize("name", ["make_pipeline", "real_clips", "random_stages", "ship_weights"])
def test_a_url_is_no_folder_of_this_machine(name, tmp_path):
    arguments = ["--out=gs://bucket/x", "--workdir=x", "--pipeline=x"]
    code, _, err = ended(script(tmp_path, sys.executable, str(LAUNCH / f"{name}.py"), *arguments))
    assert code == 2 and "--out" in err and not list(tmp_path.iterdir())


def test_the_quickstart_is_of_this_machine(tmp_path):
    code, _, err = ended(script(tmp_path, "bash", str(LAUNCH / "quickstart.sh"), RUN="gs://bucket/x"))
    assert code == 2 and err.startswith("RUN=gs://bucket/x: ") and not list(tmp_path.iterdir())


def test_the_quickstart_shows_videos_first_and_then_trains_on_all_cores(quickstart, tmp_path):
    code, out, err = ended(quickstart())
    assert (code, err) == (0, "")
    shipped, page, autoencoder, content, evaluation, both, motion = calls(tmp_path)
    config = "--config=configs/quickstart.py:"
    assert shipped[0].startswith(f"sample {config}sample,size=long --workdir=runs/quickstart/shipped --config.sampling")
    assert evaluation[0].startswith(f"evaluate {config}sample --workdir=runs/quickstart --config.sampling")
    shown, scored = ([int(n) for n in row[0].split("classes=")[1].split(",")] for row in (shipped, evaluation))
    assert sorted(scored) == list(range(48)) and shown == scored[: len(shown)]
    assert len(shown) == load(f"{ROOT}/configs/quickstart.py:sample,size=long", {}).sampling.num
    collect = "-m cmd_jax.report.collect runs/quickstart/index.html runs/quickstart/shipped/samples"
    assert (page[0], both[0]) == (collect, f"{collect} runs/quickstart/samples")
    assert autoencoder[0] == f"train --workdir=runs/quickstart {config}autoencoder"
    assert autoencoder[1] == "--xla_force_host_platform_device_count=2 " and content[1] == motion[1] == ""
    if len(os.sched_getaffinity(0)) > 1:  # side by side, each on its half
        assert len({shipped[2], content[2], motion[2]}) == 3
        assert (tmp_path / "runs" / "quickstart" / "motion.log").read_text() == "progress of motion\n"
    gallery = tmp_path / "runs" / "quickstart" / "index.html"
    assert re.search(rf"first videos \d+ s after the installation: open {gallery}\n(.*\n)*== training", out)
    assert re.search(rf"first videos after \d+ s, all of it \d+ s, .*\nopen {gallery}\n$", out)

    code, out, err = ended(quickstart())  # nothing is trained twice
    assert (code, err) == (0, "")
    assert [row[0].split()[0] for row in calls(tmp_path)] == ["sample", "-m", "evaluate", "-m"]
    code, out, err = ended(quickstart("--anew"))
    assert (code, err) == (0, "") and len(calls(tmp_path)) == 7


@pytest.mark.parametrize(
    "stage, ending, wanted",
    [
        ("autoencoder", "exit 0", 0), ("content", "exit 0", 0), ("motion", "exit 0", 0),  # asked to stop
        ("content", "sleep 0.4; exit 0", 0),  # when motion has ended
        ("autoencoder", "exit 2", 2), ("content", "exit 2", 2), ("motion", "exit 3", 3),
    ],
)  # fmt: skip
def test_a_quickstart_whose_training_ends_early_says_so_and_goes_on_later(quickstart, tmp_path, stage, ending, wanted):
    (tmp_path / stage).write_text(ending)
    code, out, err = ended(quickstart())
    assert code == wanted and ("--resume goes on" in out) == (wanted == 0), (out, err)
    assert not any("evaluate" in row[0] for row in calls(tmp_path))
    (tmp_path / stage).unlink()
    assert ended(quickstart("--resume"))[::2] == (0, "")
    assert any("evaluate" in row[0] for row in calls(tmp_path))


def test_a_quickstart_that_is_stopped_leaves_no_training_behind(quickstart, tmp_path):
    """SIGTERM to the script, while motion trains in the background: it is passed on, and its save waited for."""
    (tmp_path / "motion").write_text(
        "trap 'sleep 0.2; touch saved; exit 0' TERM; touch begun; while :; do sleep 0.05; done"
    )
    running = quickstart()
    marks = tmp_path / "begun", tmp_path / "runs" / "quickstart" / "content" / "summary.json"
    end = time.monotonic() + 30
    while not all(mark.exists() for mark in marks) and time.monotonic() < end:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert ended(running)[0] == 143
    if len(os.sched_getaffinity(0)) > 1:
        assert (tmp_path / "saved").exists()


def test_an_environment_serves_one_version_of_python(tmp_path):
    """Stand-ins: pythons that tell their version, as install.sh asks, make an environment, or run pip."""
    for version in ("3.10", "3.11", "3.13"):
        body = 'case "$*" in *venv*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/bin/activate" ;;\n'
        body += f"*pip*) echo pip of {version} ;;\n*) echo {version}; [ {version} != 3.10 ] ;; esac"
        stand_in(tmp_path, f"python{version}", body)
    stand_in(tmp_path, "python", 'exec "$VENV/bin/python" "$@"')
    for name in ("pyproject.toml", "requirements.txt"):
        (tmp_path / name).write_text("")

    def install(**variables):
        return ended(script(tmp_path, "bash", "-c", f". {LAUNCH}/install.sh test", **variables))

    code, out, err = install(PYTHON="python3.11", VENV=".venv")
    assert (code, err) == (0, "") and out.endswith("installing cmd_jax[test] into .venv\npip of 3.11\n")
    assert install(PYTHON="python3.11") == install(PYTHON="") == (0, "", "")  # there already
    code, out, err = install(PYTHON="python3.13")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"PYTHON=python3\.13: is 3\.13, but \.venv .*; name another folder, like VENV=\S+-3\.13\n", err)
    assert install(PYTHON="python3.13", VENV=".venv-3.13")[1].endswith("pip of 3.13\n")
    for wrong in ("python3.10", "python9"):
        code, out, err = install(PYTHON=wrong)
        assert (code, out) == (2, "") and re.fullmatch(f"PYTHON={wrong}: .*; name one, like .*\n", err)


@pytest.fixture
def slurm(tmp_path):
    """Start slurm.sbatch in a stand-in of a checkout."""
    for name in ("launch/env.sh", ".venv/bin/activate"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    stand_in(tmp_path, "scancel", "echo scancel $*; touch stop")
    stand_in(tmp_path, "scontrol", "echo scontrol $*")
    variables = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_SUBMIT_DIR": str(tmp_path)}
    return lambda *arguments, **more: script(
        tmp_path, "bash", str(LAUNCH / "slurm.sbatch"), *arguments, **variables | more
    )


def test_slurm_starts_a_failed_step_again_but_not_a_wrong_one(slurm, tmp_path):
    stand_in(tmp_path, "srun", 'printf "%s|" "$@"; echo x >> starts; exit "$(sed -n "$(wc -l < starts)p" codes)"')
    (tmp_path / "codes").write_text("3\n134\n0\n")
    code, out, err = ended(slurm(*TRAIN))
    assert code == 0 and out.count("|--distributed=auto|--config.processes.expected=4|") == 3
    assert "|python|-m|cmd_jax.main|train|--config=c.py:content|--workdir=/shared/two words|" in out
    assert err == (
        "launch: ended with code 3; starting again (1 of 3)\nlaunch: ended with code 134; starting again (2 of 3)\n"
    )
    (tmp_path / "codes").write_text("0\n0\n0\n2\n3\n3\n")
    assert ended(slurm(*TRAIN))[::2] == (2, "")
    code, _, err = ended(slurm(*TRAIN[:2], "--workdir=s3://runs/ucf101", RESTARTS="1"))
    assert code == 3 and err.endswith("launch: ended with code 3; gave up after 1 restarts\n")


def test_slurm_saves_before_the_time_limit_and_queues_again(slurm, tmp_path):
    stand_in(tmp_path, "srun", "echo x > begun; until [ -e stop ]; do sleep 0.05; done; echo saved")
    running = slurm(*TRAIN)
    await_file(tmp_path / "begun")
    running.send_signal(signal.SIGUSR1)
    code, out, err = ended(running)
    assert (code, err) == (0, "")
    assert out == (
        "scancel --signal=TERM 17\nsaved\nlaunch: the time limit is near; job 17 queues again\nscontrol requeue 17\n"
    )


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        (TRAIN, {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID=: missing; .*"),
        (["train"], {}, "--config=: missing; .*"),
        (["train", "--config=c"], {}, "--workdir=: not a place that all nodes share; .*"),
        (["train", "--config=c", "--workdir=runs"], {}, "--workdir=runs: not a place .*"),
        (["train", "--config=c", "--workdir=ftp://b/runs"], {}, "--workdir=ftp://b/runs: not a place .*"),
        (["train", "--config=c", "--workdir=gs:///runs"], {}, "--workdir=gs:///runs: not a place .*"),
        (TRAIN, {"RESTARTS": "x"}, "RESTARTS=x: not a number; .*"),
        (TRAIN, {"SLURM_SUBMIT_DIR": "/"}, "SLURM_SUBMIT_DIR=/: not the root of the checkout; .*"),
        (TRAIN, {"VENV": "none"}, "VENV=none: no environment there; .*"),
    ],
)
def test_what_slurm_lacks_is_one_line_and_2(slurm, arguments, variables, message):
    code, out, err = ended(slurm(*arguments, **variables))
    assert (code, out) == (2, "") and re.fullmatch(message + "\n", err), err
