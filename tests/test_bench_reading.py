import importlib.util
from pathlib import Path

import numpy as np

from cmd_jax import defaults
from cmd_jax.sharding import make_mesh

SCRIPT = Path(__file__).parents[1] / "launch" / "bench_reading.py"
spec = importlib.util.spec_from_file_location("bench_reading", SCRIPT)
bench_reading = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_reading)


def test_it_reads_what_it_makes(tmp_path):
    """The same windows from files and from records, and at a rate."""
    videos = {"count": 2, "frames": 20, "height": 24, "width": 32, "codec": "mpeg4", "rate": 100}
    files, records = bench_reading.of_videos(tmp_path / "a", 16, 4, "raw", videos)
    (latents,) = bench_reading.of_latents(tmp_path / "b", "CMD", {"content": (2, 3, 4), "motion": (5,)}, 8, 4)
    assert (files.clips, records.clips, records.files, latents.size) == (4, 4, files.name, 58)
    for index in range(4):
        one, other = (line.read(index, np.random.default_rng(index)) for line in (files, records))
        assert one["video"].shape == (16, 16, 16, 3) and one["label"] == other["label"]
        np.testing.assert_array_equal(one["video"], other["video"])
    assert latents.read(7, None)["content"].shape == (2, 3, 4)
    mesh = make_mesh(defaults.stage("content").mesh)
    assert all(bench_reading.rate(line, mesh, 0.01) > 0 for line in (files, records, latents))
