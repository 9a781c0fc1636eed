"""Starting the processes of one run, and holding them together: they must agree, and all hear of an error.

A process that fails for itself tells the others through its heartbeat file (peers.py); what all of them come to at the
same place, like the opening of the data, goes through `leader_first`.
"""

import contextlib
import itertools
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from cmd_jax.errors import Unavailable, UserError, choose, exit_code, of_file, with_remedy
from cmd_jax.running.compilation import keep_compiled
from cmd_jax.running.runtime import check_devices, has_terminal

log = logging.getLogger(__name__)
MODES = ("auto", "off", "explicit")
# By which JAX knows a task of SLURM, and how many there are; where Open MPI started the processes, it asks that.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = "OMPI_MCA_orte_hnp_uri"
LINGER = 5.0  # seconds; more than two beats of the watch, where those are not told to be longer
BARRIER_SECONDS = 86_400  # what opening data or slow disks may need: a peer that died ends this process long before
_gathered = itertools.count()
_linger = LINGER


def start(
    mode: str, coordinator: str, num_processes: int | None, process_id: int | None, options,
    end_process: Callable,
):  # fmt: skip
    """Connect the processes; must come before anything that starts a JAX backend.

    mode "auto" asks JAX whether it sees a cluster it knows (TPU pod, SLURM, GKE, Open MPI, or the variable
    JAX_COORDINATOR_ADDRESS), "explicit" takes the three numbers given, "off" leaves this process alone.
    options: the config's `processes` group. end_process(exit code, last words): called where others do not come within
    options.start_timeout. UserError where flags, port or the number of processes are wrong.
    """
    choose("--distributed", mode, MODES)
    numbers = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    for flag, value in numbers.items():
        if mode == "explicit" and value in (None, ""):
            raise UserError(flag, "", "missing", "--distributed=explicit needs all of " + ", ".join(numbers))
        if mode != "explicit" and value not in (None, ""):
            raise UserError(flag, value, f"not used with --distributed={mode}", "add --distributed=explicit")
    # Later than our own watch (peers.py), which knows more: this one aborts the process, and names nobody. Its clock
    # may start half of its time before the death.
    times = dict(
        initialization_timeout=int(options.start_timeout) + 60,
        heartbeat_timeout_seconds=int(2 * options.peer_timeout) + 60,
    )
    if mode == "explicit":
        check_numbers(coordinator, num_processes, process_id)
        if process_id == 0:
            probe_port(coordinator)
        with deadline(f"this is {process_id} of {num_processes}", options.start_timeout, end_process):
            if process_id:
                wait_for_coordinator(coordinator, options.start_timeout)
            jax.distributed.initialize(coordinator, num_processes, process_id, **times)
    elif mode == "auto":
        tasks = slurm_tasks()
        check_slurm(tasks)
        who = f"SLURM speaks of {tasks} tasks; --distributed=off takes this one alone" if tasks else "found by JAX"
        with deadline(who, options.start_timeout, end_process):
            try:
                jax.distributed.initialize(**times)
            except RuntimeError as e:
                if "must be called before" not in str(e):
                    raise
                # Called within a program that uses JAX already: that has connected its processes, or has one.
                log.debug("JAX was started before: %d processes", jax.process_count())
            except ValueError as e:
                if "coordinator_address" not in str(e):  # what JAX says where it sees no cluster
                    raise UserError(
                        "--distributed", mode, str(e), "name the numbers with --distributed=explicit"
                    ) from e
    check_devices()
    keep_compiled()
    if options.expected and options.expected != jax.process_count():
        raise UserError(
            "processes.expected", options.expected, f"{jax.process_count()} processes were started",
            "start that many, or look why JAX does not see them (--distributed=explicit names them)",
        )  # fmt: skip


def slurm_tasks() -> int:
    """How many processes JAX will wait for because of SLURM's variables; 0 where it does not go by them."""
    if OPEN_MPI in os.environ or not all(name in os.environ for name in SLURM):
        return 0
    count = os.environ["SLURM_NTASKS"]
    return int(count) if count.isdigit() else 0


def check_slurm(tasks: int):
    """UserError in a shell of a SLURM job, where nobody starts the other processes that its variables speak of.

    Such a shell has a terminal, which a task of srun has only with --pty; or its step is of one task, or of none.
    """
    step, task = os.environ.get("SLURM_STEP_NUM_TASKS"), os.environ.get("SLURM_TASK_PID")
    if tasks > 1 and (step != str(tasks) or (has_terminal() and task != str(os.getpid()))):
        problem = "this seems to be a shell of a SLURM job, where JAX would wait for as many processes"
        remedy = "add --distributed=off to run in this one alone, or start all with srun, without --pty"
        raise UserError("SLURM_NTASKS", tasks, problem, remedy)


def check_numbers(coordinator: str, num_processes: int, process_id: int):
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError("--coordinator", coordinator, "not of the form HOST:PORT", "write it like localhost:1234")
    if num_processes < 1:
        raise UserError("--num-processes", num_processes, "must be positive", "give the number of processes")
    if not 0 <= process_id < num_processes:
        raise UserError("--process-id", process_id, f"not from 0 to {num_processes - 1}", "number them from 0")


def probe_port(coordinator: str):
    """JAX crashes on a port that is taken; try it first."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as e:
            raise UserError("--coordinator", coordinator, f"its port cannot be had ({e.strerror})",
                            "end what listens there, or take another port") from e  # fmt: skip


def wait_for_coordinator(coordinator: str, seconds: float):
    """Until process 0 listens."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except socket.gaierror as e:
            raise UserError("--coordinator", coordinator, "no such host", "give the address of process 0") from e
        except OSError as e:
            if time.monotonic() > end:
                raise UserError(
                    "--coordinator", coordinator, f"nobody answered for {seconds:.0f} s ({e.strerror or e})",
                    "start process 0 there, or mend the address",
                ) from e  # fmt: skip
            time.sleep(0.2)


@contextlib.contextmanager
def deadline(who: str, seconds: float, end_process: Callable):
    """Ends this process with one line after `seconds` within: JAX itself would abort it without a word."""
    error = UserError(
        "processes.start_timeout", f"{seconds:.0f}", f"not all processes connected in time ({who})",
        "start all of them with the same number, or raise it",
    )  # fmt: skip
    timer = threading.Timer(seconds, end_process, (2, str(error)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def barrier(name: str):
    """Until all processes are here. Unlike in a collective one may wait in any thread, and for long."""
    import orbax.checkpoint as ocp  # which takes a while, and one process has no use for it

    sync = ocp.multihost.get_barrier_sync_fn()
    sync(key=f"cmd_jax-{name}", timeout_ms=1000 * BARRIER_SECONDS)


def several() -> bool:
    """Whether this process was connected to others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_leader() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; every process must call it, if much later than others."""
    if jax.process_count() == 1:
        return [text]
    barrier(f"gather-{next(_gathered)}")
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(lengths.max()) - len(data))))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def gather_items(items: dict[int, object]) -> list:
    """What all processes have by number, in the order of the numbers; made of what JSON knows."""
    parts = [json.loads(text) for text in gather(json.dumps([*items.items()]))]
    return [value for _, value in sorted((item for part in parts for item in part), key=lambda item: item[0])]


def broadcast_from_leader(value):
    """Process 0's `value`, made of what JSON knows."""
    return json.loads(gather(json.dumps(value))[0])


def agree(values: dict[str, str], remedy: str):
    """UserError, the same on every process, for the first value in which one differs from process 0."""
    first, *others = (json.loads(text) for text in gather(json.dumps(values)))
    for index, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                problem = f"on process {index}, but {first.get(name, 'absent')} on process 0"
                raise UserError(name, other.get(name, "absent"), problem, remedy)


def run_id() -> str:
    """One random name for this start of the job."""
    return broadcast_from_leader(secrets.token_hex(8))


def linger():
    """Before this process ends by a fault: its output is out; others, whom the end of process 0 aborts, know why."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if several() and is_leader():
        time.sleep(_linger)


def linger_for(seconds: float):
    """So long at least, where others need that to hear of it."""
    global _linger
    _linger = max(LINGER, seconds)


def leader_alone(action: Callable):
    """What `action()` gives on process 0, made of what JSON knows, on all. Its UserError, or OSError, is everyone's,
    and so is the exit code of that."""
    value, problem = None, None
    if is_leader():
        try:
            value = action()
        except UserError as e:
            problem = with_remedy(e)
        except OSError as e:
            problem = of_file(e)
    error = problem and [[problem.field, str(problem.value), problem.problem, problem.remedy], exit_code(problem)]
    value, error = broadcast_from_leader([value, error])
    if problem:
        raise problem
    if error:
        words, code = error
        raise UserError(*words) from (Unavailable("it is, for process 0") if code == 3 else None)
    return value


def leader_first(action: Callable):
    """`action()` on process 0, then on the others, which find what it wrote. Its UserError is everyone's."""
    results = []
    leader_alone(lambda: results.append(action()))
    return results[0] if is_leader() else action()
