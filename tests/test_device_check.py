"""launch/device_check.sh: what it plans, how it runs steps, and on the CPU all of it at tiny size."""

import importlib.util
import json
import os
import sys
import time
import zipfile

import pytest
from stand_ins import LAUNCH, ended, script

from cmd_jax.bench.options import Options
from cmd_jax.config import load
from cmd_jax.errors import UserError
from cmd_jax.main import parse

spec = importlib.util.spec_from_file_location("device_check", LAUNCH / "device_check.py")
device_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(device_check)
Step, Summary = device_check.Step, device_check.Summary


@pytest.mark.parametrize("tiny", [True, False])
def test_it_plans_commands_that_there_are(tiny, tmp_path):
    steps = device_check.plan(tmp_path, tiny)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for step in steps:
        assert step.command[0] == sys.executable
        if step.command[1] != "-m":
            assert (LAUNCH / "device_check.py").with_name(step.command[1].rpartition("/")[2]).is_file()
            continue
        flags, overrides = parse([*step.command[3:]])
        options, config = Options.of(flags), load(flags.config, overrides, shapes_only=True)
        assert options.verb == step.name.partition("-")[0] or options.peers
        assert (config.sampling if config.stage == "sample" else config.model).dtype in ("bfloat16", "float32", "")
    assert len({word for step in steps for word in step.command if str(tmp_path) in word}) == 5  # files of results


def run(steps, tmp_path, minutes=1.0):
    summary = Summary(tmp_path, minutes)
    device_check.check(steps, summary, tmp_path / "log.txt", minutes, dict(os.environ))
    told = json.loads((tmp_path / "summary.json").read_text())["steps"]
    return summary.well, {step["name"]: (step["state"], step["code"], step["why"]) for step in told}


def step(name, code, limit=60.0, needs=()):
    return Step(name, (sys.executable, "-c", code), limit, needs)


def test_a_step_that_goes_wrong_does_not_stop_the_others(tmp_path):
    child = tmp_path / "child"
    hangs = f"import os, time; print(os.getpid(), file=open({str(child)!r}, 'w')); os.fork(); time.sleep(100)"
    steps = [
        step("fails", "import sys; print('working'); sys.exit('x=1: wrong; mend it')"),
        step("hangs", hangs, limit=1.5),
        step("misses", "", needs=("torch_of_nobody",)),
        step("runs", "print('done')"),
    ]
    well, told = run(steps, tmp_path)
    assert not well and list(told) == ["fails", "hangs", "misses", "runs"]
    assert told["fails"] == ("failed", 1, "x=1: wrong; mend it")
    assert told["hangs"][:2] == ("took too long", None) and told["runs"] == ("ran", 0, "")
    assert told["misses"][0] == "skipped" and "torch_of_nobody" in told["misses"][2]
    log = (tmp_path / "log.txt").read_text()
    assert log.index("working") < log.index("== hangs") < log.index("done")
    end, group = time.monotonic() + 5, int(child.read_text())
    with pytest.raises(ProcessLookupError):  # once all of it are gone
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.02)


def test_what_is_skipped_is_no_failure_and_what_has_no_time_is(tmp_path):
    assert run([step("misses", "", needs=("torch_of_nobody",)), step("runs", "")], tmp_path)[0]
    well, told = run([step("runs", "")], tmp_path, minutes=0.1)
    assert not well and told["runs"][0] == "no time left"


def test_wheels_are_installed_for_the_check_alone(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with pytest.raises(UserError, match=r"^--wheels=.*: holds no wheels"):
        device_check.install(wheels, site)
    with zipfile.ZipFile(wheels / "nobodys-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("nobodys.py", "X = 1\n")
        wheel.writestr("nobodys-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: nobodys\nVersion: 1\n")
        wheel.writestr("nobodys-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("nobodys-1.dist-info/RECORD", "")
    device_check.install(wheels, site)
    assert (site / "nobodys.py").read_text() == "X = 1\n" and importlib.util.find_spec("nobodys") is None


def test_wrong_flags_are_one_line(tmp_path):
    for flags, field in ((["--steps=parities"], "--steps=parities"), (["--minutes=0"], "--minutes=0.0")):
        command = "bash", str(LAUNCH / "device_check.sh"), "--out=out", *flags
        code, _, err = ended(script(tmp_path, *command, PYTHON=sys.executable))
        assert code == 2 and err.startswith(f"{field}: ") and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_all_of_it_on_the_cpu_at_tiny_size(tmp_path):
    command = "bash", str(LAUNCH / "device_check.sh"), "--out=out", "--tiny"
    running = script(tmp_path, *command, PYTHON=sys.executable, JAX_PLATFORMS="cpu")
    out, err = running.communicate(timeout=500)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert running.returncode == 0, (out, err, summary)
    assert summary["device"]["platform"] == "cpu"
    torch = importlib.util.find_spec("torch") and importlib.util.find_spec("diffusers")
    states = {step["name"]: step["state"] for step in summary["steps"]}
    assert states == {
        step.name: "skipped" if step.needs and not torch else "ran" for step in device_check.plan(tmp_path, True)
    }
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert parity["beyond"] == [] and max(parity["differences"].values()) < 1e-4
    for name, count in (("sampling", 4), ("training", 4)):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) >= count and all(json.loads(line)["p50_seconds"] > 0 for line in lines)
