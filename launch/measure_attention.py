"""How fast each kernel of attention is here, and how near to the plain one: kernel x lengths x forward and backward.

    python launch/measure_attention.py [--out FILE] [--tiny] [--dtype bfloat16] [--rounds 7] [--only "DiT;UNet"]

Of the shapes that the models have, each kernel of cmd_jax.models.attention that can compute them here, in turns, and
PyTorch's scaled_dot_product_attention on the CPU where torch is installed and JAX runs there too. Medians in
milliseconds of the result alone, and of it with the gradients of queries, keys and values; the greatest difference from
plain attention in float32 as a part of its greatest value, and the PSNR. --out: JSON lines too. --tiny: few tokens, to
see that it runs. The kernel that `attention=auto` takes is marked.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.models import attention
from cmd_jax.models.attention_kernels import plain
from cmd_jax.performance.timing import in_turns

CASES = {  # name: clips (times frames or cells), queries, keys, heads, channels of a head
    "autoencoder, time": (2048, 16, 16, 8, 48),
    "autoencoder, space of 64x64": (16, 1024, 1024, 8, 48),
    "autoencoder, space of 64x128": (16, 2048, 2048, 8, 48),
    "DiT, 256 tokens": (4, 256, 256, 16, 64),
    "DiT, 320 tokens": (4, 320, 320, 16, 64),
    "DiT, 1,024 tokens": (2, 1024, 1024, 16, 64),
    "DiT XL, 1,280 tokens": (2, 1280, 1280, 16, 72),
    "UNet of 1.5, 64x64": (1, 4096, 4096, 8, 40),
    "UNet of 2.1, 64x128": (1, 8192, 8192, 5, 64),
    "UNet, to a text": (2, 4096, 77, 8, 40),
    "VAE, 64x128": (1, 8192, 8192, 1, 512),
}
MOST_SCORES = {"cpu": 2**28}  # of plain attention, whose backward pass keeps them
MOST_SCORES_ELSEWHERE = 2**31
KERNELS = [name for name in attention.KERNELS if name != "auto"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that gets a JSON line for each kernel and case")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default float32 on a CPU, else bfloat16")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each")
    parser.add_argument("--only", default="", help="beginnings of the names of cases, separated by semicolons")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    dtype = options.dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("")
    print(f"{device.device_kind or device.platform}, {dtype}, jax {jax.__version__}; forward and backward in ms")
    print("| attention | B x N x M, heads | kernel | forward | and backward | greatest difference | PSNR |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in CASES.items():
        if options.only and not name.startswith(tuple(options.only.split(";"))):
            continue
        if options.tiny:
            shape = (1, min(shape[1], 160), min(shape[2], 144), 2, min(shape[4], 16))
        for record in measured(name, shape, dtype, device, 1 if options.tiny else options.rounds):
            record |= {"device": device.device_kind, "jax": jax.__version__}
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            print(row(record), flush=True)


def row(record: dict) -> str:
    b, n, m, heads, width = record["shape"]
    difference, psnr = (record[name] for name in ("difference", "psnr"))
    near = ["" if difference is None else f"{difference:.1e}", "" if psnr is None else f"{psnr:.0f} dB"]
    kernel = f"**{record['kernel']}**" if record["chosen"] else record["kernel"]
    times = [f"{record[name]:.3g}" for name in ("forward", "backward")]
    return f"| {' | '.join([record['name'], f'{b}x{n:,}x{m:,}, {heads} of {width}', kernel, *times, *near])} |"


def measured(name: str, shape, dtype: str, device, rounds: int):
    """A record for each kernel that can compute this, and for PyTorch's."""
    b, n, m, heads, width = shape
    draws = np.random.default_rng(0).standard_normal
    arrays = [np.asarray(draws((b, tokens, heads, width)), np.float32) for tokens in (n, m, m, n)]
    *exact, weights = map(jnp.asarray, arrays)
    args = [x.astype(dtype) for x in exact]
    case = attention.Case(attention.Device.of(device), dtype, n, m, width)
    able = [kernel for kernel in KERNELS if not attention.unable(kernel, case)]
    chosen = attention.choice("auto", case)[0]
    if b * heads * n * m > MOST_SCORES.get(device.platform, MOST_SCORES_ELSEWHERE):
        able.remove("plain")
    # What memory has no room for is compared with the tiles in float32, which are compared with it elsewhere.
    reference = plain if "plain" in able else lambda *x: attention.kernels.blocked(*x, device.platform == "cpu")
    expected = np.asarray(jax.jit(reference)(*exact))
    forward, backward, near = {}, {}, {}
    for kernel in able:
        with attention.asked(kernel, device):
            forward[kernel] = jax.jit(attention.attend).lower(*args).compile()
            backward[kernel] = jax.jit(with_gradients).lower(*args, weights).compile()
        error = np.asarray(forward[kernel](*args), np.float32) - expected
        peak, square = np.abs(expected).max(), np.mean(error**2)
        psnr = float(10 * np.log10(4 * peak**2 / square)) if square else None  # of a range from -peak to peak
        near[kernel] = float(np.abs(error).max() / peak), psnr
    calls = [
        {kernel: lambda f=f: f(*args) for kernel, f in forward.items()},
        {kernel: lambda f=f: f(*args, weights) for kernel, f in backward.items()},
    ]
    if device.platform == "cpu":
        calls = [own | other for own, other in zip(calls, torch_calls(arrays, dtype), strict=True)]
    times = [in_turns(each, rounds) for each in calls]
    for kernel in times[0]:
        medians = [1e3 * each[kernel].p50 for each in times]
        difference, psnr = near.get(kernel, (None, None))
        yield dict(
            name=name, shape=list(shape), dtype=dtype, kernel=kernel, chosen=kernel == chosen,
            forward=medians[0], backward=medians[1], difference=difference, psnr=psnr,
        )  # fmt: skip


def with_gradients(query, key, value, weights):
    def loss(*args):
        out = attention.attend(*args)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)


def torch_calls(arrays, dtype: str) -> list[dict]:
    """[{"PyTorch": the result}, {"PyTorch": with gradients}] on the threads that XLA has, or [{}, {}] without torch."""
    try:
        import torch
    except ImportError:
        return [{}, {}]
    *inputs, weights = (torch.tensor(x).transpose(1, 2).to(getattr(torch, dtype)) for x in arrays)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            sdpa(*inputs)

    def backward():
        leaves = [x.detach().requires_grad_() for x in inputs]
        (sdpa(*leaves) * weights).sum().backward()

    return [{"PyTorch": forward}, {"PyTorch": backward}]


if __name__ == "__main__":
    main()
