"""A training whose folder is in a bucket does what it does on a disk, and leaves nothing here."""

import json
import os
import signal
import time

import numpy as np
import pytest
import tiny
from safetensors.numpy import load

from cmd_jax import train as training
from cmd_jax.errors import Stopped, UserError, exit_code
from cmd_jax.files import as_path, read_json
from cmd_jax.running import lease

pytestmark = pytest.mark.xdist_group("test_train")  # by which TensorFlow is loaded once
CONFIG = dict(train__checkpoint_every=3, train__preview_every=4)


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same on a disk: stopped after three steps, and gone on with."""
    workdir = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        stop_and_resume(workdir, patch)
    return workdir / "autoencoder"


def stop_and_resume(workdir, monkeypatch):
    account = training.Metrics.account

    def stopping(self, step, *values):
        account(self, step, *values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.Metrics, "account", stopping)
    with pytest.raises(Stopped, match="saved; run the same command to resume"):
        training.train(tiny.config_of("autoencoder", **CONFIG), workdir)
    monkeypatch.setattr(training.Metrics, "account", account)
    return training.train(tiny.config_of("autoencoder", **CONFIG), workdir)


@pytest.mark.parametrize("server", ["gcs", pytest.param("s3", marks=pytest.mark.slow)])
def test_stopped_and_resumed_as_on_a_disk(local, request, server, tmp_path, monkeypatch):
    bucket = request.getfixturevalue(server)
    for name in ("home", "cwd"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    workdir = f"{bucket}/run"
    summary = stop_and_resume(workdir, monkeypatch)
    assert summary["digests"] == read_json(local / "summary.json")["digests"]

    there = {name.removeprefix("run/autoencoder/"): data for name, data in bucket.objects("run/").items()}
    assert there["ledger.jsonl"] == (local / "ledger.jsonl").read_bytes()
    shown = {name for name in there if "checkpoints/" not in name and "tfevents" not in name}
    assert shown == {
        n for n in tree(local) if (local / n).is_file() and "checkpoints/" not in n and "tfevents" not in n
    }
    previews = [name for name in shown if name.startswith("previews/")]
    assert all(there[name] == (local / name).read_bytes() for name in ("config.json", *previews)) and previews
    ema, wanted = load(there["ema.safetensors"]), load((local / "ema.safetensors").read_bytes())
    assert ema.keys() == wanted.keys() and all(np.array_equal(ema[name], wanted[name]) for name in ema)
    assert sum("tfevents" in name for name in there) == 2
    assert json.loads(there[".lock"])["state"] == "free"
    steps = {name.split("/")[1] for name in there if name.startswith("checkpoints/")}
    assert steps == {path.name for path in (local / "checkpoints").iterdir()}
    # Here there is nothing, not even in the cache, which is no place for a run.
    assert {name for name in tree(tmp_path) if not name.startswith("home/.cache/")} == {
        "home", "cwd", "cache", "cache/tmp",
    }  # fmt: skip
    assert training.train(tiny.config_of("autoencoder", **CONFIG), workdir)["step"] == tiny.STEPS  # left as it is
    assert as_path(f"{workdir}/autoencoder/summary.json").read_text() == there["summary.json"].decode()


def test_a_run_that_another_has_is_refused(gcs_stub):
    with (
        lease.Lease(as_path(f"{gcs_stub}/run/autoencoder/.lock"), "trains in it", "workdir"),
        pytest.raises(UserError, match=f"workdir={gcs_stub}/run/autoencoder: another process trains in it") as error,
    ):
        training.train(tiny.config_of("autoencoder"), f"{gcs_stub}/run")
    assert exit_code(error.value) == 2


def test_who_lost_the_lock_commits_nothing(gcs_stub, monkeypatch):
    """Exit code 3, and the step before stays."""
    monkeypatch.setattr(lease, "PAUSE", 0.0)
    account = training.Metrics.account

    def robbed(self, step, *values):
        account(self, step, *values)
        if step == 4:
            while "run/autoencoder/checkpoints/3/manifest.json" not in gcs_stub.names("run/"):
                time.sleep(0.02)
            lock = as_path(f"{gcs_stub}/run/autoencoder/.lock")
            lock.write_bytes(json.dumps(json.loads(lock.read_bytes()) | {"holder": "another"}).encode())

    monkeypatch.setattr(training.Metrics, "account", robbed)
    with pytest.raises(UserError, match="checkpoint=6: could not be saved") as error:
        training.train(tiny.config_of("autoencoder", train__checkpoint_every=3), f"{gcs_stub}/run")
    assert exit_code(error.value) == 3 and "the previous step 3 is intact" in str(error.value)
    names = gcs_stub.names("run/autoencoder/checkpoints/")
    assert [name for name in names if name.endswith("manifest.json")] == ["run/autoencoder/checkpoints/3/manifest.json"]
    assert json.loads(gcs_stub.get("run/autoencoder/.lock"))["holder"] == "another"
