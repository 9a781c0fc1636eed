"""Weights in a bucket: the same parameters as from a local copy, read in parts, a few requests at a time."""

import collections
import json
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from torch_writer import TorchFile

from cmd_jax.buckets import BucketPath
from cmd_jax.errors import Unavailable, UserError, exit_code
from cmd_jax.files import as_path
from cmd_jax.interop import ranges
from cmd_jax.interop.diffusers import load_pipeline, load_vae
from cmd_jax.interop.folders import DIFFUSERS, WeightFiles, find_weights
from cmd_jax.interop.tensors import LAYOUTS, Tensor, same, to_params
from cmd_jax.interop.weights import (
    digest_weights,
    flatten,
    open_weights,
    read_metadata,
    read_state_dict,
    write_safetensors,
)
from cmd_jax.main import main
from cmd_jax.pretrained import TextEncoderMetadata, VAEMetadata, check_same, describe
from cmd_jax.verbs.convert import given_architecture
from cmd_jax.verbs.convert_weights import _class_names

VAE = "vae/diffusion_pytorch_model.safetensors"


def equal(ours: dict, theirs: dict) -> bool:
    ours, theirs = flatten(ours), flatten(theirs)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name]) for name in ours
    )


class Requests(collections.defaultdict):
    """{object: [(start, end)] of the range requests}; most: how many of them were under way at a time."""

    def __init__(self):
        super().__init__(list)
        self.now = self.most = 0
        self.lock = threading.Lock()

    def bytes(self, name: str) -> int:
        return sum(end - start for start, end in self[name])


@pytest.fixture
def requests(monkeypatch):
    seen, original = Requests(), BucketPath.read_range

    def counting(self, start, end):
        with seen.lock:
            seen[self.name].append((start, end))
            seen.now += 1
            seen.most = max(seen.most, seen.now)
        time.sleep(0.005)
        try:
            return original(self, start, end)
        finally:
            with seen.lock:
                seen.now -= 1

    monkeypatch.setattr(BucketPath, "read_range", counting)
    return seen


@pytest.fixture
def one_file(gcs):
    """(tensors) -> WeightFiles of an object that holds them."""

    def make(**tensors):
        path = as_path(f"{gcs}/w.safetensors")
        write_safetensors(path, tensors)
        return WeightFiles(path, (path,))

    return make


def test_a_stable_diffusion_folder_is_read_to_the_bit(gcs, requests):
    folder = tiny.pipeline_folder()
    url = gcs.put_folder(folder, "sd")
    there, here = load_pipeline(url), load_pipeline(folder)
    assert all(equal(getattr(there, part)[1], getattr(here, part)[1]) for part in ("unet", "vae", "text_encoder"))
    assert there.tokenizer.identity == here.tokenizer.identity and there.configs == here.configs
    # The first request of a file brings its header, another one all of its 40 to 100 tensors.
    assert len(requests["diffusion_pytorch_model.safetensors"]) == 4 and len(requests["model.safetensors"]) == 2
    for kind in (VAEMetadata, TextEncoderMetadata):
        assert describe(url, kind) == describe(folder, kind)


class Half:
    """A sharding of which this process has one half; the devices of the other are another process's."""

    def __init__(self, *index):
        self.index = index

    def addressable_devices_indices_map(self, _):
        return {0: self.index, 1: self.index}  # two devices that hold the same


def test_a_process_asks_for_what_it_holds(one_file, requests, monkeypatch):
    """Half the rows of a table are half its bytes; half its columns lie all over it, and it is read once."""
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, read: read(sharding.index))
    table = np.random.default_rng(0).random((1024, 512), np.float32)
    files, header = one_file(table=table, transposed=table[:, :256]), ranges.GAP * 2
    rows, all_of = slice(512, 1024), slice(None)
    for index, tensor, size in (
        ((rows, all_of), same("table", table.shape), table.nbytes // 2),
        ((all_of, slice(0, 256)), same("table", table.shape), table.nbytes),
        ((all_of, rows), Tensor("x", "transposed", (1024, 256), LAYOUTS[2]), table.nbytes // 4),
    ):
        requests.clear()
        with open_weights(files) as weights:
            like = {tensor.path: SimpleNamespace(shape=tensor.ours, sharding=Half(*index))}
            read = to_params([tensor], weights, like=like)[tensor.path]
        whole = table if tensor.name == "table" else table[:, :256].T
        np.testing.assert_array_equal(read, whole[index])
        assert size <= requests.bytes("w.safetensors") <= size + header


def test_small_tensors_come_together_and_large_ones_in_pieces(one_file, requests, monkeypatch):
    monkeypatch.setattr(ranges, "PIECE", 2**14)
    rng = np.random.default_rng(0)
    tensors = {f"small.{i}": rng.random(20, np.float32) for i in range(300)}
    tensors["large"] = rng.random((50, 4000), np.float32)
    files = one_file(**tensors)
    with open_weights(files) as weights:
        read = dict(weights.whole())
        assert sorted(read) == sorted(tensors) and all(np.array_equal(read[name], tensors[name]) for name in tensors)
        head, *others = requests["w.safetensors"]
        size = sum(array.nbytes for array in tensors.values())
        assert len(others) == -(-size // 2**14) and sum(end - start for start, end in others) == size
        assert 1 < requests.most <= ranges.AHEAD
        weights.read("large", (slice(7, 8), slice(None)))  # of which nobody had told
        assert requests["w.safetensors"][-1][1] - requests["w.safetensors"][-1][0] == 16000
        # Far apart, two requests; the rows between are not asked for.
        requests.clear()
        parts = {i: ("large", (slice(i, i + 1), slice(None))) for i in (0, 30)}
        weights.expect(parts.values())
        assert all(np.array_equal(weights.read(*part)[0], tensors["large"][i]) for i, part in parts.items())
        assert requests.bytes("w.safetensors") == 32000


@pytest.mark.parametrize("ending", ["bin", "pt"])
def test_a_torch_file_is_read_through_a_copy_that_goes(s3, tmp_path, ending):
    file = TorchFile()
    path = file.save(tmp_path / f"w.{ending}", {"a": file.tensor(np.arange(6, dtype=np.float32).reshape(2, 3))})
    s3.put(path.name, path.read_bytes())
    assert equal(read_state_dict(f"{s3}/{path.name}"), read_state_dict(path))
    assert not [*(tmp_path / "cache").rglob(f"*.{ending}")]


def test_written_to_s3_and_read_back(s3, tmp_path):
    tensors = {"a/b": np.arange(6, dtype=np.float16).reshape(2, 3).T, "c": np.ones(3, np.int64), "d": np.zeros((0, 2))}
    write_safetensors(f"{s3}/w.safetensors", tensors, {"note": "é"})
    assert equal(read_state_dict(f"{s3}/w.safetensors"), tensors)
    assert read_metadata(f"{s3}/w.safetensors") == {"note": "é"} and s3.names() == ["w.safetensors"]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def vae_folder(bucket) -> str:
    return bucket.put_folder(tiny.pipeline_folder() / "vae", "sd/vae")


def test_a_tenth_of_the_requests_fails(gcs_stub):
    folder = vae_folder(gcs_stub)
    gcs_stub.server.order(share=0.1, seed=3)
    assert equal(load_vae(folder)[1], load_vae(tiny.pipeline_folder() / "vae")[1])
    gcs_stub.server.order()
    assert digest_weights(find_weights(folder, DIFFUSERS)) == digest_weights(
        find_weights(tiny.pipeline_folder() / "vae", DIFFUSERS)
    )


def test_a_store_that_does_not_answer_is_another_exit_code(gcs_stub, monkeypatch, capsys):
    folder = vae_folder(gcs_stub)
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "0.2")
    gcs_stub.server.order(share=1.0)
    with pytest.raises(Unavailable):
        as_path(f"{folder}/config.json").exists()
    assert main(["convert", "i3d", f"{folder}/x.pt", "out.safetensors"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder}/x.pt" in line and "again when the store answers" in line


def damage(bucket, how: str) -> str:
    """What is then wrong."""
    name, content = f"sd/{VAE}", bucket.get(f"sd/{VAE}")
    if how == "cut off":
        bucket.put(name, content[:-100])
        return "damaged or incomplete"
    if how == "a bit of the header":
        bucket.flip(name, byte=8)
        return "damaged or incomplete"
    if how == "gone":
        bucket.delete(name)
        return "no such file"
    if how == "a part of it gone":
        bucket.delete(name)
        bucket.put(f"sd/{VAE}.index.json", json.dumps({"weight_map": {"a": "part.safetensors"}}).encode())
        return "missing, diffusion_pytorch_model.safetensors.index.json names it"
    bucket.put(name, b"version https://git-lfs.github.com/spec/v1\n")
    return "a git-lfs pointer"


@pytest.mark.parametrize("how", ["cut off", "a bit of the header", "gone", "a part of it gone", "a pointer"])
def test_what_is_wrong_with_an_object_is_one_line(gcs, how):
    folder = vae_folder(gcs)
    said = damage(gcs, how)
    with pytest.raises(UserError, match="^weights=gs://.*safetensors: ") as e:
        load_vae(folder)
    assert said in str(e.value) and exit_code(e.value) == 2


def test_a_flipped_bit_of_the_numbers_is_another_digest(gcs):
    """Safetensors have no sums; a training keeps the digest of what it was given."""
    folder = vae_folder(gcs)
    kept = describe(tiny.pipeline_folder(), VAEMetadata)
    gcs.put_folder(tiny.pipeline_folder(), "sd")
    assert check_same(f"{gcs}/sd", kept, "this run was started with") == kept
    gcs.flip(f"sd/{VAE}", byte=-5)
    with pytest.raises(UserError, match=f"^pretrained.path={gcs}/sd: its vae: digest of its weights"):
        check_same(f"{gcs}/sd", kept, "this run was started with")
    assert folder == f"{gcs}/sd/vae"


def test_convert_from_bucket_to_bucket(gcs_stub, tmp_path, monkeypatch, capsys):
    """A folder is a pipeline once model_index.json is there, which comes last; nothing stays on this machine."""
    monkeypatch.chdir(tmp_path)
    source = gcs_stub.put_folder(tiny.pipeline_folder(), "sd")
    assert main(["convert", "stable-diffusion", source, f"{gcs_stub}/half", "--dtype=float16"]) == 0
    stored, names = gcs_stub.server.server.buckets[gcs_stub.name], gcs_stub.names("half/")
    assert names == [name.replace("sd/", "half/", 1) for name in gcs_stub.names("sd/")]
    assert max(names, key=lambda name: stored[name].generation) == "half/model_index.json"
    assert main(["convert", "stable-diffusion", str(tiny.pipeline_folder()), "half", "--dtype=float16"]) == 0
    for path in (tmp_path / "half").rglob("*.*"):
        assert gcs_stub.get(str(path.relative_to(tmp_path))) == path.read_bytes()
    assert main(["convert", "stable-diffusion", source, f"{gcs_stub}/half"]) == 2
    assert f"OUTPUT={gcs_stub}/half: exists already" in capsys.readouterr().err
    gcs_stub.server.order(deny="write")
    assert main(["convert", "stable-diffusion", source, f"{gcs_stub}/denied"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"OUTPUT={gcs_stub}/denied/")
    gcs_stub.server.order()
    assert not gcs_stub.names("denied/") and not [x for x in (tmp_path / "cache").rglob("*") if x.is_file()]


def test_what_convert_reads_beside_weights(gcs):
    gcs.put("sizes.json", b'{"heads": 8}')
    gcs.put("names.txt", "ape\nböar\n".encode())
    assert given_architecture(f"{gcs}/sizes.json") == {"heads": 8}
    assert _class_names(as_path(f"{gcs}/names.txt")) == ["ape", "böar"]
    for read, field in ((given_architecture, "--architecture"), (lambda text: _class_names(as_path(text)), "classes")):
        with pytest.raises(UserError, match=f"^{field}={gcs}/none: "):
            read(f"{gcs}/none")
