"""Which files a sampler is of, and what they must have in common."""

from dataclasses import replace

import pytest
import tiny
from samplers import command

from cmd_jax.errors import UserError
from cmd_jax.loading import load_sampler
from cmd_jax.trained import export, load_trained

pytestmark = pytest.mark.xdist_group("tiny")


def test_a_folder_is_one_of_weights_or_a_workdir():
    sampler = load_sampler(tiny.trained(), stages=("autoencoder",))
    assert sampler.autoencoder.clip_shape == (4, 16, 24, 3) and not sampler.denoisers
    with pytest.raises(UserError, match="^workdir=.*nowhere/autoencoder: holds no trained autoencoder stage"):
        load_sampler("nowhere")


def test_wrong_stages_are_one_line(tmp_path, capsys):
    def said(workdir, **changes):
        assert command("sample", workdir, **changes) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith(("WARNING", "I0000"))]
        return line

    assert "holds no trained autoencoder stage; train the autoencoder stage there first" in said(tmp_path)
    assert "no such file" in said(tmp_path, weights=tmp_path / "missing")
    exported = {stage: tiny.trained() / stage / "ema.safetensors" for stage in ("autoencoder", "content", "motion")}
    for stage, path in exported.items():
        (tmp_path / f"{stage}.safetensors").symlink_to(path)
    assert "data.height=20: the weights are for 16" in said(tmp_path, weights=tmp_path, data__height=20)
    assert "sampling.content_solver=ddim: not one of the choices; use one of euler, heun" in said(
        tmp_path, weights=tmp_path, content_solver="ddim"
    )
    (tmp_path / "motion.safetensors").unlink()
    (tmp_path / "motion.safetensors").symlink_to(exported["content"])
    assert "is a content stage; give one of the motion stage" in said(tmp_path, weights=tmp_path)
    content = load_trained(exported["content"], "content")
    (tmp_path / "motion.safetensors").unlink()
    (tmp_path / "motion.safetensors").symlink_to(exported["motion"])
    # Of other numbers, or of the same ones in another model.
    known = content.metadata.autoencoder
    for changes in ({"digest": "another", "params": "another"}, {"config": known.config | {"model.heads": 4}}):
        (tmp_path / "content.safetensors").unlink()
        metadata = replace(content.metadata, autoencoder=replace(known, **changes))
        export(tmp_path / "content.safetensors", content._replace(metadata=metadata))
        assert "trained with another autoencoder" in said(tmp_path, weights=tmp_path)
    content.config.model.width = 32
    export(tmp_path / "content.safetensors", content)
    line = said(tmp_path, weights=tmp_path)
    assert line.startswith("weights content.safetensors/") and "this config wants ((" in line
