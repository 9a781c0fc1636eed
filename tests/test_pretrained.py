"""Which parts of a pretrained model a stage was trained with, and whether a folder holds the same."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from interop.clip_folders import FIXTURES, change_json, copied, message
from safetensors.numpy import load_file, save_file

from cmd_jax import pretrained
from cmd_jax.errors import Unavailable, UserError, exit_code
from cmd_jax.files import as_json, from_json
from cmd_jax.pretrained import (
    ImageModelMetadata,
    TextEncoderMetadata,
    VAEMetadata,
    check_same,
    describe,
)
from cmd_jax.running.distributed import leader_alone

PARTS = (VAEMetadata, TextEncoderMetadata, ImageModelMetadata)
SCHEDULER = "scheduler/scheduler_config.json"
VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def parts():
    """What a stage of the fixture keeps, read again from its JSON."""
    told = [as_json(describe(FIXTURES / "tiny-sd15", kind)) for kind in PARTS]
    return [from_json(kind, json.loads(json.dumps(part))) for kind, part in zip(PARTS, told, strict=True)]


def refusal(folder, parts):
    for part in parts:
        try:
            check_same(folder, part, "this run was started with")
        except UserError as error:
            assert error.field == "pretrained.path" and "\n" not in str(error)
            return part.part, error.problem
    return None


def rewritten(path, change):
    save_file({k: np.ascontiguousarray(v) for k, v in change(load_file(path)).items()}, path)


def without_last_merge(folder):
    path = folder / "tokenizer/merges.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def set_field(name, **changes):
    return lambda folder: change_json(folder / name, **changes)


OTHERS = {  # what is changed -> how, the part, and what is said
    "scaling factor": (set_field("vae/config.json", scaling_factor=0.2), "vae", ": scaling_factor is 0.2, this"),
    "a number of the VAE": (
        lambda f: rewritten(f / VAE, lambda t: t | {"quant_conv.bias": t["quant_conv.bias"] + np.float32(1e-6)}),
        "vae",
        "vae: digest of its weights is ",
    ),
    "activation": (
        set_field("text_encoder/config.json", hidden_act="gelu"), "text_encoder", "text_encoder/config.json: hidden_act"
    ),
    "precision of the text encoder": (
        lambda f: rewritten(f / TEXT, lambda t: {k: v.astype(np.float16) for k, v in t.items()}),
        "text_encoder",
        "text_encoder: digest of its weights is ",
    ),
    "merges": (without_last_merge, "text_encoder", "tokenizer: merges is "),
    "an added word": (set_field("tokenizer/added_tokens.json", me=533), "text_encoder", "tokenizer: added_tokens is "),
    "padding": (set_field("tokenizer/special_tokens_map.json", pad_token="!"), "text_encoder", "tokenizer: pad is 0, "),
    "UNet": (set_field("unet/config.json", freq_shift=1), "image_model", "unet/config.json: freq_shift is 1, "),
    "prediction": (
        set_field(SCHEDULER, prediction_type="v_prediction"),
        "image_model",
        f"{SCHEDULER}: prediction_type is v_prediction, this run was started with epsilon",
    ),
    "spacing": (set_field(SCHEDULER, timestep_spacing="trailing"), "image_model", ": timestep_spacing is trailing, "),
    "solver": (set_field(SCHEDULER, _class_name="DPMSolverMultistepScheduler"), "image_model", ": solver is dpmpp, "),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_another_part_is_named_with_the_field_that_differs(what, parts, tmp_path):
    change, part, said = OTHERS[what]
    folder = copied("tiny-sd15", tmp_path / "sd")
    change(folder)
    found, problem = refusal(folder, parts)
    assert found == part and said in problem, problem


def renamed_tensors(folder):
    """As the published files have them: attention's old names in the VAE, a prefix and a buffer in the text encoder."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def of_vae(tensors):
        for new, name in old.items():
            tensors = {key.replace(new, name): value for key, value in tensors.items()}
        assert any(".proj_attn." in name for name in tensors)
        return tensors

    rewritten(folder / VAE, of_vae)
    buffer = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    rewritten(folder / TEXT, lambda tensors: buffer | {f"text_model.{name}": value for name, value in tensors.items()})


def in_shards(folder):
    tensors = load_file(folder / VAE)
    (folder / VAE).unlink()
    names = ["a.safetensors", "b.safetensors"]
    for i, name in enumerate(names):
        save_file(dict(list(tensors.items())[i::2]), folder / "vae" / name)
    weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
    (folder / f"{VAE}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def with_unused_variants(folder):
    for path in (folder / VAE, folder / TEXT):
        for ending in (".fp16.safetensors", ".non_ema.safetensors", ".bin"):
            path.with_suffix(ending).write_bytes(b"another model's")


SAME = {
    "unused variants": with_unused_variants,
    "other names of tensors": renamed_tensors,
    "shards": in_shards,
    "fields that change nothing": lambda f: [
        change_json(f / part / "config.json", _diffusers_version="0.1", decay=0.9, transformers_version="4")
        for part in ("vae", "text_encoder", "unet")
    ],
    "defaults left out": lambda f: [
        change_json(f / "vae/config.json", sample_size="absent", shift_factor="absent", out_channels="absent"),
        change_json(f / "scheduler/scheduler_config.json", timestep_spacing="absent", thresholding="absent"),
        change_json(f / "text_encoder/config.json", vocab_size=533, attention_dropout="absent"),
    ],
    "a tokenizer's other files": lambda f: [
        (f / "tokenizer/special_tokens_map.json").unlink(),
        change_json(f / "tokenizer/tokenizer_config.json", name_or_path="x", added_tokens_decoder="absent"),
    ],
}


@pytest.mark.parametrize("what", SAME)
def test_the_same_parts_in_other_files_are_the_same(what, parts, tmp_path):
    folder = copied("tiny-sd15", tmp_path / "sd")
    SAME[what](folder)
    assert refusal(folder, parts) is None
    for part in PARTS:
        assert describe(folder, part).identity() == describe(FIXTURES / "tiny-sd15", part).identity()


def test_weights_are_read_by_process_0_alone(monkeypatch):
    """The others hear the digest; a folder of theirs that holds other files is an error of all."""
    config, texts = FIXTURES / "tiny-sd15", []
    monkeypatch.setattr("cmd_jax.running.distributed.gather", lambda text: texts.append(text) or [text])
    part = describe(config, VAEMetadata)
    monkeypatch.setattr("cmd_jax.running.distributed.is_leader", lambda: False)
    monkeypatch.setattr(pretrained, "digest_weights", lambda *_: pytest.fail("read by another process"))
    heard = iter(texts)
    monkeypatch.setattr("cmd_jax.running.distributed.gather", lambda text: [next(heard), text])
    assert describe(config, VAEMetadata) == part
    other = json.dumps({"pretrained.path: vae": "other"})
    monkeypatch.setattr("cmd_jax.running.distributed.gather", lambda text: [text, other])
    assert "on process 1, but " in message(describe, config, VAEMetadata)


def test_an_error_of_process_0_is_everyone_s(monkeypatch):
    def fails():
        raise UserError("weights", "x", "damaged", "fetch it")

    texts = []
    monkeypatch.setattr("cmd_jax.running.distributed.gather", lambda text: texts.append(text) or [text])
    assert leader_alone(lambda: {"a": 1}) == {"a": 1}
    message(leader_alone, fails)
    monkeypatch.setattr("cmd_jax.running.distributed.is_leader", lambda: False)
    for text, outcome in zip(texts, ({"a": 1}, "weights=x: damaged; fetch it"), strict=True):
        monkeypatch.setattr("cmd_jax.running.distributed.gather", lambda _, text=text: [text])
        told = message(leader_alone, None) if isinstance(outcome, str) else leader_alone(None)
        assert told == outcome


def test_a_store_that_process_0_cannot_reach_is_a_reason_for_all_to_start_again(monkeypatch):
    def fails(error):
        raise error

    told, gather = [], "cmd_jax.running.distributed.gather"
    for error in (PermissionError(13, "no right", "gs://b/x"), Unavailable(113, "cannot be reached", "gs://b/x")):
        monkeypatch.setattr("cmd_jax.running.distributed.is_leader", lambda: True)
        monkeypatch.setattr(gather, lambda text: told.append(text) or [text])
        for action in (partial(fails, error), None):
            with pytest.raises(UserError, match="file=gs://b/x: ") as raised:
                leader_alone(action)
            assert exit_code(raised.value) == 2 + isinstance(error, Unavailable)
            monkeypatch.setattr("cmd_jax.running.distributed.is_leader", lambda: False)
            monkeypatch.setattr(gather, lambda _: told[-1:])


def test_a_folder_that_lacks_a_part(tmp_path):
    folder = copied("tiny-sd15", tmp_path / "sd")
    shutil.rmtree(folder / "vae")
    assert message(describe, folder, VAEMetadata).startswith(
        f"pretrained.path={folder}: holds no vae/config.json; give"
    )
