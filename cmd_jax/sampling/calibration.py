"""Step caches for a wanted speed-up: what the denoisers keep is measured, and where it changes least it is reused."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from cmd_jax.data.requests import Request
from cmd_jax.diffusion.plan import Kind
from cmd_jax.errors import UserError, brief
from cmd_jax.files import as_json, as_path, from_json, like_of, read_json, versions, write_json
from cmd_jax.performance.flops import count
from cmd_jax.running.hosts import whole
from cmd_jax.sampling.sampler import Sampler
from cmd_jax.sampling.settings import SamplingSettings

NOT_OF_A_RUN = ("batch_size", "seed", "content_reuse", "motion_reuse")  # settings that a calibration is not bound to


@dataclass(frozen=True)
class Cost:
    """Operations of one evaluation for one condition: of the whole network, and of what reusing leaves of it."""

    whole: int
    reusing: int


@dataclass(frozen=True)
class StepCache:
    """The list of one denoiser. changes: of what each evaluation keeps, the relative L1 distance from the one before.
    speedup: operations of the run in full over those with the list."""

    reuse: str
    speedup: float
    cost: Cost
    changes: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """What `cmd-jax calibrate` writes. made_for: all that the lists hold for, see `made_for`."""

    made_for: dict
    samples: int
    content: StepCache
    motion: StepCache
    versions: dict


def made_for(sampler: Sampler, settings: SamplingSettings) -> dict[str, str | float | int]:
    """What a list depends on: the stages' parameters, the size of clips, and how they are sampled."""
    settings = sampler.resolve(settings)
    run = {name: value for name, value in asdict(settings).items() if name not in NOT_OF_A_RUN}
    run["guidance"] = 1.0 if settings.guidance is None else float(settings.guidance)
    size = "x".join(map(str, sampler.autoencoder.clip_shape[:3]))
    return {**{f"digest of {name}": value for name, value in sampler.digests.items()}, "size": size, **run}


def calibrate(sampler: Sampler, request: Request, settings: SamplingSettings, speedup: float) -> Calibration:
    """Lists by which each denoiser takes at most 1 / speedup of its operations, measured on one batch of a request.

    UserError (--speedup) where no list does.
    """
    settings = replace(settings, content_reuse="", motion_reuse="")
    samples = min(settings.batch_size, len(request))
    settings, layout, (params, batch, key, guidance, *null_ids) = sampler.first_call(request, settings)
    with layout.partitioning():
        changes = sampler.program("changes", settings, layout)(params, batch, key, guidance, *null_ids)
    caches = {}
    for name, stage in sampler.denoisers.items():
        change = whole(changes[name])[:samples].mean(axis=0)
        kinds = stage.kinds(guided=guidance is not None, **settings.run_of(name))
        cost = cost_of(sampler, name)
        reuse = choose(change, kinds, cost, speedup)
        text = ",".join(map(str, reuse))
        gain = operations(kinds, cost) / operations(reusing(kinds, reuse), cost)
        caches[name] = StepCache(text, round(gain, 4), cost, tuple(round(float(x), 5) for x in change[:, 0]))
    return Calibration(made_for(sampler, settings), samples, **caches, versions=versions())


def cost_of(sampler: Sampler, name: str) -> Cost:
    """Counted from what the network computes; nothing is run."""
    stage = sampler.denoisers[name]
    x, timesteps = np.zeros((1, *stage.shape), np.float32), np.zeros(1, np.float32)
    content = None if name == "content" else np.zeros((1, *sampler.autoencoder.content_shape), np.float32)

    def given(params):
        return sampler.conditions.null(params["conditions"], 1), stage.content_features(params[name], content)

    def apply(params, given, **cache):
        return stage.apply(params, x, timesteps, *given, **cache)

    given, params = jax.eval_shape(given, sampler.params), sampler.params[name]
    _, kept = jax.eval_shape(partial(apply, keep=True), params, given)
    part = count(lambda params, given, kept: apply(params, given, reuse=kept), params, given, kept)
    return Cost(count(apply, params, given).total, part.total)


def operations(kinds: list[Kind], cost: Cost) -> int:
    """Of all evaluations of a run, for one clip."""
    return sum((1 + kind.guided) * (cost.reusing if kind.reuses else cost.whole) for kind in kinds)


def reusing(kinds: list[Kind], reuse) -> list[Kind]:
    return [kind._replace(reuses=n in reuse) for n, kind in enumerate(kinds)]


def choose(changes: np.ndarray, kinds: list[Kind], cost: Cost, speedup: float) -> tuple[int, ...]:
    """The evaluations that reuse, for the wanted speed-up at the least sum of changes.

    changes: [evaluations, back], of what each keeps the distance from what was kept 1, 2, ... evaluations before; at
    most `back` in a row reuse. Dynamic programming over the evaluations: for each number of saved rows, and of
    evaluations since the last in full, the least sum so far and its list.
    """
    if not speedup >= 1:
        raise UserError("--speedup", speedup, "not a speed-up", "use 1 or more")
    full, saves = operations(kinds, cost), cost.whole - cost.reusing
    wanted = int(np.ceil((full - full / speedup) / saves - 1e-9))
    first_guided = next((n for n, kind in enumerate(kinds) if kind.guided), 0)
    best = {(0, 0): (0.0, ())}  # (rows saved, evaluations since the last in full) -> (sum of changes, list)
    for n, kind in enumerate(kinds):
        reached = {}
        for (saved, since), (total, chosen) in best.items():
            options = [((saved, 0), (total, chosen))]
            oldest = first_guided if kind.guided else 0  # of the null condition nothing was kept before
            if since < changes.shape[1] and n - since - 1 >= oldest:
                state = min(saved + 1 + kind.guided, wanted), since + 1
                options.append((state, (total + float(changes[n, since]), (*chosen, n))))
            for state, value in options:
                reached[state] = min(value, reached.get(state, value))
        best = reached
    found = [value for (saved, _), value in best.items() if saved >= wanted]
    if not found:
        most = full / (full - max(saved for saved, _ in best) * saves)
        problem = f"reusing up to {changes.shape[1]} evaluations in a row gives {most:.2f} at most"
        raise UserError("--speedup", speedup, problem, "use less, or fewer steps")
    return min(found)[1]


def settings_of(sampler: Sampler, config, **changes) -> SamplingSettings:
    """How a sample config says to sample, with the lists of its sampling.reuse."""
    settings, path = SamplingSettings.of(config, **changes), config.sampling.reuse
    return apply(as_path(path), sampler, settings) if path and sampler.denoisers else settings


def write(path: Path, calibration: Calibration):
    write_json(path, as_json(calibration))


def apply(path: Path, sampler: Sampler, settings: SamplingSettings) -> SamplingSettings:
    """The settings with the lists of a file; UserError (sampling.reuse) where it was made for another run."""
    remedy = "run `cmd-jax calibrate` for it, or leave it out"
    calibration = from_json(Calibration, read_json(path, "sampling.reuse", like=like_of(Calibration), remedy=remedy))
    for name in ("content_reuse", "motion_reuse"):
        if list_given := getattr(settings, name):
            raise UserError(f"sampling.{name}", list_given, "sampling.reuse brings lists too", "give one of the two")
    for name, value in made_for(sampler, settings).items():
        if (other := calibration.made_for.get(name)) != value:
            problem = f"made for another run: {name} was {brief(other)}, and is {brief(value)}"
            raise UserError("sampling.reuse", path, problem, remedy)
    return replace(settings, content_reuse=calibration.content.reuse, motion_reuse=calibration.motion.reuse)
