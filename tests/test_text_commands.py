"""Text to video from the command line, and what it refuses."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import tiny_text
from PIL import Image
from tiny_text import config_of, pipeline, settings, texts, trained

from cmd_jax import prepare as preparing
from cmd_jax.defaults import CLIP_BY_SPACE
from cmd_jax.errors import UserError
from cmd_jax.files import read_json
from cmd_jax.loading import open_sampler
from cmd_jax.main import main
from cmd_jax.models.frames import VAELatents
from cmd_jax.pretrained import ImageModelMetadata
from cmd_jax.sampling.settings import SamplingSettings
from cmd_jax.stages import FrozenAutoencoder, diffusion_stage
from cmd_jax.train import train
from cmd_jax.trained import Trained, export, load_trained
from cmd_jax.verbs import sample as sampling

pytestmark = pytest.mark.xdist_group("text")


@pytest.fixture(scope="module")
def sampler():
    return tiny_text.sampler()


def command(workdir, *flags):
    return main(["sample", f"--config={tiny.CONFIG_FILE}:sample,kind=text", f"--workdir={workdir}", *flags])


@pytest.fixture
def workdir(tmp_path, sampler, monkeypatch):
    monkeypatch.setattr(sampling, "open_sampler", lambda *_: sampler)
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
    with pytest.raises(UserError, match="^data.height=12: the VAE and the UNet halve it until 1/8 is left; use a mul"):
        diffusion_stage(config_of("content", data__height=12), frozen, texts()[0], None, ImageModelMetadata(unet, {}))


def test_a_dit_on_latents_refuses_the_clip_of_pixels_before_it_encodes(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "filler_of", None)
    latents = {"latents__autoencoder": trained() / "autoencoder", "latents__starts": 1, "model__patch": 2}
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
        train(config_of("content", latents__starts=1, pretrained__path=other), trained())
    folder = with_scheduler(tmp_path / "sd", prediction_type="sample")
    with pytest.raises(UserError, match="scheduler_config.json: prediction_type is sample, this run was started with"):
        train(config_of("content", latents__starts=1, pretrained__path=folder), trained())
    with pytest.raises(UserError, match="prediction_type is sample, the content stage was trained with "):
        open_sampler(settings(pretrained__path=folder), trained())
    text_encoder = load_trained(trained() / "motion", "motion").metadata.text_encoder
    config = exported(tmp_path, "motion", text_encoder=replace(text_encoder, weights="other"))
    with pytest.raises(UserError, match="^weights=motion: its classes or text encoder differ from the content stage's"):
        open_sampler(config, tmp_path)


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
    sampler = open_sampler(config, tmp_path)
    resolved = sampler.resolve(SamplingSettings(content_steps=998, motion_steps=4))
    assert (resolved.content_solver, resolved.motion_solver) == ("dpmpp", "ddim")
    with pytest.raises(UserError, match="^sampling.content_steps=1000: more than the 999 training steps; use 1 to 999"):
        sampler.resolve(SamplingSettings(content_steps=1000, motion_steps=4))
    with pytest.raises(UserError, match="^sampling.steps_offset=1: "):  # which leaves room for one step less
        sampler.resolve(SamplingSettings(content_steps=999, motion_steps=4))
    with pytest.raises(UserError, match="^sampling.eta=0.5: the content solver is dpmpp, not ddim; set it to 0.0"):
        sampler.resolve(SamplingSettings(content_steps=3, motion_steps=4, eta=0.5))
