"""The forward half of CMD: video -> (content frame, motion latent) -> loss; one small class a stage (paper section 3).

A stage is all that the training loop knows:
    name; frozen (arrays the loss reads but never changes);
    init(key) -> parameters, boxed with their logical axes;
    loss(params, frozen, batch, key) -> (scalar, metrics);
    preview(params, frozen, batch, key) -> {name: videos [N, T, H, W, 3] or images [N, H, W, 3] in [-1, 1]}.
A batch holds "video" uint8 [B, T, H, W, 3] or, encoded before, "content" and "motion"; "label" int32 [B]; and, in
training, "id" int32 [B], which no loss reads.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.diffusion.flow import Flow
from cmd_jax.diffusion.gaussian import PREDICTIONS, Gaussian
from cmd_jax.diffusion.guidance import guide
from cmd_jax.diffusion.schedules import Schedule, linear_betas, scaled_linear_betas
from cmd_jax.errors import UserError, choose
from cmd_jax.models.autoencoder import CONTENTS, MODES, POSITIONS, Autoencoder, Latents
from cmd_jax.models.discriminator import (
    PatchDiscriminator,
    feature_matching_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from cmd_jax.models.dit import POSITIONS as DIT_POSITIONS
from cmd_jax.models.dit import DiT
from cmd_jax.models.vgg import LPIPS

PREVIEW_STEPS = 25


def pixels(video):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def build_autoencoder(model) -> Autoencoder:
    """The module of an autoencoder config's `model` group."""
    choose("model.mode", model.mode, MODES)
    choose("model.position", model.position, POSITIONS)
    choose("model.content", model.content, CONTENTS)
    return Autoencoder(**{**model.to_dict(), "dtype": jnp.dtype(model.dtype)})


def build_process(config) -> Gaussian | Flow:
    """The diffusion process of a config's `diffusion` group."""
    choose("diffusion.kind", config.kind, ("gaussian", "flow"))
    choose("diffusion.schedule", config.schedule, ("linear", "scaled_linear"))
    choose("diffusion.prediction", config.prediction, PREDICTIONS)
    if config.kind == "flow":
        if config.learned_range:
            raise UserError("diffusion.learned_range", True, "flow matching has no variance", "set it to False")
        return Flow(time_mean=config.time_mean, time_std=config.time_std, clip=config.clip or None)
    betas = (linear_betas if config.schedule == "linear" else scaled_linear_betas)(config.timesteps)
    return Gaussian(Schedule.from_betas(betas), config.prediction, config.learned_range, config.clip or None)


def build_denoiser(config, channels: int, classes: int, process) -> DiT:
    """The DiT of a content or motion config."""
    choose("model.position", config.model.position, DIT_POSITIONS)
    out_channels = channels * (2 if process.learned_range else 1)
    model = {**config.model.to_dict(), "dtype": jnp.dtype(config.model.dtype)}
    return DiT(out_channels=out_channels, classes=classes, **model)


def normalize(x, statistics):
    return (x - statistics["mean"]) / statistics["std"]


def denormalize(x, statistics):
    return x * statistics["std"] + statistics["mean"]


class AutoencoderStage:
    """Reconstruct clips: 4 L1 + 4 LPIPS in pixels or L2 in latents, and optionally adversarial (appendix B)."""

    name = "autoencoder"

    def __init__(self, config, lpips_params=None):
        self.loss_weights = config.loss
        self.module = build_autoencoder(config.model)
        data = config.data
        self.video_shape = (1, data.frames, data.height, data.width, config.model.channels)
        self.frozen = {} if lpips_params is None else {"lpips": lpips_params}
        self.discriminators = {}
        if config.loss.adversarial:
            sizes = {"base_channels": config.loss.discriminator_channels, "layers": config.loss.discriminator_layers}
            self.discriminators = {f"{n}d": PatchDiscriminator(dimensions=n, **sizes) for n in (2, 3)}

    def init(self, key):
        video = jnp.zeros(self.video_shape)
        params = {"autoencoder": self.module.init(key, video)["params"]}
        for name, module in self.discriminators.items():
            params[name] = module.init(jax.random.fold_in(key, len(params)), self._view(name, video, 0))["params"]
        return params

    def loss(self, params, frozen, batch, key):
        video, weights = pixels(batch["video"]), self.loss_weights
        frame = jax.random.randint(key, video.shape[:1], 0, video.shape[1])
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
        psnr = jnp.mean(10 * jnp.log10(4.0 / jnp.maximum(mse, 1e-10)))
        return total, {**terms, "psnr": psnr, "motion_saturated": jnp.mean(jnp.abs(latents.motion) > 0.99)}

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
        video = pixels(batch["video"])
        reconstruction, latents = self.module.apply({"params": params["autoencoder"]}, video)
        weights = self.module.apply({"params": params["autoencoder"]}, video, method="content_weights")
        # Black where a frame gives nothing, grey for the mean's share, white from twice that.
        weights = jnp.clip(weights * video.shape[1] - 1, -1, 1)
        return {
            "clips": video,
            "reconstructions": reconstruction,
            "content": latents.content,
            "content_weights": weights,
        }


class FrozenAutoencoder:
    """Stage 1 as the later stages see it: a module and its EMA parameters."""

    def __init__(self, config, params):
        self.module, self.params = build_autoencoder(config.model), params["autoencoder"]
        self.config, data, model = config, config.data, config.model
        self.video_shape = (data.frames, data.height, data.width, model.channels)
        self.content_shape = (data.height, data.width, model.channels)
        self.motion_shape = (data.frames, (data.height + data.width) // model.patch, model.motion_channels)

    def encode(self, params, batch) -> Latents:
        """Latents of a batch, computed here unless the batch brings them."""
        if "content" in batch:
            return Latents(batch["content"], batch["motion"])
        return self.module.apply({"params": params}, pixels(batch["video"]), method="encode")

    def decode(self, params, latents: Latents):
        return self.module.apply({"params": params}, latents, method="decode")


class DiffusionStage:
    """What content and motion training share: draw t and noise, drop labels, denoise (paper section 3.2)."""

    name: str
    shape: tuple[int, ...]  # of what is diffused, without the batch

    def __init__(self, config, autoencoder: FrozenAutoencoder, classes: int, statistics):
        self.autoencoder, self.classes = autoencoder, classes
        self.process = build_process(config.diffusion)
        self.label_dropout = config.guidance.label_dropout
        self.module = build_denoiser(config, self.shape[-1], classes, self.process)
        constants = {
            name: {k: np.asarray(v, np.float32) for k, v in values.items()} for name, values in statistics.items()
        }
        self.frozen = {"autoencoder": autoencoder.params, "statistics": constants}

    def split(self, latents: Latents, statistics) -> tuple[jax.Array, jax.Array | None]:
        """Latents -> (what this stage diffuses, what it is conditioned on), in the denoiser's units."""
        raise NotImplementedError

    def denoiser(self, params, label, condition):
        """(x, timesteps) -> prediction."""

        def denoise(x, timesteps):
            return self.module.apply({"params": params}, x, timesteps, label, condition)

        return denoise

    def guided_denoiser(self, params, label, condition, guidance):
        """Like `denoiser`, extrapolated away from the null class by `guidance`; None means unguided."""
        if guidance is None:
            return self.denoiser(params, label, condition)

        def denoise(x, timesteps):
            # Both labels ride on a new outermost axis, so that the batch axis keeps its layout on the mesh.
            labels = jnp.stack([label, jnp.full_like(label, self.classes)])
            one = lambda y: self.module.apply({"params": params}, x, timesteps, y, condition)  # noqa: E731
            conditional, null = jax.vmap(one)(labels)
            return guide(conditional, null, guidance, self.process.learned_range)

        return denoise

    def init(self, key):
        x, content = jnp.zeros((1, *self.shape)), jnp.zeros((1, *self.autoencoder.content_shape))
        return self.module.init(key, x, jnp.zeros(1), jnp.zeros(1, jnp.int32), content)["params"]

    def loss(self, params, frozen, batch, key):
        keys = dict(zip(("noise", "label"), jax.random.split(key), strict=True))
        latents = jax.lax.stop_gradient(self.autoencoder.encode(frozen["autoencoder"], batch))
        x0, condition = self.split(latents, frozen["statistics"])
        dropped = jax.random.bernoulli(keys["label"], self.label_dropout, batch["label"].shape)
        label = jnp.where(dropped, self.classes, batch["label"])
        t, noise = self.process.draw(keys["noise"], x0)
        losses, metrics = self.process.loss(self.denoiser(params, label, condition), x0, t, noise)
        return losses.mean(), jax.tree.map(jnp.mean, metrics)

    def sample(self, params, statistics, label, content, keys, *, guidance, steps, solver, **options):
        """Reverse process for each key: -> content frames [B, H, W, C] or motion latents, in their own units."""
        condition = None if content is None else normalize(content, statistics["content"])
        denoise = self.guided_denoiser(params, label, condition, guidance)
        noise_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, self.shape))(noise_keys)
        if isinstance(self.process, Flow):
            x = self.process.sample(denoise, noise, step_keys, steps=steps, solver=solver or "euler")
        else:
            options = {"spacing": "even", **options}  # iDDPM's rule, which starts at the noisiest timestep
            x = self.process.sample(denoise, noise, step_keys, steps=steps, solver=solver or "ddim", **options)
        return denormalize(x, statistics[self.name])

    def _sample_batch(self, params, frozen, batch, key, content):
        keys = jax.random.split(key, batch["label"].shape[0])
        return self.sample(
            params, frozen["statistics"], batch["label"], content, keys,
            guidance=None, steps=PREVIEW_STEPS, solver="",
        )  # fmt: skip


class ContentStage(DiffusionStage):
    """p(content | class)."""

    name = "content"

    def __init__(self, config, autoencoder, classes, statistics):
        self.shape = autoencoder.content_shape
        super().__init__(config, autoencoder, classes, statistics)

    def split(self, latents, statistics):
        return normalize(latents.content, statistics["content"]), None

    def preview(self, params, frozen, batch, key):
        latents = self.autoencoder.encode(frozen["autoencoder"], batch)
        return {"content": latents.content, "samples": self._sample_batch(params, frozen, batch, key, None)}


class MotionStage(DiffusionStage):
    """p(motion | content, class). The class enters with the timestep, the content frame as extra tokens."""

    name = "motion"

    def __init__(self, config, autoencoder, classes, statistics):
        self.shape = autoencoder.motion_shape
        super().__init__(config, autoencoder, classes, statistics)

    def split(self, latents, statistics):
        return normalize(latents.motion, statistics["motion"]), normalize(latents.content, statistics["content"])

    def preview(self, params, frozen, batch, key):
        latents = self.autoencoder.encode(frozen["autoencoder"], batch)
        motion = self._sample_batch(params, frozen, batch, key, latents.content)
        decode = partial(self.autoencoder.decode, frozen["autoencoder"])
        return {"reconstructions": decode(latents), "samples": decode(Latents(latents.content, motion))}


DIFFUSION_STAGES = {"content": ContentStage, "motion": MotionStage}


def check_patches(config, autoencoder: FrozenAutoencoder):
    """The grids that the denoiser cuts into patches must be multiples of them."""
    patch, (height, width, _) = config.model.patch, autoencoder.content_shape
    frames, cells, _ = autoencoder.motion_shape
    if config.stage == "content":
        sides = [("data.height", height, "patch", patch), ("data.width", width, "patch", patch)]
    else:
        extra = config.model.content_patch
        sides = [("data.frames", frames, "patch", patch), ("h+w", cells, "patch", patch)]
        sides += [("data.height", height, "content_patch", extra), ("data.width", width, "content_patch", extra)]
    for field, size, by, p in sides:
        if size % p:
            raise UserError(field, size, f"not a multiple of {config.stage} model.{by}={p}", f"change model.{by}")
