"""The one function that all engines run: a shard of a plan, the same bytes whoever writes it."""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from cmd_jax.data import records
from cmd_jax.data.codecs import encoded, video_name
from cmd_jax.data.examples import example
from cmd_jax.data.roots import stat_inside
from cmd_jax.errors import UserError
from cmd_jax.files import each
from cmd_jax.ingest.decoder import BadClip, Clip, Cut, Decoder
from cmd_jax.ingest.plan import Plan, generated


class Limits(NamedTuple):
    """Of decoding a file: seconds without a further frame, and seconds in all, 0 for any."""

    timeout: float
    cap: float


class Files:
    """The clips of a plan of video files, by their places in the listing; for one thread."""

    def __init__(self, plan: Plan, limits: Limits):
        self.plan, self.decoder = plan, Decoder(plan.cut, limits.timeout, limits.cap or math.inf)

    def clip(self, place: int) -> Clip:
        """Raises BadClip."""
        name = self.plan.entries.names[place]
        try:
            stat_inside(self.plan.root, name)
        except ValueError as error:
            raise BadClip(str(error)) from error
        return self.decoder.read(os.path.join(self.plan.root, name))

    def stop(self):
        """From another thread: end the clip that is being decoded."""
        self.decoder.stop()

    def close(self):
        self.decoder.close()


class Generated:
    """As `Files`, of a plan of generated clips."""

    def __init__(self, plan: Plan):
        self.cut, self.source = plan.cut, generated(plan.fields)

    def clip(self, place: int) -> Clip:
        begun = time.thread_time()
        video, *_ = self.source.clip(place, np.random.default_rng(place))
        parts = [encoded(Image.fromarray(frame), self.cut.codec, self.cut.quality) for frame in video]
        parts = [b"".join(parts)] if self.cut.codec == "raw" else parts
        return Clip(len(video), parts, 0.0, len(video), 0, time.thread_time() - begun)

    def stop(self):
        """A clip takes no time."""

    def close(self):
        """There is nothing to end."""


def open_reader(plan: Plan, limits: Limits) -> Files | Generated:
    return Files(plan, limits) if plan.root else Generated(plan)


def finished(plan: Plan, k: int) -> dict | None:
    """The facts of shard k, None until it is finished; UserError if it is another plan's, or damaged."""
    facts = records.finished(plan.shards, k)
    if facts is not None and facts.get("plan") != plan.id:
        path = plan.shards.facts_path(k)
        raise UserError("shard", path, "is of another plan", "remove its facts and run cmd-jax ingest again")
    return facts


def all_finished(plan: Plan, shards: Iterable[int]) -> list[dict | None]:
    """`finished` of each of these."""
    return each(plan.folder, partial(finished, plan), shards)


def video_of(clip: Clip, cut: Cut) -> dict[str, Sequence]:
    """The features of a clip's frames; those of bytes have a shape where it is not the same for all, as TFDS wants."""
    name = video_name(cut.codec, cut.buckets)
    if name == "video":
        return {name: clip.parts}
    return {name: clip.parts, "video/shape": (clip.frames, *cut.sizes[clip.bucket], 3)}


def write_shard(plan: Plan, k: int, reader: Files | Generated, told: Callable[[str], None] = lambda reason: None):
    """Write shard k, unless it is finished -> its facts.

    told: is called with each clip's fault, or "". Beside those of `records.write_shard` the facts are

        plan        the plan's id
        clips       how many it was to have
        lengths     frames of each record; buckets: which of the cut's sizes it has
        seconds     of each record, 0 where its frames a second are not known
        whole       frames of each clip, of which a record has all or the middle ones
        bad         name -> why it was left out; bad_places: the places of these in the shard
        wall, cpu   seconds that it took, the child's among them
    """
    if done := finished(plan, k):
        return done
    places, begun, own = plan.places(k), time.monotonic(), time.thread_time()
    clips, bad = [], {}

    def examples():
        for place in places:
            entry = plan.entries[place]
            try:
                clip = reader.clip(place)
            except BadClip as error:
                bad[place] = str(error)
                told(str(error))
                continue
            clips.append(clip._replace(parts=()))
            features = video_of(clip, plan.cut) | {"label": int(plan.entries.label[place]), "fps": clip.fps}
            yield example(features | {"name": entry.name, "texts": entry.texts})
            told("")

    def facts() -> dict:
        return {
            "plan": plan.id,
            "clips": len(places),
            "lengths": [clip.frames for clip in clips],
            "buckets": [clip.bucket for clip in clips],
            "whole": [clip.whole for clip in clips],
            "seconds": [round(clip.frames / clip.fps, 3) if clip.fps else 0.0 for clip in clips],
            "bad": {plan.entries.names[place]: reason for place, reason in bad.items()},
            "bad_places": [place - places.start for place in bad],
            "wall": time.monotonic() - begun,
            "cpu": time.thread_time() - own + sum(clip.cpu for clip in clips if plan.root),
        }

    return records.write_shard(plan.shards, k, examples(), facts)
