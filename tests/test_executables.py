"""Compiled programs that the next process reads: the same numbers without compiling, and anew for anything else."""

import copy
import hashlib
import json
import logging
import pickle
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from meshes import abstract
from samplers import SETTINGS, request_of, together

from cmd_jax.loading import load_sampler
from cmd_jax.sampling import executables
from cmd_jax.sampling.executables import FLAGS, Executables, digest_of, facts_of

pytestmark = pytest.mark.xdist_group("tiny")
LABELS = np.array([0, 5], np.int32)


def sampler_in(folder):
    sampler = load_sampler(tiny.trained())
    sampler.keep_executables(folder)
    return sampler


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == executables.__name__]


def videos(sampler, settings=SETTINGS):
    return together(sampler.generate(request_of(LABELS), settings))["video"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """-> (folder with one program, what it drew)."""
    folder = tmp_path_factory.mktemp("executables")
    sampler = sampler_in(folder / "new")
    return folder / "new", videos(sampler), sampler


def test_the_next_sampler_reads_it_and_draws_the_same(written, caplog):
    folder, drawn, first = written
    caplog.set_level(logging.INFO, "cmd_jax")
    assert first.seconds["compile"] > 0 and len(list(folder.iterdir())) == 1
    again = sampler_in(folder)
    np.testing.assert_array_equal(videos(again), drawn)
    assert set(again.seconds) == {"load"} and not told(caplog)
    # Arguments: another seed, weight and parameters need no other program.
    again.params["motion"] = jax.tree.map(lambda x: x * 0.5, again.params["motion"])
    assert not np.array_equal(videos(again, replace(SETTINGS, seed=1, guidance=3.0)), drawn)
    assert set(again.seconds) == {"load"} and not told(caplog)


def test_what_is_damaged_or_for_another_machine_is_compiled_anew_and_replaced(written, caplog, monkeypatch):
    folder, drawn, first = written
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    head, _, payload = whole.partition(b"\n")
    header = json.loads(head)
    kept = first._programs.executables
    name, asked = "generate", _asked(first)
    assert kept.load(name, asked) is not None

    def said(content: bytes) -> str:
        path.write_bytes(content)
        caplog.clear()
        assert kept.load(name, asked) is None
        (message,) = told(caplog)
        assert message.startswith(f"executable {path}: ") and message.endswith("; compiled anew")
        return message

    caplog.set_level(logging.INFO, "cmd_jax")
    flipped = bytearray(whole)
    flipped[-10] ^= 1
    for damage in (b"", whole[:100], whole[:-1], whole + b"x", bytes(flipped), b"{}\n" + payload, b"\0\n" + payload):
        assert "damaged" in said(damage)
    for fact in header["facts"]:
        other = header | {"facts": header["facts"] | {fact: "another"}}
        assert f"{fact} was another, and is " in said(json.dumps(other).encode() + b"\n" + payload)
    known = {"jax", "jaxlib", "cmd_jax", "code", "machine", "platform", "devices", "mesh", "model", *FLAGS}
    assert known <= header["facts"].keys()
    for junk in (b"junk", pickle.dumps((b"junk", 1, 2)), pickle.dumps(None)):  # with the digest that belongs to it
        right = header | {"sha256": hashlib.sha256(junk).hexdigest(), "bytes": len(junk)}
        assert "XLA does not take it" in said(json.dumps(right).encode() + b"\n" + junk)
    caplog.clear()
    again = sampler_in(folder)  # what is there now is junk
    np.testing.assert_allclose(videos(again), drawn, atol=1e-6)
    assert again.seconds["compile"] > 0 and kept.load(name, asked) is not None
    path.unlink()
    monkeypatch.setattr(kept, "folder", folder / "missing")
    assert kept.load(name, asked) is None


def test_a_program_that_cannot_run_is_compiled_anew(written, monkeypatch, caplog):
    folder, drawn, _ = written
    caplog.set_level(logging.INFO, "cmd_jax")
    sampler = sampler_in(folder / "other")

    def fails(*_):
        raise jax.errors.JaxRuntimeError("NOT_FOUND: Function fusion not found")

    monkeypatch.setattr(sampler._programs.executables, "load", lambda *_: fails)
    np.testing.assert_allclose(videos(sampler), drawn, atol=1e-6)
    assert "XLA cannot run it (NOT_FOUND: Function fusion not found); compiled anew" in caplog.text


def test_all_that_a_program_closes_over_is_in_its_facts(written, monkeypatch):
    sampler = written[2]
    names = ("autoencoder", "denoisers", "statistics", "conditions", "rules")
    parts = {name: getattr(sampler, name) for name in names}
    before = digest_of(parts)
    assert digest_of(parts) == before

    def changed(stage: str, **changes) -> str:
        other = copy.copy(sampler.denoisers[stage])
        vars(other).update(changes)
        return digest_of(parts | {"denoisers": sampler.denoisers | {stage: other}})

    stage = sampler.denoisers["content"]
    process = copy.copy(stage.process)
    object.__setattr__(process, "made_up", 1)
    others = [
        changed("content", module=stage.module.clone(dtype=jax.numpy.bfloat16)),
        changed("content", module=stage.module.clone(heads=1)),
        changed("content", process=process),
        changed("motion", autoencoder=sampler.autoencoder.resized(16, 48)),
        digest_of(parts | {"statistics": jax.tree.map(lambda x: x + 1, sampler.statistics)}),
        digest_of(parts | {"rules": sampler.rules[1:]}),
    ]
    assert len({before, *others}) == len(others) + 1
    assert changed("content", params={"w": np.ones(3)}) == before  # given to the program
    with pytest.raises(TypeError):
        digest_of(object())
    facts = facts_of(sampler.mesh, **parts)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert {n for n, x in facts_of(sampler.mesh, **parts).items() if x != facts[n]} == {"XLA_FLAGS"}


def test_several_cpu_devices_keep_none(tmp_path, caplog):
    caplog.set_level(logging.INFO, "cmd_jax")
    kept = Executables(tmp_path, {}, abstract(2, 1, 1))
    kept.save("generate", "x", None)
    assert kept.load("generate", "x") is None and not list(tmp_path.iterdir())
    assert "XLA:CPU" in caplog.text


def _asked(sampler) -> str:
    ((name, settings, layout),) = sampler._programs._compiled
    return f"{name} {settings} {layout}"
