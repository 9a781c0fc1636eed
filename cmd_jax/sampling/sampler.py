"""What is asked for, batch after batch, and the samples that come back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.data.pipeline import local_rows, to_global
from cmd_jax.data.prompts import check_prompt
from cmd_jax.data.requests import Request, class_request, prompt_request
from cmd_jax.diffusion.guidance import check_guidance
from cmd_jax.diffusion.schedules import check_count
from cmd_jax.errors import UserError
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Classes, Texts
from cmd_jax.running.hosts import own_rows
from cmd_jax.sampling.executables import Executables, facts_of
from cmd_jax.sampling.layouts import Layout, Layouts
from cmd_jax.sampling.programs import Programs
from cmd_jax.sampling.settings import DEFAULTS, SamplingSettings, resolve
from cmd_jax.stages import DiffusionStage, FrozenAutoencoder


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
    "content", "motion"}. tokenizer: of Texts, else None. class_names: of Classes, () without any. digests: of the
    stages' parameters, by their names, as their metadata have them; empty of random ones. dtype: in which parameters
    were read, and calls compute that say nothing else; "": float32, and as was trained. by_size: whether each batch is
    laid out by its size, as of Layouts.
    """

    def __init__(
        self, autoencoder: FrozenAutoencoder, denoisers: dict[str, DiffusionStage], statistics: dict, params: dict,
        conditions: Classes | Texts | None, class_names: tuple[str, ...], tokenizer, mesh, rules,
        attention: str = "auto", digests: dict[str, str | None] | None = None, dtype: str = "", by_size: bool = False,
    ):  # fmt: skip
        self.autoencoder, self.denoisers, self.statistics, self.params = autoencoder, denoisers, statistics, params
        self.conditions, self.class_names, self.tokenizer = conditions, class_names, tokenizer
        self.mesh, self.rules, self.attention, self.digests, self.dtype = mesh, rules, attention, digests or {}, dtype
        self.layouts = Layouts(mesh, rules, attention, by_size)
        self._programs = Programs(autoencoder, denoisers, statistics, conditions)
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
        settings = resolve(settings, self.denoisers, self.layouts, self.dtype)
        if self.denoisers:
            self._guidance(settings)
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

    def layout(self, samples: int, settings: SamplingSettings) -> Layout:
        """Of a batch of so many samples, drawn with resolved settings."""
        return self.layouts.of(samples, settings.batch_size, self._guidance(settings)[0] is not None)

    def program(self, name: str, settings: SamplingSettings, layout: Layout):
        """The jitted program `name` ("generate", ...) of resolved settings: (params, batch, *arguments) -> batch."""
        return self._programs.jitted(name, settings, layout)

    def keep_executables(self, folder):
        """From now on take compiled programs from a folder, which must be trusted as code is, and write them there."""
        others = ("params", "tokenizer", "mesh", "layouts", "digests")  # arguments, and what no program refers to
        names = [name for name in vars(self) if not name.startswith("_") and name not in others]
        facts = facts_of(self.mesh, **{name: getattr(self, name) for name in names})
        self._programs.executables = Executables(folder, facts, self.mesh)

    @property
    def seconds(self) -> dict[str, float]:
        """What programs have taken until they could run: to "trace", "lower", "compile" and "load" them."""
        return dict(self._programs.seconds)

    # Calls.

    def generate(self, request: Request, settings: SamplingSettings = DEFAULTS) -> Iterator[Samples]:
        """Videos of what is asked for."""
        return self._run("generate", drawn(request), len(request), *self._arguments(settings))

    def animate(self, request: Request, given: dict, settings: SamplingSettings = DEFAULTS):
        """Videos of given content frames, in arrays, or in sequences that read them as they are asked.

        given: {"content": N of [h, w, C]}, {"image": N of float [H, W, 3] in [-1, 1]}, or {"video": N of uint8
        [T, H, W, 3]}, clips whose content frames are taken.
        """
        return self._run("animate", drawn(request) | given, len(request), *self._arguments(settings))

    def reconstruct(self, videos, settings: SamplingSettings = DEFAULTS) -> Iterator[Samples]:
        """Clips encoded and decoded: N of uint8 [T, H, W, 3], an array, or a sequence that reads as it is asked."""
        return self._run("reconstruct", {"video": videos}, len(videos), self.resolve(settings))

    def vary_motion(self, request: Request, motions: int, settings: SamplingSettings = DEFAULTS):
        """`motions` videos of each content frame: sample i * motions + v is motion v of what is asked for i-th.

        Each content frame is drawn once: drawn again in another row of a batch, its last bits could differ.
        """
        check_count("sampling.motions", motions)
        settings, *arguments = self._arguments(settings)
        columns, guidance = drawn(request), arguments[1]

        def launched():
            for first, few, layout, batch in self._batches(columns, len(request), settings, guidance):
                frames = self._launch("draw_content", batch, layout, settings, *arguments)
                many = motions * few
                which = first + np.arange(many) // motions
                each = {name: values[which] for name, values in columns.items()}
                each["variant"] = np.arange(many, dtype=np.int32) % motions
                for start, count, layout, batch in self._batches(each, many, settings, guidance):
                    rows = np.minimum(start + np.arange(layout.rows), many - 1) // motions
                    given = {"content": self._programs.take(layout)(frames, rows)}
                    out = self._launch("animate", batch | given, layout, settings, *arguments)
                    yield motions * first + start, count, out

        return fetched(launched())

    def encode(self, videos) -> Latents:
        """Clips uint8 [N, T, H, W, 3] -> content frames [N, h, w, C] and motion latents [N, T, h+w, K]; arrays of
        the host, all at once."""
        with self.layouts.of(len(videos), len(videos), guided=False).partitioning():
            return jax.device_get(self._encode(self.params["autoencoder"], {"video": videos}))

    def decode(self, latents: Latents) -> np.ndarray:
        """Content frames and motion latents, of one clip or of several -> videos float [N, T, H, W, 3] in [-1, 1]."""
        with self.layouts.of(len(latents.content), len(latents.content), guided=False).partitioning():
            return jax.device_get(self._from_latents(self.params["autoencoder"], latents))

    def first_call(self, request: Request, settings: SamplingSettings = DEFAULTS) -> tuple:
        """-> (resolved settings, layout, arguments) of the first batch for which `generate` calls its program."""
        settings, *arguments = self._arguments(settings)
        _, _, layout, batch = next(self._batches(drawn(request), len(request), settings, arguments[1]))
        return settings, layout, (self.params, batch, *arguments)

    def _arguments(self, settings) -> tuple:
        """-> (resolved settings, and the arguments of the programs that draw: key, guidance, ids of the null text)."""
        return self.resolve(settings), jax.random.key(settings.seed), *self._guidance(settings)

    def _run(self, name: str, columns: dict, count: int, settings, *arguments) -> Iterator[Samples]:
        guidance = arguments[1] if arguments else None

        def launched():
            for start, few, layout, batch in self._batches(columns, count, settings, guidance):
                yield start, few, self._launch(name, batch, layout, settings, *arguments)

        return fetched(launched())

    def _launch(self, name: str, batch, layout, settings, *arguments):
        with layout.partitioning():
            return self._programs.run(name, settings, layout, (self.params, batch, *arguments))

    def _batches(self, columns: dict, count: int, settings, guidance) -> Iterator[tuple[int, int, Layout, dict]]:
        """(first row, samples, layout, batch [layout.rows, ...]) of {name: values of `count` samples}; each process
        reads its own rows.

        Rows beyond the samples repeat the last one.
        """
        for start in range(0, count, settings.batch_size):
            few = min(settings.batch_size, count - start)
            layout = self.layouts.of(few, settings.batch_size, guided=guidance is not None)
            picks = {row: start + min(row, few - 1) for row in local_rows(layout.rows, layout.mesh)}
            read = {i: {name: values[i] for name, values in columns.items()} for i in {*picks.values()}}
            batch = to_global({row: read[i] for row, i in picks.items()}, layout.rows, layout.mesh)
            yield start, few, layout, batch


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
