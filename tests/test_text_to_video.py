"""Text to video at toy size: latents of a random VAE, captions of shapes; trained, resumed, drawn."""

import json
import shutil
from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from PIL import Image

from cmd_jax import prepare as preparing
from cmd_jax.data.latents import PROVENANCE
from cmd_jax.data.shapes import CLASS_NAMES, ShapesSource
from cmd_jax.defaults import CLIP_BY_SPACE
from cmd_jax.diffusion.guidance import guide
from cmd_jax.errors import UserError
from cmd_jax.files import read_json
from cmd_jax.interop.diffusers import load_pipeline
from cmd_jax.interop.schedulers import from_scheduler_config
from cmd_jax.keys import derive
from cmd_jax.main import main
from cmd_jax.models.clip import mean_pool
from cmd_jax.models.conditions import Text, Texts, drop
from cmd_jax.models.frames import VAELatents, pixels
from cmd_jax.planning.flops import count
from cmd_jax.prepare import prepare
from cmd_jax.running.checkpoint import Checkpoints
from cmd_jax.running.runtime import StopRequest
from cmd_jax.sharding import make_mesh, partitioning
from cmd_jax.stages import FrozenAutoencoder, diffusion_stage
from cmd_jax.state import abstract, init_state, make_optimizer
from cmd_jax.train import train
from cmd_jax.trained import Trained, export, load_trained
from cmd_jax.verbs import evaluate as evaluating
from cmd_jax.verbs import sample as sampling

pytestmark = pytest.mark.xdist_group("text")
PROMPTS = ["a red circle", "blue square, moving"]


config_of = lambda argument, **changes: tiny.config_of(f"{argument},kind=text", **changes)  # noqa: E731


@cache
def pipeline():
    return load_pipeline(tiny.pipeline_folder())


@cache
def trained():
    """A workdir with the three stages, on latents made once; content is stopped after its third step, and resumed."""
    workdir = tiny.scratch() / "text"
    cached = {"latents__cache_clips": 48}
    train(config_of("autoencoder", **cached, train__preview_every=6), workdir)
    train(config_of("motion", **cached), workdir)
    train(config_of("content", **cached, train__steps=3), workdir)
    train(config_of("content", **cached, train__preview_every=6), workdir)
    return workdir


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


# Frames and conditions.


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_frames_pass_the_vae_in_chunks(at_once):
    module, params = pipeline().vae
    space = VAELatents(module, params, at_once)
    video = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 32, 3), np.uint8)
    latents = jax.jit(space.encode)(params, video)
    assert latents.shape == (2, 4, 8, 16, 4)  # H != W
    one = module.apply({"params": params}, pixels(video[1, 2])[None], method="latents")[0]
    np.testing.assert_allclose(latents[1, 2], one, atol=1e-5)
    decoded = jax.jit(space.decode)(params, latents)
    np.testing.assert_allclose(decoded[0, 3], space.decode_image(params, latents[0, 3:])[0], atol=1e-4)
    # What is alive at a time: one chunk of all clips.
    program = jax.make_jaxpr(space.decode)(params, latents)
    (loop,) = [e for e in program.eqns if e.primitive.name == "scan"]
    assert loop.params["length"] == 4 // at_once


def texts():
    module, params = pipeline().text_encoder
    tokenizer = pipeline().tokenizer
    return Texts(module, params, tokenizer([""])[0], tokenizer.end), tokenizer


def test_texts_are_encoded_pooled_and_dropped():
    conditions, tokenizer = texts()
    ids = jnp.asarray(tokenizer(PROMPTS))
    made = conditions.of(conditions.params, {"ids": ids})
    states = pipeline().text_encoder[0].apply({"params": conditions.params}, ids)[0]
    np.testing.assert_array_equal(made.states, states)
    length = int(np.argmax(np.asarray(ids[0]) == tokenizer.end)) + 1
    np.testing.assert_allclose(made.pooled[0], states[0, :length].mean(axis=0), atol=1e-5)
    assert relative(mean_pool(states, ids, tokenizer.end), made.pooled) == 0
    given = conditions.of(None, {"ids": ids, "states": made.states})  # encoded before: no encoder is needed
    assert all(np.array_equal(a, b) for a, b in zip(given, made, strict=True))

    null = conditions.null(conditions.params, 2)
    empty = conditions.of(conditions.params, {"ids": jnp.asarray(tokenizer(["", ""]))})
    np.testing.assert_allclose(null.states, empty.states, atol=1e-5)
    negative = conditions.null(conditions.params, 2, tokenizer(["ugly"])[0])
    assert relative(negative.states, null.states) > 1e-2
    mixed = drop(made, null, jnp.array([True, False]))
    assert isinstance(mixed, Text)
    np.testing.assert_array_equal(mixed.states, jnp.stack([null.states[0], made.states[1]]))
    np.testing.assert_array_equal(mixed.pooled, jnp.stack([null.pooled[0], made.pooled[1]]))


# Training.


def test_what_trains_and_what_does_not():
    folder = trained() / "content"
    facts, summary = read_json(folder / "facts.json"), read_json(folder / "summary.json")
    assert {"vae", "text_encoder", "image_model", "autoencoder"} <= facts.keys()
    unet = jax.tree.map(np.shape, pipeline().unet[1])
    state = Checkpoints(folder, read_only=True)
    assert jax.tree.map(lambda x: x.shape, state.shapes("params")) == unet
    assert summary["parameters"] == sum(np.size(x) for x in jax.tree.leaves(pipeline().unet[1]))
    # Adam keeps two moments of what trains, and of nothing else.
    moments = [x for x in jax.tree.leaves(state.restore_item("opt_state")) if np.ndim(x)]
    assert sum(x.size for x in moments) == 2 * summary["parameters"]
    ema = load_trained(folder, "content").params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ema, pipeline().unet[1])
    # Three steps and three more are as six: the resumed run went on from the trained weights.
    assert all(value > 0 for value in jax.tree.leaves(moved))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6] and summary["step"] == 6


def test_fine_tuning_starts_from_the_pretrained_function():
    config = config_of("content")
    stage, mesh = stage_of("content"), make_mesh(config.mesh)
    with partitioning(mesh, config.rules):
        given = stage.pretrained(partial(abstract, mesh=mesh, rules=config.rules))
        state = init_state(stage, make_optimizer(config.optimizer), 0, mesh, config.rules, given)
    for tree in (state.params, state.ema):
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), tree, pipeline().unet[1])
        assert all(jax.tree.leaves(same))
    assert stage.process.prediction == "v" and not stage.process.learned_range
    assert stage.process.schedule.betas[0] == pytest.approx(0.00085)


def stage_of(name):
    """The stage as training makes it, from the autoencoder trained here."""
    config = config_of(name)
    with StopRequest("stopped"):
        quiet = type("Quiet", (), {"print": lambda *_, **__: None})()
        return prepare(config, trained(), make_mesh(config.mesh), quiet, resuming=False).stage


def test_latents_and_texts_are_made_once():
    files = {}
    for path in trained().glob("latents-*.npz"):
        with np.load(path) as latents:
            files |= {name: latents[name] for name in latents.files if name != PROVENANCE}
    assert len(list(trained().glob("latents-*.npz"))) == 2  # the autoencoder's, and one for both denoisers
    assert {k: v.shape for k, v in files.items()} == {
        "frames": (48, 4, 8, 16, 4), "content": (48, 8, 16, 4), "motion": (48, 4, 12, 4), "label": (48,),
        "ids": (48, 77), "states": (48, 77, 8),
    }  # fmt: skip
    source = ShapesSource(clips=48, frames=4, height=16, width=32)
    np.testing.assert_array_equal(files["ids"][5], pipeline().tokenizer([source.texts[5]])[0])
    metrics = json.loads((trained() / "autoencoder" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"l2", "snr"} <= metrics.keys() and "psnr" not in metrics
    assert metrics["loss"] == pytest.approx(metrics["l2"])
    previews = {path.name for path in (trained() / "content" / "previews").iterdir()}
    assert previews == {"0000006_content.png", "0000006_samples.png"}
    with Image.open(trained() / "content" / "previews" / "0000006_samples.png") as grid:
        assert grid.size == (4 * 32 + 3 * 2, 16)  # pixels, not latents


@pytest.mark.parametrize("name", ["content", "motion"])
def test_cached_features_give_the_loss_of_videos_and_texts(name):
    stage = stage_of(name)
    conditions, tokenizer = texts()
    source = ShapesSource(clips=48, frames=4, height=16, width=32)
    video = np.stack([source.clip(i)[0] for i in (3, 20, 40)])
    batch = {"video": video, "ids": tokenizer([source.texts[i] for i in (3, 20, 40)])}
    content, motion = stage.autoencoder.encode(stage.frozen["autoencoder"], batch)
    states = conditions.states(conditions.params, batch["ids"])
    cached = {"content": content, "motion": motion, "ids": batch["ids"], "states": states}
    shapes = nn.unbox(jax.eval_shape(stage.init, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)
    loss = jax.jit(lambda batch: stage.loss(params, stage.frozen, batch, jax.random.key(2))[0])
    value = float(loss(batch))
    assert value == pytest.approx(float(loss(cached)), rel=1e-4)
    other = batch | {"ids": tokenizer(["something else", "and this", "or that"])}
    assert abs(float(loss(other)) - value) > 1e-5
    if name == "content":  # that its six steps moved every parameter is asserted above
        return
    # Gradients reach everything that trains, the map of the text features too, and nothing that is frozen.
    gradients = jax.jit(jax.grad(lambda *both: stage.loss(*both, cached, jax.random.key(2))[0], argnums=(0, 1)))
    ours, frozen = gradients(params, stage.frozen)
    quiet = [k for k, g in flatten_dict(ours, sep="/").items() if not np.abs(g).max() > 0]
    assert all(k.endswith("key/bias") for k in quiet), quiet
    assert np.abs(ours["text"]["kernel"]).max() > 0
    for part in ("autoencoder", "conditions"):
        assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(frozen[part]))


# Sampling.


@pytest.fixture(scope="module")
def sampler():
    """The tiny run's, with the pretrained UNet itself as its content stage: what fine-tuning starts from."""
    sampler = sampling.load_sampler(settings(), trained())
    sampler.params["content"] = jax.tree.map(jnp.asarray, pipeline().unet[1])
    return sampler


def settings(**changes):
    changes = {"sampling__guidance": 7.5, "sampling__negative": "dim", **changes}
    return config_of("sample", **changes)


def batch_of(sampler, prompts=PROMPTS):
    index = np.arange(len(prompts), dtype=np.int32)
    return {"index": index, "variant": np.zeros_like(index), "ids": sampler.tokenizer(prompts)}


def test_step_zero_samples_are_those_of_the_pretrained_pipeline(sampler):
    """Noise, text encoder, guidance with a negative prompt, DDIM, VAE decoder: as the folder itself says."""
    out = sampler.generate(batch_of(sampler))
    unet, params = pipeline().unet

    def encode(prompts):
        module, params = pipeline().text_encoder
        return module.apply({"params": params}, pipeline().tokenizer(prompts))[0]

    states = jnp.stack([encode(PROMPTS), encode(["dim", "dim"])])
    process, options = from_scheduler_config(pipeline().scheduler)

    def denoise(x, t):
        return guide(*jax.vmap(lambda s: unet.apply({"params": params}, x, t, s))(states), 7.5, False)

    keys = [derive(derive(jax.random.key(0), "sample", i), "content") for i in range(2)]
    noise = jnp.stack([jax.random.normal(derive(key, "noise"), (8, 16, 4)) for key in keys])
    latents = jax.jit(partial(process.sample, denoise, keys=None, steps=3, **options))(noise)
    assert relative(out["content"], latents) <= 1e-4
    images = pipeline().vae[0].apply({"params": pipeline().vae[1]}, latents, method="decode")
    assert relative(out["image"], images) <= 1e-4
    assert out["video"].shape == (2, 4, 16, 32, 3) and np.isfinite(out["video"]).all()


def test_a_sample_does_not_depend_on_its_batch(sampler):
    out, one = sampler.generate(batch_of(sampler, [*PROMPTS, "a cat"])), batch_of(sampler, ["a cat"])
    one["index"] = np.array([2], np.int32)
    alone = sampler.generate(one)
    for name in out:
        assert relative(alone[name][0], out[name][2]) <= 1e-4, name
    assert relative(out["content"][0], out["content"][1]) > 1e-2


def test_texts_and_content_frames_are_read_once_a_call():
    """What another step adds to the program's work is both denoisers twice, and nothing else."""

    def work(content_steps, motion_steps):
        changes = {"sampling__content_steps": content_steps, "sampling__motion_steps": motion_steps}
        sampler = sampling.load_sampler(settings(**changes), trained())
        arguments = sampler.params, batch_of(sampler), jax.random.key(0), jnp.float32(2), sampler.null_ids
        with partitioning(sampler.mesh, sampler.rules):
            return count(sampler._generate, *arguments), sampler

    (base, sampler), (content, _), (motion, _) = work(1, 1), work(2, 1), work(1, 2)
    x, t = jnp.zeros((2, 8, 16, 4)), jnp.zeros(2)
    text = Text(jnp.zeros((2, 77, 8)), jnp.zeros((2, 8)))
    unet, dit = sampler.denoisers["content"], sampler.denoisers["motion"]
    step = count(lambda params: unet.guided_denoiser(params, text, None, 2.0, text)(x, t), sampler.params["content"])
    assert content == base + step and step.layers > 0
    tokens = dit.content_features(sampler.params["motion"], x)
    assert tokens.shape == (2, 8, 16)
    y = jnp.zeros((2, *dit.shape))
    step = count(lambda params: dit.guided_denoiser(params, text, tokens, 2.0, text)(y, t), sampler.params["motion"])
    assert motion == base + step and step.layers > 0


def test_my_own_image_as_content_frame(sampler, tmp_path):
    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(tmp_path / "image.png")
    changes = {"sampling__mode": "animate", "sampling__image": tmp_path / "image.png", "sampling__prompt": "a sea"}
    out, captions = sampling.make_samples(sampler, settings(**changes, sampling__num=2), trained())
    module, params = pipeline().vae
    image = jnp.full((1, 16, 32, 3), 200 / 127.5 - 1)
    latents = module.apply({"params": params}, image, method="latents")
    np.testing.assert_allclose(out["content"][1], latents[0], atol=1e-4)
    assert captions == ["a sea", "a sea"] and relative(out["motion"][0], out["motion"][1]) > 1e-3


def test_same_content_new_motion_and_reconstruction(sampler):
    changes = {"sampling__mode": "vary-motion", "sampling__prompt": "a sea", "sampling__num": 1}
    out, captions = sampling.make_samples(sampler, settings(**changes), trained())
    assert captions == ["a sea, motion 1", "a sea, motion 2"] and np.array_equal(out["content"][0], out["content"][1])
    out, captions = sampling.make_samples(sampler, settings(sampling__mode="reconstruct", sampling__num=2), trained())
    assert out["original"].shape == out["video"].shape == (2, 4, 16, 32, 3)
    assert captions == [CLASS_NAMES[0], CLASS_NAMES[24]]


# The command.


def command(workdir, *flags):
    return main(["sample", f"--config={tiny.CONFIG_FILE}:sample,kind=text", f"--workdir={workdir}", *flags])


@pytest.fixture
def workdir(tmp_path, sampler, monkeypatch):
    for verb in (sampling, evaluating):
        monkeypatch.setattr(verb, "load_sampler", lambda *_: sampler)
    return tmp_path


def test_prompts_make_a_gallery(workdir, tmp_path):
    hostile = ["🚗 emoji", "שלום RTL ‮ text", "<b>&amp;", "../../etc/passwd"]
    (tmp_path / "prompts.txt").write_text("# comment\n" + "\n".join(hostile) + "\n")
    flags = (f"--prompts-file={tmp_path}/prompts.txt", "--num=2", "--guidance=7.5", "--seed=0")
    assert command(workdir, *flags) == 0
    folder = workdir / "samples"
    records = read_json(folder / "samples.json")["items"]
    assert [r["caption"] for r in records] == [text for text in hostile for _ in range(2)]
    assert [r["video"] for r in records] == [f"{i:04d}.mp4" for i in range(8)]  # names come from indices
    page = (folder / "index.html").read_text()
    assert "🚗 emoji" in page and "<b>&amp;" not in page and "&lt;b&gt;&amp;amp;" in page
    with Image.open(folder / "0000_content.png") as content:
        assert content.size == (32, 16)  # pixels, not latents


def test_the_flags_of_the_issue(tmp_path):
    """The whole command, loading included; a prompt of 10,000 characters is cut, and told of."""
    flags = ("--prompt=" + "a very long walk " * 600, "--negative=rain", "--guidance=3", "--steps=2", "--solver=dpmpp")
    assert command(trained(), *flags, "--seed=5", "--num=1", "--config.sampling.output=flags") == 0
    config = read_json(trained() / "flags" / "config.json")
    wanted = {"guidance": 3.0, "content_steps": 2, "motion_steps": 2, "negative": "rain", "num": 1}
    assert {k: config["sampling"][k] for k in wanted} == wanted and config["seed"] == 5
    assert config["sampling"]["content_solver"] == config["sampling"]["motion_solver"] == "dpmpp"


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "sampling.prompt=: missing; say what to draw"),
        (("--prompt=",), "sampling.prompt=: missing; say what to draw"),
        (("--prompt= \t ",), "sampling.prompt=: empty; say what to draw"),
        (("--prompt=a\0b",), "sampling.prompt=a\\x00b: character 2 is U+0000, a control character; remove it"),
        (("--prompt=a", "--prompts-file=x.txt"), "sampling.prompt=a: sampling.prompts_file is given too; give one"),
        (("--prompts-file=nowhere.txt",), "sampling.prompts_file=nowhere.txt: cannot be read"),
        (("--prompt=a", "--steps=0"), "sampling.content_steps=0: must be positive"),
        (("--prompt=a", "--steps=1001"), "sampling.content_steps=1001: more than the 1000 training steps"),
        (("--prompt=a", "--guidance=nan"), "sampling.guidance=nan: not a finite number"),
        (("--prompt=a", "--seed=-1"), "seed=-1: must not be negative"),
        (("--prompt=a", "--num=0"), "sampling.num=0: must be positive"),
        (
            ("--prompt=a", "--solver=heun"),
            "sampling.content_solver=heun: not one of the choices; use one of ddim, dpmpp",
        ),
        (("--prompt=a", "--guidance=1", "--negative=b"), "sampling.negative=b: has no effect without guidance"),
        (("--prompt=a", "--config.sampling.classes=cat"), "sampling.classes=cat: the model was trained on texts"),
        (("--prompt=a", "--num=1", "--config.sampling.num=2"), "--num=1: --config.sampling.num is given too"),
        (("--prompt=a", "--config.pretrained.path="), "pretrained.path=: missing; give the folder of a Stable"),
        (("--prompt=a", "--config.pretrained.path=nowhere"), "pretrained.path=nowhere: no such folder; give the"),
        (
            ("--prompt=a", f"--config.pretrained.path={tiny.FIXTURES / 'tiny-sd15'}"),
            "pretrained.path=",
        ),
        (("--promt=a",), "flag=--promt=a: not a flag of sample; did you mean --prompt=TEXT"),
    ],
)
def test_bad_prompts_and_options(capsys, flags, message):
    assert command(trained(), *flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" not in line]
    assert line.startswith(message), line
    assert not list(trained().glob(".tmp*"))


@pytest.mark.parametrize(
    "argument, changes, message",
    [
        ("autoencoder", {"pretrained__path": ""}, "pretrained.path=: missing: model.mode=latent needs its VAE; "),
        ("content", {"pretrained__path": ""}, "pretrained.path=: missing: this stage reads texts; "),
        ("motion", {"pretrained__path": ""}, "pretrained.path=: missing: this stage reads texts; "),
        ("autoencoder", {"loss__lpips": 4.0}, "loss.lpips=4.0: compares pixels, not latents; "),
        ("autoencoder", {"pretrained__vae_frames": 3}, "data.frames=4: not a multiple of pretrained.vae_frames=3; "),
        ("autoencoder", {"model__mode": "pixel"}, "model.channels=4: clips have 3 channels; "),
        ("motion", {"model__condition": "words"}, "model.condition=words: not one of the choices; use one of class, "),
    ],
)
def test_bad_configs(argument, changes, message):
    with pytest.raises(UserError) as error:
        config_of(argument, **changes)
    assert str(error.value).startswith(message)


def test_shapes_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(UserError, match="^model.channels=5: the latents of the VAE have 4; use 4"):
        train(config_of("autoencoder", model__channels=5), tmp_path)
    with pytest.raises(UserError, match="^data.width=18: not a multiple of 2 of the VAE x model.patch=4; use "):
        train(config_of("autoencoder", data__width=18), tmp_path)
    autoencoder = config_of("autoencoder", data__height=12)
    space = VAELatents(pipeline().vae[0])
    frozen = FrozenAutoencoder(autoencoder, {"autoencoder": {}}, space)
    unet = read_json(tiny.FIXTURES / "tiny-sd21" / "unet" / "config.json")  # of three levels
    model = {"unet": unet, "scheduler": pipeline().scheduler}
    with pytest.raises(UserError, match="^data.height=12: the VAE and the UNet halve it until 1/8 is left; use a mul"):
        diffusion_stage(config_of("content", data__height=12), frozen, texts()[0], {}, model)


def test_a_dit_on_latents_refuses_the_clip_of_pixels_before_it_encodes(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "encoded_clips", None)
    latents = {"latents__autoencoder": trained() / "autoencoder", "latents__cache_clips": 48, "model__patch": 2}
    text = {"model__condition": "text", "pretrained__path": tiny.pipeline_folder(), "data__width": 32}
    config = tiny.config_of("content,kind=gaussian", **latents, **text, diffusion__clip=1.0)
    with pytest.raises(UserError, match="^diffusion.clip=1.0: content frames are latents of the VAE"):
        train(config, tmp_path)
    config.diffusion.clip = CLIP_BY_SPACE
    with pytest.raises(TypeError, match="NoneType"):  # it comes to encoding
        train(config, tmp_path)


def test_parts_of_another_model_are_refused(tmp_path):
    other = tiny.FIXTURES / "tiny-sd15"
    with pytest.raises(
        UserError, match="its vae/config.json: block_out_channels is .*, the autoencoder was trained wi"
    ):
        train(config_of("content", latents__cache_clips=48, pretrained__path=other), trained())
    folder = with_scheduler(tmp_path / "sd", prediction_type="sample")
    with pytest.raises(UserError, match="scheduler_config.json: prediction_type is sample, this run was started with"):
        train(config_of("content", latents__cache_clips=48, pretrained__path=folder), trained())
    with pytest.raises(UserError, match="prediction_type is sample, the content stage was trained with "):
        sampling.load_sampler(settings(pretrained__path=folder), trained())
    text_encoder = load_trained(trained() / "motion", "motion").metadata.text_encoder
    config = exported(tmp_path, "motion", text_encoder=replace(text_encoder, weights="other"))
    with pytest.raises(UserError, match="^weights=motion: its classes or text encoder differ from the content stage's"):
        sampling.load_sampler(config, tmp_path)


def with_scheduler(folder, **changes):
    """The pipeline of the run here, but for fields of its scheduler."""
    shutil.copytree(tiny.pipeline_folder(), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def exported(folder, changed, **metadata):
    """The settings for weights files of the run here, where one stage has other metadata."""
    for name in ("autoencoder", "content", "motion"):
        stage = load_trained(trained() / name, name)
        stated = replace(stage.metadata, **(metadata if name == changed else {}))
        export(folder / f"{name}.safetensors", Trained(stage.config, stage.params, stated))
    config = settings()
    config.weights = str(folder)
    return config


def test_eta_and_steps_are_checked_for_the_solver_that_the_scheduler_is_for(tmp_path):
    """Not for the first of those there are: an empty solver is the folder's own."""
    model = load_trained(trained() / "content", "content").metadata.image_model
    scheduler = model.scheduler | {"_class_name": "DPMSolverMultistepScheduler"}
    config = exported(tmp_path, "content", image_model=replace(model, scheduler=scheduler))
    config.pretrained.path = str(with_scheduler(tmp_path / "sd", **scheduler))
    config.sampling.content_steps = 999
    assert sampling.load_sampler(config, tmp_path).solvers == {"content": "dpmpp", "motion": "ddim"}
    config.sampling.content_steps = 1000
    with pytest.raises(UserError, match="^sampling.content_steps=1000: more than the 999 training steps; use 1 to 999"):
        sampling.load_sampler(config, tmp_path)
    config.sampling.update(content_steps=3, eta=0.5)
    with pytest.raises(UserError, match="^sampling.eta=0.5: the content solver is dpmpp, not ddim; set it to 0.0"):
        sampling.load_sampler(config, tmp_path)
