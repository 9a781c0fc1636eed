"""What is timed side by side computes the same, and what is told of it; at toy sizes."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import peer as peers_group
import pytest
from peer import diffusers, torch

from cmd_jax.bench import peers
from cmd_jax.bench.options import Options
from cmd_jax.bench.records import LIKE
from cmd_jax.errors import UserError
from cmd_jax.files import check_like

pytestmark = peers_group.grouped
# XLA's CPU compiler takes many seconds for a UNet; tests/interop/test_diffusers_peer.py compares smaller ones.
COMMON = {"format": 1, "verb": "sample", "preset": "", "device": "cpu", "devices": 1, "mesh": {}}  # of all records
QUICK = ("autoencoder", "dit-content", "dit-motion")


@pytest.fixture(autouse=True)
def installed():
    """Skips where torch or diffusers is missing; torch computes with as many threads as before afterwards."""
    diffusers.DDIMScheduler  # noqa: B018
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def told(components, which="forward") -> list[dict]:
    records = []
    options = Options(peers_size="tiny", rounds=2)
    peers.run(components, which, options, "float32", records.append)
    return records


def check(record):
    """Medians and the paired ratio are those of the turns; both took one thread for each core."""
    turns, peer_turns = np.array(record["turns"]), np.array(record["peer_turns"])
    assert len(turns) == len(peer_turns) == 2
    assert record["ratio"] == pytest.approx(np.median(peer_turns / turns))
    assert (record["p50_seconds"], record["peer_seconds"]) == pytest.approx((np.median(turns), np.median(peer_turns)))
    assert record["peer_threads"] == len(os.sched_getaffinity(0)) and record["program_gib"] > 0
    assert record["batch"] == 1 and record["dtype"] == "float32"


def test_both_compute_the_same():
    records = told(QUICK)
    assert [record["component"] for record in records] == list(QUICK)
    for record in records:
        check(record)
        assert 0 < record["difference"] <= 1e-4, record
        assert not check_like(COMMON | record, LIKE)  # a gate can read it
    assert peers.table(records).row_count == len(QUICK)


def test_gradients_are_the_same():
    """Of the autoencoder, ours in the peer's names."""
    from cmd_jax.bench.peer_pairs import autoencoder
    from cmd_jax.bench.peers_torch import state_of

    ours, theirs, _, _ = autoencoder(2, True, "float32")
    video = jnp.asarray(ours.inputs[0])
    found = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(ours.apply(params, video)))))(ours.params)
    theirs.call(theirs.model, *theirs.inputs).square().sum().backward()
    found, expected = state_of(found), {name: p.grad for name, p in theirs.model.named_parameters()}
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():  # a bias that softmax takes out again has none but rounding
        tolerance = 1e-3 * gradient.abs().max().item() + 1e-6 * largest
        np.testing.assert_allclose(found[name], gradient, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["forward", "training"])
def test_every_component(which):
    records = told(["all"], which)
    assert [record["component"] for record in records] == [
        n for n, batches in peers.BATCHES.items() if which in batches
    ]
    for record in records:
        if record["component"] != "modelscope":
            check(record)
            assert record["difference"] is None if which == "training" else record["difference"] <= 1e-4
            continue
        part = record["parts"]
        assert record["peer_seconds"] == pytest.approx(50 * part["theirs"])
        assert record["p50_seconds"] == pytest.approx(50 * (part["content"] + part["motion"]) + part["decoder"])
        assert record["seconds_with_vae"] == pytest.approx(record["p50_seconds"] + 16 * part["vae"])


def test_it_says_what_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name))
    with pytest.raises(UserError, match=r"^--peers=torch: .*: diffusers; .*\[peers\]"):
        told(["vae"])
    with pytest.raises(UserError, match=r"^--peers=unets: .*unet"):
        told(["unets"])
