"""Weights that somebody may have changed: safetensors, and torch's files with code in their pickles."""

import functools
import io
import json
import os
import pickle
import pickletools
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

import fuzz
import fuzz_json
import numpy as np
import tiny
from safetensors.numpy import save
from torch_writer import Call, Global, TorchFile, opcodes

from cmd_jax.errors import UserError
from cmd_jax.interop import cmd_config, cmd_release, diffusers_dit
from cmd_jax.interop.converted import ARCHITECTURE, KIND, OPTIONAL, load_converted
from cmd_jax.interop.diffusers import load_vae
from cmd_jax.interop.weights import flatten, read_metadata, read_state_dict, unflatten
from cmd_jax.trained import load_trained

SIZES = fuzz_json.DIT | {"hidden_size": 4, "input_size": [4, 4]}


@functools.cache
def dit() -> dict[str, np.ndarray]:
    """A DiT in facebook's names, a few kilobytes."""
    module, shapes = cmd_release.model("content_dit", SIZES)
    params = {name: np.full(leaf.shape, 0.5, np.float32) for name, leaf in flatten(shapes).items()}
    return cmd_release.state_dict("content_dit", SIZES, unflatten(params))


# Safetensors: eight bytes that tell the length of the header, the header in JSON, the numbers.


@functools.cache
def safetensors() -> list[bytes]:
    architecture = {KIND: "dit", ARCHITECTURE: json.dumps(SIZES), OPTIONAL: "[]"}
    params = flatten(cmd_release.load("content_dit", SIZES, dit())[1])
    stage = {name: json.dumps(value) for name, value in fuzz_json.readers()["weights file"].files.items()}
    like = fuzz_json.shardings(tiny.config_of("content"), fuzz_json.STAGE)
    weights = {name: np.zeros(leaf.shape, np.float16) for name, leaf in flatten(like).items()}
    odd = {"a": np.zeros((2, 3), np.int8), "b/c": np.ones(3, bool), "empty": np.zeros((0, 4), np.float64)}
    fast = [save(dit()), save(params, architecture), save(weights, stage), save(odd, {"format": "pt"})]
    return [*fast, *fast, next((tiny.pipeline_folder() / "vae").glob("*.safetensors")).read_bytes()]


def mutate_safetensors(seed: bytes, other: bytes, rng) -> bytes:
    if rng.random() < 0.5:
        return fuzz.mutate_bytes(seed, other, rng)
    length = struct.unpack("<Q", seed[:8])[0]
    header, numbers = json.loads(seed[8 : 8 + length]), seed[8 + length :]
    for _ in range(int(rng.integers(1, 3))):
        header = fuzz.mutate_json(header, rng)
    text = fuzz.dump_json(header).encode()
    if rng.random() < 0.2:
        text = fuzz.mutate_bytes(text, b"{}", rng)
    return struct.pack("<Q", len(text)) + text + numbers


def read_safetensors(path: Path):
    """As all the verbs do that take such a file."""
    readers = [
        lambda: _load(read_state_dict(path)),
        lambda: load_converted(path, "dit"),
        lambda: load_trained(path, "content", fuzz_json.shardings),
        lambda: load_trained(path, "content"),
    ]
    if b"quant_conv" in path.read_bytes():
        readers = [lambda: vae(path)]
    found = first(readers)
    read_metadata(path)
    return found


def vae(path: Path):
    folder = path.parent / "vae"
    folder.mkdir(exist_ok=True)
    shutil.copy(tiny.pipeline_folder() / "vae" / "config.json", folder)
    shutil.copy(path, folder / "diffusion_pytorch_model.safetensors")
    return load_vae(folder)


def first(readers):
    """What the first of them reads that reads at all, after all were tried; else what the first one says."""
    answers, errors = [], []
    for read in readers:
        try:
            answers.append(read())
        except UserError as error:
            errors.append(error)
            assert str(error).isprintable()
    if not answers:
        raise errors[0]
    return answers[0]


def _load(state: dict[str, np.ndarray]):
    told = {}
    if diffusers_dit.MARKER in state:
        told, state = diffusers_dit.COMPUTES, diffusers_dit.in_facebooks_names(state)
    return cmd_release.load("content_dit", cmd_config.complete("content_dit", told | {"heads": 2}, state), state)


SAFETENSORS = fuzz.Kind(safetensors, mutate_safetensors, read_safetensors, ".safetensors")


# Torch's files: a zip of a pickle and of storages, or pickles in a row.


def attacks() -> list[bytes]:
    """Opcodes that would make the marker, in every way that a pickle has to call something."""
    marker = os.environ.get(fuzz.MARKER, "marker")
    touch, text = f"touch {marker}", f"S'{marker}'\n".encode()
    mapped = b"cbuiltins\nmap\n(cos\nsystem\n" + opcodes([touch]) + b"t"
    unicode = lambda s: b"\x8c" + bytes([len(s)]) + s.encode()  # noqa: E731
    return [
        opcodes(Call(Global("os", "system"), (touch,))),
        opcodes(Call(Global("posix", "system"), (touch,))),
        opcodes(Call(Global("builtins", "open"), (marker, "w"))),
        opcodes(Call(Global("builtins", "eval"), (f"open({marker!r}, 'w')",))),
        opcodes(Call(Global("builtins", "exec"), (f"open({marker!r}, 'w')",))),
        opcodes(Call(Global("subprocess", "Popen"), (("touch", marker),))),
        opcodes(Call(Global("torch.serialization", "os.system"), (touch,))),
        unicode("os") + unicode("system") + b"\x93" + opcodes((touch,)) + b"R",  # STACK_GLOBAL
        b"(" + text + b"S'w'\nibuiltins\nopen\n",  # INST
        b"(cbuiltins\nopen\n" + text + b"S'w'\no",  # OBJ
        b"cbuiltins\nbytes\n(" + mapped + b"\x81t\x81",  # NEWOBJ: bytes(map(os.system, [touch]))
        b"cbuiltins\nbytes\n(" + mapped + b"}\x92t}\x92",  # NEWOBJ_EX
        b"ccollections\nOrderedDict\n)Rcos\nsystem\n(" + opcodes(touch) + b"tRb",  # BUILD with what a call gives
        b"cbuiltins\nlist\n)R(" + opcodes(Call(Global("os", "system"), (touch,))) + b"e",
        b"}" + opcodes(Call(Global("os", "system"), (touch,))) + b"Ns",  # as a key
        opcodes(Call(Global("os", "system"), (touch,))) + b"Q",  # as a persistent id
    ]


def checkpoint() -> TorchFile:
    file = TorchFile()
    state = {name: file.tensor(array) for name, array in dit().items()}
    opt = {"state": {0: {"step": 1, "exp_avg": file.tensor(np.zeros(3, np.float16))}}, "param_groups": [{"lr": 0.1}]}
    args = Call(Global("argparse", "Namespace"), (), {"lr": 1e-4})
    file.tree = {"model": state, "ema": state, "opt": opt, "args": args, "epoch": 3}
    return file


@functools.cache
def pickles() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        file = checkpoint()
        whole = file.save(Path(folder, "a.pt"), file.tree).read_bytes()
        bare = TorchFile()
        bare = bare.save(Path(folder, "b.pt"), {name: bare.tensor(array) for name, array in dit().items()}).read_bytes()
    return [whole, bare, legacy()]


def legacy() -> bytes:
    """As torch wrote before 1.6: magic, version, machine, content, keys; then storages with their lengths."""
    file, state = TorchFile(), dit()
    content = b"\x80\x02" + opcodes({name: file.tensor(array) for name, array in state.items()}) + b"."
    machine = {"little_endian": True, "protocol_version": 1001}
    heads = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, machine)]
    keys = pickle.dumps([str(i) for i in range(len(state))], 2)
    numbers = [struct.pack("<q", array.size) + array.tobytes() for array in state.values()]
    return b"".join([*heads, content, keys, *numbers])


def mutate_pickle(data: bytes, other: bytes, rng) -> bytes:
    """Instructions left out, repeated, exchanged, put elsewhere, with other arguments, or an attack among them."""
    try:
        starts = [place for _, _, place in pickletools.genops(data)]
    except Exception:
        return fuzz.mutate_bytes(data, other, rng)
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(int(rng.integers(1, 4))):
        at, how = int(rng.integers(len(parts))), int(rng.integers(8))
        if how == 0:
            del parts[at]
        elif how == 1:
            parts[at:at] = [parts[at]] * int(rng.integers(1, 4))
        elif how == 2:
            parts[at] = parts[int(rng.integers(len(parts)))]
        elif how == 3:
            parts[at] = fuzz.mutate_bytes(parts[at], b"", rng)
        elif how == 4:
            parts.insert(at, bytes([int(rng.choice([ord(o.code) for o in pickletools.opcodes]))]))
        elif how == 5:
            parts.insert(at, b"\x8a\x08" + rng.bytes(8))
        else:
            choices = attacks()
            parts.insert(at, choices[int(rng.integers(len(choices)))])
        if not parts:
            break
    return b"".join(parts)


def mutate_torch(seed: bytes, other: bytes, rng) -> bytes:
    how = rng.random()
    if how < 0.3:
        return fuzz.mutate_bytes(seed, other, rng)
    if not seed.startswith(b"PK"):  # the content is the fourth pickle
        stream, ends = io.BytesIO(seed), []
        for _ in range(4):
            list(pickletools.genops(stream))
            ends.append(stream.tell())
        return seed[: ends[2]] + mutate_pickle(seed[ends[2] : ends[3]], b"", rng) + seed[ends[3] :]
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if how < 0.8:
        members["archive/data.pkl"] = mutate_pickle(members["archive/data.pkl"], b"", rng)
    else:
        name = list(members)[int(rng.integers(len(members)))]
        content = members.pop(name)
        kept = {0: None, 1: "archive/other", 2: "../" + name, 3: name.upper(), 4: name}[int(rng.integers(5))]
        if kept:
            members[kept] = fuzz.mutate_bytes(content, b"", rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def read_torch(path: Path):
    return first([lambda: _load(read_state_dict(path)), lambda: _load(read_state_dict(path, "model"))])


PICKLES = fuzz.Kind(pickles, mutate_torch, read_torch, ".pt")
