"""The sampler of the tiny run, for the tests of sampling and of its verbs."""

import functools
import re

import jax
import numpy as np
import tiny

from cmd_jax.data.requests import Request, label_request
from cmd_jax.data.shapes import CLASS_NAMES
from cmd_jax.files import read_json
from cmd_jax.loading import load_sampler
from cmd_jax.main import main
from cmd_jax.sampling.settings import SamplingSettings

LABELS = np.array([0, 5, 17, 30, 47], np.int32)
SETTINGS = SamplingSettings(batch_size=2, guidance=2.0, content_steps=3, motion_steps=4)  # those of tiny.config_of


def config_of(**changes):
    """The sample config; changes are keys of `sampling`, or `group__key`."""
    return tiny.config_of("sample", **{k if "__" in k else f"sampling__{k}": v for k, v in changes.items()})


@functools.cache
def stirred():
    """Its denoisers are stirred: six steps of training hardly make them heed the class."""
    sampler, rng = load_sampler(tiny.trained()), np.random.default_rng(0)
    for stage in ("content", "motion"):
        stir = lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32)  # noqa: E731
        sampler.params[stage] = jax.tree.map(stir, sampler.params[stage])
    return sampler


def request_of(labels=LABELS) -> Request:
    return label_request(labels, CLASS_NAMES)


def together(stream) -> dict[str, np.ndarray]:
    """All samples of a stream, which must come in order and be complete."""
    batches = list(stream)
    numbers = np.concatenate([samples.index for samples in batches])
    assert numbers.tolist() == list(range(len(numbers)))
    names = [name for name in ("video", "image", "content", "motion", "original") if vars(batches[0])[name] is not None]
    return {name: np.concatenate([vars(samples)[name] for samples in batches]) for name in names}


def difference(a, b):
    return np.abs(a - b).max()


def command(verb, workdir, **changes):
    arguments = [verb, f"--config={tiny.CONFIG_FILE}:sample", f"--workdir={workdir}"]
    changes = {k if "__" in k or k in ("seed", "weights") else f"sampling__{k}": v for k, v in changes.items()}
    return main(arguments + [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()])


def check_gallery(folder, count):
    """-> (its page, what its samples.json says); of a folder with all that `sample` writes of `count` videos."""
    names = [f"{i:04d}{end}" for i in range(count) for end in (".mp4", ".gif", "_content.png")]
    names += ["grid.gif", "grid.png", "content_grid.png", "index.html", "samples.json", "summary.json", "config.json"]
    assert {p.name for p in folder.iterdir()} == set(names)
    assert all((folder / name).stat().st_size > 30 for name in names)
    page = (folder / "index.html").read_text()
    linked = re.findall(r'src="([^"]+)"', page)
    assert len(linked) == 2 * count and all((folder / name).is_file() for name in linked)
    assert not re.search(r"https?://", page)
    section = read_json(folder / "samples.json")
    assert [item["video"] for item in section["items"]] == [f"{i:04d}.mp4" for i in range(count)]
    return page, section
