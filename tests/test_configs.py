"""The config files: they load, they are locked, and ucf101.py holds the paper's numbers."""

import math
from pathlib import Path

import flax.linen as nn
import jax
import pytest

from cmd_jax.builders import build_process, check_patches, clip_of
from cmd_jax.config import load
from cmd_jax.models.conditions import Classes
from cmd_jax.models.dit import SIZES
from cmd_jax.models.frames import Pixels, VAELatents
from cmd_jax.models.vae import VAE
from cmd_jax.pretrained import ImageModelMetadata, load_space, load_texts, stated
from cmd_jax.sampling.layouts import Layouts
from cmd_jax.sampling.settings import SamplingSettings, resolve
from cmd_jax.sharding import make_mesh
from cmd_jax.stages import AutoencoderStage, ContentStage, FrozenAutoencoder, MotionStage, diffusion_stage

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("autoencoder", "content", "motion", "sample")
FILES = {
    "quickstart": ("", "size=small", "size=long"),
    "folder": ("",),
    "ucf101": ("", "size=paper", "size=appendix", "size=reference", "size=S", "size=B"),
    "webvid": ("", "sd=15", "size=small", "size=tiny", "size=tiny,sd=15"),
}
FIXTURES = Path(__file__).parent / "fixtures"
SPECIFICATIONS = [
    f"{file}:{stage}{',' * bool(size)}{size}" for file, sizes in FILES.items() for size in sizes for stage in STAGES
]


def given(specification: str) -> dict:
    """What the user of a config must give."""
    version = 15 if "sd=15" in specification else 21
    return {"pretrained.path": str(FIXTURES / f"tiny-sd{version}")} if specification.startswith("webvid") else {}


def ucf101(stage, size="paper"):
    return load(f"ucf101:{stage},size={size}", {})


def test_every_file_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("specification", SPECIFICATIONS)
def test_a_config_loads_and_is_locked(specification):
    config = load(specification, given(specification) if "size=tiny" not in specification else {})
    assert config.stage == specification.partition(":")[2].split(",")[0]
    for node in (config, config.data, config.sampling if config.stage == "sample" else config.model):
        with pytest.raises((KeyError, AttributeError)):
            node.nonsense = 1
    if config.stage != "sample":
        assert config.optimizer.steps == config.train.steps
        assert config.train.batch_size <= config.data.clips or config.data.source == "folder"


@pytest.mark.parametrize("specification", ["quickstart", "folder", "ucf101", *(f"webvid,{s}" for s in FILES["webvid"])])
def test_the_stages_of_a_file_fit_each_other(specification):
    file, _, size = specification.partition(",")
    configs = {stage: load(f"{file}:{stage},{size}", given(specification)) for stage in STAGES}
    assert len({(c.data.source, c.data.frames, c.data.height, c.data.width) for c in configs.values()}) == 1
    autoencoder, conditions, models = autoencoder_of(configs["autoencoder"]), Classes(2), [None, None]
    if file == "webvid":
        conditions, _ = load_texts(configs["motion"].pretrained, None)
        models = [stated(configs["content"].pretrained.path, ImageModelMetadata), None]
    stages = {
        name: diffusion_stage(configs[name], autoencoder, conditions, None, model)
        for name, model in zip(("content", "motion"), models, strict=True)
    }
    for stage in stages.values():
        assert jax.eval_shape(stage.init, jax.random.key(0))
    for name in ("quality", "balanced", "fast"):
        sample = load(f"{file}:sample,{size}", given(specification) | {"sampling.preset": name})
        resolve(SamplingSettings.of(sample), stages, Layouts(make_mesh(sample.mesh), sample.rules))


def autoencoder_of(config):
    """The frozen autoencoder of a config, without parameters."""
    space = load_space(config.pretrained, None) if config.pretrained.path else None
    return FrozenAutoencoder(config, {"autoencoder": {}}, space)


@pytest.mark.parametrize("version, width, cells, content_patch", [(15, 512, 64, 4), (21, 1024, 96, 8)])
def test_the_papers_text_to_video(version, width, cells, content_patch):
    """Latents of 1/8, K=8, D=384; XL/2 motion with content patches of 4 and 8; batch 256, 3 epochs of 10.7M clips."""
    configs = {stage: load(f"webvid:{stage},sd={version}", given(f"webvid,sd={version}")) for stage in STAGES}
    autoencoder, content, motion, sample = configs.values()
    for config in configs.values():
        assert (config.data.frames, config.data.height, config.data.width) == (16, 512, width)
        assert config.data.layout == "webvid" or config is sample
    model = autoencoder.model
    assert (model.mode, model.channels, model.patch, model.width, model.motion_channels) == ("latent", 4, 2, 384, 8)
    assert (model.depth, model.heads, model.head_dim) == (8, 8, 48)
    assert autoencoder.loss.to_dict()["l2"] == 1 and autoencoder.loss.l1 == autoencoder.loss.lpips == 0
    assert rates(autoencoder) == (1e-5, 0.5, 0.9, 24)
    published = VAELatents(VAE(3, 4, (128, 256, 512, 512), 2))
    frozen = FrozenAutoencoder(autoencoder, {"autoencoder": {}}, published)
    assert (frozen.content_shape, frozen.motion_shape) == ((64, width // 8, 4), (16, cells, 8))
    for config in (content, motion):
        assert rates(config) == (1e-4, 0.9, 0.999, 256) and config.train.ema_decay == 0.999
        assert config.train.steps == 3 * 10_700_000 // 256 and config.guidance.label_dropout == 0.1
    size = motion.model.depth, motion.model.width, motion.model.heads
    assert size == SIZES["XL"] == (28, 1152, 16) and motion.model.condition == "text"
    assert (motion.model.patch, motion.model.content_patch) == (2, content_patch)
    assert motion.optimizer.clip_norm == 1.0 and motion.diffusion.learned_range
    check_patches(motion, frozen)
    options = sample.sampling
    assert (options.guidance, options.content_steps, options.motion_steps, options.eta) == (7.5, 50, 100, 0.0)


def rates(config):
    optimizer = config.optimizer
    return optimizer.learning_rate, optimizer.b1, optimizer.b2, config.train.batch_size


def test_the_papers_autoencoder():
    """K=8, D=384, patch 2, Adam 1e-5 (0.5, 0.9), batch 24; 8 blocks of 8 heads of 48, or the appendix' 12 of 64."""
    config = ucf101("autoencoder")
    model = config.model
    assert (model.patch, model.width, model.motion_channels, model.channels) == (2, 384, 8, 3)
    assert (model.depth, model.heads, model.head_dim) == (8, 8, 48)
    assert (model.mode, model.position, model.content) == ("pixel", "rotary", "weighted")
    appendix = ucf101("autoencoder", "appendix").model
    assert (appendix.depth, appendix.heads, appendix.head_dim) == (12, 8, 64)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2) == (1e-5, 0.5, 0.9)
    assert (optimizer.decay, optimizer.warmup_steps, config.train.batch_size) == ("constant", 0, 24)
    loss = config.loss
    assert (loss.l1, loss.l2, loss.lpips, loss.adversarial, loss.feature_matching) == (4.0, 0.0, 4.0, 0.0, 4.0)
    assert (config.data.frames, config.data.height, config.data.width, config.data.stride) == (16, 64, 64, 1)
    assert (config.data.layout, config.data.fold, config.data.split) == ("ucf101", 1, "train")
    given = load("ucf101:autoencoder", {"loss.vgg": "vgg.pt"})
    assert (given.loss.lpips, given.loss.vgg) == (4.0, "vgg.pt")


@pytest.mark.parametrize("stage", ["content", "motion"])
def test_the_papers_diffusion(stage):
    """Adam 1e-4 (0.9, 0.999), batch 256, 3000 epochs, EMA 0.999, clip 1.0; eps, learned range, label dropout 0.1."""
    config = ucf101(stage)
    optimizer, train, diffusion = config.optimizer, config.train, config.diffusion
    assert (optimizer.learning_rate, optimizer.b1, optimizer.b2) == (1e-4, 0.9, 0.999)
    assert (optimizer.decay, optimizer.warmup_steps, optimizer.clip_norm) == ("constant", 0, 1.0)
    assert (train.batch_size, train.ema_decay, train.accumulate) == (256, 0.999, 1)
    assert train.steps * 256 / 9537 == pytest.approx(3000, abs=0.1)
    assert (diffusion.kind, diffusion.prediction, diffusion.learned_range) == ("gaussian", "eps", True)
    assert config.guidance.label_dropout == 0.1
    assert not config.latents.normalize and not config.latents.starts
    assert config.model.patch == 2 and config.model.position == "sincos"
    process = build_process(diffusion, clip_of(config, Pixels()))
    betas = process.schedule.betas
    assert (len(betas), betas[0], betas[-1]) == (1000, 1e-4, pytest.approx(0.02))
    assert betas[500] == pytest.approx(1e-4 + 500 / 999 * (0.02 - 1e-4))
    assert process.learned_range and process.clip == {"content": 1.0, "motion": None}[stage]


def test_the_papers_denoisers():
    """Content DiT-XL/2 (reference L/2), motion L/2 with content patches of 4."""
    size = lambda config: (config.model.depth, config.model.width, config.model.heads)  # noqa: E731
    assert size(ucf101("content")) == SIZES["XL"] == (28, 1152, 16)
    assert size(ucf101("content", "reference")) == SIZES["L"] == (24, 1024, 16)
    assert size(ucf101("motion")) == size(ucf101("motion", "reference")) == SIZES["L"]
    for name, expected in {"S": (12, 384, 6), "B": (12, 768, 12)}.items():
        assert size(ucf101("content", name)) == size(ucf101("motion", name)) == expected
    assert ucf101("motion").model.content_patch == 4


def test_the_papers_sampling():
    """Guidance 4.0, DDIM with eta 0, 50 content steps, 100 motion steps."""
    sampling = ucf101("sample").sampling
    assert (sampling.guidance, sampling.content_steps, sampling.motion_steps, sampling.eta) == (4.0, 50, 100, 0.0)
    assert (sampling.content_solver, sampling.motion_solver, sampling.mode) == ("", "", "generate")


def count(init) -> int:
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def dit_size(depth, width, patch, channels, classes, extra_patch=0) -> int:
    """Parameters of a DiT with learned range, by hand."""
    block = linear(width, 6 * width) + 4 * linear(width, width) + linear(width, 4 * width) + linear(4 * width, width)
    ends = linear(patch**2 * channels, width) + linear(width, patch**2 * 2 * channels) + linear(width, 2 * width)
    condition = linear(256, width) + linear(width, width) + (classes + 1) * width
    return depth * block + ends + condition + (linear(extra_patch**2 * 3, width) if extra_patch else 0)


@pytest.mark.parametrize("size", ["paper", "reference", "S", "B"])
def test_the_denoisers_have_the_parameters_of_their_formula(size):
    autoencoder = FrozenAutoencoder(ucf101("autoencoder"), {"autoencoder": {}})
    assert (autoencoder.content_shape, autoencoder.motion_shape) == ((64, 64, 3), (16, 64, 8))
    published = {"S": 33e6, "B": 130e6, "L": 458e6, "XL": 675e6}  # DiT-*/2 on 4 channels with 1000 classes
    for kind, channels, extra in ((ContentStage, 3, 0), (MotionStage, 8, 4)):
        config = ucf101(kind.name, size)
        parameters = count(kind(config, autoencoder, Classes(101)).init)
        depth, width = config.model.depth, config.model.width
        assert parameters == dit_size(depth, width, 2, channels, 101, extra)
        name = next(n for n, s in SIZES.items() if s == (depth, width, config.model.heads))
        assert dit_size(depth, width, 2, 4, 1000) == pytest.approx(published[name], rel=0.01)
        assert parameters == pytest.approx(published[name], rel=0.02)


@pytest.mark.parametrize("size", ["paper", "appendix"])
def test_the_autoencoder_has_the_parameters_of_its_formula(size):
    config = ucf101("autoencoder", size)
    model = config.model
    width, inner, patch = model.width, model.heads * model.head_dim, model.patch**2 * 3
    attention = 3 * linear(width, inner) + linear(inner, width)
    block = 2 * attention + 2 * linear(width, 4 * width) + linear(4 * width, width) + 3 * 2 * width
    embeddings = 2 * linear(patch, width) + 2 * linear(8, width)
    heads = 2 * (width * patch + 3) + 2 * linear(width, 8)  # transposed convolutions have one bias a channel
    assert count(AutoencoderStage(config).init) == 2 * model.depth * block + embeddings + heads
    if size == "paper":  # the block of the paper's FLOP count: 16,384 tokens x 16 blocks x 20 D^2 = 0.773 T
        kernels = 2 * 4 * width * inner + 12 * width**2
        assert kernels == 20 * width**2 and 16_384 * 16 * kernels == pytest.approx(0.773e12, rel=1e-3)
