"""Opening the source of clips that a config names."""

from pathlib import Path

from cmd_jax import cache as caches
from cmd_jax.data.dataset import DatasetSource
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.shapes import ShapesSource
from cmd_jax.data.sizes import sizes_of
from cmd_jax.errors import choose

Source = ShapesSource | FolderSource | DatasetSource


def open_source(data, cache: Path | None = None) -> Source:
    """The source of a config's `data` group. `cache` remembers which files of a folder could be read."""
    caches.use(data.cache_dir, data.cache_gib)
    choose("data.source", data.source, ("shapes", "folder", "dataset"))
    shape = {"frames": data.frames, "height": data.height, "width": data.width, "split": data.split}
    if data.source == "shapes":
        return ShapesSource(clips=data.clips, seed=data.seed, **shape)
    files = {"stride": data.stride, "fps": data.fps, "max_bad_fraction": data.max_bad_fraction}
    files["further_sizes"] = sizes_of(data)[1:]
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
