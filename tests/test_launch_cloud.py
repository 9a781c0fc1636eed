"""launch/tpu_pod.sh with a stand-in for gcloud, the script of launch/gke_jobset.yaml, and what the scripts name."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import gone
from stand_ins import LAUNCH, ROOT, TRAIN, await_file, ended, script, stand_in

from cmd_jax.config import load

# Runs the commands for the workers here, in a home of their own. A slice that is asked for is there at the second look.
GCLOUD = """
cd "{folder}"; echo "${{*:3:2}}" >> calls; printf "%s\n" "$@" | grep -v command= >> flags
case "$3 $4" in
    "tpu-vm scp") cp "$5" home/ ;;
    "tpu-vm ssh")
        [ -e home ] || exit 255
        cd home; for a in "$@"; do case "$a" in --command=*) bash -c "${{a#--command=}}" || exit ;; esac; done ;;
    "queued-resources list")
        if [ -e state ]; then cat state; fi
        if grep -qs PROVISIONING state; then echo ACTIVE > state; cp -r fresh home; fi ;;
    "queued-resources create") echo PROVISIONING > state ;;
    "queued-resources delete") rm -r state home ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """Start tpu_pod.sh with a gcloud whose machines, of the folder `fresh`, have all installed."""
    environment = tmp_path / "fresh" / "cmd_jax" / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "activate").write_text("")
    digest = subprocess.run(
        "cat pyproject.toml requirements.txt | sha256sum | cut -c1-16",
        shell=True, cwd=ROOT, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (environment / f"installed-{digest}-tpu,gcs").touch()
    stand_in(tmp_path, "gcloud", GCLOUD.format(folder=tmp_path))
    given = {"TPU_NAME": "cmd", "ZONE": "z", "PROJECT": "p", "SLICE": "--accelerator-type=v6e-16 --spot", "POLL": "0.1"}
    given["TMPDIR"] = str(tmp_path)
    return lambda *arguments, **more: script(tmp_path, str(LAUNCH / "tpu_pod.sh"), *arguments, **given | more)


def calls(folder: Path) -> list[str]:
    """Of gcloud, since the last time."""
    text = (folder / "calls").read_text()
    (folder / "calls").unlink()
    return text.splitlines()


def test_a_pod_is_made_set_up_started_and_stopped(pod, tmp_path):
    code, out, err = ended(pod("create"))
    assert (code, err) == (0, "") and out.splitlines()[-1].endswith("cmd: PROVISIONING")
    listed, made, *looks = calls(tmp_path)
    assert (listed, made) == ("queued-resources list", "queued-resources create") and {*looks} == {listed}
    flags = (tmp_path / "flags").read_text().split()
    assert {"--accelerator-type=v6e-16", "--spot", "--node-id=cmd", "--async"} <= {*flags}
    assert ended(pod("create"))[:2] == (0, "") and calls(tmp_path) == [listed]  # there already

    worker = tmp_path / "home" / "cmd_jax"
    (tmp_path / "flags").unlink()
    code, _, err = ended(pod("setup", PREPARE='echo "$HOME" > prepared'))
    assert (code, err) == (0, "")
    assert (tmp_path / "home" / "prepared").exists()
    assert (worker / "launch" / "local.py").exists() and (worker / "cmd_jax" / "main.py").exists()
    assert calls(tmp_path) == ["tpu-vm scp", "tpu-vm ssh"]
    flags = (tmp_path / "flags").read_text().split()
    assert all(flags.count(flag) == 2 for flag in ("--worker=all", "--zone=z", "--project=p"))

    # The supervisor itself was tried in tests/test_launch.py.
    (worker / "launch" / "local.py").write_text(
        "import json, sys, time\njson.dump(sys.argv[1:], open('given', 'w'))\ntime.sleep(60)\n"
    )
    code, _, err = ended(pod("start", *TRAIN, STEP_TIMEOUT="600"))
    assert (code, err) == (0, "")
    pid = int((worker / "launch.pid").read_text().split()[0])
    await_file(worker / "given")
    given = json.loads((worker / "given").read_text())
    own = ["--processes=1", "--distributed=auto", "--restarts=3", "--step-timeout=600"]
    assert given == [*own, "--", *TRAIN]
    code, _, err = ended(pod("start", *TRAIN))
    assert code == 2 and err.endswith(": runs already; stop it first\n")
    assert ended(pod("logs"))[0] == 0
    code, out, _ = ended(pod("stop"))
    assert code == 0 and out.endswith(": asked to save and end\n") and gone(pid)
    assert ended(pod("delete"))[0] == 0 and not worker.exists()


def test_a_machine_that_started_anew_is_no_running_one(pod, tmp_path):
    """Its number may be another process's."""
    shutil.copytree(tmp_path / "fresh", tmp_path / "home")
    (tmp_path / "home" / "cmd_jax" / "launch.pid").write_text(f"{os.getpid()} of-an-earlier-boot\n")
    code, out, err = ended(pod("stop"))
    assert code != 0 and out == ""


TRAINEE = """
import sys, time
from pathlib import Path
from cmd_jax.main import end_process
from cmd_jax.running.runtime import StopRequest
here = Path(__file__).parent
if (here / "saved").exists():
    (here / "resumed").write_text(" ".join(sys.argv[1:]))
    sys.exit(int((here / "ending").read_text()))
with StopRequest("too early", end_process) as stop:
    stop.running = True
    (here / "begun").write_text("yes")
    while not stop.signal:
        time.sleep(0.01)
    time.sleep(0.3)  # a save
    (here / "saved").write_text("yes")
"""


@pytest.mark.parametrize("ending, workdir", [(0, "gs://runs/ucf101"), (2, "{}/runs/ucf101")])
def test_a_preempted_pod_saves_and_is_kept_until_the_job_ends(pod, tmp_path, ending, workdir):
    """All processes of a worker get SIGTERM, those that a supervisor would tell as well, and then it is gone."""
    (tmp_path / "trainee.py").write_text(TRAINEE)
    (tmp_path / "ending").write_text(str(ending))
    stand_in(tmp_path, "python", f'exec "{sys.executable}" "$1" --module=trainee "${{@:2}}"')
    workdir = workdir.format(tmp_path)
    running = pod("keep", *TRAIN[:2], f"--workdir={workdir}", PYTHONPATH=str(tmp_path))
    await_file(tmp_path / "begun")
    supervisor = int((tmp_path / "home" / "cmd_jax" / "launch.pid").read_text().split()[0])
    shell = int(Path(f"/proc/{supervisor}/stat").read_text().rpartition(")")[2].split()[1])
    trainee = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text())
    for pid in (trainee, shell, supervisor):
        os.kill(pid, signal.SIGTERM)
    assert gone(trainee, shell, supervisor) and (tmp_path / "saved").exists()
    assert not (tmp_path / "home" / "cmd_jax" / "launch.code").exists()  # which would be the end
    (tmp_path / "state").write_text("SUSPENDED\n")
    code, out, err = ended(running)
    assert code == ending, (out, err)
    assert out.splitlines()[-1].endswith(f"cmd: launch: ended {ending}")
    assert f"--workdir={workdir} --distributed=auto" in (tmp_path / "resumed").read_text()
    made = [call for call in calls(tmp_path) if call not in ("queued-resources list", "tpu-vm ssh")]
    assert made == ["queued-resources create", "tpu-vm scp", "queued-resources delete"] + made[:2]


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        ([], {}, "argument=: not known; use create, setup, .*"),
        (["begin"], {}, "argument=begin: not known; .*"),
        (["stop", "now"], {}, "argument=now: not used with stop; leave it out"),
        (["logs"], {"TPU_NAME": ""}, "TPU_NAME=: missing; set it, .*"),
        (["logs"], {"ZONE": ""}, "ZONE=: missing; set it, .*"),
        (["create"], {"SLICE": ""}, "SLICE=: missing; set it, .*"),
        (["keep", *TRAIN], {"SLICE": ""}, "SLICE=: missing; set it, .*"),
        (["start", "train"], {}, "--config=: missing; .*"),
        (["keep", "train", "--config=c"], {}, "--workdir=: not a place that all workers share; .*"),
        (["start", "train", "--config=c", "--workdir=runs"], {}, "--workdir=runs: not a place .*"),
        (["start", "train", "--config=c", "--workdir=gs:runs"], {}, "--workdir=gs:runs: not a place .*"),
    ],
)
def test_what_a_pod_lacks_is_one_line_and_2(pod, tmp_path, arguments, variables, message):
    code, out, err = ended(pod(*arguments, **variables))
    assert (code, out) == (2, "") and re.fullmatch(message + "\n", err), err
    assert not (tmp_path / "calls").exists()


def test_gke_manifest_and_its_script(tmp_path):
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] == 4 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod["serviceAccountName"] and "hostNetwork" not in pod  # there Workload Identity would not be heard
    (text,) = container["args"]
    assert f"--config.processes.expected={job['parallelism']} " in text
    assert "$(" not in text  # Kubernetes would replace it
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert given["WORKDIR"].startswith("gs://")
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "env.sh").write_text("")

    def run(python: str, workdir=tmp_path / "runs"):
        stand_in(tmp_path, "python", python)
        return script(tmp_path, *container["command"], text, WORKDIR=str(workdir))

    for wanted in (0, 2, 3):
        assert ended(run(f"exit {wanted}"))[0] == wanted
    running = run("trap 'echo saved; exit 0' TERM; echo x > begun; while :; do sleep 0.05; done")
    await_file(tmp_path / "begun")
    running.send_signal(signal.SIGTERM)
    assert ended(running)[:2] == (143, "saved\n")
    code, out, err = ended(run('printf "%s|" "$@"', workdir=given["WORKDIR"]))
    assert (code, err) == (0, "") and f"|--workdir={given['WORKDIR']}|" in out
    assert {path.name for path in tmp_path.iterdir()} == {"launch", "bin", "begun", "runs"}  # and no "gs:"
    for workdir, problem in (("/proc/runs", "cannot be written"), ("runs", "not a place"), ("gs:///a", "not a place")):
        code, _, err = ended(run("exit 0", workdir=workdir))
        assert code == 2 and err.splitlines()[-1].startswith(f"WORKDIR={workdir}: {problem}")


@pytest.mark.parametrize("mark", ["", "CLAIM", "EDIT"])
def test_what_the_gke_manifest_offers_fits_in(mark):
    """The lines that are comments but for their mark make a manifest too, whose mounts are its volumes."""
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    edited = re.sub(rf"^( +)# (.* # {mark}\b.*)$", r"\1\2", text, flags=re.M) if mark else text
    assert (edited != text) == bool(mark)
    pod = yaml.safe_load(edited)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"cache": "/cache"} | ({"runs": "/runs"} if mark == "CLAIM" else {})
    assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
    assert {"name": "CMD_JAX_CACHE", "value": mounts["cache"]} in container["env"]
    assert (pod["nodeSelector"].get("cloud.google.com/gke-spot") == "true") == (mark == "EDIT")


def test_scripts_parse_and_their_flags_exist():
    texts = {name: (LAUNCH / name).read_text() for name in ("tpu_pod.sh", "slurm.sbatch", "gke_jobset.yaml")}
    for name in ("tpu_pod.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    helps = {
        command: subprocess.run(
            [sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for command in ("launch/local.py", "-m cmd_jax.main train")
    }
    for flag in ("--distributed", "--coordinator", "--num-processes", "--process-id", "--config", "--workdir"):
        assert flag in helps["-m cmd_jax.main train"]
    for text in (*texts.values(), (LAUNCH / "local.py").read_text().split('"""')[1]):
        for flag in re.findall(r"--(?:processes|distributed|restarts|step-timeout|devices)\b", text):
            assert flag in helps["launch/local.py"]
        for key, value in re.findall(r"--config\.([a-z_.]+)=([\w:/-]*)", text):
            load(f"{ROOT}/configs/quickstart.py:autoencoder", {key: "1" if value in ("N", "") else value})
        for specification in re.findall(r"--config=([\w/]+(?:\.py)?:\w+)", text):
            load(str(ROOT / specification) if "/" in specification else specification, {})
