"""DiT in diffusers' layout: what we read of a folder computes what diffusers does with it."""

import json

import jax
import numpy as np
import peer as peers
import pytest
from peer import diffusers, torch

from cmd_jax.errors import UserError
from cmd_jax.interop.converted import load_converted
from cmd_jax.interop.diffusers_dit import in_facebooks_names, read_dit_folder
from cmd_jax.interop.weights import read_state_dict
from cmd_jax.main import main

pytestmark = peers.grouped
SIZES = dict(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
             patch_size=2, num_embeds_ada_norm=5, norm_num_groups=1)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """Random weights; embeddings of all blocks alike, as facebook's weights have them there."""
    model = diffusers.DiTTransformer2DModel(**SIZES).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.transformer_blocks[1].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(folder / "transformer")
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("part", ["", "transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_converted_folder_computes_what_diffusers_does(model, folder, tmp_path, part):
    told = ["--architecture=heads=2,input_size=8"] if part.endswith("s") else []
    assert main(["convert", "dit", str(folder / part), str(tmp_path / "dit.safetensors"), *told]) == 0
    module, params = load_converted(tmp_path / "dit.safetensors", "dit")
    x, t, y = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), [3, 500, 999], [0, 3, 5]
    with torch.no_grad():
        expected = model(x, torch.tensor(t), torch.tensor(y)).sample.numpy()
    found = jax.jit(module.apply)({"params": params}, x.permute(0, 2, 3, 1).numpy(), np.array(t), np.array(y))
    assert np.abs(np.moveaxis(found, -1, 1) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_it_goes_back_in_facebooks_names(folder, tmp_path):
    ours, back = tmp_path / "dit.safetensors", tmp_path / "back.safetensors"
    main(["convert", "dit", str(folder), str(ours), "--architecture=frequency_shift=0,mlp_epsilon=1e-6"])
    module, _ = load_converted(ours, "dit")
    assert (module.frequency_shift, module.mlp_epsilon) == (0, 1e-6)
    assert main(["convert", "dit", str(ours), str(back), "--to=torch"]) == 0
    expected, found = read_dit_folder(folder)[1], read_state_dict(back)
    assert found.keys() == expected.keys() | {"pos_embed"} and "blocks.1.attn.qkv.weight" in found
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_embeddings_that_differ_between_blocks_are_refused(model):
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(UserError, match=f"^weights={name}: not the same in all blocks"):
        in_facebooks_names(state | {name: state[name] + 1})
    with pytest.raises(UserError, match="to_v.*not three alike"):
        in_facebooks_names({n: value for n, value in state.items() if "1.attn1.to_v.bias" not in n})


@pytest.mark.parametrize("changes, field", [
    ({"_class_name": "PixArtTransformer2DModel"}, "INPUT"),
    ({"norm_elementwise_affine": True}, "transformer/config.json:norm_elementwise_affine"),
    ({"num_layers": "2"}, "--architecture: depth"),
    ({"num_layers": 3}, "--architecture: depth"),
    ({"sample_size": None}, "--architecture: input_size"),
    ({"norm_eps": "small"}, "--architecture: mlp_epsilon"),
])  # fmt: skip
def test_a_config_that_does_not_fit_is_one_line(folder, tmp_path, changes, field, capsys):
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(folder / "transformer" / weights)
    assert main(["convert", "dit", str(tmp_path), str(tmp_path / "dit.safetensors")]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{field}=") and not (tmp_path / "dit.safetensors").exists()
