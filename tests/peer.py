"""The peers that `*_peer.py` compare with, each loaded by the first test that uses it, which skips where it is missing.

They take 10 s to import: the group `peers` keeps them in one worker.
"""

import warnings

import pytest


class Peer:
    """A module that is imported when something of it is asked for."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        if attribute.startswith("_"):  # pytest's own looks at what a test file holds
            raise AttributeError(attribute)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = pytest.importorskip(self.name, reason=f"{self.name}, of the extra `peers`, is not installed")
            return getattr(module, attribute)


torch, diffusers, transformers = map(Peer, ("torch", "diffusers", "transformers"))
grouped = pytest.mark.xdist_group("peers")
