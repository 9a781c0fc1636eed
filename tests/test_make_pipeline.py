import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.clip_files import quarters, write_clip
from PIL import Image

from cmd_jax.data.folder import FolderSource
from cmd_jax.errors import UserError
from cmd_jax.interop.clip import text_from_config
from cmd_jax.interop.clip_tokenizer import Tokenizer, check_tokenizer
from cmd_jax.interop.diffusers import load_pipeline
from cmd_jax.interop.schedulers import from_scheduler_config
from cmd_jax.interop.sd_config import unet_from_config, vae_from_config
from cmd_jax.models.unet import init_unet
from cmd_jax.models.vae import init_vae

SCRIPT = Path(__file__).parents[1] / "launch" / "make_pipeline.py"
spec = importlib.util.spec_from_file_location("make_pipeline", SCRIPT)
make_pipeline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_pipeline)

TINY = make_pipeline.SIZES["small"]._replace(
    unet=make_pipeline.unet_config((16,), 1, 8, attention_head_dim=2, cross_attention_dim=8, norm_num_groups=8),
    vae=make_pipeline.vae_config((8,), layers=1, groups=8, sample_size=16),  # one level: quick to compile
    text=make_pipeline.SIZES["small"].text | {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2},
)


def parameters(init, module):
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda key: init(module, key), jax.random.key(0))))


@pytest.mark.parametrize(
    ("name", "unet", "text"), [("sd15", 859_520_964, 123_060_480), ("sd21-base", 865_910_724, 340_387_840)]
)
def test_full_sizes_have_as_many_parameters_as_those_published(name, unet, text):
    size = make_pipeline.SIZES[name]
    tokenizer = Tokenizer(make_pipeline.FIXTURES / size.tokenizer / "tokenizer")
    config = make_pipeline.text_config(size.text, tokenizer)
    tower = text_from_config(config)
    assert parameters(init_unet, unet_from_config(size.unet)) == unet
    assert size.vae == make_pipeline.SIZES["sd15"].vae
    assert parameters(make_pipeline.init_text, tower) == text
    check_tokenizer(tokenizer, tower)
    ids = tokenizer(["a small cat"])
    assert tower.vocabulary == 49408 > ids.max()
    special = [config[f"{token}_token_id"] for token in ("bos", "eos", "pad")]
    assert special == [ids[0, 0], ids.max(), ids[0, -1]] and tower.end_token == tokenizer.end
    assert ids[0, -1] == (tokenizer.end if name == "sd15" else 0)  # Stable Diffusion 2 pads with "!"


def test_their_vae_has_as_many_parameters_as_the_published_one():
    assert parameters(init_vae, vae_from_config(make_pipeline.SIZES["sd15"].vae)) == 83_653_863


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setitem(make_pipeline.SIZES, "small", TINY)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["make_pipeline.py", "--out", str(tmp_path / "made"), *map(str, arguments)])
        make_pipeline.run(make_pipeline.parse())
        return tmp_path / "made"

    return run


@pytest.mark.slow
def test_small_learns_the_frames_of_clips_and_its_folder_samples(optimized, run, tmp_path, capsys):
    shape = {"frames": 4, "height": 16, "width": 24}
    write_clip(tmp_path / "clips" / "a" / "clip.mp4", quarters(4))
    write_clip(tmp_path / "clips" / "a" / "dark.mp4", 255 - quarters(4))
    flags = [f"--{name}={value}" for name, value in shape.items()]
    folder = run("--size=small", f"--clips={tmp_path / 'clips'}", *flags, "--steps=150")
    said = capsys.readouterr().out
    assert "8 frames of 16x24" in said and "vae step 150/150" in said
    decibels = float(re.search(r"^vae: ([\d.]+) dB", said, re.MULTILINE)[1])

    pipeline = load_pipeline(folder)
    frames = make_pipeline.read_frames(FolderSource(tmp_path / "clips", **shape), 0)
    assert decibels > 20 * np.log10(255 / frames.std()) + 6  # an even grey would be off by frames.std()
    vae, params = pipeline.vae
    latents = make_pipeline.by_chunks(lambda images: vae.apply({"params": params}, images, method="latents"), frames)
    assert latents.shape == (8, 16, 24, 4)
    assert np.std(latents) == pytest.approx(1, rel=1e-3)
    assert Image.open(folder / "vae_reconstruction.png").size == (2 * (8 * 26 - 2), 2 * (2 * 18 - 2))
    assert jnp.isfinite(sample(pipeline, ["a street"], latents.shape[1:])).all()


def sample(pipeline, texts, shape):
    """Three steps as the folder's scheduler says: latents [B, *shape]."""
    process, options = from_scheduler_config(pipeline.scheduler)
    (tower, tower_params), (unet, unet_params) = pipeline.text_encoder, pipeline.unet

    @jax.jit
    def run(ids, noise):
        text = tower.apply({"params": tower_params}, ids)[0]
        return process.sample(
            lambda x, t: unet.apply({"params": unet_params}, x, t, text), noise, None, steps=3, **options
        )

    return run(pipeline.tokenizer(texts), np.random.default_rng(0).standard_normal((len(texts), *shape), np.float32))


def test_random_parameters_follow_the_seed_and_the_dtype():
    tokenizer = Tokenizer(make_pipeline.FIXTURES / TINY.tokenizer / "tokenizer")
    tower = text_from_config(make_pipeline.text_config(TINY.text, tokenizer))
    first, same, different = (
        jax.tree.leaves(make_pipeline.draw(make_pipeline.init_text, tower, seed, "float16"))
        for seed in ((0, 0), (0, 0), (1, 0))
    )
    assert {x.dtype for x in first} == {np.dtype("float16")}
    assert all((x == y).all() for x, y in zip(first, same, strict=True))
    assert any((x != y).any() for x, y in zip(first, different, strict=True))


def test_drawn_kernels_keep_variance_in_stacked_layers_too():
    rng = np.random.default_rng(0)
    for name, shape, std in (
        ("down_0_resnet_0/conv1/kernel", (3, 3, 32, 64), (9 * 32) ** -0.5),
        ("text/blocks/mlp_in/kernel", (4, 64, 128), 64**-0.5),
        ("positions", (77, 64), 0.02),
    ):
        values = make_pipeline.draw_array(rng, name, shape)
        assert values.shape == shape and values.std() == pytest.approx(std, rel=0.05)
    assert (make_pipeline.draw_array(rng, "norm/scale", (8,)) == 1).all()
    assert (make_pipeline.draw_array(rng, "norm/bias", (8,)) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=small"], "--size=small: has a VAE trained on clips; give a folder of videos as --clips"),
        (["--size=sd15", "--clips=clips"], "--size=sd15: has random weights only; leave out --clips"),
        (["--size=small", "--clips=clips", "--steps=0"], "--steps=0: "),
    ],
)
def test_faults_are_named_before_any_work(arguments, message, run, tmp_path):
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "made").exists()


def test_an_existing_folder_is_left_alone(run, tmp_path):
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="--out=.*exists already"):
        run("--size=sd15")
