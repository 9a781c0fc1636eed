"""Checkpoints in buckets: how they are saved, restored, removed, and carried to a disk and back."""

import contextlib
import hashlib
import json

import pytest
from checkpoints import check_whole, save, state_at
from orbax.checkpoint._src.serialization import tensorstore_utils

from cmd_jax.errors import Unavailable, UserError, exit_code
from cmd_jax.files import as_path
from cmd_jax.running import array_store, manifest
from cmd_jax.running import checkpoint as checkpointing
from cmd_jax.running.checkpoint import ITEMS, Checkpoints
from cmd_jax.running.lock import lock_folder
from cmd_jax.running.manifest import verify

PLACE = "run/autoencoder"


@pytest.fixture(params=["gcs", "s3"])
def bucket(request):
    return request.getfixturevalue(request.param)


def folder_in(bucket):
    return as_path(f"{bucket}/{PLACE}")


def steps_in(bucket):
    return sorted({int(name.split("/")[3]) for name in bucket.names(f"{PLACE}/checkpoints/")})


def test_newest_are_kept_each_committed_by_its_manifest(bucket):
    folder, seen = folder_in(bucket), []

    def look():
        names = bucket.names(f"{PLACE}/checkpoints/")
        seen.append([name for name in names if name.split("/")[3] == "9" or name.endswith("manifest.json")])

    save(folder, 3, 6, keep=2)
    save(folder, 9, keep=2, before_commit=look)
    assert steps_in(bucket) == [6, 9]
    check_whole(folder, 9)
    objects = {
        name.partition("/checkpoints/9/")[2]: data for name, data in bucket.objects(f"{PLACE}/checkpoints/9/").items()
    }
    manifest = json.loads(objects.pop("manifest.json"))
    hashes = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in objects.items()}
    assert manifest["files"] == hashes and manifest["format"] == 1 and manifest["step"] == 9
    assert {name.split("/")[0] for name in objects} == {*ITEMS, "run.json"}
    # The caller's own files come when all but the manifest is there, and nothing older is gone yet.
    written = [f"{PLACE}/checkpoints/9/{name}" for name in objects]
    older = [f"{PLACE}/checkpoints/{step}/manifest.json" for step in (3, 6)]
    assert seen == [sorted([*written, *older])]


def test_an_error_before_the_commit_fails_the_save(gcs):
    folder = folder_in(gcs)
    save(folder, 3)

    def fail():
        raise PermissionError(13, "no right to it", "metrics.jsonl")

    checkpoints = Checkpoints(folder, before_commit=fail)
    checkpoints.save(state_at(6), {"step": 6})
    with pytest.raises(
        UserError, match=r"^checkpoint=6: could not be saved \(no right to it\); .* 3 is intact"
    ) as error:
        checkpoints.close()
    assert exit_code(error.value) == 2 and steps_in(gcs) == [3]


@pytest.mark.parametrize("fault", ["lost", "taken"])
def test_a_run_that_slept_over_its_lock_commits_nothing(gcs_stub, monkeypatch, fault):
    """While it read back what it had written another run took the lock, or even saved the same step."""
    folder, asleep = folder_in(gcs_stub), []
    read_back = manifest._entry_of

    def sleep(path, **options):
        if not asleep and fault == "taken":
            (folder / "checkpoints/6/manifest.json").write_bytes(b"the other's")
        asleep.append(path)
        return read_back(path, **options)

    def check():
        if asleep and fault == "lost":
            raise Unavailable(None, "taken over", str(folder))

    monkeypatch.setattr(manifest, "_entry_of", sleep)
    checkpoints = Checkpoints(folder, check=check)
    checkpoints.save(state_at(6), {"step": 6})
    with pytest.raises(UserError) as error:
        checkpoints.close()
    assert exit_code(error.value) == 3 and asleep
    assert not gcs_stub.names(f"{PLACE}/checkpoints/6/manifest.json")


def test_a_checkpoint_is_the_same_on_a_disk_and_in_a_bucket(gcs, s3, tmp_path):
    def digests(folder):
        with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
            return {name: checkpoints.digest(name) for name in ITEMS}

    save(folder_in(gcs), 6)
    for name, data in gcs.objects().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    check_whole(tmp_path / PLACE, 6)
    save(tmp_path / "other", 9)
    for path in (tmp_path / "other").rglob("*"):
        if path.is_file():
            s3.put(f"{PLACE}/{path.relative_to(tmp_path / 'other')}", path.read_bytes())
    check_whole(folder_in(s3), 9)
    assert digests(tmp_path / PLACE) == digests(folder_in(gcs))
    assert digests(tmp_path / "other") == digests(folder_in(s3))
    save(folder_in(s3), 12)
    save(tmp_path / PLACE, 12)
    check_whole(folder_in(s3), 12)
    check_whole(tmp_path / PLACE, 12)


def test_what_an_unfinished_save_left_is_no_step_and_goes(bucket):
    """OCDBT would merge it with what is saved there again."""
    folder = folder_in(bucket)
    save(folder, 6, 9)
    bucket.delete(f"{PLACE}/checkpoints/9/manifest.json")
    left = bucket.names(f"{PLACE}/checkpoints/9/")
    bucket.put(f"{PLACE}/checkpoints/notes", b"a foreign object")
    bucket.put(f"{PLACE}/checkpoints/12", b"another")
    bucket.put(f"{PLACE}/checkpoints/6.saving/run.json", b"{}")  # as copied from a disk
    check_whole(folder, 6)  # read_only
    assert bucket.names(f"{PLACE}/checkpoints/9/") == left != []
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        assert checkpoints.latest() == 6
        assert bucket.names(f"{PLACE}/checkpoints/9/") == []
        bucket.put(f"{PLACE}/checkpoints/9/ema/manifest.ocdbt", b"of another process, since")
        bucket.put(f"{PLACE}/checkpoints/9/ema/ocdbt.process_7/manifest.ocdbt", b"of another process, since")
        checkpoints.save(state_at(9), {"step": 9})
    check_whole(folder, 9)
    assert not any("process_7" in name for name in bucket.names())
    assert {f"{PLACE}/checkpoints/notes", f"{PLACE}/checkpoints/12"} < {*bucket.names()}


def test_reader_of_a_running_training_follows_it(gcs, monkeypatch, caplog):
    """The step that it looks at is removed meanwhile."""
    folder, looked = folder_in(gcs), []
    save(folder, 3)

    def vanish(step, *arguments):
        looked.append(step.name)
        if len(looked) == 1:
            save(folder, 9, 12)
        verify(step, *arguments)

    monkeypatch.setattr(checkpointing, "verify", vanish)
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        assert checkpoints.latest() == 12
    assert [looked[0], looked[-1]] == ["3", "12"] and not caplog.records


@pytest.mark.parametrize("name", ["a#b", "a?b", "a*b", "[b]", "a\\b", "a\nb", "a\x7f", "gs:/b", "\udcff", "é/" * 300])
def test_a_name_that_the_array_store_cannot_have_is_refused(name):
    folder = as_path(f"gs://bucket/{name}/stage")
    for open_folder in (Checkpoints, lock_folder):
        with pytest.raises(UserError, match="^workdir=.* where Orbax cannot save; rename it, or give another folder"):
            open_folder(folder)


def test_other_names_are_taken_as_they_are(s3):
    name = "lr=1e-2, a+b%25 é日本 {x}!'\"&$@~(;:|^`"
    save(as_path(f"{s3}/{name}"), 1, 2, 3)
    check_whole(as_path(f"{s3}/{name}"), 3)
    assert {key.rpartition("/checkpoints/")[0] for key in s3.names()} == {name}


# What Orbax is taught.


def test_orbax_itself_knows_no_s3_and_is_left_as_it_is_elsewhere(monkeypatch):
    """Once the first of these fails, `_with_s3` can go."""
    with pytest.raises(ValueError, match="should be absolute"):
        array_store._spec_of("s3://bkt/run")
    for path in ("/run/1", "gs://bkt/run/1"):
        assert tensorstore_utils.build_kvstore_tspec(path, "w") == array_store._spec_of(path, "w")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    mode = tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.MERGE)
    spec, as_gcs = (
        tensorstore_utils.build_kvstore_tspec(f"{scheme}://bkt/run/1", "w", ocdbt_write_options=mode)
        for scheme in ("s3", "gs")
    )
    place = {"bucket": "bkt", "path": "run/1"}
    assert as_gcs["base"] == {"driver": "gcs", **place}
    assert spec["base"] == {
        "driver": "s3", **place, "endpoint": "http://127.0.0.1:1", "aws_region": "eu-north-1",
        "aws_credentials": {"type": "environment"},
    }  # fmt: skip
    assert {**spec, "base": None} == {**as_gcs, "base": None}


def test_requests_are_tried_again_for_the_stated_time(monkeypatch):
    monkeypatch.setenv("CMD_JAX_RETRY_SECONDS", "126")
    told = tensorstore_utils.get_ts_context().spec.to_json()
    expected = {"max_retries": 6, "initial_delay": "2s", "max_delay": "2m6s"}  # 2 + 4 + 8 + ... + 64 seconds
    assert told["gcs_request_retries"] == told["s3_request_retries"] == expected
