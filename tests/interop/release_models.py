"""The CMD release's models of any size: random weights, and what they compute, in float64 and torch's layout."""

import math

import numpy as np
from fixtures.formula import draw

# The weights of a model of any size.


def layer_shapes(name, *shape, outputs=0):
    return {f"{name}.weight": shape, f"{name}.bias": (shape[outputs],)}


def autoencoder_shapes(c):
    d, p, k, inner = c["hidden_dim"], c["patch_size"], c["motion_channels"], c["heads"] * c["head_dim"]
    shapes = layer_shapes("encoder.to_patch_embedding", d, p * p * c["channels"])
    shapes |= layer_shapes("to_patch_embedding_xy", d, p * p * c["channels"])
    for side in ("encoder", "decoder"):
        for i in range(c["depth"]):
            for j in range(3):
                shapes |= layer_shapes(f"{side}.layers.{i}.{j}.norm", d)
            for j in range(2):
                shapes |= layer_shapes(f"{side}.layers.{i}.{j}.fn.qkv", 3 * inner, d)
                shapes |= layer_shapes(f"{side}.layers.{i}.{j}.fn.proj", d, inner)
            shapes |= layer_shapes(f"{side}.layers.{i}.2.fn.net.0", 8 * d, d)
            shapes |= layer_shapes(f"{side}.layers.{i}.2.fn.net.3", d, 4 * d)
    for name in ("to_output.1", "to_logit.1"):
        shapes |= layer_shapes(name, d, c["channels"], p, p, outputs=1)
    for axis in ("xt", "yt"):
        shapes |= layer_shapes(f"pre_{axis}", k, d, 1, 1) | layer_shapes(f"post_{axis}", d, k, 1, 1)
    return shapes


def dit_shapes(c):
    d, p = c["hidden_size"], c["patch_size"]
    shapes = layer_shapes("x_embedder.proj", d, c["in_channels"], p, p)
    if "content_size" in c:
        q = c["content_patch_size"]
        shapes |= layer_shapes("keyframe_embedder.proj", d, c["content_channels"], q, q)
    shapes |= layer_shapes("t_embedder.mlp.0", d, 256) | layer_shapes("t_embedder.mlp.2", d, d)
    if c.get("num_classes") is not None:
        shapes |= {"y_embedder.embedding_table.weight": (c["num_classes"] + 1, d)}
    for i in range(c["depth"]):
        for name, rows, columns in (
            ("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4), ("adaLN_modulation.1", 6, 1)
        ):  # fmt: skip
            shapes |= layer_shapes(f"blocks.{i}.{name}", rows * d, columns * d)
    shapes |= layer_shapes("final_layer.adaLN_modulation.1", 2 * d, d)
    return shapes | layer_shapes("final_layer.linear", p * p * c["in_channels"] * (1 + c["learn_sigma"]), d)


def weights(shapes, seed):
    return {n: draw(n, s, seed, 0.2) + (1 if n.endswith("norm.weight") else 0) for n, s in shapes.items()}


# The models again, of one item, in float64 and torch's layout.


def linear(sd, name, x):
    weight = sd[f"{name}.weight"].astype(np.float64)
    return x @ weight.reshape(len(weight), -1).T + sd[f"{name}.bias"]


def normalise(x, epsilon):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def layer_norm(sd, name, x):
    return normalise(x, 1e-5) * sd[f"{name}.weight"] + sd[f"{name}.bias"]


def attention(sd, name, x, heads):
    """Sequences [..., N, D]."""
    qkv = np.split(linear(sd, f"{name}.qkv", x), 3, axis=-1)
    query, key, value = (np.stack(np.split(part, heads, axis=-1)) for part in qkv)
    shares = np.exp(query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1]))
    out = shares / shares.sum(-1, keepdims=True) @ value
    return linear(sd, f"{name}.proj", np.concatenate(list(out), axis=-1))


def timesformer(sd, side, u, c):
    """Tokens [T, h, w, D]."""
    erf = np.vectorize(math.erf)
    for i in range(c["depth"]):
        name = f"{side}.layers.{i}"
        y = layer_norm(sd, f"{name}.0.norm", u).transpose(1, 2, 0, 3)
        u = u + attention(sd, f"{name}.0.fn", y, c["heads"]).transpose(2, 0, 1, 3)
        y = layer_norm(sd, f"{name}.1.norm", u).reshape(len(u), -1, u.shape[-1])
        u = u + attention(sd, f"{name}.1.fn", y, c["heads"]).reshape(u.shape)
        value, gate = np.split(linear(sd, f"{name}.2.fn.net.0", layer_norm(sd, f"{name}.2.norm", u)), 2, axis=-1)
        u = u + linear(sd, f"{name}.2.fn.net.3", value * gate * (1 + erf(gate / math.sqrt(2))) / 2)
    return u


def patches(image, p):
    """[C, H, W] -> [h, w, C, p, p]."""
    channels, height, width = image.shape
    return image.reshape(channels, height // p, p, width // p, p).transpose(1, 3, 0, 2, 4)


def transposed_conv(sd, name, u, p):
    """[h, w, D] -> [C, H, W]."""
    weight, bias = sd[f"{name}.weight"].astype(np.float64), sd[f"{name}.bias"]
    image = np.einsum("hwd,dcab->chawb", u, weight) + bias[:, None, None, None, None]
    return image.reshape(len(bias), u.shape[0] * p, u.shape[1] * p)


def autoencoder(sd, video, c):
    """[C, T, H, W] -> content [C, H, W], motion [K, T, w + h] (columns first), reconstruction [T, C, H, W]."""
    p, frames = c["patch_size"], video.swapaxes(0, 1)

    def embed(name, image):
        cut = patches(image, p).transpose(0, 1, 3, 4, 2)
        return linear(sd, name, cut.reshape(*cut.shape[:2], -1))

    u = timesformer(sd, "encoder", np.stack([embed("encoder.to_patch_embedding", f) for f in frames]), c)
    logits = np.stack([transposed_conv(sd, "to_logit.1", f, p) for f in u])
    share = np.exp(logits - logits.max(0))
    content = (share / share.sum(0) * frames).sum(0)
    columns = np.tanh(linear(sd, "pre_xt", u.mean(1)))
    rows = np.tanh(linear(sd, "pre_yt", u.mean(2)))

    x = embed("to_patch_embedding_xy", content)[None]
    x = x + linear(sd, "post_xt", columns)[:, None] + linear(sd, "post_yt", rows)[:, :, None]
    video = np.stack([transposed_conv(sd, "to_output.1", f, p) for f in timesformer(sd, "decoder", x, c)])
    video = 2 / (1 + np.exp(-video)) - 1 if c["mode"] == "pixel" else video
    return content, np.concatenate([columns, rows], axis=1).transpose(2, 0, 1), video


def silu(x):
    return x / (1 + np.exp(-x))


def dit(sd, x, t, c, label=None, content=None):
    """[C, R, S], timestep -> [out channels, R, S]; position tables from `sd`."""

    def embed(name, image, p):
        tokens = patches(image, p)
        return linear(sd, name, tokens.reshape(tokens.shape[0] * tokens.shape[1], -1))

    d, p = c["hidden_size"], c["patch_size"]
    rows, columns = x.shape[1] // p, x.shape[2] // p
    tokens = embed("x_embedder.proj", x, p) + sd["pos_embed"][0]
    if content is not None:
        extra = embed("keyframe_embedder.proj", content, c["content_patch_size"]) + sd["content_pos_embed"][0]
        tokens = np.concatenate([tokens, extra])
    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    features = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    condition = linear(sd, "t_embedder.mlp.2", silu(linear(sd, "t_embedder.mlp.0", features)))
    if label is not None:
        condition = condition + sd["y_embedder.embedding_table.weight"][label]
    condition = silu(condition)
    for i in range(c["depth"]):
        name = f"blocks.{i}"
        modulation = linear(sd, f"{name}.adaLN_modulation.1", condition).reshape(6, d)
        shift, scale, gate = modulation[:3]
        tokens = tokens + gate * attention(
            sd, f"{name}.attn", normalise(tokens, 1e-6) * (1 + scale) + shift, c["heads"]
        )
        shift, scale, gate = modulation[3:]
        hidden = linear(sd, f"{name}.mlp.fc1", normalise(tokens, 1e-6) * (1 + scale) + shift)
        hidden = hidden / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        tokens = tokens + gate * linear(sd, f"{name}.mlp.fc2", hidden)
    shift, scale = linear(sd, "final_layer.adaLN_modulation.1", condition).reshape(2, d)
    tokens = linear(sd, "final_layer.linear", normalise(tokens, 1e-6) * (1 + scale) + shift)[: rows * columns]
    grid = tokens.reshape(rows, columns, p, p, -1).transpose(4, 0, 2, 1, 3)
    return grid.reshape(-1, rows * p, columns * p)


def grid_table(rows, columns, width):
    table = np.zeros((1, rows * columns, width))
    for row, column, i in np.ndindex(rows, columns, width // 4):
        frequency = 10000 ** (-4 * i / width)
        quarters = [f(a * frequency) for a in (column, row) for f in (math.sin, math.cos)]
        table[0, row * columns + column, i :: width // 4] = quarters
    return table
