"""Files that torch writes: trainings' checkpoints, wrapped models, old layouts; and a strict load of ours there."""

import argparse
from pathlib import Path

import numpy as np
import peer as peers
import pytest
from fixtures.formula import state_dict
from peer import torch

from cmd_jax.errors import UserError
from cmd_jax.interop.weights import read_state_dict
from cmd_jax.verbs.convert_stages import autoencoder_stage, denoiser_stage, release_weights

pytestmark = peers.grouped
FIXTURES = Path(__file__).parents[1] / "fixtures"
LAYOUTS = {
    "zip": {},
    "protocol 4": {"pickle_protocol": 4},
    "before 1.6": {"_use_new_zipfile_serialization": False},
}


def net():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def assert_read(path, state, **options):
    found = read_state_dict(path, **options)
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[name], value.numpy()) for name, value in state.items())


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_a_trainings_checkpoint(tmp_path, options):
    """As facebook's DiT saves it: args is an argparse.Namespace, opt an optimizer's state with numbers as keys."""
    model, ema = net(), net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(lr=1e-4, image_size=256, results=Path("results"))
    states = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict()}
    path = tmp_path / "0400000.pt"
    torch.save(states | {"args": args}, path, **options)
    assert_read(path, ema.state_dict())
    assert_read(path, model.state_dict(), key="model")
    torch.save(states["model"] | {"args": args}, path, **options)
    with pytest.raises(UserError, match="its pickle asks for argparse.Namespace, .*refused"):
        read_state_dict(path)
    torch.save(model, path, **options)
    with pytest.raises(UserError, match=r"its pickle asks for torch\.nn\.modules\.container\.Sequential"):
        read_state_dict(path)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_views_and_dtypes(tmp_path, options):
    base = torch.arange(24.0)
    state = {
        "transposed": base.reshape(4, 6).T, "tail": base[20:], "shared": base, "scalar": torch.tensor(3.0),
        "half": torch.arange(3).half(), "brain": torch.arange(3).bfloat16(), "count": torch.tensor([2**40]),
        "parameter": torch.nn.Parameter(torch.ones(2)), "empty": torch.zeros(0, 3),
    }  # fmt: skip
    torch.save(state, tmp_path / "w.pt", **options)
    found = read_state_dict(tmp_path / "w.pt")
    assert str(found["brain"].dtype) == "bfloat16" and str(found["half"].dtype) == "float16"
    for name, value in state.items():
        assert found[name].shape == value.shape
        assert np.array_equal(found[name].astype(np.float64), value.detach().double().numpy())


def test_a_torn_file_of_before_1_6(tmp_path):
    torch.save(net().state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "w.pt").read_bytes()
    for size in (1, 30, 200, len(whole) // 2, len(whole) - 1):
        (tmp_path / "w.pt").write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged or incomplete"):
            read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_what_wrappers_put_before_names(tmp_path, prefix, caplog):
    state = net().state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "w.pt")
    with caplog.at_level("INFO"):
        assert_read(tmp_path / "w.pt", state)
    assert prefix in caplog.text
    torch.save({"0.module.weight": torch.ones(1), "0._orig_mod.bias": torch.ones(1)}, tmp_path / "part.pt")
    assert read_state_dict(tmp_path / "part.pt").keys() == {"0.module.weight", "0.bias"}
    torch.save(state | {f"{prefix}0.weight": torch.ones(1)}, tmp_path / "both.pt")
    with pytest.raises(UserError, match=f"names differ by {prefix} alone"):
        read_state_dict(tmp_path / "both.pt")


def named(shapes):
    """A module with parameters of these names and shapes."""
    whole = torch.nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = whole
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))
    return whole


def test_the_releases_strict_loading_takes_what_we_write():
    """Names and shapes as its code has them: those of the fixtures, its tables, and the autoencoder's four buffers."""
    states, npzs = {}, {}
    for name in ("autoencoder_pixel", "content_dit", "motion_dit"):
        with np.load(FIXTURES / f"{name}.npz") as npz:
            npzs[name] = dict(npz)
        states[name] = state_dict(npzs[name])
    clip = {"heads": 8, "mode": "pixel", "frames": 4, "image_size": 16}
    autoencoder = autoencoder_stage(clip, states["autoencoder_pixel"])
    content = denoiser_stage("content", {"heads": 4}, states["content_dit"], autoencoder)
    motion = denoiser_stage("motion", {"heads": 4}, states["motion_dit"], autoencoder, content.metadata.class_names)
    rotary = {f"{side}.frame_rot_emb.inv_freqs": (32,) for side in ("encoder", "decoder")}
    rotary |= {f"{side}.image_rot_emb.scales": (16,) for side in ("encoder", "decoder")}
    tables = {"pos_embed": npzs["motion_dit"]["pos_embed"].shape}
    tables["keyframe_pos_embed"] = npzs["motion_dit"]["content_pos_embed"].shape
    for stage, name, more in (
        (autoencoder, "autoencoder_pixel", rotary),
        (content, "content_dit", {"pos_embed": (1, 64, 48)}),
        (motion, "motion_dit", tables),
    ):
        there = named({n: value.shape for n, value in states[name].items()} | more)
        weights = {n: torch.from_numpy(np.ascontiguousarray(value)) for n, value in release_weights(stage).items()}
        there.load_state_dict(weights, strict=True)
        assert all(np.array_equal(dict(there.named_parameters())[n].detach(), v) for n, v in states[name].items())
