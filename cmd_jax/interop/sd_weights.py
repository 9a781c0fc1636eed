"""Names and layouts of Stable Diffusion's UNet and VAE in weight files, as diffusers writes them."""

import re
from functools import partial

from cmd_jax.interop.tensors import LAYOUTS, POINTWISE, Mismatch, Tensor, tensor

RENAMES = tuple(  # our paths -> torch names, one after the other
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\b(down|up)_(\d+)_(resnet|attention)_(\d+)\b", r"\1_blocks.\2.\3s.\4"),
        (r"\b(down|up)_(\d+)_(down|up)sample\b", r"\1_blocks.\2.\3samplers.0.conv"),
        (r"\bmid_(resnet|attention)_(\d+)\b", r"mid_block.\1s.\2"),
        (r"\bblock_(\d+)\b", r"transformer_blocks.\1"),
        (r"\b(query|key|value)/(?=\w+$)", lambda match: f"to_{match[1][0]}/"),
        (r"\b(self|cross|attention)/out\b", r"\1/to_out.0"),
        (r"\bself\b", "attn1"),
        (r"\bcross\b", "attn2"),
        (r"\battention/", ""),  # the VAE's
        (r"\btime_in\b", "time_embedding.linear_1"),
        (r"\btime_out\b", "time_embedding.linear_2"),
        (r"\btime/", "time_emb_proj/"),
        (r"\bshortcut\b", "conv_shortcut"),
        (r"\bnorm_out\b", "conv_norm_out"),
        (r"\b(post_)?quant\b", r"\1quant_conv"),
        (r"\b(kernel|scale)$", "weight"),
        (r"/", "."),
    )
)
DENSE = ("shortcut", "quant", "post_quant")  # dense layers that torch has as 1x1 convolutions
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _tensor(path: str, shape: tuple[int, ...], pointwise: tuple[str, ...] = DENSE) -> Tensor:
    name, part, parts = path, 0, 1
    if mlp := re.match(r"(.*/)mlp/(value|gate|out)/(.*)", path):
        block, dense, role = mlp.groups()
        name = f"{block}ff.net.2/{role}" if dense == "out" else f"{block}ff.net.0.proj/{role}"
        part, parts = (0, 1) if dense == "out" else (("value", "gate").index(dense), 2)
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    pattern = POINTWISE if len(shape) == 2 and path.split("/")[-2] in pointwise else LAYOUTS[len(shape)]
    return tensor(path, shape, name, pattern, part, parts)


def unet_tensor(config: dict):
    """config: of the UNet's config.json -> function (our path, shape) -> Tensor."""
    projections = () if config.get("use_linear_projection") else ("proj_in", "proj_out")
    return partial(_tensor, pointwise=(*DENSE, *projections))


def vae_tensor(path: str, shape: tuple[int, ...]) -> Tensor:
    found = _tensor(path, shape)
    return found._replace(name=re.sub(r"(attentions\.\d+)\.norm\b", r"\1.group_norm", found.name))


def vae_rename(name: str) -> str:
    """The published VAEs have the names that attention had before diffusers 0.15."""
    return re.sub(
        r"(mid_block\.attentions\.\d+\.)(query|key|value|proj_attn)\b", lambda m: m[1] + OLD_NAMES[m[2]], name
    )


# What tensors tell of a wrong config field. First those that are missing or left over, the most telling first; then
# those of another shape, if all of them match.
UNET_SUSPECTS = (
    (
        (r"(down|up)_blocks\.\d+\.resnets\.0\.conv1", "block_out_channels"),
        (r"\.resnets\.\d+\.conv1", "layers_per_block"),
        (r"down_blocks.*\.attentions\.\d+\.norm", "down_block_types"),
        (r"up_blocks.*\.attentions\.\d+\.norm", "up_block_types"),
        (r"\.transformer_blocks\.", "transformer_layers_per_block"),
        (r"class_embedding", "class_embed_type"),
        (r"add_embedding", "addition_embed_type"),
    ),
    (
        (r"attn2\.to_[kv]", "cross_attention_dim"),
        (r"\.proj_(in|out)\.", "use_linear_projection"),
        (r"^conv_in\.weight", "in_channels"),
        (r"^conv_out\.", "out_channels"),
        (r"", "block_out_channels"),
    ),
)
VAE_SUSPECTS = (
    (
        (r"(down|up)_blocks\.\d+\.resnets\.0\.conv1", "block_out_channels"),
        (r"\.resnets\.\d+\.conv1", "layers_per_block"),
    ),
    (
        (r"^encoder\.conv_in\.weight|^decoder\.conv_out\.", "in_channels"),
        (r"quant_conv|^encoder\.conv_out\.|^decoder\.conv_in\.weight", "latent_channels"),
        (r"", "block_out_channels"),
    ),
)


def suspect(part: str, config: dict, suspects, mismatch: Mismatch) -> str | None:
    by_presence, by_shape = suspects
    odd, misshapen = (*mismatch.missing, *mismatch.extra), mismatch.misshapen
    fields = [field for pattern, field in by_presence if any(re.search(pattern, name) for name in odd)]
    if misshapen:
        fields += [field for pattern, field in by_shape if all(re.search(pattern, name) for name in misshapen)]
    return f"{part}/config.json:{fields[0]}={config.get(fields[0])}" if fields else None
