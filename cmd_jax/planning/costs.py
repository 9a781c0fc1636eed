"""What the full-size text-to-video models cost, next to the numbers of the paper.

`python -m cmd_jax.planning.costs` prints `table()`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.config import load
from cmd_jax.diffusion.gaussian import Gaussian
from cmd_jax.diffusion.plan import Kind, evaluation_kinds
from cmd_jax.diffusion.schedules import Schedule, linear_betas, scaled_linear_betas
from cmd_jax.interop.clip import text_from_config
from cmd_jax.interop.sd_config import unet_from_config, vae_from_config
from cmd_jax.interop.sd_known import ARCHITECTURES
from cmd_jax.models.autoencoder import Autoencoder, Latents
from cmd_jax.models.dit import SIZES, DiT
from cmd_jax.models.unet import init_unet
from cmd_jax.models.vae import init_vae
from cmd_jax.performance.flops import Flops, count
from cmd_jax.sampling.settings import SamplingSettings


class Row(NamedTuple):
    """A line of `table()`: paper (None where it gives no number), and two counts of ours, in T or B."""

    what: str
    unit: str
    paper: float | None
    layers: float
    total: float


# The text-to-video models of the paper's cost figures: Stable Diffusion 2.1-base and the sizes of appendix B.
KNOWN = ARCHITECTURES["sd21"]
UNET, IMAGE_VAE, TEXT = unet_from_config(KNOWN.unet), vae_from_config(KNOWN.vae), text_from_config(KNOWN.text)
AUTOENCODER = Autoencoder(channels=4, mode="latent")
DEPTH, WIDTH, HEADS = SIZES["XL"]
MOTION = DiT(out_channels=16, patch=2, width=WIDTH, depth=DEPTH, heads=HEADS, classes=None, content_patch=8)
PROCESSES = {
    "content": Gaussian(Schedule.from_betas(scaled_linear_betas())),
    "motion": Gaussian(Schedule.from_betas(linear_betas()), learned_range=True),
}
FRAMES, TOKENS = 16, 77


def _array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


class Clip(NamedTuple):
    """What the models see of one 16-frame clip, as shapes."""

    frames: jax.ShapeDtypeStruct  # pixels [T, H, W, 3]
    video: jax.ShapeDtypeStruct  # VAE latents [1, T, h, w, 4]
    content: jax.ShapeDtypeStruct  # [1, h, w, 4]
    motion: jax.ShapeDtypeStruct  # [1, T, (h + w) / 2, 8]
    text: jax.ShapeDtypeStruct  # [1, 77, 1024]
    time: jax.ShapeDtypeStruct  # [1]

    @classmethod
    def of(cls, height: int, width: int) -> "Clip":
        h, w = height // IMAGE_VAE.factor, width // IMAGE_VAE.factor
        return cls(
            _array(FRAMES, height, width, 3),
            _array(1, FRAMES, h, w, 4),
            _array(1, h, w, 4),
            _array(1, FRAMES, (h + w) // AUTOENCODER.patch, AUTOENCODER.motion_channels),
            _array(1, TOKENS, UNET.text_width),
            _array(1),
        )


def full_size() -> dict:
    """Shapes of the parameters of the full-size models."""
    clip, key, ids = Clip.of(512, 512), jax.random.key(0), _array(1, TOKENS, dtype=jnp.int32)
    init = lambda module, *args: jax.eval_shape(module.init, key, *args)["params"]  # noqa: E731
    return {
        "autoencoder": init(AUTOENCODER, clip.video),
        "content": jax.eval_shape(lambda key: init_unet(UNET, key), key),
        "motion": init(MOTION, clip.motion, clip.time, None, clip.content),
        "vae": jax.eval_shape(lambda key: init_vae(IMAGE_VAE, key), key),
        "text": init(TEXT, ids),
    }


def _unet(params, x, time, text, **cache):
    return UNET.apply({"params": params}, x, time, text, **cache)


def _motion(params, x, time, content, **cache):
    return MOTION.apply({"params": params}, x, time, None, content, **cache)


def _reconstruct(params, video):
    return AUTOENCODER.apply({"params": params}, video)[0]


def _training(forward, params, *inputs) -> tuple[float, float]:
    """-> (multiply-adds of the layers, forward; operations of forward and backward pass)."""

    def loss(params, *inputs):
        return jnp.sum(jnp.square(forward(params, *inputs)))

    return count(forward, params, *inputs).layers, count(jax.value_and_grad(loss), params, *inputs).total


class Sampling:
    """The arithmetic of a latent video [1, 16, h, w, 4] from noise: content, motion, then the autoencoder's decoder."""

    def __init__(self, params: dict, height: int, width: int):
        clip = Clip.of(height, width)
        decode = lambda p, x: AUTOENCODER.apply({"params": p}, x, method="decode")  # noqa: E731
        self.decoder = count(decode, params["autoencoder"], Latents(clip.content, clip.motion))
        # The text reaches the motion model as one vector, whose linear map is not worth counting.
        self.evaluations = {
            "content": _evaluations(_unet, params["content"], clip.content, clip.time, clip.text),
            "motion": _evaluations(_motion, params["motion"], clip.motion, clip.time, clip.content),
        }

    def run(self, runs: dict[str, dict], guided: bool) -> Flops:
        """runs: of "content" and "motion", keyword arguments like those of `SamplingSettings.run_of`. guided: each
        model also answers for the null text, where it is asked to."""
        total = self.decoder
        for name, costs in self.evaluations.items():
            for kind in kinds_of(name, guided, **runs[name]):
                total += costs[kind.reuses] * (1 + kind.guided)
        return total


def kinds_of(name: str, guided: bool, interval=(0.0, 1.0), reuse=(), **run) -> list[Kind]:
    """Of each evaluation of a run of "content" or "motion", whose arguments are as of `SamplingSettings.run_of`."""
    return evaluation_kinds(PROCESSES[name].levels(**run), guided, interval, reuse)


def _evaluations(model, params, *inputs) -> tuple[Flops, Flops]:
    """Of one evaluation: in full, and with what is deep in the network reused."""
    kept = jax.eval_shape(lambda *arguments: model(*arguments, keep=True)[1], params, *inputs)
    part = lambda params, kept, *inputs: model(params, *inputs, reuse=kept)  # noqa: E731
    return count(model, params, *inputs), count(part, params, kept, *inputs)


def preset_runs(name: str) -> dict[str, dict]:
    """The runs of a preset of configs/webvid.py."""
    settings = SamplingSettings.of(load("webvid:sample", {"sampling.preset": name}))
    runs = {stage: settings.run_of(stage) for stage in ("content", "motion")}
    return {stage: run | {"solver": run["solver"] or "ddim"} for stage, run in runs.items()}


def table() -> list[Row]:
    """The paper's costs of text-to-video next to ours, for one clip of 16 frames.

    layers: multiply-adds of linear and convolution layers, no guidance, one forward pass: as the paper counts.
    total: operations, two a multiply-add, attention included; training with its backward pass, sampling with guidance.
    The encoders and the VAE decoder, which the paper leaves out, have lines of their own: training runs the encoders
    where their outputs are not cached, sampling the text encoder twice (prompt and null text) and the VAE decoder.
    The parameters' total includes the frozen VAE and text encoder.

    The paper's 46.8 and 92.1 T differ by 45.3 T for 50 steps (ours: 45.2, if the UNet's convolutions of enlarged cells
    took all nine products in place of four), and so leave 1.5 T for the autoencoder.
    Its encoder and decoder together are 1.55 T; sampling runs the decoder only, 0.77 T, and we count what it runs.
    """
    params, square, wide = full_size(), Clip.of(512, 512), Clip.of(512, 1024)
    unet_inputs = square.content, square.time, square.text
    motion_inputs = square.motion, square.time, square.content
    training = {
        "train at 512x512: autoencoder": (0.77, _training(_reconstruct, params["autoencoder"], square.video)),
        "train at 512x512: content": (0.34, _training(_unet, params["content"], *unet_inputs)),
        "train at 512x512: motion": (0.14, _training(_motion, params["motion"], *motion_inputs)),
    }

    sampling, sampled = Sampling(params, 512, 1024), {}

    def sample(runs):
        return sampling.run(runs, guided=False).layers, sampling.run(runs, guided=True).total

    for steps, paper in ((50, 46.8), (100, 92.1)):
        even = dict.fromkeys(("content", "motion"), {"steps": steps})
        sampled[f"sample at 512x1024: {steps} + {steps} steps, CMD decoder"] = paper, sample(even)
    for name in ("balanced", "fast"):
        sampled[f"sample at 512x1024: preset {name}, CMD decoder"] = None, sample(preset_runs(name))

    def frozen(name, module, x, times=1, **method):
        flops = count(lambda p, x: module.apply({"params": p}, x, **method), params[name], x) * times
        return None, (flops.layers, flops.total)

    one_frame, ids = _array(1, *square.frames.shape[1:]), _array(1, TOKENS, dtype=jnp.int32)
    alone = {
        "VAE encoder, 16 frames of 512x512": frozen("vae", IMAGE_VAE, one_frame, FRAMES, method="encode"),
        "CMD encoder at 512x512": frozen("autoencoder", AUTOENCODER, square.video, method="encode"),
        "text encoder, one prompt": frozen("text", TEXT, ids),
        "VAE decoder, 16 frames of 512x1024": frozen("vae", IMAGE_VAE, wide.content, FRAMES, method="decode"),
    }
    rows = training | sampled | alone
    cost = [Row(what, "T", paper, *(value / 1e12 for value in ours)) for what, (paper, ours) in rows.items()]
    sizes = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    trained = sum(sizes[name] for name in ("autoencoder", "content", "motion"))
    return [*cost, Row("parameters", "B", 1.6, trained / 1e9, sum(sizes.values()) / 1e9)]


def format_table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| what | paper | ours, multiply-adds as in the paper | ours, all operations |",
        "|---|---|---|---|",
    ]
    for row in rows:
        paper = "" if row.paper is None else f"{row.paper:g} {row.unit}"
        lines.append(f"| {row.what} | {paper} | {_digits(row.layers)} {row.unit} | {_digits(row.total)} {row.unit} |")
    return "\n".join(lines)


def _digits(value: float) -> str:
    """Three significant digits, never in exponent notation."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


if __name__ == "__main__":
    print(format_table(table()))
