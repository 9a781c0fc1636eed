"""What is refused before several processes start; the rest needs real ones (test_processes.py)."""

import os
import re
import socket
import subprocess
import sys
import time

import jax
import pytest
import tiny
from processes import environment, free_port, train

from cmd_jax.errors import UserError
from cmd_jax.running import distributed

OPTIONS = tiny.config_of("autoencoder").processes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("multi", None, None, None), "--distributed=multi: not one of the choices; use one of auto, off, explicit"),
        (("explicit", None, 2, 0), "--coordinator=: missing; --distributed=explicit needs all of "),
        (("explicit", "a:1", None, 0), "--num-processes=: missing; "),
        (("explicit", "a:1", 2, None), "--process-id=: missing; "),
        (("auto", "a:1", None, None), "--coordinator=a:1: not used with --distributed=auto; "),
        (("off", None, None, 0), "--process-id=0: not used with --distributed=off; "),
        (("explicit", "localhost", 2, 0), "--coordinator=localhost: not of the form HOST:PORT; "),
        (("explicit", "localhost:70000", 2, 0), "--coordinator=localhost:70000: not of the form HOST:PORT; "),
        (("explicit", "localhost:1", 0, 0), "--num-processes=0: must be positive; "),
        (("explicit", "localhost:1", 2, 2), "--process-id=2: not from 0 to 1; "),
        (("explicit", "localhost:1", 2, -1), "--process-id=-1: not from 0 to 1; "),
        (("explicit", "no.such.host.invalid:1", 2, 1), "--coordinator=no.such.host.invalid:1: no such host; "),
    ],
)
def test_flags_that_make_no_sense(arguments, line):
    with pytest.raises(UserError) as error:
        distributed.start(*arguments, OPTIONS, pytest.fail)
    assert str(error.value).startswith(line)


def test_a_busy_port_is_noticed_before_jax_crashes_on_it():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--coordinator=localhost:{port}: its port cannot be had "):
            distributed.start("explicit", f"localhost:{port}", 2, 0, OPTIONS, pytest.fail)
    distributed.probe_port(f"localhost:{free_port()}")


def test_a_coordinator_that_never_answers():
    begun = time.monotonic()
    with pytest.raises(UserError, match="nobody answered for 1 s"):
        distributed.wait_for_coordinator(f"127.0.0.1:{free_port()}", 1.0)
    assert time.monotonic() - begun < 4


def test_expected_processes_are_counted():
    with pytest.raises(UserError, match="processes.expected=4: 1 processes were started; "):
        distributed.start("off", None, None, None, tiny.config_of("autoencoder", processes__expected=4).processes, None)
    distributed.start("off", None, None, None, tiny.config_of("autoencoder", processes__expected=1).processes, None)


TASK = dict.fromkeys(distributed.SLURM, "0") | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_TASK_PID": "1"}


@pytest.mark.parametrize(
    ("changes", "terminal", "refused"),
    [
        ({}, False, False),  # a task of srun
        ({}, True, True),  # srun --ntasks=2 --pty bash
        ({"SLURM_TASK_PID": str(os.getpid())}, True, False),  # srun --ntasks=2 --pty cmd-jax: the other one started too
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, True, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False, True),  # the shell that salloc gives
        ({"SLURM_STEP_NUM_TASKS": None}, False, True),  # an editor's terminal on the node
        ({"OMPI_MCA_orte_hnp_uri": "x"}, True, False),  # mpirun in such a shell
        ({"SLURM_PROCID": None}, True, False),  # JAX looks away
    ],
)
def test_a_shell_of_a_slurm_job_is_told_from_a_task(monkeypatch, changes, terminal, refused):
    for name, value in (TASK | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "has_terminal", lambda: terminal)
    waited = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: waited.append(1))
    if refused:
        with pytest.raises(UserError, match="^SLURM_NTASKS=2: .*SLURM.*--distributed=off"):
            distributed.start("auto", None, None, None, OPTIONS, pytest.fail)
    else:
        distributed.start("auto", None, None, None, OPTIONS, pytest.fail)
    assert bool(waited) != refused


def test_the_time_out_of_a_slurm_task_says_that_it_is_one(tmp_path):
    """Its peer never comes."""
    command = [sys.executable, "-m", "cmd_jax.main", *train(tmp_path), "--config.processes.start_timeout=2"]
    env = environment(1) | TASK | {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("processes.start_timeout=2: ")]
    assert "SLURM speaks of 2 tasks" in line and "--distributed=off" in line


def test_alone_everything_agrees_and_acts_once():
    calls = []
    assert distributed.leader_first(lambda: calls.append(1) or 7) == 7 and calls == [1]
    distributed.agree({"a": "b"}, "nothing")
    assert distributed.broadcast_from_leader({"a": [1, None]}) == {"a": [1, None]}
    assert len({distributed.run_id() for _ in range(3)}) == 3
    assert not distributed.several()


SCRIPT = """
import sys
from cmd_jax.running import distributed
from cmd_jax.errors import UserError
from cmd_jax.main import leave
import tiny
index, port = int(sys.argv[1]), sys.argv[2]
distributed.start("explicit", "127.0.0.1:" + port, 2, index, tiny.config_of("autoencoder").processes, leave)
print(distributed.gather("x" * (index + 1) + "é"), distributed.broadcast_from_leader(index), flush=True)

def refuse(*_):
    raise UserError("field", 1, "wrong", "mend it")

def attempt(action):
    try:
        print("got", action(), flush=True)
    except UserError as error:
        print(error, flush=True)

attempt(lambda: distributed.agree({"a": "1", "b": str(index)}, "start both alike"))
attempt(lambda: distributed.agree({"a": "1"} | ({"c": "2"} if index else {}), "start both alike"))
attempt(lambda: distributed.leader_first(lambda: index))
attempt(lambda: distributed.leader_first(refuse))
leave(5)
"""


def test_two_processes_compare_and_wait_for_each_other():
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(i), port],
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for i in (0, 1)
    ]
    ended = [(process, *process.communicate(timeout=100)) for process in processes]
    for i, (process, out, error) in enumerate(ended):
        assert process.returncode == 5, error
        lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert lines == [
            "['xé', 'xxé'] 0",
            "b=1: on process 1, but 0 on process 0; start both alike",
            "c=2: on process 1, but absent on process 0; start both alike",
            f"got {i}",
            "field=1: wrong; mend it",
        ]
        assert not re.search("Traceback|Terminating process", error)
