"""The reverse half of CMD: class or text -> content frame -> motion latent -> video, one program (section 3.3)."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.data.pipeline import local_rows, to_global
from cmd_jax.data.prompts import check_prompt
from cmd_jax.diffusion.guidance import check_guidance
from cmd_jax.diffusion.schedules import check_count
from cmd_jax.errors import UserError, choose
from cmd_jax.keys import derive
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Classes
from cmd_jax.models.frames import pixels
from cmd_jax.pretrained import check_same, load_texts, open_space, stated_conditions, stated_space
from cmd_jax.running.hosts import whole_batch
from cmd_jax.sharding import batch_sharding, check_batch, make_mesh, partitioning, replicated
from cmd_jax.stages import AutoencoderStage, FrozenAutoencoder, diffusion_stage
from cmd_jax.state import abstract
from cmd_jax.trained import Metadata, Trained, belongs, load_trained


class Sampler:
    """The three trained stages, whose parameters lie on the mesh, and the jitted programs over them.

    A program maps a batch to {"video": [B, T, H, W, 3] and "image": [B, H, W, 3], roughly in [-1, 1], "content":
    [B, H, W, C], "motion": [B, T, h+w, K]}, split over the mesh like the batch; "image" is the content frame as pixels.
    Sample i draws from keys below its own alone, so its video does not depend on the batch it is made in.
    """

    def __init__(self, stages: dict[str, Trained], config, mesh):
        self.mesh, self.rules, self.options, self.seed = mesh, config.rules, config.sampling, config.seed
        trained, shardings = stages["autoencoder"], partial(abstract, mesh=mesh, rules=config.rules)
        space = open_space(config.pretrained, trained.metadata.vae, shardings)
        self.autoencoder = FrozenAutoencoder(trained.config, trained.params, space)
        self.params = {"autoencoder": self.autoencoder.params}
        self.statistics, self.denoisers, self.solvers, self.null_ids = {}, {}, {}, None
        if "content" in stages:
            self._open_conditions(stages["content"].metadata, config, shardings)
        for name in ("content", "motion"):
            if name not in stages:
                continue
            metadata = stages[name].metadata
            if not belongs(metadata, trained):
                problem = "this stage was trained with another autoencoder"
                raise UserError("weights", name, problem, "give the three stages of one run")
            if conditioned_on(metadata) != conditioned_on(stages["content"].metadata):
                problem = "its classes or text encoder differ from the content stage's"
                raise UserError("weights", name, problem, "use stages of one run")
            stage = denoiser_stage(stages[name].config, metadata, trained)
            self._check_options(name, stage)
            self.denoisers[name], self.params[name] = stage, stages[name].params
            self.statistics[name] = jax.device_put(stage.frozen["statistics"], replicated(mesh))
        jit = partial(jax.jit, out_shardings=batch_sharding(mesh))
        self._programs = {name: jit(getattr(self, f"_{name}")) for name in ("generate", "animate", "reconstruct")}

    def _open_conditions(self, metadata, config, shardings):
        """Classes or a text encoder, guidance, and what it leads away from."""
        self.class_names, self.tokenizer = metadata.class_names, None
        guidance = check_guidance(self.options.guidance)
        if metadata.text_encoder:
            for part in filter(None, (metadata.image_model, metadata.text_encoder)):
                check_same(config.pretrained.path, part, "the content stage was trained with")
            self.conditions, self.tokenizer = load_texts(config.pretrained, shardings)
            self.null_ids = null_prompt(self.options, self.tokenizer)
            if self.null_ids is None:
                self.null_ids = self.conditions.null_ids
            if self.options.classes:
                problem = "the model was trained on texts"
                raise UserError("sampling.classes", self.options.classes, problem, "give sampling.prompt instead")
        else:
            check_wordless(self.options)
            self.conditions = Classes(len(self.class_names))
        unguided = guidance == 1.0 or not (self.class_names or self.tokenizer)
        self.guidance = None if unguided else jnp.float32(guidance)
        self.params["conditions"] = self.conditions.params

    def _check_options(self, name, stage):
        """Before anything is compiled, and by the names the user knows."""
        if wanted := self.options[f"{name}_solver"]:
            choose(f"sampling.{name}_solver", wanted, stage.solvers)
        process, options = stage.solver(wanted)
        solver = self.solvers[name] = options["solver"]
        if self.options.eta and solver != "ddim":
            problem = f"the {name} solver is {solver}, not ddim"
            raise UserError("sampling.eta", self.options.eta, problem, "set it to 0.0")
        check_count(f"sampling.{name}_steps", self.options[f"{name}_steps"], process.most_steps(**options))

    # Programs, pure functions of their arguments.

    def _draw(self, name, params, keys, condition, content, guidance, null):
        """Content frames (content=None) or motion latents [B, ...], one key a sample."""
        stage, options = self.denoisers[name], self.options
        eta = {"eta": options.eta} if options.eta else {}
        return stage.sample(
            params[name], self.statistics[name], condition, content, keys,
            guidance=guidance, null=null, steps=options[f"{name}_steps"], solver=self.solvers[name], **eta,
        )  # fmt: skip

    def _finish(self, params, content, motion):
        frozen = params["autoencoder"]
        video, image = self.autoencoder.decode(frozen, Latents(content, motion)), self.autoencoder.show(frozen, content)
        return {"video": video, "image": image, "content": content, "motion": motion}

    def _conditions(self, params, batch, guidance, null_ids):
        """-> (what the samples are conditioned on, what guidance leads away from); texts are encoded here, once."""
        condition = self.conditions.of(params["conditions"], batch)
        if guidance is None:
            return condition, None
        return condition, self.conditions.null(params["conditions"], len(batch["index"]), null_ids)

    def _keys(self, key, batch):
        """-> (content keys [B], motion keys [B]). Samples of one "index" share the content key, not the motion key."""

        def of(index, variant):
            sample = derive(key, "sample", index)
            return derive(sample, "content"), derive(sample, "motion", variant)

        return jax.vmap(of)(batch["index"], batch["variant"])

    def _generate(self, params, batch, key, guidance, null_ids=None):
        """Classes or texts -> content -> motion -> video."""
        content_keys, motion_keys = self._keys(key, batch)
        condition, null = self._conditions(params, batch, guidance, null_ids)
        content = self._draw("content", params, content_keys, condition, None, guidance, null)
        motion = self._draw("motion", params, motion_keys, condition, content, guidance, null)
        return self._finish(params, content, motion)

    def _animate(self, params, batch, key, guidance, null_ids=None):
        """Given content frames, or images -> motion -> video."""
        _, motion_keys = self._keys(key, batch)
        condition, null = self._conditions(params, batch, guidance, null_ids)
        if "image" in batch:
            content = self.autoencoder.content_of(params["autoencoder"], batch["image"])
        else:
            content = batch["content"]
        motion = self._draw("motion", params, motion_keys, condition, content, guidance, null)
        return self._finish(params, content, motion)

    def _reconstruct(self, params, batch):
        latents = self.autoencoder.encode(params["autoencoder"], batch)
        return {**self._finish(params, *latents), "original": pixels(batch["video"])}

    # Calls, which cut any number of samples into batches of one compiled size.

    def generate(self, batch: dict) -> dict:
        """{"label" or "ids", "index", "variant"} int [N, ...] -> host arrays of N samples."""
        return self._in_batches("generate", batch, jax.random.key(self.seed), self.guidance, self.null_ids)

    def animate(self, batch: dict) -> dict:
        """As generate, with "content" float32 [N, H, W, C] given, or "image" [N, H, W, 3] in [-1, 1]."""
        return self._in_batches("animate", batch, jax.random.key(self.seed), self.guidance, self.null_ids)

    def reconstruct(self, batch: dict) -> dict:
        """{"video": uint8 [N, T, H, W, C]} -> reconstructions, and the clips themselves as "original"."""
        return self._in_batches("reconstruct", batch)

    def _in_batches(self, name: str, batch: dict, *arguments) -> dict:
        program, size, parts = self._programs[name], self.options.batch_size, []
        count = len(next(iter(batch.values())))
        rows = local_rows(size, self.mesh)
        for start in range(0, count, size):
            # The last batch is filled up by repeating its last sample; what that gives is dropped.
            picks = {row: min(start + row, count - 1) for row in rows}
            examples = {row: {k: values[i] for k, values in batch.items()} for row, i in picks.items()}
            with partitioning(self.mesh, self.rules):
                out = program(self.params, to_global(examples, size, self.mesh), *arguments)
            parts.append(whole_batch(out, self.mesh))
        return {k: np.concatenate([part[k] for part in parts])[:count] for k in parts[0]}


def conditioned_on(metadata: Metadata) -> dict | tuple[str, ...]:
    """What must be the same in two diffusion stages that sample together."""
    return metadata.text_encoder.identity() if metadata.text_encoder else metadata.class_names


def denoiser_stage(config, metadata: Metadata, autoencoder: Trained):
    """The content or motion stage of a trained one's config and metadata, without parameters."""
    frozen = FrozenAutoencoder(autoencoder.config, None, stated_space(autoencoder.metadata.vae))
    conditions = stated_conditions(len(metadata.class_names), metadata.text_encoder)
    return diffusion_stage(config, frozen, conditions, metadata.statistics, metadata.image_model)


def load_stages(config, workdir: Path, mesh) -> dict[str, Trained]:
    """What a sample config names, shipped weights or the stages of the workdir, read straight into its shards."""
    names = ("autoencoder",) if config.sampling.mode == "reconstruct" else ("autoencoder", "content", "motion")
    root, suffix = (Path(config.weights), ".safetensors") if config.weights else (workdir, "")
    stages = {}

    def shardings(trained_config, metadata):
        if trained_config.stage == "autoencoder":
            stage = AutoencoderStage(trained_config, space=stated_space(metadata.vae))
        else:
            stage = denoiser_stage(trained_config, metadata, stages["autoencoder"])
        return abstract(stage.init, mesh, config.rules)

    for name in names:
        stages[name] = load_trained(root / f"{name}{suffix}", name, shardings)
    return stages


def load_sampler(config, workdir: Path) -> Sampler:
    """The sampler of a sample config: shipped weights, or the stages of the workdir."""
    mesh = make_mesh(config.mesh)
    check_batch("sampling.batch_size", config.sampling.batch_size, mesh)
    stages = load_stages(config, workdir, mesh)
    shape = stages["autoencoder"].config.data
    for side in ("frames", "height", "width"):
        if config.data[side] != shape[side]:
            raise UserError(f"data.{side}", config.data[side], f"the weights are for {shape[side]}", "use that")
    return Sampler(stages, config, mesh)


def check_wordless(options):
    """A model of classes takes no texts."""
    for field in ("prompt", "prompts_file", "negative"):
        if options[field]:
            problem = "the model was trained on classes, not on texts"
            raise UserError(f"sampling.{field}", options[field], problem, "name sampling.classes, or leave it out")


def null_prompt(options, tokenizer) -> np.ndarray | None:
    """Token ids [L] of the negative prompt, or None without one, which stands for the empty text."""
    if not options.negative:
        return None
    if options.guidance == 1:
        problem = "has no effect without guidance"
        raise UserError("sampling.negative", options.negative, problem, "set sampling.guidance above 1")
    return tokenizer([check_prompt(options.negative, "sampling.negative")])[0]
