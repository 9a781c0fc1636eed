"""What is timed side by side computes the same, and what is told of it; at toy sizes."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import peer as peers_group
import pytest
from peer import diffusers, torch

from cmd_jax.bench import peers
from cmd_jax.errors import UserError

pytestmark = peers_group.grouped
# XLA's CPU compiler takes many seconds for a UNet; tests/interop/test_diffusers_peer.py compares smaller ones.
QUICK = ("autoencoder", "dit-content", "dit-motion")


@pytest.fixture(autouse=True)
def installed():
    """Skips where torch or diffusers is missing; torch computes with as many threads as before afterwards."""
    diffusers.DDIMScheduler  # noqa: B018
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def told(*arguments, **more) -> list[dict]:
    records = []
    peers.run(*arguments, rounds=2, small=True, emit=records.append, **more)
    return records


def check(record):
    assert record["ratio"] == pytest.approx(record["peer_seconds"] / record["seconds"])
    assert len(record["turns"]) == len(record["peer_turns"]) == 2
    assert min(record["turns"]) <= record["seconds"] <= max(record["turns"])
    assert record["dtype"] == "float32" and record["bytes"] > 1000
    assert record["cores"] == record["peer_threads"]


def test_both_compute_the_same():
    records = told(QUICK, ["forward"])
    assert [record["component"] for record in records] == list(QUICK)
    for record in records:
        check(record)
        assert 0 < record["difference"] <= 1e-4, record


def test_gradients_are_the_same():
    """Of the autoencoder, ours in the peer's names."""
    from cmd_jax.bench.peer_pairs import autoencoder
    from cmd_jax.bench.peers_torch import state_of

    ours, theirs, _, _ = autoencoder(2, True, "float32")
    video = jnp.asarray(ours.inputs[0])
    found = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(ours.apply(params, video)))))(ours.params)
    peers.their_call(theirs, "training")()
    found, expected = state_of(found), {name: p.grad for name, p in theirs.model.named_parameters()}
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():  # a bias that softmax takes out again has none but rounding
        tolerance = 1e-3 * gradient.abs().max().item() + 1e-6 * largest
        np.testing.assert_allclose(found[name], gradient, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.slow
def test_every_component_and_pass():
    records = told()
    assert [(r["component"], r["pass"]) for r in records] == [
        (name, which) for name in peers.COMPONENTS for which in peers.BATCHES.get(name, {"forward": 1})
    ]
    *pairs, clip = records
    for record in pairs:
        check(record)
        assert record["difference"] is None if record["pass"] == "training" else record["difference"] <= 1e-4
    part = clip["parts"]
    assert clip["peer_seconds"] == pytest.approx(50 * part["theirs"])
    assert clip["seconds"] == pytest.approx(50 * (part["content"] + part["motion"]) + part["decoder"])
    assert clip["seconds_with_vae"] == pytest.approx(clip["seconds"] + 16 * part["vae"])


def test_it_says_what_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name))
    with pytest.raises(UserError, match=r"^peers=torch: diffusers .*\[peers\]"):
        told(["vae"])
    with pytest.raises(UserError, match=r"^peers=unets: .*unet"):
        told(["unets"])
