"""Opening the source of clips that a config names, and encoding it once for the diffusion stages."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cmd_jax.data.dataset import DatasetSource
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.pipeline import local_rows, to_global
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.errors import choose
from cmd_jax.sharding import replicated

STATISTICS_CLIPS = 1024
Source = ShapesSource | FolderSource | DatasetSource


def open_source(data, cache: Path | None = None) -> Source:
    """The source of a config's `data` group. `cache` remembers which files of a folder could be read."""
    choose("data.source", data.source, ("shapes", "folder", "dataset"))
    shape = {"frames": data.frames, "height": data.height, "width": data.width, "split": data.split}
    if data.source == "shapes":
        return ShapesSource(clips=data.clips, seed=data.seed, **shape)
    files = {"stride": data.stride, "fps": data.fps, "max_bad_fraction": data.max_bad_fraction}
    if data.source == "dataset":
        return DatasetSource(data.root, **shape, **files)
    return FolderSource(
        data.root,
        **shape,
        **files,
        layout=data.layout,
        fold=data.fold,
        probe_timeout=data.probe_timeout,
        probe_cap=data.probe_cap,
        cache=cache,
    )


def encode_clips(read, encode, params, indices, batch_size: int, mesh, seed: int) -> dict:
    """encode(params, batch) of the clips at `indices` [N] on every host: {name: [N, ...]}.

    read: as `video_reader` makes it. Each position draws a random start of its own.
    """
    rows, count = local_rows(batch_size, mesh), len(indices)
    encode, parts = jax.jit(encode, out_shardings=replicated(mesh)), []
    for start in range(0, count, batch_size):
        examples = {
            row: read(int(indices[(start + row) % count]), np.random.default_rng((seed, 2, start + row)))
            for row in rows
        }
        parts.append(jax.tree.map(np.asarray, encode(params, to_global(examples, batch_size, mesh))))
    return {name: np.concatenate([p[name] for p in parts])[:count] for name in parts[0]}


def latent_reader(latents: dict) -> Callable[[int, np.random.Generator], dict]:
    """Examples of an encoded source: index -> {name: values[index]}."""
    return lambda index, rng: {name: values[index] for name, values in latents.items()}
