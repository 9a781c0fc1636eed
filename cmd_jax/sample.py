"""The reverse half of CMD: class or text -> content frame -> motion latent -> video, one program (section 3.3)."""

import copy
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.data.pipeline import local_rows, to_global
from cmd_jax.data.prompts import check_prompt
from cmd_jax.data.requests import Request, class_request, prompt_request
from cmd_jax.defaults import DTYPES, SEEDS
from cmd_jax.diffusion.guidance import check_guidance
from cmd_jax.diffusion.schedules import check_count
from cmd_jax.errors import UserError, choose
from cmd_jax.keys import derive
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Classes, Texts
from cmd_jax.models.frames import pixels
from cmd_jax.running.hosts import own_rows
from cmd_jax.sharding import batch_sharding, check_batch, partitioning
from cmd_jax.stages import DiffusionStage, FrozenAutoencoder


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample, an argument of each call of a Sampler.

    batch_size: samples at once, a multiple of the mesh's data x fsdp.
    guidance: weight >= 0 of classifier-free guidance; 1 or None: none, at half the cost.
    negative: the text that guidance leads away from; "": the empty text.
    content_solver, motion_solver: ddim, ddpm or dpmpp, of flow matching euler or heun; "": the stage's own.
    eta: 0 to 1, the noise that ddim adds.
    dtype: of the matrix products of denoisers and decoder, float32 or bfloat16; "": as they were trained.
    """

    batch_size: int = 8
    seed: int = 0
    guidance: float | None = 4.0
    negative: str = ""
    content_steps: int = 50
    content_solver: str = ""
    motion_steps: int = 100
    motion_solver: str = ""
    eta: float = 0.0
    dtype: str = ""

    @property
    def static(self) -> "SamplingSettings":
        """What a program is compiled for, beside the shapes of its batch; the rest are its arguments."""
        return replace(self, batch_size=1, seed=0, guidance=None, negative="")


@dataclass(frozen=True)
class Samples:
    """Those samples of one batch whose rows lie on this process's devices; arrays of the host.

    index: int [n], which of the samples asked for they are. video: [n, T, H, W, 3] and image: [n, H, W, 3], the content
    frame, float32, roughly in [-1, 1]. content: [n, h, w, C] and motion: [n, T, h+w, K], the latents. original: the
    clips that were reconstructed, like video.
    """

    index: np.ndarray
    video: np.ndarray
    image: np.ndarray
    content: np.ndarray
    motion: np.ndarray
    original: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)


class Sampler:
    """The three trained stages, whose parameters lie on the mesh, and the jitted programs over them.

    A call checks its arguments, UserError by the names of the `sampling` config group, and gives an iterator: Samples
    batch after batch, of which the next is computed while the last is fetched and used. Of several processes all must
    make the same calls and use up the same iterators, and each gets its own rows. Sample i draws from keys below its
    own alone, so that its video does not depend on the batch it is made in. Steps, solvers, eta and dtype select a
    program, compiled at first use.

    denoisers: {"content", "motion"}, or {} where only `reconstruct` is wanted. params: {"autoencoder", "conditions",
    "content", "motion"}. tokenizer: of Texts, else None. class_names: of Classes, () without any.
    """

    def __init__(
        self, autoencoder: FrozenAutoencoder, denoisers: dict[str, DiffusionStage], statistics: dict, params: dict,
        conditions: Classes | Texts | None, class_names: tuple[str, ...], tokenizer, mesh, rules,
    ):  # fmt: skip
        self.autoencoder, self.denoisers, self.statistics, self.params = autoencoder, denoisers, statistics, params
        self.conditions, self.class_names, self.tokenizer = conditions, class_names, tokenizer
        self.mesh, self.rules, self._programs = mesh, rules, {}
        self._take = jax.jit(operator.getitem, out_shardings=batch_sharding(mesh))
        self._encode, self._from_latents = jax.jit(autoencoder.encode), jax.jit(autoencoder.decode)

    # What is asked for.

    def request(self, classes=(), prompts=(), count: int | None = None) -> Request:
        """A sample of each class, by name or number, or of each prompt; or `count`, of these or of all classes in turn.

        UserError: sampling.classes, sampling.prompt, sampling.num.
        """
        classes, prompts = ([x] if isinstance(x, str | int) else [*x] for x in (classes, prompts))
        if self.tokenizer is None:
            self.check_wordless(prompt=", ".join(prompts))
            return class_request(classes, self.class_names, count)
        if classes:
            raise UserError("sampling.classes", classes[0], "the model was trained on texts", "give prompts instead")
        return prompt_request(prompts, self.tokenizer, count)

    def check_wordless(self, **texts: str):
        """UserError for a text, by its name in the `sampling` group, that a model of classes cannot heed."""
        for field, text in texts.items():
            if text and self.tokenizer is None:
                problem = "the model was trained on classes, not on texts"
                raise UserError(f"sampling.{field}", text, problem, "name sampling.classes, or leave it out")

    def resolve(self, settings: SamplingSettings) -> SamplingSettings:
        """The settings, solvers by their names; UserError for what these stages cannot do. Nothing is compiled."""
        check_count("sampling.batch_size", settings.batch_size)
        check_batch("sampling.batch_size", settings.batch_size, self.mesh)
        choose("sampling.dtype", settings.dtype, ("", *DTYPES))
        if not 0 <= operator.index(settings.seed) < SEEDS:
            raise UserError("seed", settings.seed, "none that random keys have", f"use 0 to {SEEDS - 1}")
        if not 0 <= settings.eta <= 1:
            raise UserError("sampling.eta", settings.eta, "outside 0 to 1", "use 0 for deterministic sampling")
        if self.denoisers:
            self._guidance(settings)
        for name, stage in self.denoisers.items():
            if wanted := getattr(settings, f"{name}_solver"):
                choose(f"sampling.{name}_solver", wanted, stage.solvers)
            process, options = stage.solver(wanted)
            solver, steps = options["solver"], getattr(settings, f"{name}_steps")
            if settings.eta and solver != "ddim":
                problem = f"the {name} solver is {solver}, not ddim"
                raise UserError("sampling.eta", settings.eta, problem, "set it to 0.0")
            check_count(f"sampling.{name}_steps", steps, process.most_steps(**options))
            settings = replace(settings, **{f"{name}_solver": solver})
        return settings

    def _guidance(self, settings) -> tuple:
        """-> (weight, None for no guidance; token ids [L] of what it leads away from, None where that is no text)."""
        weight = 1.0 if settings.guidance is None else check_guidance(settings.guidance)
        self.check_wordless(negative=settings.negative)
        null_ids = getattr(self.conditions, "null_ids", None)
        if settings.negative:
            if weight == 1:
                problem = "has no effect without guidance"
                raise UserError("sampling.negative", settings.negative, problem, "set sampling.guidance above 1")
            null_ids = self.tokenizer([check_prompt(settings.negative, "sampling.negative")])[0]
        return None if weight == 1 or not (self.class_names or self.tokenizer) else jnp.float32(weight), null_ids

    # Programs: pure functions of their arguments; `settings` are static.

    def _draw(self, name, params, keys, condition, content, guidance, null, settings):
        """Content frames (content=None) or motion latents [B, ...], one key a sample."""
        return computing_in(settings.dtype, self.denoisers[name]).sample(
            params[name], self.statistics[name], condition, content, keys, guidance=guidance, null=null,
            steps=getattr(settings, f"{name}_steps"), solver=getattr(settings, f"{name}_solver"),
            **({"eta": settings.eta} if settings.eta else {}),
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

    def program(self, name: str, settings: SamplingSettings):
        """The jitted program `name` ("generate", ...) of resolved settings: (params, batch, *arguments) -> batch."""
        key = name, settings.static
        if key not in self._programs:
            function = partial(getattr(self, f"_{name}"), settings=settings.static)
            self._programs[key] = jax.jit(function, out_shardings=batch_sharding(self.mesh))
        return self._programs[key]

    # Calls.

    def generate(self, request: Request, settings: SamplingSettings = SamplingSettings()) -> Iterator[Samples]:
        """Videos of what is asked for."""
        return self._run("generate", drawn(request), len(request), *self._arguments(settings))

    def animate(self, request: Request, given: dict, settings: SamplingSettings = SamplingSettings()):
        """Videos of given content frames, in arrays, or in sequences that read them as they are asked.

        given: {"content": N of [h, w, C]}, {"image": N of float [H, W, 3] in [-1, 1]}, or {"video": N of uint8
        [T, H, W, 3]}, clips whose content frames are taken.
        """
        return self._run("animate", drawn(request) | given, len(request), *self._arguments(settings))

    def reconstruct(self, videos, settings: SamplingSettings = SamplingSettings()) -> Iterator[Samples]:
        """Clips encoded and decoded: N of uint8 [T, H, W, 3], an array, or a sequence that reads as it is asked."""
        return self._run("reconstruct", {"video": videos}, len(videos), self.resolve(settings))

    def vary_motion(self, request: Request, motions: int, settings: SamplingSettings = SamplingSettings()):
        """`motions` videos of each content frame: sample i * motions + v is motion v of what is asked for i-th.

        Each content frame is drawn once: drawn again in another row of a batch, its last bits could differ.
        """
        check_count("sampling.motions", motions)
        settings, *arguments = self._arguments(settings)
        size, columns = settings.batch_size, drawn(request)

        def launched():
            for first, batch in self._batches(columns, len(request), size):
                frames = self._launch("draw_content", batch, settings, *arguments)
                many = motions * min(size, len(request) - first)
                which = first + np.arange(many) // motions
                each = {name: values[which] for name, values in columns.items()}
                each["variant"] = np.arange(many, dtype=np.int32) % motions
                for start, batch in self._batches(each, many, size):
                    rows = np.minimum(start + np.arange(size), many - 1) // motions
                    given = {"content": self._take(frames, rows)}
                    out = self._launch("animate", batch | given, settings, *arguments)
                    yield motions * first + start, min(size, many - start), out

        return fetched(launched())

    def encode(self, videos) -> Latents:
        """Clips uint8 [N, T, H, W, 3] -> content frames [N, h, w, C] and motion latents [N, T, h+w, K]; arrays of
        the host, all at once."""
        with partitioning(self.mesh, self.rules):
            return jax.device_get(self._encode(self.params["autoencoder"], {"video": videos}))

    def decode(self, latents: Latents) -> np.ndarray:
        """Content frames and motion latents, of one clip or of several -> videos float [N, T, H, W, 3] in [-1, 1]."""
        with partitioning(self.mesh, self.rules):
            return jax.device_get(self._from_latents(self.params["autoencoder"], latents))

    def _arguments(self, settings) -> tuple:
        """-> (resolved settings, and the arguments of the programs that draw: key, guidance, ids of the null text)."""
        return self.resolve(settings), jax.random.key(settings.seed), *self._guidance(settings)

    def _run(self, name: str, columns: dict, count: int, settings, *arguments) -> Iterator[Samples]:
        def launched():
            for start, batch in self._batches(columns, count, settings.batch_size):
                out = self._launch(name, batch, settings, *arguments)
                yield start, min(settings.batch_size, count - start), out

        return fetched(launched())

    def _launch(self, name: str, batch, settings, *arguments):
        with partitioning(self.mesh, self.rules):
            return self.program(name, settings)(self.params, batch, *arguments)

    def _batches(self, columns: dict, count: int, size: int) -> Iterator[tuple[int, dict]]:
        """(first row, batch [size, ...] on the mesh) of {name: values of `count` samples}; each process reads its own.

        The last batch is filled up by repeating its last sample.
        """
        rows = local_rows(size, self.mesh)
        for start in range(0, count, size):
            picks = {row: min(start + row, count - 1) for row in rows}
            read = {i: {name: values[i] for name, values in columns.items()} for i in {*picks.values()}}
            yield start, to_global({row: read[i] for row, i in picks.items()}, size, self.mesh)


def fetched(launched: Iterable[tuple[int, int, dict]]) -> Iterator[Samples]:
    """(first sample, how many count, batch on the mesh) -> this process's Samples, each when the next is launched."""
    before = None
    for now in launched:
        if before is not None:
            yield _fetch(*before)
        before = now
    if before is not None:
        yield _fetch(*before)


def _fetch(first: int, count: int, out: dict) -> Samples:
    rows, arrays = own_rows(out)
    kept = rows < count
    return Samples(index=first + rows[kept], **{name: values[kept] for name, values in arrays.items()})


def drawn(request: Request) -> dict:
    """The columns of a request's samples, each with the number that its keys are of."""
    index = np.arange(len(request), dtype=np.int32)
    return {"index": index, "variant": np.zeros_like(index), **request.conditions}


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
