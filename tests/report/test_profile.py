"""Traces of steps, wherever a run lies."""

import jax
import jax.numpy as jnp
import pytest

from cmd_jax.declare import span_of
from cmd_jax.errors import UserError
from cmd_jax.files import as_path
from cmd_jax.report import profile
from cmd_jax.report.console import make_console
from cmd_jax.report.profile import Profile


@jax.jit
def a_step_by_name(x):
    return jnp.sin(x @ x)


def train(folder, steps, last, start=0):
    trace, x = Profile(folder, steps, make_console()), jnp.eye(8)
    for step in range(start, last):
        if trace.begins(step):
            trace.start(step, x)
        x = a_step_by_name(x)
        if trace.ends(step):
            trace.stop(x)
    trace.close()


def test_a_trace_in_a_bucket(gcs_stub, capsys):
    train(as_path(f"{gcs_stub}/run"), range(1, 3), last=5)
    names = gcs_stub.names("run/")
    assert {name.rpartition(".")[2] for name in names} == {"pb", "gz"}
    assert all(name.startswith("run/profile/plugins/profile/") for name in names)
    assert any(b"a_step_by_name" in gcs_stub.get(name) for name in names)
    assert capsys.readouterr().out == f"traced steps 1 to 2: {gcs_stub}/run/profile\n"


@pytest.mark.parametrize(
    "start, last, traced",
    [(0, 9, "2 to 4"), (3, 9, "3 to 4"), (0, 4, "2 to 3"), (5, 9, None), (0, 2, None)],
)
def test_what_a_run_does_of_the_steps_is_traced(start, last, traced, tmp_path, capsys):
    train(tmp_path, range(2, 5), last, start)
    assert capsys.readouterr().out == (f"traced steps {traced}: {tmp_path}/profile\n" if traced else "")
    assert (tmp_path / "profile").exists() == bool(traced)


def test_a_trace_that_cannot_be_made_or_written_is_left_out(tmp_path, monkeypatch, caplog):
    jax.profiler.start_trace(tmp_path / "another")
    train(tmp_path / "a", range(2), last=3)
    jax.profiler.stop_trace()

    def full(*_):
        raise OSError(28, "disk full")

    monkeypatch.setattr(profile.shutil, "copyfile", full)
    train(tmp_path / "b", range(2), last=3)
    one, other = (record.message for record in caplog.records)
    assert one.startswith("no profile: RuntimeError: ")
    assert other.startswith("no profile: OSError: [Errno 28] disk full: ")
    monkeypatch.undo()
    train(tmp_path / "c", range(2), last=3)  # neither left a trace open
    assert not (tmp_path / "a").exists() and any((tmp_path / "c").rglob("*.pb"))


@pytest.mark.parametrize("text", ["3", "3:", ":3", "3:3", "5:3", "-1:3", "a:b", "1:2:3", "1.0:2", "1:²", "1" * 50])
def test_spans_that_are_none(text):
    with pytest.raises(UserError, match=f"^train.profile={text}: "):
        span_of("train.profile", text)
