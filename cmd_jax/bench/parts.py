"""The stages of a config, those of the paper's three that are trained or random ones of the same shapes."""

from functools import cached_property, partial
from typing import NamedTuple

import jax
import numpy as np

from cmd_jax.bench.weights import draw
from cmd_jax.config import STAGES, load_sibling
from cmd_jax.data.shapes import CLASS_NAMES
from cmd_jax.errors import UserError
from cmd_jax.interop.clip import text_from_config
from cmd_jax.interop.sd_config import vae_from_config
from cmd_jax.loading import open_sampler
from cmd_jax.models.clip import CLIPText
from cmd_jax.models.conditions import Classes, Texts
from cmd_jax.models.frames import Pixels, VAELatents
from cmd_jax.models.vae import init_vae
from cmd_jax.pretrained import ImageModelMetadata, TextEncoderMetadata, VAEMetadata, stated
from cmd_jax.sampling.sampler import Sampler
from cmd_jax.sharding import is_unset, make_mesh, replicated
from cmd_jax.stages import AutoencoderStage, FrozenAutoencoder, diffusion_stage

CLASSES_OF_FILES = tuple(map(str, range(101)))  # as many as UCF-101 has
CAPTION = 12  # tokens of a made-up text; a caption of WebVid has about as many


class FixedTokens:
    """In place of a tokenizer, where there are no files of one: all texts have the same ids, of a caption's length."""

    def __init__(self, module: CLIPText):
        self.end = module.vocabulary - 1 if module.end_token is None else module.end_token
        start = max(self.end - 1, 0)
        self.ids = np.full(module.length, self.end, np.int32)
        self.ids[: min(CAPTION, module.length - 2) + 1] = [start, *range(min(CAPTION, module.length - 2))]

    def __call__(self, texts) -> np.ndarray:
        return np.tile(self.ids, (len(texts), 1))


class Weights(NamedTuple):
    """A sampler, and where its weights are from: "random", or the name of their folder."""

    sampler: Sampler
    origin: str


class Random:
    """Random stages for a config: its own, and those of the same file that it needs beside it.

    dtype: of all weights and, of VAE and text encoder, of the products; "": float32, and as `pretrained` says.
    """

    def __init__(self, specification: str, overrides: dict, config, dtype: str = ""):
        self.specification, self.overrides, self.config, self.dtype = specification, overrides, config, dtype
        self.mesh, self.pretrained_dtype = make_mesh(config.mesh), dtype or config.pretrained.dtype
        self.draw = partial(draw, mesh=self.mesh, rules=config.rules, seed=config.seed, dtype=dtype or "float32")

    def stage_config(self, name: str):
        """Of a stage; UserError where its clips are not of the size of the config's."""
        if name == self.config.stage:
            return self.config
        config = load_sibling(self.specification, name, self.overrides)
        for side in ("frames", "height", "width"):
            if config.data[side] != self.config.data[side]:
                problem = f"the {name} stage of the file is for {config.data[side]}"
                raise UserError(f"data.{side}", self.config.data[side], problem, "use that")
        return config

    def _stated(self, kind):
        return stated(self.config.pretrained.path, kind, self.config.pretrained.architecture)

    @property
    def stored(self) -> bool:
        """Whether a training reads latents that were kept, so that what encodes clips needs no parameters."""
        return self.config.stage != "sample" and self.config.latents.starts > 0

    @cached_property
    def space(self) -> Pixels | VAELatents:
        if self.stage_config("autoencoder").model.mode != "latent":
            return Pixels()
        module = vae_from_config(self._stated(VAEMetadata).config, self.pretrained_dtype)
        params = None if self.stored else self.draw(partial(init_vae, module))
        return VAELatents(module, params, self.config.pretrained.vae_frames)

    @cached_property
    def autoencoder(self) -> FrozenAutoencoder:
        config = self.stage_config("autoencoder")
        params = None if self.stored else self.draw(AutoencoderStage(config, None, self.space).init)
        return FrozenAutoencoder(config, params, self.space)

    @cached_property
    def tokenizer(self) -> FixedTokens | None:
        return FixedTokens(self.conditions.module) if isinstance(self.conditions, Texts) else None

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        return () if isinstance(self.conditions, Texts) else self._classes

    @property
    def _classes(self) -> tuple[str, ...]:
        return CLASS_NAMES if self.config.data.source == "shapes" else CLASSES_OF_FILES

    @cached_property
    def conditions(self) -> Classes | Texts:
        if self.stage_config("motion").model.condition != "text":
            return Classes(len(self._classes))
        module = text_from_config(self._stated(TextEncoderMetadata).config, self.pretrained_dtype)
        ids = np.zeros((1, 1), np.int32)
        params = self.draw(lambda key: module.init(key, ids)["params"])
        tokens = FixedTokens(module)
        return Texts(module, params, tokens([""])[0], tokens.end)

    def denoiser(self, name: str):
        """The content or motion stage, without its parameters."""
        config = self.stage_config(name)
        image_model = self._stated(ImageModelMetadata) if config.denoiser == "unet" else None
        return diffusion_stage(config, self.autoencoder, self.conditions, None, image_model)

    def sampler(self) -> Sampler:
        """Of all three stages."""
        size = self.config.data.height, self.config.data.width
        denoisers = {name: self.denoiser(name) for name in ("content", "motion")}
        params = {"autoencoder": self.autoencoder.params, "conditions": self.conditions.params}
        params |= {name: self.draw(stage.init) for name, stage in denoisers.items()}
        whole = replicated(self.mesh)
        statistics = {name: jax.device_put(s.frozen["statistics"], whole) for name, s in denoisers.items()}
        return Sampler(
            self.autoencoder.resized(*size), denoisers, statistics, params, self.conditions, self.class_names,
            self.tokenizer, self.mesh, self.config.rules, self.config.attention, dtype=self.dtype,
            by_size=is_unset(self.config.mesh),
        )  # fmt: skip


def sampler_of(specification: str, overrides: dict, config, workdir) -> Weights:
    """The sampler of a sample config: of its weights, of the stages in the workdir, or where there are none random."""
    if config.sampling.mode != "generate":
        problem = "bench measures new videos"
        raise UserError("sampling.mode", config.sampling.mode, problem, "leave it at generate")
    trained = workdir and all((workdir / name / "config.json").is_file() for name in STAGES)
    if config.weights or trained:
        return Weights(open_sampler(config, workdir), str(config.weights or workdir))
    return Weights(Random(specification, overrides, config, config.sampling.dtype).sampler(), "random")
