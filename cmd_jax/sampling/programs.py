"""The reverse half of CMD: class or text -> content frame -> motion latent -> video, one program (section 3.3)."""

import contextlib
import copy
import operator
import time
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.keys import derive
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Classes, Texts
from cmd_jax.models.frames import pixels
from cmd_jax.running.compilation import apart_from_the_cache
from cmd_jax.sampling.executables import Executables
from cmd_jax.sampling.layouts import Layout
from cmd_jax.sampling.settings import SamplingSettings
from cmd_jax.sharding import batch_sharding
from cmd_jax.stages import DiffusionStage, FrozenAutoencoder

BACK = 4  # evaluations over which changes are measured: no longer run of them reuses


class Programs:
    """generate, draw_content, animate, reconstruct, changes: (params, batch, *arguments) -> batch, of resolved static
    settings.

    denoisers, params, conditions: as of Sampler. statistics: {"content", "motion"}, by which latents are normalised.
    arguments, but for reconstruct: key, guidance (None for none), and token ids [L] of what it leads away from, where
    that is a text.
    """

    def __init__(
        self, autoencoder: FrozenAutoencoder, denoisers: dict[str, DiffusionStage], statistics: dict,
        conditions: Classes | Texts | None,
    ):  # fmt: skip
        self.autoencoder, self.denoisers, self.statistics = autoencoder, denoisers, statistics
        self.conditions, self._jitted, self._compiled = conditions, {}, {}
        self.executables: Executables | None = None
        self.seconds = Counter()  # "trace", "lower", "compile", and "load" of executables

    def jitted(self, name: str, settings: SamplingSettings, layout: Layout):
        """One of them, compiled at first use for the static part of resolved settings and each layout of a batch."""
        key = name, settings.static, layout.mesh
        if key not in self._jitted:
            function = partial(getattr(self, f"_{name}"), settings=settings.static)
            self._jitted[key] = jax.jit(function, out_shardings=self._places(name, layout))
        return self._jitted[key]

    def run(self, name: str, settings: SamplingSettings, layout: Layout, arguments: tuple):
        """What one of them gives; compiled, or read, at first use for those settings and shapes and where these lie."""
        places = _layout(arguments)
        key = name, settings.static, places
        if key not in self._compiled:
            asked = f"{name} {settings.static} {places}"
            with self._timed("load"):
                loaded = self.executables and self.executables.load(name, asked)
            if loaded:
                with self.executables.first_call(name, asked):  # what it lacks is told then, and not before
                    out = jax.block_until_ready(loaded(*arguments))
                    self._compiled[key] = loaded
                    return out
            self._compiled[key] = self._made(name, settings, layout, asked, arguments)
        return self._compiled[key](*arguments)

    def _made(self, name: str, settings, layout: Layout, asked: str, arguments: tuple):
        with self._timed("trace"):
            traced = self.jitted(name, settings, layout).trace(*arguments)
        with self._timed("lower"):
            lowered = traced.lower()
        with self._timed("compile"), apart_from_the_cache() if self.executables else contextlib.nullcontext():
            compiled = lowered.compile()
        if self.executables:
            self.executables.save(name, asked, compiled)
        return compiled

    @contextlib.contextmanager
    def _timed(self, what: str):
        begun = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begun

    def take(self, layout: Layout):
        """(array [B, ...] on any layout, numbers of rows) -> these rows, laid out."""
        if layout.mesh not in self._jitted:
            self._jitted[layout.mesh] = jax.jit(operator.getitem, out_shardings=batch_sharding(layout.mesh))
        return self._jitted[layout.mesh]

    def _places(self, name: str, layout: Layout):
        """Where the results of a program lie: rows are whole, but the frames of videos stay where they were made."""
        rows = batch_sharding(layout.mesh)
        if name in ("draw_content", "changes"):
            return rows
        frames = layout.frames(self.autoencoder.clip_shape[0])
        places = {"video": frames, "image": rows, "content": rows, "motion": rows}
        return places | ({"original": frames} if name == "reconstruct" else {})

    def _draw(self, name, params, keys, condition, content, guidance, null, settings, **more):
        """Content frames (content=None) or motion latents [B, ...], one key a sample."""
        return computing_in(settings.dtype, self.denoisers[name]).sample(
            params[name], self.statistics[name], condition, content, keys, guidance=guidance, null=null,
            **settings.run_of(name), **more,
        )  # fmt: skip

    def _decode(self, params, content, motion, settings):
        autoencoder, frozen = computing_in(settings.dtype, self.autoencoder), params["autoencoder"]
        video, image = autoencoder.decode(frozen, Latents(content, motion)), autoencoder.show(frozen, content)
        return {"video": video, "image": image, "content": content, "motion": motion}

    def _conditions(self, params, batch, guidance, null_ids):
        """-> (what the samples are conditioned on, what guidance leads away from); texts are encoded here, once."""
        condition = self.conditions.of(params["conditions"], batch)
        if guidance is None:
            return condition, None
        return condition, self.conditions.null(params["conditions"], len(batch["index"]), null_ids)

    def _generate(self, params, batch, key, guidance, null_ids=None, *, settings):
        """Classes or texts -> content -> motion -> video."""
        content_keys, motion_keys = sample_keys(key, batch)
        condition, null = self._conditions(params, batch, guidance, null_ids)
        content = self._draw("content", params, content_keys, condition, None, guidance, null, settings)
        motion = self._draw("motion", params, motion_keys, condition, content, guidance, null, settings)
        return self._decode(params, content, motion, settings)

    def _changes(self, params, batch, key, guidance, null_ids=None, *, settings, back=BACK):
        """Classes or texts -> {"content", "motion"}: what the denoiser keeps, from evaluation to evaluation."""
        content_keys, motion_keys = sample_keys(key, batch)
        condition, null = self._conditions(params, batch, guidance, null_ids)
        given = guidance, null, settings
        content, of_content = self._draw("content", params, content_keys, condition, None, *given, back=back)
        _, of_motion = self._draw("motion", params, motion_keys, condition, content, *given, back=back)
        return {"content": of_content, "motion": of_motion}

    def _draw_content(self, params, batch, key, guidance, null_ids=None, *, settings):
        """Classes or texts -> content."""
        condition, null = self._conditions(params, batch, guidance, null_ids)
        return self._draw("content", params, sample_keys(key, batch)[0], condition, None, guidance, null, settings)

    def _animate(self, params, batch, key, guidance, null_ids=None, *, settings):
        """Given content frames, or those of images or of clips -> motion -> video."""
        _, motion_keys = sample_keys(key, batch)
        condition, null = self._conditions(params, batch, guidance, null_ids)
        autoencoder, frozen = computing_in(settings.dtype, self.autoencoder), params["autoencoder"]
        if "image" in batch:
            content = autoencoder.content_of(frozen, batch["image"])
        elif "video" in batch:
            content = autoencoder.encode(frozen, batch).content
        else:
            content = batch["content"]
        motion = self._draw("motion", params, motion_keys, condition, content, guidance, null, settings)
        return self._decode(params, content, motion, settings)

    def _reconstruct(self, params, batch, *, settings):
        latents = computing_in(settings.dtype, self.autoencoder).encode(params["autoencoder"], batch)
        return {**self._decode(params, *latents, settings), "original": pixels(batch["video"])}


def _layout(arguments: tuple) -> tuple:
    """Of which shapes and dtypes they are, and where they lie."""
    leaves, tree = jax.tree.flatten(arguments)
    return tree, tuple((np.shape(x), str(x.dtype), getattr(x, "sharding", None)) for x in leaves)


def sample_keys(key, batch) -> tuple:
    """-> (content keys [B], motion keys [B]). Samples of one "index" share the content key, not the motion key."""

    def of(index, variant):
        sample = derive(key, "sample", index)
        return derive(sample, "content"), derive(sample, "motion", variant)

    return jax.vmap(of)(batch["index"], batch["variant"])


def computing_in(dtype: str, stage):
    """The stage or autoencoder, its matrix products in `dtype`; "": as it is."""
    if not dtype:
        return stage
    stage = copy.copy(stage)
    stage.module = stage.module.clone(dtype=jnp.dtype(dtype))
    return stage
