"""Runs whose evaluations differ: rolled in one program, against the same written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.diffusion.flow import Flow
from cmd_jax.diffusion.gaussian import Gaussian
from cmd_jax.diffusion.plan import Kind, Planned, empty_memory, evaluation, evaluation_kinds, parse_reuse
from cmd_jax.diffusion.schedules import Schedule, linear_betas
from cmd_jax.errors import UserError

CONDITION, NULL = jnp.array([1.0, -0.5]), jnp.array([0.25, 0.25])
X, GUIDANCE = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 5)), jnp.float32), 3.0
PROCESSES = {"flow": Flow(), "gaussian": Gaussian(Schedule.from_betas(linear_betas(100)))}
RUNS = [("flow", "euler"), ("flow", "heun"), ("flow", "ab2"), ("gaussian", "ddim"), ("gaussian", "dpmpp")]
INTERVAL, REUSE = (0.2, 0.74), (1, 4, 6)
SIZES = {"steps": 7}


def apply(x, timesteps, condition, content, keep=False, reuse=None):
    """A model of [B,...] whose deep part is a tanh; content is left out."""
    deep = jnp.tanh(2 * x + condition[:, None, None, None]) if reuse is None else reuse
    out = deep * timesteps[:, None, None, None] / 1000 + 0.3 * x
    return (out, deep) if keep else out


def planned(process, guidance=GUIDANCE, interval=(0.0, 1.0), reuse=(), **run) -> Planned:
    kinds = evaluation_kinds(process.levels(**run), guidance is not None, interval, reuse)
    memory = empty_memory(jax.ShapeDtypeStruct(X.shape, X.dtype), kinds) if reuse else ()
    return Planned(evaluation(apply, CONDITION, None, guidance, NULL), kinds, memory)


def sample(process, denoise, **run):
    return jax.jit(lambda x: process.sample(denoise, x, None, **run))


def plain(guidance=GUIDANCE):
    """The guided denoiser without a plan."""
    evaluate = evaluation(apply, CONDITION, None, guidance, NULL)
    return lambda x, timesteps: evaluate(Kind(guidance is not None, False), (), x, timesteps)[1]


@pytest.mark.parametrize("name, solver", RUNS)
@pytest.mark.parametrize("guidance", [GUIDANCE, None])
def test_guidance_everywhere_and_no_reuse_is_the_program_without_a_plan(name, solver, guidance):
    run = dict(solver=solver, **SIZES)
    texts = [
        sample(PROCESSES[name], denoise, **run).lower(X).as_text()
        for denoise in (planned(PROCESSES[name], guidance, **run), plain(guidance))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "name, solver, guidance, interval",
    [
        *((*run, GUIDANCE, INTERVAL) for run in RUNS),
        ("flow", "ab2", GUIDANCE, (0.0, 1.0)),
        ("gaussian", "dpmpp", None, (0.0, 1.0)),
    ],
)
def test_a_plan_is_what_it_says_evaluation_by_evaluation(name, solver, guidance, interval):
    """By hand: each evaluation in turn, on rows of one condition at a time."""
    process, run, seen, kept = PROCESSES[name], dict(solver=solver, **SIZES), [], {}

    def one(x, timesteps, condition, number):
        if number in REUSE:
            return apply(x, timesteps, condition, None, reuse=kept[float(condition[0])])
        out, kept[float(condition[0])] = apply(x, timesteps, condition, None, keep=True)
        return out

    def by_hand(x, timesteps):
        number, level = len(seen), float(timesteps[0]) / (1000 if name == "flow" else 100)
        seen.append(level)
        out = one(x, timesteps, CONDITION, number)
        if guidance is None or not interval[0] <= level <= interval[1]:
            return out
        null = one(x, timesteps, NULL, number)
        return null + guidance * (out - null)

    with jax.disable_jit():  # a scan is then a loop of Python
        expected = process.sample(by_hand, X, None, **run)
    found = sample(process, planned(process, guidance, interval, REUSE, **run), **run)(X)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(process.levels(**run), seen, atol=1e-6)
    whole = sample(process, planned(process, guidance, **run), **run)(X)
    assert np.abs(found - whole).max() > 1e-3


def test_kinds():
    kinds = evaluation_kinds(np.array([1.0, 0.75, 0.5, 0.25]), True, (0.5, 0.75), (2,))
    assert [tuple(kind) for kind in kinds] == [(False, False), (True, False), (True, True), (False, False)]
    assert not any(kind.guided for kind in evaluation_kinds(np.array([1.0, 0.5]), False))
    assert parse_reuse(" 6,3, 4", "f") == (3, 4, 6) and parse_reuse("", "f") == ()


@pytest.mark.parametrize("reuse, error", [
    ((0, 2), "f=0,2: evaluation 0 is the first: nothing is kept yet; leave 0 out"),
    ((1,), "f=1: evaluation 1 is the first with guidance: nothing is kept yet; leave 1 out"),
    ((2, 4), "f=2,4: there is no evaluation 4; use numbers from 1 to 3"),
])  # fmt: skip
def test_a_list_that_cannot_be_is_refused(reuse, error):
    with pytest.raises(UserError) as refused:
        evaluation_kinds(np.array([1.0, 0.75, 0.5, 0.25]), True, (0.0, 0.8), reuse, "f")
    assert str(refused.value) == error


@pytest.mark.parametrize("text", ["3;4", "-1", "1,,2", "2,2", "1.5", "all", "9" * 30])
def test_a_text_that_is_no_list_is_refused(text):
    with pytest.raises(UserError, match="^f=.*: not different whole numbers separated by commas; "):
        parse_reuse(text, "f")
