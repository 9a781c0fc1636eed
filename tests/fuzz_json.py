"""Who reads JSON that somebody may have changed: for each reader the files as they should be, and how it reads them.

`READERS` are for the table in test_hostile.py and, through `JSON`, for the mutations of test_fuzz.py.
"""

import contextlib
import functools
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fuzz
import numpy as np
import tiny

from cmd_jax.data.latents import LatentStatistics
from cmd_jax.data.outcomes import HEADER, Outcomes
from cmd_jax.data.prompts import read_prompts
from cmd_jax.errors import UserError
from cmd_jax.files import as_json, from_json, read_json
from cmd_jax.interop import cmd_config, cmd_release, diffusers_dit
from cmd_jax.interop.clip import load as load_clip
from cmd_jax.interop.clip import text_from_config
from cmd_jax.interop.clip_tokenizer import Tokenizer
from cmd_jax.interop.converted import ARCHITECTURE, KIND, OPTIONAL, load_converted
from cmd_jax.interop.folders import TRANSFORMERS, find_weights
from cmd_jax.interop.schedulers import from_scheduler_config
from cmd_jax.interop.sd_config import unet_from_config, vae_from_config
from cmd_jax.interop.weights import open_weights, write_safetensors
from cmd_jax.loading import denoiser_stage
from cmd_jax.prepare import check_same_run
from cmd_jax.pretrained import compare, stated_space
from cmd_jax.report.collect import read_section
from cmd_jax.report.training import Metrics
from cmd_jax.running.checkpoint import ITEMS, RUN, RUN_LIKE
from cmd_jax.running.manifest import CutOff, Damaged, verify, write_manifest
from cmd_jax.running.peers import Peers
from cmd_jax.running.resume import check_continues
from cmd_jax.sharding import abstract, make_mesh
from cmd_jax.stages import AutoencoderStage
from cmd_jax.trained import DataMetadata, Metadata, Trained, load_trained, read_run_metadata, read_stage
from cmd_jax.verbs import convert
from cmd_jax.verbs.convert_stages import release_weights

FIXTURES = Path(__file__).parent / "fixtures"
PIPELINE = FIXTURES / "tiny-sd15"


class Reader(NamedTuple):
    """files: {name: value as it should be}. read: folder that holds them as JSON -> whatever; UserError if damaged.

    passes: what is damaged is passed over, nothing is raised.
    """

    files: dict[str, object]
    read: Callable[[Path], object]
    passes: bool = False


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def config(argument: str) -> dict:
    return json.loads(json.dumps(tiny.config_of(argument).to_dict()))


PART = {"weights": "d"}
TOKENS = {"vocabulary": "v", "merges": "m", "added_tokens": [], "start": 531, "end": 532, "pad": 532, "max_length": 77}
DATA = DataMetadata("f", 2)
STAGE = tiny.metadata("run", "jump", data=DATA, statistics=LatentStatistics.unit(3, 4))
METADATA = as_json(STAGE) | {"autoencoder": {"digest": "", "params": "p", "config": {"model.heads": 2}}}
FLAT = {"class_names": ["run"], "digest": "", "clips": 2, "fingerprint": "f", "autoencoder": "", "autoencoder_params":
        "p", "autoencoder_config": {"model.heads": 2}, "statistics": METADATA["statistics"]}  # fmt: skip
AUTOENCODER = {"digest": "", "class_names": ["run"], "data": {"clips": 1, "fingerprint": "f"}}
CONVERTED = {"cmd_jax": "0", "config": {"hidden_dim": 16, "patch_size": 4, "channels": 3, "motion_channels": 4,
             "depth": 1, "heads": 2, "head_dim": 8, "mode": "pixel", "frames": 4, "image_size": [16, 24]}}  # fmt: skip
DIT = {"input_size": [8, 8], "patch_size": 2, "in_channels": 2, "hidden_size": 8, "depth": 1, "heads": 2,
       "num_classes": 3, "learn_sigma": True, "frequency_shift": 0, "mlp_epsilon": 1e-6}  # fmt: skip
RUNS = {"step": 1, "keys": 1, "examples": 4, "order": {"seed": 0, "batch_size": 4, "data": "f"}, "key": [0, 0],
        "config": {"model": {"remat": "none"}, "train": {"accumulate": 1}}, "versions": {"jax": "0"}, "devices": 1,
        "processes": 1}  # fmt: skip
SAMPLES = {"title": "t", "note": "n", "table": [["a", "b"], ["x", 1.0]],
           "items": [{"index": 0, "caption": "c", "video": "0.mp4", "content": "0.png"}]}  # fmt: skip
BEAT = {"run": "r", "process": 1, "count": 2, "host": "h", "pid": 7, "step": 3, "time": 1.0, "state": "failed",
        "message": "m", "fault": ""}  # fmt: skip
MSRVTT = {"videos": [{"video_id": "v", "split": "test"}], "sentences": [{"video_id": "v", "caption": "a cat"}]}
INDEX = {"metadata": {}, "weight_map": {n: f"model-0000{i}-of-00002.safetensors" for i, n in enumerate("ab", 1)}}
TOKENIZER = ("vocab.json", "tokenizer_config.json", "special_tokens_map.json")
ADDED = {"added_tokens.json": {"<cat>": 533}}


@functools.cache
def mesh():
    return make_mesh(tiny.config_of("sample").mesh)


def shardings(config, metadata):
    """The shapes of a stage's parameters, laid out on the mesh, as sampling asks for them."""
    if config.stage == "autoencoder":
        stage = AutoencoderStage(config, space=stated_space(metadata.vae))
    else:
        argument = "autoencoder,kind=text" if metadata.vae else "autoencoder"
        stage = denoiser_stage(config, metadata, Trained(tiny.config_of(argument), {}, metadata))
    return abstract(stage.init, mesh(), tiny.config_of("sample").rules)


def stage(name: str):
    return lambda folder: shardings(*read_stage(folder, name))


def weights_file(folder: Path):
    texts = {name: (folder / name).read_text(errors="replace") for name in ("config", "facts")}
    write_safetensors(folder / "content.safetensors", {"a": np.zeros(1, np.float32)}, texts)
    return load_trained(folder / "content.safetensors", "content", shardings)


def resume(folder: Path):
    config = tiny.config_of("content")
    check_same_run(folder, config)
    read_run_metadata(folder, config)


def compared(folder: Path):
    """What a stage was trained with, against the parts of another folder."""
    metadata = read_run_metadata(folder, tiny.config_of("content,kind=text"))
    others = from_json(Metadata, readers()["metadata of a folder"].files["facts.json"])
    for part in ("vae", "text_encoder", "image_model"):
        if theirs := getattr(metadata, part):
            compare(folder, theirs, getattr(others, part), "it was made with")


def release(folder: Path):
    config, metadata = read_stage(folder, "autoencoder")
    return release_weights(Trained(config, {"autoencoder": {}}, metadata))


def converted(kind: str):
    def read(folder: Path):
        texts = {KIND: kind, ARCHITECTURE: (folder / "architecture").read_text(errors="replace")}
        texts[OPTIONAL] = (folder / "optional").read_text(errors="replace")
        write_safetensors(folder / "model.safetensors", {"a": np.zeros(1, np.float32)}, texts)
        return load_converted(folder / "model.safetensors", kind)

    return read


def architecture(folder: Path):
    flags = types.SimpleNamespace(to=None, output="x", unet=None, pretrained=None, heads=None, input="y", kind="dit")
    try:
        given = convert.given_architecture(str(folder / "architecture.json"))
        return cmd_release.load("content_dit", cmd_config.complete("content_dit", given, {}), {})
    except UserError as error:
        raise convert.on_the_command_line(error, flags) from error


def manifest(folder: Path):
    try:
        verify(folder, ITEMS)
    except (CutOff, Damaged) as error:
        raise UserError("checkpoint", folder, str(error), "bring back a copy") from error


def signed(folder: Path):
    """A manifest that agrees with itself, whatever it says."""
    from cmd_jax.running.manifest import MANIFEST, digest_of

    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(content | {"digest": digest_of(content)}))
    manifest(folder)


def run(folder: Path):
    earlier = read_json(folder / RUN, like=RUN_LIKE)
    check_continues(earlier, RUNS, types.SimpleNamespace(print=lambda *_, **__: None))


def pipeline(*parts: str):
    value = read(PIPELINE.joinpath(*parts))
    return {"value.json": value}


def of_value(build: Callable) -> Callable[[Path], object]:
    return lambda folder: build(read_json(folder / "value.json"))


def dit_folder(folder: Path):
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        write_safetensors(weights, {"pos_embed.proj.weight": np.zeros((16, 4, 2, 2), np.float32)})
    told, state = diffusers_dit.read_dit_folder(folder)
    return cmd_release.load("content_dit", cmd_config.complete("content_dit", told, state), state)


def tokenizer(folder: Path):
    for name in ("merges.txt",):
        shutil.copy(PIPELINE / "tokenizer" / name, folder)
    return Tokenizer(folder)(["a cat"])


def shards(folder: Path):
    for name, file in INDEX["weight_map"].items():
        write_safetensors(folder / file, {name: np.zeros(1, np.float32)})
    with open_weights(find_weights(folder, TRANSFORMERS)) as weights:
        return weights.shapes


def clip(folder: Path):
    shutil.copy(FIXTURES / "tiny-clip" / "model.safetensors", folder)
    return load_clip(folder)


def manifest_files() -> dict:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "1")
        folder.mkdir()
        (folder / "a").write_text("a")
        write_manifest(folder, 1)
        return {"1/manifest.json": read(folder / "manifest.json")}


def heartbeats(folder: Path):
    peers = Peers(folder, 0, 2, "r", peer_timeout=1.0, stall_timeout=1.0, on_fault=None)
    for now in (0.0, 10.0):
        peers._read(now)
        peers._failed(now), peers._lost(now), peers._stalled(now)


def outcomes(folder: Path):
    line = (folder / "line").read_bytes()
    (folder / "cache").write_bytes(json.dumps(HEADER).encode() + b"\n" + line + b"\n")
    return Outcomes(folder / "cache").of("a.mp4", [1, 2])


def metrics(folder: Path):
    return Metrics._open_lines(types.SimpleNamespace(folder=folder), 5)


def in_step(check: Callable) -> Callable[[Path], object]:
    def read(folder: Path):
        (folder / "1" / "a").write_text("a")
        check(folder / "1")

    return read


@functools.cache
def readers() -> dict[str, Reader]:
    parts = {part: {"config": read(PIPELINE / part / "config.json")} | PART for part in ("vae", "text_encoder")}
    parts["text_encoder"]["tokenizer"] = TOKENS
    model = {"unet": read(PIPELINE / "unet" / "config.json"),
             "scheduler": read(PIPELINE / "scheduler" / "scheduler_config.json")}  # fmt: skip
    texts = {"config.json": config("content,kind=text"), "facts.json": METADATA | parts | {"image_model": model}}
    latent = {"config.json": config("autoencoder,kind=text"), "facts.json": AUTOENCODER | {"vae": parts["vae"]}}
    autoencoder = {"config.json": config("autoencoder"), "facts.json": AUTOENCODER}
    content = {"config.json": config("content"), "facts.json": METADATA}
    motion = {"config.json": config("motion,kind=gaussian"), "facts.json": METADATA}
    dit = {"_class_name": "DiTTransformer2DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
           "attention_head_dim": 8, "in_channels": 4, "norm_elementwise_affine": False, "norm_eps": 1e-5, "norm_type":
           "ada_norm_zero", "num_attention_heads": 2, "num_embeds_ada_norm": 5, "num_layers": 2, "out_channels": 8,
           "patch_size": 2, "sample_size": 8}  # fmt: skip
    return {
        "autoencoder stage": Reader(autoencoder, stage("autoencoder")),
        "latent autoencoder stage": Reader(latent, stage("autoencoder")),
        "content stage": Reader(content, stage("content")),
        "motion stage": Reader(motion, stage("motion")),
        "text stage": Reader(texts, stage("content")),
        "metadata of a folder": Reader({"facts.json": METADATA | parts | {"image_model": model}}, compared),
        "weights file": Reader({"config": content["config.json"], "facts": METADATA}, weights_file),
        "older weights file": Reader({"config": content["config.json"], "facts": FLAT}, weights_file),
        "resumed run": Reader(content, resume),
        "release": Reader(autoencoder | {"facts.json": AUTOENCODER | {"converted": CONVERTED}}, release),
        "converted dit": Reader({"architecture": DIT, "optional": []}, converted("dit")),
        "converted i3d": Reader({"architecture": {"epsilon": 1e-5}, "optional": []}, converted("i3d")),
        "converted lpips": Reader({"architecture": {}, "optional": ["scaling_layer.shift"]}, converted("lpips")),
        "architecture": Reader({"architecture.json": DIT}, architecture),
        "manifest": Reader(manifest_files(), in_step(manifest)),
        "signed manifest": Reader(manifest_files(), in_step(signed)),
        "run.json": Reader({RUN: RUNS}, run),
        "samples.json": Reader({"s/samples.json": SAMPLES}, lambda f: read_section(f / "s", f / "index.html")),
        "prompts": Reader({"prompts.json": MSRVTT}, lambda folder: read_prompts(folder / "prompts.json")),
        "heartbeat": Reader({"processes/1.json": BEAT}, heartbeats, passes=True),
        "outcomes of tests": Reader({"line": {"name": "a.mp4", "key": [1, 2], "frames": 3}}, outcomes, passes=True),
        "metrics": Reader({"metrics.jsonl": {"step": 3, "loss": 1.0, "wall_seconds": 2.0}}, metrics, passes=True),
        "unet": Reader(pipeline("unet", "config.json"), of_value(unet_from_config)),
        "vae": Reader(pipeline("vae", "config.json"), of_value(vae_from_config)),
        "text encoder": Reader(pipeline("text_encoder", "config.json"), of_value(text_from_config)),
        "scheduler": Reader(pipeline("scheduler", "scheduler_config.json"), of_value(from_scheduler_config)),
        "tokenizer": Reader({n: read(PIPELINE / "tokenizer" / n) for n in TOKENIZER} | ADDED, tokenizer),
        "clip": Reader({"config.json": read(FIXTURES / "tiny-clip" / "config.json")}, clip),
        "index of shards": Reader({"model.safetensors.index.json": INDEX}, shards),
        "dit folder": Reader({"config.json": dit}, dit_folder),
    }  # fmt: skip


# For the mutations: a file is a reader's name, the name of one of its files, and the text of that.


def seeds() -> list[bytes]:
    return [
        json.dumps([name, file, json.dumps(value)]).encode()
        for name, reader in readers().items()
        for file, value in reader.files.items()
    ]


seeds = functools.cache(seeds)


def mutate(seed: bytes, other: bytes, rng) -> bytes:
    name, file, text = json.loads(seed)
    if rng.random() < 0.75:
        value = json.loads(text)
        for _ in range(int(rng.integers(1, 3))):
            value = fuzz.mutate_json(value, rng)
        content = fuzz.dump_json(value).encode()
    else:
        content = fuzz.mutate_bytes(text.encode(), json.loads(other)[2].encode(), rng)
    return json.dumps([name, file]).encode() + b"\n" + content


def read_file(path: Path):
    head, _, content = path.read_bytes().partition(b"\n")
    name, file = json.loads(head)
    return read_with(path.parent / "reader", name, {file: content})


def read_with(folder: Path, name: str, contents: dict[str, bytes]):
    """What a reader makes of its files, some of which have other contents."""
    shutil.rmtree(folder, ignore_errors=True)
    reader = readers()[name]
    for file, value in reader.files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(contents.get(file, json.dumps(value).encode()))
    return reader.read(folder)


JSON = fuzz.Kind(seeds, mutate, read_file, "")
