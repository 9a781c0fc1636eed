"""Step caches: how they are chosen, measured, written and checked, and that a mesh changes nothing."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from samplers import SETTINGS, command, request_of, stirred

from cmd_jax.defaults import RULES
from cmd_jax.defaults import stage as stage_defaults
from cmd_jax.diffusion.plan import Kind
from cmd_jax.errors import UserError
from cmd_jax.files import read_json
from cmd_jax.keys import derive
from cmd_jax.performance.flops import count
from cmd_jax.sampling import calibration
from cmd_jax.sampling.calibration import Cost, choose, cost_of, operations, reusing
from cmd_jax.sampling.programs import BACK
from cmd_jax.sharding import batch_sharding, make_mesh, partitioning

pytestmark = pytest.mark.xdist_group("tiny")
COST = Cost(whole=100, reusing=4)
WHOLE, GUIDED = Kind(False, False), Kind(True, False)


@pytest.mark.parametrize("kinds", [[GUIDED] * 8, [WHOLE] * 3 + [GUIDED] * 3 + [WHOLE] * 2])
@pytest.mark.parametrize("speedup", [1.0, 1.4, 2.0])
def test_no_other_list_saves_as_much_at_less_change(kinds, speedup):
    changes = np.random.default_rng(len(kinds) + int(10 * speedup)).uniform(0.1, 1.0, (8, 2))

    def total(reuse):
        """None where the list may not be."""
        since, summed, kept = 0, 0.0, set()
        for n, kind in enumerate(kinds):
            if n not in reuse:
                since, kept = 0, kept | {kind.guided}
                continue
            if n == 0 or since == 2 or (kind.guided and True not in kept):
                return None
            summed, since = summed + changes[n, since], since + 1
        return summed

    every = (set(c) for size in range(8) for c in itertools.combinations(range(8), size))
    enough = [c for c in every if operations(reusing(kinds, c), COST) * speedup <= operations(kinds, COST) + 1e-6]
    least = min(found for c in enough if (found := total(c)) is not None)
    chosen = choose(changes, kinds, COST, speedup)
    assert operations(reusing(kinds, chosen), COST) * speedup <= operations(kinds, COST) + 1e-6
    assert total({*chosen}) == pytest.approx(least)


def test_more_than_lists_can_do_is_refused():
    assert choose(np.ones((4, 1)), [GUIDED] * 4, COST, 1.9) == (1, 3)
    with pytest.raises(UserError, match=r"^--speedup=2.0: reusing up to 1 evaluations in a row gives 1.92 at most; "):
        choose(np.ones((4, 1)), [GUIDED] * 4, COST, 2.0)
    with pytest.raises(UserError, match="^--speedup=0.5: not a speed-up; "):
        choose(np.ones((4, 1)), [GUIDED] * 4, COST, 0.5)


@pytest.fixture(scope="module")
def sampler():
    return stirred()


def test_what_is_measured_is_how_much_the_kept_changes(sampler):
    """Against a loop of Python over the evaluations of the content stage, guided below t = 0.8."""
    chosen = replace(SETTINGS, content_steps=4, guidance_to=0.8)
    settings, layout, arguments = sampler.first_call(request_of(), chosen)
    params, batch, key, guidance, *_ = arguments
    with layout.partitioning():
        found = jax.device_get(sampler.program("changes", settings, layout)(*arguments))
    assert found["content"].shape == (2, 4, BACK) and found["motion"].shape == (2, 4, BACK)
    stage, label, null_label, kept = sampler.denoisers["content"], batch["label"], jnp.full(2, 48), []

    apply = jax.jit(lambda x, t, label: stage.apply(params["content"], x, t, label, None, keep=True))
    keys = jax.vmap(lambda index: derive(derive(key, "sample", index), "content"))(batch["index"])
    x = jax.vmap(lambda key: jax.random.normal(derive(key, "noise"), stage.shape))(keys)
    for level in (1.0, 0.75, 0.5, 0.25):
        (out, deep), (null, null_deep) = (apply(x, jnp.full(2, 1000 * level), which) for which in (label, null_label))
        guided = level <= 0.8
        kept.append((np.asarray(deep), np.asarray(null_deep) if guided else None))
        x = x - 0.25 * (null + guidance * (out - null) if guided else out)
    size = lambda x: np.abs(x).sum((1, 2))  # noqa: E731
    for now, back in ((1, 1), (2, 1), (3, 1), (3, 2)):
        pairs = [pair for pair in zip(kept[now], kept[now - back], strict=True) if pair[0] is not None]
        if any(before is None for _, before in pairs):
            continue  # of the null condition nothing was kept yet
        expected = sum(size(a - b) for a, b in pairs) / sum(size(a) for a, _ in pairs)
        np.testing.assert_allclose(found["content"][:, now, back - 1], expected, rtol=1e-3)


def test_a_list_saves_what_its_cost_says(sampler):
    """Operations of the whole program, with and without lists and an interval."""

    def counted(settings):
        settings, layout, arguments = sampler.first_call(request_of(), settings)
        program = sampler.program("generate", settings, layout)
        return count(lambda params: program(params, *arguments[1:]), arguments[0]).total // settings.batch_size

    def denoisers(settings):
        settings, total = sampler.resolve(settings), 0
        for name, stage in sampler.denoisers.items():
            total += operations(stage.kinds(guided=True, **settings.run_of(name)), cost_of(sampler, name))
        return total

    plain = replace(SETTINGS, content_steps=4)
    short = replace(plain, content_reuse="2", motion_reuse="2,3", guidance_from=0.3, guidance_to=0.8)
    assert counted(plain) - counted(short) == denoisers(plain) - denoisers(short) > 0


def test_the_verb_writes_lists_that_sampling_takes_and_checks(sampler, tmp_path, capsys):
    for stage in ("autoencoder", "content", "motion"):
        (tmp_path / stage).symlink_to(tiny.trained() / stage)
    assert command("calibrate", tmp_path, content_steps=6, motion_steps=6, num=2) == 0
    path, told = tmp_path / "reuse.json", capsys.readouterr().out
    written = read_json(path)
    for name in ("content", "motion"):
        cache = written[name]
        assert cache["speedup"] >= 1.5 and len(cache["changes"]) == 6
        assert f"sampling.{name}_reuse={cache['reuse']}\n" in told
    settings = replace(SETTINGS, content_steps=6, motion_steps=6)
    applied = calibration.apply(path, sampler, settings)
    assert (applied.content_reuse, applied.motion_reuse) == (written["content"]["reuse"], written["motion"]["reuse"])
    assert command("sample", tmp_path, content_steps=6, motion_steps=6, reuse=path, num=1) == 0

    refusals = {
        "content_steps=7": ("content_steps", "6, and is 7"),
        "guidance=3.0": ("guidance", "2.0, and is 3.0"),
        "motion_solver=heun": ("motion_solver", "euler, and is heun"),
    }
    for change, (name, told) in refusals.items():
        key, _, value = change.partition("=")
        changes = {"content_steps": 6, "motion_steps": 6, "reuse": path} | {key: value}
        assert command("sample", tmp_path, **changes) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith(f"sampling.reuse={path}: made for another run: {name} was {told}; ")
        assert "\n" not in line
    with pytest.raises(UserError, match="^sampling.content_reuse=1: sampling.reuse brings lists too; "):
        calibration.apply(path, sampler, replace(settings, content_reuse="1"))


def check_eight_devices():
    """Content frames of texts by the UNet, the same numbers on eight devices as on one: guided, where the rows of both
    conditions lie apart, and not guided, with a row on each device."""
    from lowered import mesh_of, stage_of

    from cmd_jax.models.conditions import Text
    from cmd_jax.state import abstract

    stage, rng = stage_of("content", "text"), np.random.default_rng(0)
    draw = lambda shape: rng.normal(0, 0.1, shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(lambda x: draw(x.shape), abstract(stage.init, mesh_of(1), RULES))
    text, null = (Text(10 * draw((8, 77, 8)), draw((8, 8))) for _ in range(2))
    keys = jax.random.split(jax.random.key(0), 8)
    split = stage_defaults("sample").mesh
    split.guidance = 2
    halves = make_mesh(split)

    for guidance, many in ((3.0, halves), (None, mesh_of(8))):

        def sample(keys, text, null, guidance=guidance):
            return stage.sample(
                params, stage.frozen["statistics"], text, None, keys, guidance=guidance, null=null,
                steps=6, solver="dpmpp", interval=(0.2, 0.7), reuse=(1, 3, 5),
            )  # fmt: skip

        drawn = []
        for mesh in (mesh_of(1), many):
            with partitioning(mesh, RULES):
                rows = batch_sharding(mesh)
                jitted = jax.jit(sample, in_shardings=(rows, rows, rows), out_shardings=rows)
                drawn.append(np.asarray(jitted(keys, text, null)))
        assert np.isfinite(drawn[0]).all() and np.abs(drawn[0]).max() > 0.1
        np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-4 * np.abs(drawn[0]).max())
