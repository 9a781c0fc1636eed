"""The forward half of CMD: video -> (content frame, motion latent) -> loss; one small class a stage (paper section 3).

A stage is all that the training loop knows:
    name; frozen (arrays the loss reads but never changes);
    init(key) -> parameters, boxed with their logical axes;
    pretrained(shardings) -> parameters to start from instead, or None;
    loss(params, frozen, batch, key) -> (scalar, metrics);
    preview(params, frozen, batch, key) -> {name: videos [N, T, H, W, 3] or images [N, H, W, 3] in [-1, 1]}.
A batch holds "video" uint8 [B, T, H, W, 3] or, encoded before, "frames" (for the autoencoder) or "content" and
"motion", which may be float16; what the condition is made of, "label" int32 [B] or "ids" int32 [B, L] and perhaps
"states" [B, L, E]; and, in training, "id" int32 [B], which no loss reads.
"""

import copy
from functools import partial

import jax
import jax.numpy as jnp

from cmd_jax.builders import (
    build_autoencoder,
    build_denoiser,
    build_process,
    check_fits,
    clip_of,
    frames_shape,
)
from cmd_jax.data.latents import LatentStatistics
from cmd_jax.data.sizes import check_sizes
from cmd_jax.diffusion.flow import Flow
from cmd_jax.diffusion.plan import Kind, Planned, empty_memory, evaluation, evaluation_kinds, measuring
from cmd_jax.files import as_path
from cmd_jax.interop.diffusers import load_unet
from cmd_jax.interop.schedulers import SOLVERS, from_scheduler_config
from cmd_jax.interop.sd_config import unet_from_config
from cmd_jax.keys import derive
from cmd_jax.models.autoencoder import Latents
from cmd_jax.models.conditions import Classes, Texts, drop
from cmd_jax.models.discriminator import (
    PatchDiscriminator,
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from cmd_jax.models.frames import Pixels, VAELatents
from cmd_jax.models.layout import gathered, rows_are
from cmd_jax.models.unet import init_unet
from cmd_jax.models.vgg import LPIPS
from cmd_jax.pretrained import ImageModelMetadata

PREVIEW_STEPS = 25


def normalize(x, statistics):
    return (x - statistics["mean"]) / statistics["std"]


def denormalize(x, statistics):
    return x * statistics["std"] + statistics["mean"]


class AutoencoderStage:
    """Reconstruct clips: 4 L1 + 4 LPIPS in pixels or L2 in latents, and optionally adversarial (appendix B)."""

    name = "autoencoder"

    def __init__(self, config, lpips_params=None, space: Pixels | VAELatents | None = None):
        self.loss_weights, self.space, self.mode = config.loss, space or Pixels(), config.model.mode
        self.module = build_autoencoder(config.model)
        shape = lambda size: frames_shape((config.data.frames, *size, 3), self.module, self.space)  # noqa: E731
        check_sizes(config.data, shape)
        self.video_shape = (1, *shape((config.data.height, config.data.width)))
        self.frozen = {} if lpips_params is None else {"lpips": lpips_params}
        if self.space.params:
            self.frozen["vae"] = self.space.params
        self.discriminators = {}
        if config.loss.adversarial:
            sizes = {"base_channels": config.loss.discriminator_channels, "layers": config.loss.discriminator_layers}
            self.discriminators = {f"{n}d": PatchDiscriminator(dimensions=n, **sizes) for n in (2, 3)}

    def init(self, key):
        video = jnp.zeros(self.video_shape)
        params = {"autoencoder": self.module.init(derive(key, "autoencoder"), video)["params"]}
        for name, module in self.discriminators.items():
            params[name] = module.init(derive(key, name), self._view(name, video, 0))["params"]
        return params

    def pretrained(self, shardings):
        return None

    def frames(self, frozen, batch):
        """The clips of a batch as the autoencoder sees them, encoded here unless the batch brings them so."""
        if "frames" in batch:
            return batch["frames"].astype(jnp.float32)
        return self.space.encode(frozen.get("vae"), batch["video"])

    def loss(self, params, frozen, batch, key):
        video, weights = self.frames(frozen, batch), self.loss_weights
        frame = jax.random.randint(derive(key, "frame"), video.shape[:1], 0, video.shape[1])
        reconstruction, latents = self.module.apply({"params": params["autoencoder"]}, video)
        mse = jnp.mean(jnp.square(reconstruction - video), axis=(1, 2, 3, 4))
        terms = {"l1": jnp.mean(jnp.abs(reconstruction - video)), "l2": mse.mean()}
        if "lpips" in frozen:
            one_frame = partial(self._view, "2d", frame=frame)
            distance = LPIPS().apply({"params": frozen["lpips"]}, one_frame(reconstruction), one_frame(video))
            terms["lpips"] = distance.mean()
        total = sum(weights[name] * value for name, value in terms.items())
        if self.discriminators:
            adversarial, added = self._adversarial(params, video, reconstruction, frame)
            total, terms = total + adversarial, terms | added
        # Pixels span 2; latents have no range, so that their own variance stands for it.
        name, power = ("psnr", 4.0) if self.mode == "pixel" else ("snr", jnp.var(video, axis=(1, 2, 3, 4)))
        decibels = jnp.mean(10 * jnp.log10(power / jnp.maximum(mse, 1e-10)))
        return total, {**terms, name: decibels, "motion_saturated": jnp.mean(jnp.abs(latents.motion) > 0.99)}

    def _view(self, name, video, frame):
        """What a discriminator sees: one frame of each clip [B, H, W, C], or the clip."""
        if name == "3d":
            return video
        frame = jnp.broadcast_to(frame, video.shape[:1])
        return jnp.take_along_axis(video, frame[:, None, None, None, None], axis=1)[:, 0]

    def _adversarial(self, params, video, reconstruction, frame):
        """Hinge losses of both players at once: each sees the other's parameters as constants."""
        weights, generator, discriminator = self.loss_weights, 0.0, 0.0
        for name, module in self.discriminators.items():
            real, fake = self._view(name, video, frame), self._view(name, reconstruction, frame)
            judge = partial(module.apply, {"params": jax.lax.stop_gradient(params[name])})
            fake_logits, fake_features = judge(fake)
            _, real_features = judge(real)
            matching = feature_matching_loss(real_features, fake_features)
            generator += hinge_generator_loss(fake_logits) + weights.feature_matching * matching
            learn = partial(module.apply, {"params": params[name]})
            discriminator += hinge_discriminator_loss(learn(real)[0], learn(jax.lax.stop_gradient(fake))[0])
        return weights.adversarial * generator + discriminator, {"generator": generator, "discriminator": discriminator}

    def preview(self, params, frozen, batch, key):
        video = self.frames(frozen, batch)
        reconstruction, latents = self.module.apply({"params": params["autoencoder"]}, video)
        weights = self.module.apply({"params": params["autoencoder"]}, video, method="content_weights")
        if self.mode == "latent":
            weights = jnp.repeat(weights.mean(axis=-1, keepdims=True), 3, axis=-1)
        # Black where a frame gives nothing, grey for the mean's share, white from twice that.
        weights = jnp.clip(weights * video.shape[1] - 1, -1, 1)
        show = partial(self.space.decode, frozen.get("vae"))
        return {
            "clips": show(video),
            "reconstructions": show(reconstruction),
            "content": self.space.decode_image(frozen.get("vae"), latents.content),
            "content_weights": weights,
        }


class FrozenAutoencoder:
    """Stage 1 as the later stages see it: a module and its EMA parameters, and the space of its frames.

    params: {"autoencoder"}, None where only shapes are asked for. The attribute params is {"autoencoder", "vae"}, what
    encode and decode take.
    """

    def __init__(self, config, params: dict | None, space: Pixels | VAELatents | None = None):
        self.module, self.space = build_autoencoder(config.model), space or Pixels()
        self.params = {"autoencoder": params and params["autoencoder"], "vae": self.space.params}
        self._take(config.data.frames, config.data.height, config.data.width)

    def _take(self, frames: int, height: int, width: int):
        self.clip_shape = (frames, height, width, 3)
        self.video_shape = frames_shape(self.clip_shape, self.module, self.space)
        self.content_shape = self.video_shape[1:]
        cells = sum(self.content_shape[:2]) // self.module.patch
        self.motion_shape = (frames, cells, self.module.motion_channels)

    def resized(self, height: int, width: int) -> "FrozenAutoencoder":
        """The same for clips of another size."""
        other = copy.copy(self)
        other._take(self.clip_shape[0], height, width)
        return other

    def encode(self, params, batch) -> Latents:
        """Latents of a batch, computed here unless the batch brings them."""
        if "content" in batch:
            return Latents(batch["content"].astype(jnp.float32), batch["motion"].astype(jnp.float32))
        frames = self.space.encode(params["vae"], batch["video"])
        return self.module.apply({"params": params["autoencoder"]}, frames, method="encode")

    def decode(self, params, latents: Latents):
        """-> video [B, T, H, W, 3]."""
        frames = self.module.apply({"params": params["autoencoder"]}, latents, method="decode")
        return self.space.decode(params["vae"], frames)

    def show(self, params, content):
        """Content frames [B, h, w, C] as images [B, H, W, 3]."""
        return self.space.decode_image(params["vae"], content)

    def content_of(self, params, image):
        """An image [B, H, W, 3] as a content frame [B, h, w, C]."""
        return self.space.encode_image(params["vae"], image)


class DiffusionStage:
    """What content and motion training share: draw t and noise, drop conditions, denoise (paper section 3.2).

    statistics: by which latents are normalised; None takes them as they are.
    """

    name: str
    shape: tuple[int, ...]  # of what is diffused, without the batch

    def __init__(self, config, autoencoder: FrozenAutoencoder, conditions: Classes | Texts,
                 statistics: LatentStatistics | None = None):  # fmt: skip
        channels = autoencoder.content_shape[-1], autoencoder.motion_shape[-1]
        self.autoencoder, self.conditions = autoencoder, conditions
        self.statistics = statistics or LatentStatistics.unit(*channels)
        self.label_dropout = config.guidance.label_dropout
        self.build(config)
        frozen = {"autoencoder": autoencoder.params, "conditions": conditions.params}
        self.frozen = frozen | {"statistics": self.statistics.arrays()}

    def build(self, config):
        """Set process, solvers and module."""
        self.process = build_process(config.diffusion, clip_of(config, self.autoencoder.space))
        self.solvers = self.process.solvers
        classes = self.conditions.count if isinstance(self.conditions, Classes) else None
        self.module = build_denoiser(config.model, self.shape[-1], classes, self.process)

    def split(self, latents: Latents, statistics) -> tuple[jax.Array, jax.Array | None]:
        """Latents -> (what this stage diffuses, what it is conditioned on), in the denoiser's units."""
        raise NotImplementedError

    def init(self, key):
        x, content = jnp.zeros((1, *self.shape)), jnp.zeros((1, *self.autoencoder.content_shape))
        label = jnp.zeros(1, jnp.int32)
        if isinstance(self.conditions, Texts):
            label = jnp.zeros((1, self.conditions.module.width))
        return self.module.init(key, x, jnp.zeros(1), label, content)["params"]

    def pretrained(self, shardings):
        return None

    def apply(self, params, x, timesteps, condition, content, **cache):
        """One evaluation of the denoiser; condition and content as of `denoiser`, cache: its arguments keep, reuse."""
        label = condition.pooled if isinstance(self.conditions, Texts) else condition
        return self.module.apply({"params": params}, x, timesteps, label, content, **cache)

    def denoiser(self, params, condition, content):
        """(x, timesteps) -> prediction, given a class or text and a content frame, or None for none of that."""
        return lambda x, timesteps: self.apply(params, x, timesteps, condition, content)

    def guided_denoiser(self, params, condition, content, guidance, null):
        """Like `denoiser`, extrapolated away from the `null` condition by `guidance`; None means unguided."""
        kind = Kind(guided=guidance is not None, reuses=False)
        evaluate = self._evaluation(params, condition, content, guidance, null)
        return lambda x, timesteps: evaluate(kind, (), x, timesteps)[1]

    def _evaluation(self, params, condition, content, guidance, null):
        """As `diffusion.plan.evaluation`; the rows of both conditions may lie on devices of their own."""

        def both(*inputs, **cache):
            with rows_are("act_guided"):
                out = self.apply(params, *inputs, **cache)
            return (gathered(out[0]), out[1]) if isinstance(out, tuple) else gathered(out)

        apply, learned = partial(self.apply, params), self.process.learned_range
        return evaluation(apply, condition, content, guidance, null, learned, both)

    def loss(self, params, frozen, batch, key):
        latents = jax.lax.stop_gradient(self.autoencoder.encode(frozen["autoencoder"], batch))
        x0, content = self.split(latents, frozen["statistics"])
        dropped = jax.random.bernoulli(derive(key, "label"), self.label_dropout, (len(x0),))
        null = self.conditions.null(frozen["conditions"], len(x0))
        condition = jax.lax.stop_gradient(drop(self.conditions.of(frozen["conditions"], batch), null, dropped))
        t, noise = self.process.draw(key, x0)
        losses, metrics = self.process.loss(self.denoiser(params, condition, content), x0, t, noise)
        return losses.mean(), jax.tree.map(jnp.mean, metrics)

    def solver(self, name: str = "") -> tuple:
        """The solver of that name, or the one it has by default -> (process, keyword arguments of its `sample`)."""
        if isinstance(self.process, Flow):
            return self.process, {"solver": name or "euler"}
        # iDDPM's spacing, which starts at the noisiest timestep.
        return self.process, {"solver": name or "ddim", "spacing": "even"}

    def content_features(self, params, content):
        """What the denoiser needs of content frames at every step, computed once; here the frames themselves."""
        return content

    def kinds(self, solver: str, guided: bool, interval=(0.0, 1.0), reuse=(), **options) -> list[Kind]:
        """How each evaluation of a run of `sample` is made; UserError sampling.content_reuse or motion_reuse."""
        process, own = self.solver(solver)
        return evaluation_kinds(process.levels(**own | options), guided, interval, reuse, f"sampling.{self.name}_reuse")

    def sample(
        self, params, statistics, condition, content, keys, *, steps, solver,
        guidance=None, null=None, shape=None, interval=(0.0, 1.0), reuse=(), back=0, **more,
    ):  # fmt: skip
        """Reverse process for each key: -> content frames [B, H, W, C] or motion latents, in their own units.

        shape: of one, without it that of the config's clips. interval, reuse: as of `evaluation_kinds`. With back > 0
        it gives (these, `Measured.changes` of all evaluations).
        """
        features = self.content_features(params, None if content is None else normalize(content, statistics["content"]))
        evaluate, memory = self._evaluation(params, condition, features, guidance, null), ()
        noise = jax.vmap(lambda key: jax.random.normal(derive(key, "noise"), shape or self.shape))(keys)
        process, options = self.solver(solver)
        kinds = self.kinds(solver, guidance is not None, interval, reuse, steps=steps, **more)
        if back or any(kind.reuses for kind in kinds):
            kept = lambda: self.apply(params, noise, jnp.zeros(len(noise)), condition, features, keep=True)[1]  # noqa: E731
            memory = empty_memory(jax.eval_shape(kept), kinds)
        if back:
            evaluate, memory = measuring(evaluate, memory, len(kinds), back)
        denoise = Planned(evaluate, kinds, memory)
        x, memory = process.integrate(denoise, noise, keys, steps=steps, **{**options, **more})
        x = denormalize(x, statistics[self.name])
        return (x, memory.changes) if back else x

    def _sample_batch(self, params, frozen, batch, key, content, shape):
        rows = jnp.arange(len(next(iter(batch.values()))))
        keys = jax.vmap(lambda row: derive(key, "sample", row))(rows)
        condition = self.conditions.of(frozen["conditions"], batch)
        process, options = self.solver()
        steps = min(PREVIEW_STEPS, process.most_steps(**options) or PREVIEW_STEPS)
        return self.sample(params, frozen["statistics"], condition, content, keys, steps=steps, solver="", shape=shape)


class ContentStage(DiffusionStage):
    """p(content | class), drawn by a DiT from scratch."""

    name = "content"

    @property
    def shape(self):
        return self.autoencoder.content_shape

    def split(self, latents, statistics):
        return normalize(latents.content, statistics["content"]), None

    def preview(self, params, frozen, batch, key):
        latents = self.autoencoder.encode(frozen["autoencoder"], batch)
        show = partial(self.autoencoder.show, frozen["autoencoder"])
        samples = self._sample_batch(params, frozen, batch, key, None, latents.content.shape[1:])
        return {"content": show(latents.content), "samples": show(samples)}


class FineTunedContentStage(ContentStage):
    """p(content | text), drawn by the UNet of a pretrained image model, which gets no new parameters.

    image_model: what its folder says.
    """

    def __init__(self, config, autoencoder, conditions, statistics, image_model: ImageModelMetadata):
        self.image_model = image_model
        super().__init__(config, autoencoder, conditions, statistics)

    def build(self, config):
        self.folder, self.solvers = config.pretrained.path, SOLVERS
        self.process, _ = from_scheduler_config(self.image_model.scheduler)
        unet = unet_from_config(self.image_model.unet, "float32")
        self.module = unet.clone(dtype=jnp.dtype(config.model.dtype), remat=config.model.remat)

    def init(self, key):
        return init_unet(self.module, key)

    def pretrained(self, shardings):
        return load_unet(as_path(self.folder) / "unet", "float32", shardings)[1]

    def apply(self, params, x, timesteps, condition, content, **cache):
        return self.module.apply({"params": params}, x, timesteps, condition.states, **cache)

    def solver(self, name=""):
        return from_scheduler_config(self.image_model.scheduler, name)


class MotionStage(DiffusionStage):
    """p(motion | content, class or text). The condition enters with the timestep, the content frame as extra tokens."""

    name = "motion"

    @property
    def shape(self):
        return self.autoencoder.motion_shape

    def split(self, latents, statistics):
        return normalize(latents.motion, statistics["motion"]), normalize(latents.content, statistics["content"])

    def content_features(self, params, content):
        return self.module.apply({"params": params}, content, method="content_tokens")

    def preview(self, params, frozen, batch, key):
        latents = self.autoencoder.encode(frozen["autoencoder"], batch)
        motion = self._sample_batch(params, frozen, batch, key, latents.content, latents.motion.shape[1:])
        decode = partial(self.autoencoder.decode, frozen["autoencoder"])
        return {"reconstructions": decode(latents), "samples": decode(Latents(latents.content, motion))}


def diffusion_stage(config, autoencoder, conditions, statistics=None, image_model=None) -> DiffusionStage:
    """The stage of a content or motion config; image_model as of FineTunedContentStage, where it is one."""
    check_fits(config, autoencoder, image_model)
    if config.denoiser == "unet":
        return FineTunedContentStage(config, autoencoder, conditions, statistics, image_model)
    return {"content": ContentStage, "motion": MotionStage}[config.stage](config, autoencoder, conditions, statistics)
