import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fixtures.formula import state_dict
from safetensors.numpy import load_file

from cmd_jax.errors import UserError
from cmd_jax.interop.cmd_release import UNUSED
from cmd_jax.interop.converted import MODELS, load_converted
from cmd_jax.interop.diffusers import load_unet
from cmd_jax.interop.weights import read_metadata, read_state_dict, write_safetensors
from cmd_jax.models.dit import sincos_table
from cmd_jax.pretrained import ImageModelMetadata, TextEncoderMetadata, describe
from cmd_jax.trained import AutoencoderMetadata, Trained, export, load_trained
from cmd_jax.verbs.convert import add_flags, convert
from cmd_jax.verbs.convert_kinds import KINDS, STAGES

FIXTURES = Path(__file__).parents[1] / "fixtures"
PIPELINE = FIXTURES / "tiny-sd15"
FIXTURE_OF = {
    "cmd-autoencoder": "autoencoder_pixel", "cmd-content": "content_dit", "cmd-motion": "motion_dit",
    "dit": "content_dit", "i3d": "i3d", "lpips": "lpips",
}  # fmt: skip
TOLD = {  # what the tensors of the fixtures do not tell
    "cmd-autoencoder": ("--architecture=heads=8,mode=pixel,frames=4,image_size=16x16",),
    "cmd-content": ("--architecture=heads=4",),
    "cmd-motion": ("--architecture=heads=4",),
    "dit": ("--architecture=heads=4,input_size=16",),
}
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32).reshape(1, 3, 1, 1)


def run(*arguments):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return convert(parser.parse_args([str(argument) for argument in arguments]))


def refused(*arguments) -> UserError:
    with pytest.raises(UserError) as e:
        run(*arguments)
    return e.value


def fixture(kind):
    """-> (torch weights, and all else that is recorded); with the tables that published files have."""
    with np.load(FIXTURES / f"{FIXTURE_OF[kind]}.npz") as npz:
        npz = dict(npz)
    tables = {"content_dit": {"pos_embed": sincos_table(8, 8, 48)[None]}, "autoencoder_pixel": UNUSED}
    if kind == "cmd-motion":
        tables["motion_dit"] = {"pos_embed": npz["pos_embed"], "keyframe_pos_embed": npz["content_pos_embed"]}
    state = state_dict(npz) | tables.get(FIXTURE_OF[kind], {})
    if kind == "lpips":
        state |= {f"lins.{k}.model.1.weight": state[f"lin{k}.model.1.weight"] for k in range(5)}
        state["scaling_layer.shift"] = SHIFT
    return state, npz


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All kinds as torch's and as ours: dit-torch.safetensors and dit.safetensors, but autoencoder.safetensors ..."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "names.txt").write_text("\n".join(f"class {name}" for name in "abcdefg"))
    for kind in FIXTURE_OF:
        write_safetensors(folder / f"{kind}-torch.safetensors", fixture(kind)[0])
        names = ("--classes", folder / "names.txt") if kind == "cmd-content" else ()
        assert run(kind, folder / f"{kind}-torch.safetensors", ours(folder, kind), *TOLD.get(kind, ()), *names) == 0
    return folder


def ours(folder, kind):
    return folder / f"{STAGES.get(kind, kind)}.safetensors"


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert np.array_equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", FIXTURE_OF)
def test_every_kind_goes_there_and_back_bit_for_bit(folder, tmp_path, kind):
    assert run(kind, ours(folder, kind), tmp_path / "back.safetensors", "--to=torch") == 0
    assert_equal(read_state_dict(tmp_path / "back.safetensors"), fixture(kind)[0])
    assert read_metadata(tmp_path / "back.safetensors") == {"format": "pt"}
    assert not read_state_dict(ours(folder, kind)).keys() & fixture(kind)[0].keys()


def test_what_was_not_there_does_not_come_back(folder, tmp_path):
    state, _ = fixture("lpips")
    less = {name: array for name, array in state.items() if not name.startswith(("lins.", "scaling_layer."))}
    write_safetensors(tmp_path / "torch.safetensors", less)
    run("lpips", tmp_path / "torch.safetensors", tmp_path / "lpips.safetensors")
    run("lpips", tmp_path / "lpips.safetensors", tmp_path / "back.safetensors", "--to=torch")
    assert_equal(read_state_dict(tmp_path / "back.safetensors"), less)


def test_the_release_becomes_stages_of_one_run(folder):
    stages = {name: load_trained(folder / f"{name}.safetensors", name) for name in STAGES.values()}
    autoencoder, content, motion = (stages[name] for name in ("autoencoder", "content", "motion"))
    assert content.metadata.autoencoder == motion.metadata.autoencoder == AutoencoderMetadata.of(autoencoder)
    assert content.metadata.class_names == motion.metadata.class_names == tuple(f"class {name}" for name in "abcdefg")
    assert not motion.params["label"]["embedding"].any() and motion.params["label"]["embedding"].shape == (8, 48)
    assert autoencoder.config.model.position == "none" and motion.config.model.position == "table"


def test_a_converted_dit_computes_the_recorded_function(folder):
    npz = fixture("dit")[1]
    module, params = load_converted(folder / "dit.safetensors", "dit")
    out = jax.jit(module.apply)({"params": params}, np.moveaxis(npz["x"], 1, -1), npz["t"], npz["y"])
    assert np.abs(np.moveaxis(out, -1, 1) - npz["out"]).max() <= 1e-4 * np.abs(npz["out"]).max()


def test_a_converted_lpips_computes_the_recorded_distance(folder):
    npz = fixture("lpips")[1]
    module, params = load_converted(folder / "lpips.safetensors", "lpips")
    a, b = (npz[name].transpose(0, 2, 3, 1) for name in "ab")
    distance = jax.jit(module.apply)({"params": params}, a, b)
    assert np.abs(distance - npz["distance"]).max() <= 1e-4 * np.abs(npz["distance"]).max()


def test_the_epsilon_of_i3d_is_kept(folder, tmp_path):
    assert load_converted(folder / "i3d.safetensors", "i3d")[0].epsilon == 1e-5
    source, strict = folder / "i3d-torch.safetensors", tmp_path / "i3d.safetensors"
    run("i3d", source, strict, "--architecture=epsilon=1e-3", "--dtype=bfloat16")
    module, params = load_converted(strict, "i3d")
    assert module.epsilon == 1e-3
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}  # to compute with
    assert {str(array.dtype) for array in read_state_dict(strict).values()} == {"bfloat16"}


def test_what_the_lpips_package_holds_twice_must_agree(folder, tmp_path):
    source = tmp_path / "torch.safetensors"
    write_safetensors(source, fixture("lpips")[0] | {"lins.2.model.1.weight": np.ones((1, 256, 1, 1), np.float32)})
    error = refused("lpips", source, tmp_path / "lpips.safetensors")
    assert error.field == "INPUT" and error.value == "lins.2.model.1.weight" and "repeats" in error.problem


def test_a_dtype_that_numbers_do_not_fit_is_refused(tmp_path):
    source, out = tmp_path / "torch.safetensors", tmp_path / "dit.safetensors"
    write_safetensors(source, fixture("dit")[0] | {"t_embedder.mlp.0.bias": np.full(48, 1e6, np.float32)})
    error = refused("dit", source, out, *TOLD["dit"], "--dtype=float16")
    assert error.field == "--dtype" and "time_in/bias" in error.problem and not out.exists()


def test_weights_go_back_in_another_dtype(folder, tmp_path):
    run("cmd-content", folder / "content.safetensors", tmp_path / "back.safetensors", "--to=torch", "--dtype=float16")
    expected = {name: array.astype(np.float16) for name, array in fixture("cmd-content")[0].items()}
    assert_equal(read_state_dict(tmp_path / "back.safetensors"), expected)


# Stable Diffusion.


@pytest.fixture(scope="module")
def stage():
    """A content stage that fine-tuned PIPELINE's UNet, in all but the training."""
    _, params = load_unet(PIPELINE / "unet")
    read = lambda *parts: json.loads(PIPELINE.joinpath(*parts).read_text())  # noqa: E731
    image_model = ImageModelMetadata(read("unet", "config.json"), read("scheduler", "scheduler_config.json"))
    params = jax.tree.map(lambda x: x + np.float32(0.25), params)
    text_encoder = describe(PIPELINE, TextEncoderMetadata)
    metadata = tiny.metadata(image_model=image_model, text_encoder=text_encoder)
    return Trained(tiny.config_of("content,kind=text"), params, metadata)


def tensors(folder, part):
    return load_file(next((folder / part).glob("*.safetensors")))


def test_a_pipeline_is_written_as_it_was_read(tmp_path):
    run("stable-diffusion", PIPELINE, tmp_path / "v1.5")
    for part in ("unet", "vae", "text_encoder"):
        # transformers 5 leaves out a prefix that the versions before it need.
        found = {name.removeprefix("text_model."): array for name, array in tensors(tmp_path / "v1.5", part).items()}
        assert_equal(found, tensors(PIPELINE, part))


def test_a_fine_tuned_unet_goes_back_to_a_diffusers_folder(tmp_path, stage):
    path, out = tmp_path / "content.safetensors", tmp_path / "out"
    export(path, stage)
    run("stable-diffusion", PIPELINE, out, f"--unet={path}", "--dtype=bfloat16")
    unet = {name: (array + np.float32(0.25)).astype(jnp.bfloat16) for name, array in tensors(PIPELINE, "unet").items()}
    assert_equal(tensors(out, "unet"), unet)
    vae = {name: array.astype(jnp.bfloat16) for name, array in tensors(PIPELINE, "vae").items()}
    assert_equal(tensors(out, "vae"), vae)
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler == stage.metadata.image_model.scheduler


@pytest.mark.parametrize("changes, words", [
    ({"unet": {"layers_per_block": 3}}, "its unet/config.json: layers_per_block is 2, the stage of --unet was trained"),
    ({"scheduler": {"prediction_type": "v_prediction"}}, ": prediction_type is epsilon, the stage of --unet was trai"),
    (None, "from scratch"),
])  # fmt: skip
def test_a_stage_of_another_model_is_refused(tmp_path, stage, changes, words):
    model = stage.metadata.image_model
    path = tmp_path / "content.safetensors"
    if changes is None:
        stage = stage._replace(config=tiny.config_of("content"), metadata=tiny.metadata())
    else:
        model = replace(model, **{name: getattr(model, name) | change for name, change in changes.items()})
        stage = stage._replace(metadata=replace(stage.metadata, image_model=model))
    export(path, stage)
    error = refused("stable-diffusion", PIPELINE, tmp_path / "out", f"--unet={path}")
    assert error.field == ("INPUT" if changes else "--unet") and words in error.problem
    assert not (tmp_path / "out").exists()


def test_a_stage_of_another_text_encoder_is_refused(tmp_path, stage):
    path, other = tmp_path / "content.safetensors", replace(stage.metadata.text_encoder, weights="of another one")
    export(path, stage._replace(metadata=replace(stage.metadata, text_encoder=other)))
    error = refused("stable-diffusion", PIPELINE, tmp_path / "out", f"--unet={path}")
    assert error.field == "INPUT" and error.problem.endswith("the stage of --unet was trained with of another one")


# Errors.


@pytest.mark.parametrize("arguments, field, words", [
    (("dlt", "dit-torch", "x"), "KIND", "use one of cmd-autoencoder, cmd-content, cmd-motion, dit, i3d, lpips,"),
    (("dit", "dit-torch", "dit"), "OUTPUT", "exists already"),
    (("dit", "dit-torch", "no/x"), "OUTPUT", "there is no folder"),
    (("dit", "dit-torch", "x.pt"), "OUTPUT", "let it end in .safetensors"),
    (("dit", "absent", "x"), "INPUT", "no such file"),
    (("dit", "torn.pt", "x"), "INPUT", "damaged"),
    (("dit", "evil.pt", "x"), "INPUT", "its pickle asks for posix.system"),
    (("dit", "dit-torch", "x", "--architecture=input_size=16"), "--architecture", "heads: missing from the config"),
    (("dit", "dit-torch", "x", "--architecture=absent.json"), "--architecture", "no such file; write it like heads=8"),
    (("dit", "dit-torch", "x", "--architecture=heads="), "--architecture", "not key=value"),
    (("dit", "dit-torch", "x", "--architecture=torn.pt"), "--architecture", "not readable as JSON"),
    (("dit", "dit-torch", "x", "--architecture=list.json"), "--architecture", "not a JSON object"),
    (("dit", "dit-torch", "x", "--architecture=head=4"), "--architecture", "did you mean heads?"),
    (("dit", "dit-torch", "x", "--architecture=heads=4,input_size=16,depth=3"), "--architecture: depth", "blocks.2"),
    (("i3d", "i3d-torch", "x", "--architecture=heads=4"), "--architecture", "use epsilon"),
    (("i3d", "i3d-torch", "x", "--architecture=epsilon=no"), "--architecture: epsilon", "not a positive number"),
    (("lpips", "lpips-torch", "x", "--architecture=heads=4"), "--architecture", "only for cmd-autoencoder, "),
    (("dit", "dit-torch", "x", "--key=ema"), "--key", "no entries"),
    (("dit", "dit-torch", "x", "--dtype=int8"), "--dtype", "float32, bfloat16, float16"),
    (("dit", "dit-torch", "x", "--to=jax"), "--to", "cmd-jax, torch"),
    (("dit", "dit-torch", "x", "--unet=y"), "--unet", "only for stable-diffusion"),
    (("dit", "dit-torch", "x", "--classes=y"), "--classes", "only for cmd-content"),
    (("i3d", "dit-torch", "x"), "KIND", "looks like cmd-content or dit; give cmd-content or dit"),
    (("cmd-content", "cmd-motion-torch", "x"), "KIND", "looks like cmd-motion"),
    (("dit", "strange", "x"), "INPUT", "holds no x_embedder.proj.weight, but strange"),
    (("dit", "empty/.", "x"), "INPUT", "config.json: no such file"),
    (("dit", "unet", "x"), "KIND", "looks like stable-diffusion; give its whole folder"),
    (("dit", "dit", "x"), "INPUT", "a dit of cmd-jax already; add --to=torch"),
    (("cmd-motion", "motion", "x"), "INPUT", "a trained stage of cmd-jax already; add --to=torch"),
    (("dit", "dit-torch", "x", "--to=torch"), "INPUT", "`cmd-jax convert` did not write it"),
    (("dit", "dit", "x", "--to=torch", "--architecture=heads=4"), "--architecture", "INPUT says it already"),
    (("i3d", "dit", "x", "--to=torch"), "KIND", "holds a dit; use dit"),
    (("dit", "motion", "x", "--to=torch"), "INPUT", "is a trained stage; take it as a model of the CMD release, cmd-"),
    (("cmd-content", "motion", "x", "--to=torch"), "INPUT", "is a motion stage"),
    (("cmd-motion", "dit", "x", "--to=torch"), "INPUT", "holds no config of cmd_jax"),
    (("dit", "lacking", "x", "--to=torch"), "INPUT/blocks/out/kernel", "absent"),
    (("cmd-content", "cmd-content-torch", "empty/x"), "autoencoder", "no such file, and this model belongs to one"),
    (("cmd-content", "cmd-content-torch", "x", "--classes=no"), "--classes", "cannot be read"),
    (("cmd-content", "cmd-content-torch", "x", "--architecture=heads=4", "--classes=two.txt"), "--classes", "has 7"),
    (("cmd-autoencoder", "cmd-autoencoder-torch", "x", "--architecture=heads=8,mode=latent,frames=4,image_size=16"),
     "--architecture: mode", "needs the VAE"),
    (("cmd-autoencoder", "cmd-autoencoder-torch", "x", "--architecture=heads=8,mode=latent,frames=4,image_size=16",
      "--pretrained=empty"), "--pretrained", "holds no vae/config.json"),
    (("stable-diffusion", "dit-torch", "new"), "INPUT", "a file, not a folder"),
    (("stable-diffusion", "./absent", "new"), "INPUT", "no such folder"),
    (("stable-diffusion", str(PIPELINE) + "/.", "x.pt"), "OUTPUT", "becomes a folder"),
    (("stable-diffusion", str(PIPELINE) + "/.", "new", "--to=torch"), "--to", "leave it out"),
    (("stable-diffusion", str(PIPELINE) + "/.", "new", "--unet=absent"), "--unet", "holds no trained content stage"),
])  # fmt: skip
def test_what_cannot_be_right_is_one_line(spoiled, monkeypatch, arguments, field, words):
    monkeypatch.chdir(spoiled)
    kind, *files, flags = *arguments[:3], arguments[3:]
    files = [name if "." in name or name == "new" else f"{name}.safetensors" for name in files]
    error = refused(kind, *files, *flags)
    assert error.field == field and words in str(error), str(error)
    assert not Path("x.safetensors").exists() and not Path("new").exists()


@pytest.fixture(scope="module")
def spoiled(folder):
    """The folder, with files that are no good."""

    class Evil:
        def __reduce__(self):
            import os

            return os.system, ("touch evil-was-here",)

    import pickle
    import zipfile

    with zipfile.ZipFile(folder / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"weights": Evil()}))
    (folder / "torn.pt").write_text("no weights")
    (folder / "list.json").write_text("[1]")
    (folder / "two.txt").write_text("run\njump\n")
    (folder / "empty").mkdir()
    write_safetensors(folder / "unet.safetensors", {"down_blocks.0.resnets.0.conv1.weight": np.zeros(1)})
    write_safetensors(folder / "strange.safetensors", {"strange": np.zeros(1)})
    lacking = read_state_dict(folder / "dit.safetensors")
    del lacking["blocks/out/kernel"]
    write_safetensors(folder / "lacking.safetensors", lacking, read_metadata(folder / "dit.safetensors"))
    return folder


@pytest.mark.parametrize("kind", [*STAGES, *MODELS])
def test_tensors_that_do_not_fit_are_named(folder, tmp_path, kind):
    state, source = fixture(kind)[0], tmp_path / "torch.safetensors"
    for name in ("autoencoder", "content"):
        (tmp_path / f"{name}.safetensors").symlink_to(folder / f"{name}.safetensors")
    name = next(name for name in state if name.endswith(("qkv.bias", "1b.bn.bias", "slice3.12.bias")))
    for changed, word in (
        ({n: array for n, array in state.items() if n != name}, "missing"),
        (state | {f"extra.{name}": state[name]}, "place"),
        (state | {name: np.zeros(7, np.float32)}, "shape"),
    ):
        write_safetensors(source, changed)
        error = refused(kind, source, tmp_path / "x.safetensors", *TOLD.get(kind, ()))
        assert error.field.split(":")[0] in ("KIND", "--architecture", "INPUT")
        assert name in str(error) and any(w in error.problem for w in word.split()), str(error)


def test_help_names_every_kind_and_starts_no_jax():
    code = "import sys; from cmd_jax.main import main\ntry: main(['convert', '--help'])\n"
    command = [sys.executable, "-c", f"{code}finally: assert 'jax' not in sys.modules"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(kind in said.replace("\n", "").replace(" ", "") for kind in KINDS)
