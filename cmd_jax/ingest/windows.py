"""Windows straight from clips that nobody has decoded before: a source for stores of latents that are made ahead."""

import math
import os
import queue

import numpy as np

from cmd_jax.data.draws import Draws, draw_start, draw_text, frames_needed
from cmd_jax.data.layouts import list_clips
from cmd_jax.data.roots import check_root, stat_inside
from cmd_jax.data.splits import keys_of
from cmd_jax.data.store import LEFT_OUT
from cmd_jax.errors import UserError
from cmd_jax.ingest.decoder import BadClip, Cut, Decoder


class ListedClips:
    """As a FolderSource, but only listed: each window is cut while its file is decoded, in a child. Those of a clip
    that cannot be used are black, have the label LEFT_OUT, and `bad` has its name and the reason.

    config: its groups data and ingest. The fingerprint is that of the listing: files may change behind it.
    """

    shelf = None  # nothing is fetched

    def __init__(self, config):
        data = config.data
        self.root, self.stride = check_root(data.root), data.stride
        listing = list_clips(self.root, data.layout, data.fold, data.split)
        self.entries, self.class_names, self.bad = listing.entries, listing.class_names, dict(listing.bad)
        if not len(self.entries):
            raise UserError("data.root", self.root, "none of its clips can be used", "mend or replace them")
        self.listed = len(self.entries) + len(self.bad)
        needed = frames_needed(data.frames, data.stride)
        self._cut = Cut(data.height, data.width, "", float(data.fps), "raw", 0, needed, needed, config.ingest.pixels)
        self._limits = data.probe_timeout, data.probe_cap or math.inf
        self._decoders: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        self.has_texts = bool((np.diff(self.entries.text_edges) > 0).all())
        self.fingerprint = f"listing {self.entries.digest()}, stride {data.stride}, {data.fps:g} fps"

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries.names[index]

    def keys(self) -> np.ndarray:
        """uint64 [N], see `cmd_jax.data.splits`."""
        return keys_of(self.entries.names)

    def clip(self, index: int, rng: Draws) -> tuple[np.ndarray, int, str | None]:
        """-> (video uint8 RGB [T,H,W,3], its label or LEFT_OUT, its caption), drawn as a FolderSource draws them."""
        entry, label = self.entries[index], int(self.entries.label[index])
        try:
            video, whole = self._window(entry.name, rng.seed)
        except BadClip as error:
            self.bad[entry.name] = str(error)
            frames = len(range(0, self._cut.needed, self.stride))
            return np.zeros((frames, self._cut.height, self._cut.width, 3), np.uint8), LEFT_OUT, ""
        draw_start(whole, self._cut.needed, rng)  # as the child has
        return video[:: self.stride], label if label >= 0 else len(self.class_names), draw_text(entry.texts, rng)

    def _window(self, name: str, seed) -> tuple[np.ndarray, int]:
        """-> (its frames, how many the clip has)."""
        try:
            stat_inside(self.root, name)
        except ValueError as error:
            raise BadClip(str(error)) from error
        try:
            decoder = self._decoders.get_nowait()
        except queue.Empty:
            decoder = Decoder(self._cut, *self._limits)
        try:
            clip = decoder.read(os.path.join(self.root, name), seed)
        finally:
            self._decoders.put(decoder)
        return clip.pixels(self._cut), clip.whole

    def close(self):
        while not self._decoders.empty():
            self._decoders.get().close()
