"""`cmd-jax doctor`, on meshes of devices that are not there: it only reckons."""

import gc
import re

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh

from cmd_jax.config import to_json
from cmd_jax.data.shapes import CLASS_NAMES
from cmd_jax.errors import UserError
from cmd_jax.sharding import axes_of, mesh_sizes
from cmd_jax.trained import Trained, export
from cmd_jax.verbs import doctor as doctoring
from cmd_jax.verbs.doctor import doctor

WIDE = {"model.width": "1024", "model.heads": "8"}


@pytest.fixture
def examine(monkeypatch, capsys):
    """(argument of tiny.py, overrides, workdir, devices) -> the lines it prints."""

    def run(argument, overrides=(), workdir=None, devices=8):
        def make_mesh(config):
            return AbstractMesh(mesh_sizes(config, devices), axes_of(config))

        monkeypatch.setattr(doctoring, "make_mesh", make_mesh)
        try:
            assert doctor(f"{tiny.CONFIG_FILE}:{argument}", dict(overrides), workdir) == 0
        finally:
            run.lines = capsys.readouterr().out.splitlines()
        return run.lines

    return run


def rows(lines):
    """{first cell: other cells} of all tables."""
    cells = ([cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│"))
    return {name: rest for name, *rest in cells}


def test_shapes_axes_and_bytes_of_each_parameter(examine):
    gc.collect()  # what other tests left in circles may go at any time
    before = len(jax.live_arrays())
    lines = examine("content", {"mesh.preset": "fsdp_tp", **WIDE})
    assert len(jax.live_arrays()) <= before  # a model of 20 million parameters is not made for it
    table = rows(lines)
    assert table["blocks/mlp_in/kernel"] == ["1x1024x4096", "layers, embed, mlp", "-, fsdp, tensor", "2.000"]
    assert table["blocks/out/kernel"] == ["1x1024x1024", "layers, heads, embed", "-, tensor, fsdp", "0.500"]
    assert table["time_out/bias"] == ["1024", "embed_out", "whole: no rule maps any of its axes", "0.004"]
    assert table["label/embedding"][0] == f"{len(CLASS_NAMES) + 1}x1024"
    assert any(line.startswith("mesh: data=1 fsdp=4 tensor=2, preset fsdp_tp") for line in lines)
    assert any(re.match(r"cmd_jax .*, jax \d.*, orbax-checkpoint ", line) for line in lines)
    assert "platform cpu, devices: 1 (cpu), processes: 1" in lines
    assert lines[-1] == "no parameter of more than mesh.report_above=1,000,000 values is whole on each device"


def test_totals_and_batch(examine):
    lines = examine("content", {"mesh.preset": "fsdp_tp", "latents.starts": "0", **WIDE})
    table = rows(lines)
    values = int(table["params"][0].replace(",", ""))
    width, patch = 1024, 4 * 4 * 3
    block = 4 * width * (width + 1) + width * 4 * width * 2 + 5 * width + (width + 1) * 6 * width
    ends = (patch + 1) * width + (width + 1) * patch + (width + 1) * 2 * width
    assert values == block + ends + 257 * width + (width + 1) * width + 49 * width
    assert table["ema"] == table["params"] and float(table["params"][1].replace(",", "")) == round(
        values * 4 / 2**20, 1
    )
    assert int(table["opt_state"][0].replace(",", "")) == 2 * values + 2  # two moments and the counts of steps
    # Each device's part is a good eighth: biases and the like are copied.
    whole, each = map(float, table["params"][1:])
    assert whole / 8 < each < whole / 8 * 1.1
    assert float(table["frozen"][2]) <= float(table["frozen"][1])
    clips = rows(examine("content", {"mesh.preset": "fsdp_tp", "data.height": "512", "data.width": "512"}))
    latents = 4 * (512 * 512 * 3 + 4 * 256 * 4) * 4 / 2**20  # of 4 clips, which a config of tiny.py keeps
    assert clips["batch, 1 of 4 clips on each device"] == ["", f"{latents:.1f}", f"{latents / 4:.1f}"]
    video = {"latents.starts": "0", "latents.normalize": "false", "data.height": "512", "data.width": "512"}
    clips = rows(examine("content", {"mesh.data": "2", "mesh.fsdp": "2", "mesh.tensor": "2", **video}))
    assert clips["batch, 1 of 4 clips on each device"] == ["", "12.0", "3.0"]  # 4 x 512 x 512 x 3 bytes each


def test_large_parameters_that_are_whole_are_named(examine):
    lines = examine("motion", {"mesh.preset": "tp", "mesh.report_above": "40000", **WIDE})
    assert "time_in/kernel [256, 1024], 262,144 values, is whole on each device: embed split over fsdp=1" in lines
    embedding = "label/embedding [49, 1024], 50,176 values, is whole on each device: embed split over fsdp=1"
    assert embedding in lines and not any(line.startswith("blocks/") for line in lines)
    odd = examine("content", {"mesh.preset": "fsdp", "mesh.report_above": "5000", "model.width": "100",
                              "model.heads": "4", "train.batch_size": "8"})  # fmt: skip
    assert any(line.startswith("blocks/mlp_in/kernel [1, 100, 400], 40,000 values, is whole on each device: embed "
                               "100 not divisible by fsdp=8, mlp split over tensor=1") for line in odd)  # fmt: skip
    assert examine("motion", {"train.batch_size": "8"})[-1] == (
        "the mesh splits the batch only: each device holds everything else"
    )


def test_a_batch_that_does_not_divide_is_told_after_the_table(examine):
    with pytest.raises(UserError, match="^train.batch_size=4: not divisible by the 8 data x fsdp shards; use 8$"):
        examine("autoencoder", {"mesh.preset": "fsdp"})
    assert "batch, 0.5 of 4 clips on each device" in rows(examine.lines)
    with pytest.raises(UserError, match="^sampling.batch_size=2: not divisible by the 8 data x fsdp shards; use 8$"):
        examine("sample", {"mesh.preset": "dp"})
    with pytest.raises(UserError, match="^mesh=3x1x1: does not make the 8 devices here; "):
        examine("autoencoder", {"mesh.data": "3"})


def test_a_sampler_lays_out_its_batches_by_size_where_no_mesh_was_asked_for(examine):
    lines = examine("sample", {"sampling.batch_size": "6"})
    assert "batch, 3 of 6 clips on each device" in rows(lines)
    assert [line for line in lines if line.startswith("a batch of ")] == [
        "a batch of 1: data=1 fsdp=1 guidance=2 tensor=4",
        "a batch of 2: data=2 fsdp=1 guidance=2 tensor=2",
        "a batch of 4: data=4 fsdp=1 guidance=2 tensor=1",
        "a batch of 6: data=2 fsdp=1 guidance=2 tensor=2",
    ]
    lines = examine("sample", {"mesh.guidance": "2", "sampling.batch_size": "4"})
    assert "mesh: data=4 fsdp=1 guidance=2 tensor=1" in lines


def test_sampling_holds_the_three_stages(examine):
    table = rows(examine("sample", {"mesh.preset": "fsdp", "sampling.batch_size": "8"}))
    stages = {name: rows(examine(name, {"train.batch_size": "8"})) for name in ("autoencoder", "content", "motion")}
    names = [name for name in table if "/" in name]
    assert {name.split("/")[0] for name in names} == set(stages)
    for name in names:
        inside = name if name.startswith("autoencoder/") else name.partition("/")[2]
        assert table[name][:2] == stages[name.split("/")[0]][inside][:2]
    assert {"params", "batch, 1 of 8 clips on each device"} < table.keys()
    assert not {"ema", "opt_state", "frozen"} & table.keys()


def test_discriminators_and_lpips_count(examine):
    small = {"loss.adversarial": "0.1", "train.batch_size": "8", "mesh.preset": "fsdp"}
    table = rows(examine("autoencoder", {**small, "loss.vgg": "vgg.pt"}))
    assert {"2d/conv0/kernel", "3d/logits/bias"} < table.keys()
    assert table["frozen"] == ["14,716,160", "56.1", "56.1"]  # 14,714,688 of VGG16 and 1,472 taps
    assert "frozen" not in rows(examine("autoencoder", small))


def test_the_autoencoder_comes_from_where_it_was_trained(examine, tmp_path):
    config = tiny.config_of("autoencoder", model__motion_channels=6)
    trained = tmp_path / "run" / "autoencoder"
    trained.mkdir(parents=True)
    (trained / "config.json").write_text(to_json(config))
    (trained / "facts.json").write_text('{"class_names": ["a", "b"]}')
    kernel = "embed/kernel"
    eight = {"train.batch_size": "8"}
    assert rows(examine("motion", eight))[kernel][0] == f"{2 * 2 * 4}x16"
    found = examine("motion", eight, trained.parent)
    assert rows(found)[kernel][0] == f"{2 * 2 * 6}x16" and f"autoencoder: as in {trained}" in found
    assert rows(examine("motion", {"latents.autoencoder": str(trained), **eight}, tmp_path))[kernel][0] == "24x16"
    with pytest.raises(UserError, match=f"^latents.autoencoder={tmp_path}: holds no trained autoencoder stage; "):
        examine("motion", {"latents.autoencoder": str(tmp_path)})
    with pytest.raises(UserError, match=f"^data.height=24: the autoencoder of {trained} is for 16; "):
        examine("motion", {"data.height": "24"}, trained.parent)
    # From the file, it follows what the command says about the data.
    assert "embed/kernel" in rows(examine("motion", {"data.height": "24", **eight}))
    with pytest.raises(UserError, match="^h.w=11: not a multiple of motion model.patch=2; "):
        examine("motion", {"data.height": "20", **eight})


def test_weights_of_a_sample_config(examine, tmp_path):
    """Their configs and classes count, whatever the config file says."""
    for name in ("autoencoder", "content", "motion"):
        config = tiny.config_of(name, model__depth=3)
        metadata = tiny.metadata("run", "walk", "jump")
        export(tmp_path / f"{name}.safetensors", Trained(config, {"a": np.zeros(1)}, metadata))
    found = {"weights": str(tmp_path), "sampling.batch_size": "8"}
    lines = examine("sample", found)
    assert f"motion: as in {tmp_path}/motion.safetensors" in lines
    table = rows(lines)
    assert table["motion/label/embedding"][0] == table["content/label/embedding"][0] == "4x16"
    assert table["autoencoder/encoder/blocks/mlp/gate/kernel"][0] == "3x16x64"
    export(tmp_path / "content.safetensors", Trained(tiny.config_of("motion"), {"a": np.zeros(1)}, metadata))
    with pytest.raises(UserError, match="^weights=.*content.safetensors: is a motion stage; give one of the content "):
        examine("sample", found)
    (tmp_path / "motion.safetensors").unlink()
    export(tmp_path / "content.safetensors", Trained(tiny.config_of("content"), {"a": np.zeros(1)}, metadata))
    with pytest.raises(UserError, match="^path=.*motion.safetensors: no such file; "):
        examine("sample", found)


def test_classes_are_counted_without_decoding(examine, tmp_path):
    for name in ("run", "walk", "jump"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.avi").write_bytes(b"no video")
    folder = {"data.source": "folder", "train.batch_size": "8"}
    assert rows(examine("content", {**folder, "data.root": str(tmp_path)}))["label/embedding"][0] == "4x16"
    for root, problem in (("", "not given"), (str(tmp_path / "none"), "no such folder")):
        lines = examine("content", {**folder, "data.root": root})
        assert rows(lines)["label/embedding"][0] == "1x16"
        assert any(line.startswith(f"classes counted as 0: data.root={root}: {problem}") for line in lines)
