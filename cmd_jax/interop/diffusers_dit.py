"""DiT as diffusers stores it, DiTTransformer2DModel, in facebook's names and with the config that `cmd_release` takes.

diffusers computes two things otherwise than facebook's code: frequencies of timesteps are spaced by 127, not 128, and
LayerNorms before MLPs have norm_eps, which is 1e-5, not 1e-6. What is read here computes what diffusers does.
"""

import re
from pathlib import Path

import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.files import read_json
from cmd_jax.interop.folders import DIFFUSERS, check_folder, find_weights
from cmd_jax.interop.weights import open_weights

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is what it was a part of before diffusers 0.29
MARKER = "pos_embed.proj.weight"
COMPUTES = {"frequency_shift": 1, "mlp_epsilon": 1e-5}
FIXED = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True,
         "norm_elementwise_affine": False}  # fmt: skip
SIZES = {"sample_size": "input_size", "patch_size": "patch_size", "in_channels": "in_channels", "num_layers": "depth",
         "num_attention_heads": "heads", "num_embeds_ada_norm": "num_classes"}  # fmt: skip
SOURCE = "give a folder that diffusers wrote, with transformer/ or with its config.json"

ONCE = {  # every block has these, with the same numbers
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
IN_BLOCKS = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


def read_dit_folder(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A pipeline's folder, or that of its transformer -> (config for cmd_release.load, state dict in facebook's names).

    UserError for what is no such folder, for a config that facebook's DiT has no place for, and for damaged files.
    """
    check_folder("path", folder, SOURCE, "model_index.json", "config.json")
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    config = read_json(folder / "config.json", "path", SOURCE)
    if config.get("_class_name") not in CLASSES:
        raise UserError("path", folder, f"its config.json is of a {config.get('_class_name')}", f"give a {CLASSES[0]}")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            field, problem = f"transformer/config.json:{name}", f"not supported, only {value}"
            raise UserError(field, config[name], problem, "give facebook's DiT")
    with open_weights(find_weights(folder, DIFFUSERS)) as weights:
        state = dict(weights.whole())
    told = {ours: config[theirs] for theirs, ours in SIZES.items() if theirs in config}
    if "norm_eps" in config:
        told["mlp_epsilon"] = config["norm_eps"]
    return COMPUTES | told, in_facebooks_names(state)


def in_facebooks_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """UserError for blocks that have a timestep or class embedding of their own, which facebook's DiT has once."""
    renamed, parts = {}, {}
    for name, tensor in state.items():
        path, _, role = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", path)
        if path in OUTSIDE:
            renamed[f"{OUTSIDE[path]}.{role}"] = tensor
        elif block and block[2] in ONCE:
            new = f"{ONCE[block[2]]}.{role}"
            if not np.array_equal(renamed.setdefault(new, tensor), tensor):
                problem = "not the same in all blocks, as facebook's DiT has it"
                raise UserError("weights", name, problem, "give a DiT that facebook's code can have trained")
        elif block and block[2] in IN_BLOCKS:
            renamed[f"blocks.{block[1]}.{IN_BLOCKS[block[2]]}.{role}"] = tensor
        elif block and block[2] in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            parts.setdefault(f"blocks.{block[1]}.attn.qkv.{role}", {})[block[2][-1]] = tensor
        elif name == "pos_embed.pos_embed":
            renamed["pos_embed"] = tensor
        else:
            renamed[name] = tensor  # which has no place, and is named so
    for name, part in parts.items():
        if part.keys() != set("qkv") or len({p.shape for p in part.values()}) > 1:
            raise UserError("weights", name.replace("attn.qkv", "attn1.to_q, to_k, to_v"), "not three alike", SOURCE)
        renamed[name] = np.concatenate([part[letter] for letter in "qkv"])
    return renamed
