from pathlib import Path

import jax
import numpy as np
import pytest
from fixtures.formula import state_dict

from cmd_jax.config import load
from cmd_jax.errors import UserError
from cmd_jax.interop.converted import load_converted
from cmd_jax.interop.lpips import HEADS, TRUNK, load_lpips, lpips_params
from cmd_jax.interop.weights import write_safetensors
from cmd_jax.main import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lpips.npz"
QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.py")


@pytest.fixture(scope="module")
def weights():
    with np.load(FIXTURE) as npz:
        return state_dict(dict(npz))


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """The package's state dict, and its parts as torchvision and the package have them in files of their own."""
    folder = tmp_path_factory.mktemp("lpips")
    heads = {name: array for name, array in weights.items() if name.startswith("lin")}
    vgg = {f"features.{name.split('.', 2)[2]}": array for name, array in weights.items() if name not in heads}
    assert sorted(heads) == [f"lin{k}.model.1.weight" for k in range(5)] and "features.28.bias" in vgg
    vgg |= {"classifier.0.weight": np.zeros((2, 2), np.float32), "classifier.6.bias": np.zeros(2, np.float32)}
    for name, state in (("whole", weights), ("vgg16", vgg), ("heads", heads)):
        write_safetensors(folder / f"{name}.safetensors", state)
    return folder


def assert_same(found, weights):
    jax.tree.map(np.testing.assert_array_equal, found, lpips_params(weights))


def test_torchvisions_vgg_and_the_packages_heads_are_lpips(weights, files, tmp_path):
    vgg16, heads, ours = files / "vgg16.safetensors", files / "heads.safetensors", tmp_path / "lpips.safetensors"
    assert main(["convert", "lpips", str(vgg16), str(ours), f"--heads={heads}"]) == 0
    assert_same(load_converted(ours, "lpips")[1], weights)
    assert_same(load_lpips(vgg16, heads), weights)
    assert_same(load_lpips(files / "whole.safetensors"), weights)
    assert_same(load_lpips(ours), weights)  # what `convert` wrote will do as loss.vgg too


@pytest.mark.parametrize("arguments, field, words", [
    (("vgg16",), "INPUT", f"give {HEADS} too"),
    (("heads",), "INPUT", f"give {TRUNK}"),
    (("whole", "--heads={heads}"), "INPUT", "in both files"),
    (("vgg16", "--heads={whole}"), "INPUT", "in both files"),
    (("vgg16", "--heads={absent}"), "--heads", "no such file"),
])  # fmt: skip
def test_a_file_that_is_missing_is_named(files, tmp_path, capsys, arguments, field, words):
    paths = {name: files / f"{name}.safetensors" for name in ("heads", "whole", "absent")}
    name, *flags = (argument.format(**paths) for argument in arguments)
    out = tmp_path / "lpips.safetensors"
    found = main(["convert", "lpips", str(files / f"{name}.safetensors"), str(out), *flags])
    *_, line = capsys.readouterr().err.splitlines()
    assert found == 2 and line.startswith(f"{field}=") and words in line and not out.exists()


def test_of_a_loss_the_config_keys_are_named(files, tmp_path):
    with pytest.raises(UserError, match=r"5 of 31 tensors are missing: lin0\.model.*; give .*loss\.lpips_heads"):
        load_lpips(files / "vgg16.safetensors")
    with pytest.raises(UserError, match="^loss.vgg=.*absent.pt: no such file"):
        load_lpips(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="^loss.lpips_heads=.*absent.pt: no such file"):
        load_lpips(files / "vgg16.safetensors", tmp_path / "absent.pt")
    with pytest.raises(UserError, match="^loss.vgg=: missing, loss.lpips_heads belongs to it"):
        load(QUICKSTART, {"loss.lpips_heads": "heads.pth"})


def test_wrong_state_dicts_are_named(weights):
    short = {k: v for k, v in weights.items() if k != "lin3.model.1.weight"}
    with pytest.raises(UserError, match=r"missing: lin3\.model\.1\.weight"):
        lpips_params(short)
    with pytest.raises(UserError, match=r"no place for 1: classifier\.0\.weight"):
        lpips_params(weights | {"classifier.0.weight": np.zeros((2, 2))})
    with pytest.raises(UserError, match=r"net\.slice1\.0\.bias \[63\], expected \[64\]"):
        lpips_params(weights | {"net.slice1.0.bias": np.zeros(63)})
