"""Sources of folders for the tests, and what they say."""

import sys

import numpy as np
import pytest

from cmd_jax.data import probe
from cmd_jax.data.folder import FolderSource
from cmd_jax.data.supervised import answered
from cmd_jax.errors import UserError

SIZE = {"frames": 8, "height": 24, "width": 32}
ANSWER = '{"frames": 20, "declared": 20, "width": 64, "height": 48, "key_frames": []}'
TRUSTING = f"""
import sys
print('{{"ready": true}}', flush=True)
for line in sys.stdin:
    print('{ANSWER}', flush=True)
"""


def source(root, **settings):
    """With a child that takes every file for a good one, since it starts ten times as fast as the true one."""
    command = [sys.executable, "-I", "-S", "-c", TRUSTING]
    return FolderSource(root, **{**SIZE, "max_bad_fraction": 0.9, "probe_command": command, **settings})


def probed(root, **settings):
    return source(root, probe_command=probe.COMMAND, **settings)


def facts_of(path, progress=lambda: None) -> dict:
    """What a child says of a file."""
    return answered(probe.inspect, {"path": str(path), "times": False}, progress)[0]


def names(source):
    return [source.name(index) for index in range(len(source))]


def labels(source):
    found = [source.clip(index, np.random.default_rng(0))[1] for index in range(len(source))]
    assert source.labels.dtype == np.int32 and found == source.labels.tolist()
    return found


def texts(source):
    """The first caption of each clip, None where not all have any."""
    return tuple(source.texts(index)[0] for index in range(len(source))) if source.has_texts else None


def drawn_texts(source, index, seeds):
    return [source.clip(index, np.random.default_rng(seed))[2] for seed in range(seeds)]


def manifest(root, text, name="metadata.csv"):
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def refused(field, match, root, **settings):
    with pytest.raises(UserError, match=match) as error:
        source(root, **settings)
    assert error.value.field == field
    assert "\n" not in str(error.value)
