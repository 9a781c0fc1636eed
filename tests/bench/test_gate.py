"""The gate: slow-downs are found, by component, in records; files that are no results are refused by one line."""

import json

import pytest

from cmd_jax.bench import records
from cmd_jax.bench.gate import judge
from cmd_jax.errors import UserError

SAMPLE = {
    "format": 1, "verb": "sample", "component": "whole", "batch": 4, "clip": [16, 512, 1024], "parameters": 10**9,
    "dtype": "bfloat16", "preset": "", "settings": {"guidance": 7.5, "content_steps": 50}, "device": "NVIDIA H100",
    "devices": 1, "mesh": {}, "p50_seconds": 1.0, "versions": {"jax": "0.10.2"}, "machine": "one",
}  # fmt: skip


def of(seconds: float, component="whole", **changes) -> dict:
    return SAMPLE | {"component": component, "p50_seconds": seconds} | changes


EARLIER = [of(seconds, name) for seconds in (1.0, 1.1, 0.9, 1.0, 1.2, 1.0) for name in ("whole", "cmd_decoder")]


def test_only_the_component_that_became_slower_is_named():
    slower, unknown = judge([of(1.3), of(1.1, "cmd_decoder")], EARLIER, bound=1.25)
    assert len(slower) == 1 and slower[0].startswith("sample whole, batch 4: 1.3 s, 1.30 times") and not unknown
    assert judge([of(1.24), of(1.24, "cmd_decoder")], EARLIER, bound=1.25) == ([], [])
    assert len(judge([of(1.13)], EARLIER, bound=1.1)[0]) == 1


def test_one_slow_result_among_the_last_five_changes_nothing():
    assert len(judge([of(1.3)], [*EARLIER, of(9.0)], bound=1.25)[0]) == 1
    assert not judge([of(1.2)], [*EARLIER, of(0.1)], bound=1.25)[0]


def test_a_slow_drift_is_found_by_the_first_result():
    drift = [of(1.2**i) for i in range(8)]
    assert drift[-1]["p50_seconds"] < 1.25 * drift[-3]["p50_seconds"] * 1.2
    slower, _ = judge([of(drift[5]["p50_seconds"])], drift, bound=1.25)
    assert len(slower) == 1 and "the first" in slower[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 8}, {"clip": [16, 512, 512]}, {"dtype": "float32"}, {"preset": "fast"}, {"device": "NVIDIA A100"},
        {"devices": 8}, {"mesh": {"data": 8}}, {"parameters": 5}, {"settings": {"guidance": 1.0, "content_steps": 50}},
        {"verb": "train"}, {"component": "motion_denoiser"},
    ],
)  # fmt: skip
def test_what_is_another_measurement_is_not_compared(changes):
    slower, unknown = judge([of(100.0, **changes)], EARLIER, bound=1.25)
    assert not slower and len(unknown) == 1


def test_what_may_differ_between_equal_measurements():
    changed = of(100.0, versions={}, machine="another", time="later", config="./webvid.py:sample", attention="plain")
    assert len(judge([changed], EARLIER, bound=1.25)[0]) == 1


def test_a_file_is_appended_to_and_read(tmp_path):
    path = tmp_path / "new" / "bench.jsonl"
    records.append(path, EARLIER[:1])
    records.append(path, EARLIER[1:])
    assert records.read(path, "--gate") == EARLIER


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\n\n", b"[1]\n", b"{}\n", b"not JSON\n", json.dumps(SAMPLE).encode()[:-9], b"\xff\xfe\n",
        json.dumps(SAMPLE | {"format": 2}).encode(), json.dumps(SAMPLE | {"p50_seconds": "1"}).encode(),
        json.dumps(SAMPLE | {"p50_seconds": -1.0}).encode(), json.dumps(SAMPLE | {"p50_seconds": 0.0}).encode(),
        json.dumps({k: v for k, v in SAMPLE.items() if k != "device"}).encode(),
        json.dumps(SAMPLE).encode() + b"\n" + json.dumps(SAMPLE | {"batch": None}).encode(),
        b'{"format": 1, "p50_seconds": NaN}', b"version https://git-lfs.github.com/spec/v1\n",
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "results"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        records.read(path, "--gate")
    assert error.value.field == "--gate" and str(path) in str(error.value.value)
    for other in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError):
            records.read(other, "--gate")
