"""What the verdicts say of ledgers that are made up."""

import json

import pytest

from cmd_jax.files import as_path
from cmd_jax.verbs.resume_trainings import Watch
from cmd_jax.verbs.resume_verdicts import Kill, Run, Segment, judge_devices, judge_killed, read_ledger, table_rows

STEPS, INTERVAL = 12, 3
DIGESTS = {name: name[0] * 64 for name in ("params", "ema", "opt_state")}


def step_of(step: int, loss_of=lambda step: 1 / (step + 1)) -> tuple[int, str, str]:
    return step, f"{step:016x}", float(loss_of(step)).hex()


def segment(start: int, stop: int, devices: int = 2, **options) -> Segment:
    return Segment(start, devices, [step_of(step, **options) for step in range(start, stop)])


WHOLE = Run([segment(0, STEPS)], DIGESTS)
# Killed in the save of step 3, which it so lost, and again after a complete one.
KILLED = [segment(0, 5), segment(0, 8), segment(6, STEPS)]
KILLS = [Kill(5, 3, True), Kill(8, 6, False)]


def faults(segments=KILLED, digests=DIGESTS, kills=KILLS, asked=2) -> list[str]:
    """The claims that do not hold of a killed run."""
    verdicts = judge_killed(WHOLE, Run(segments, digests), kills, asked, STEPS, INTERVAL)
    return [verdict.claim.removeprefix("killed: ") for verdict in verdicts if not verdict.holds]


def tampered(number: int, step: int, part: int, value: str) -> list[Segment]:
    """KILLED with one value of one line changed."""
    segments = [segment._replace(steps=list(segment.steps)) for segment in KILLED]
    index = step - segments[number].start
    line = list(segments[number].steps[index])
    line[part] = value
    segments[number].steps[index] = tuple(line)
    return segments


# What the ledgers must say.


def test_an_honest_ledger_passes():
    assert faults() == []
    assert Run(KILLED, DIGESTS).repeated() == [5, 2]
    assert Run(KILLED, DIGESTS).last() == WHOLE.last()


def test_another_clip_is_noticed():
    assert faults(tampered(2, 9, 1, "f" * 16)) == ["same clips at every step"]
    # In a step that was done again, only its repetition counts for the parameters, but both must be alike.
    assert faults(tampered(0, 2, 1, "f" * 16)) == ["repeated steps gave the same clips and losses"]


def test_the_last_bit_of_a_loss_is_noticed():
    loss = float.fromhex(step_of(9)[2])
    near = (loss + loss * 2**-52).hex()
    assert near != loss.hex()
    assert faults(tampered(2, 9, 2, near)) == ["same loss at every step, to the bit"]
    near = (0.5 + 2**-53).hex()
    assert faults(tampered(0, 1, 2, near)) == ["repeated steps gave the same clips and losses"]


@pytest.mark.parametrize("name", DIGESTS)
def test_another_digest_is_noticed(name):
    claim = "same params, ema, opt_state at the end, to the bit"
    assert faults(digests=DIGESTS | {name: "0" * 64}) == [claim]
    assert faults(digests={k: v for k, v in DIGESTS.items() if k != name}) == [claim]


def test_missing_steps_are_noticed():
    torn = tampered(2, 9, 0, "")
    del torn[2].steps[3]
    assert "every step was done" in faults(torn)
    assert "same clips at every step" in faults(torn)
    assert faults([*KILLED[:2], segment(6, STEPS - 1)])[0] == "every step was done"
    # A start beyond what was done has left steps out, though all of those there agree.
    assert (
        faults([segment(0, 5), segment(0, 8), segment(9, STEPS)], kills=[KILLS[0], Kill(8, 6, False)])[0]
        == "every step was done"
    )


@pytest.mark.parametrize(
    "kills, lost",
    [
        ([Kill(5, 3, False), KILLS[1]], True),  # 3 was complete, yet it began at 0
        ([Kill(7, 6, True), KILLS[1]], True),  # 3 must have been complete
        ([KILLS[0], Kill(8, 6, True)], False),  # it did better than it had to
        ([KILLS[0]], True),  # a start too many
    ],
)
def test_lost_checkpoints_are_noticed(kills, lost):
    assert len(faults(kills=kills, asked=len(kills))) == lost


def test_too_few_kills_are_noticed():
    verdicts = judge_killed(WHOLE, Run(KILLED, DIGESTS), KILLS, 3, STEPS, INTERVAL)
    (verdict,) = [v for v in verdicts if not v.holds]
    assert verdict.detail == "2 of 3 kills, 1 of them in a save; the run ended before: raise train.steps"


def changed(segments: list[Segment], devices=(2, 1, 4)) -> list[str]:
    verdicts = judge_devices(WHOLE, Run(segments, {}), devices, STEPS)
    return [verdict.claim.removeprefix("devices: ") for verdict in verdicts if not verdict.holds]


def test_changing_devices_may_change_losses_a_little():
    def near(step):
        return (1 + 0.9e-4 * (step == 7)) / (step + 1)

    def far(step):
        return (1 + 1.1e-4 * (step == 7)) / (step + 1)

    def segments(loss_of):
        return [segment(0, 4), segment(4, 9, 1, loss_of=loss_of), segment(9, STEPS, 4)]

    assert changed(segments(near)) == []
    assert changed(segments(far)) == ["losses within 0.0001 of each other"]
    other = segments(near)
    other[1].steps[0] = (4, "f" * 16, other[1].steps[0][2])
    assert changed(other) == ["same clips at every step"]


def test_devices_that_were_not_used_are_noticed():
    claim = "trained on each number of devices in turn"
    assert changed([segment(0, 4), segment(4, STEPS, 1)]) == [claim]
    assert changed([segment(0, 4), segment(4, 9, 1), segment(9, STEPS, 1)]) == [claim]
    assert changed([segment(0, 5), segment(4, 9, 1), segment(9, STEPS, 4)]) == ["no step was repeated"]


@pytest.mark.parametrize("torn", ['{"step": 1, "id', "7", '{"step": 1}', "[" * 99])
def test_a_ledger_with_a_torn_line_is_read(tmp_path, torn):
    path = tmp_path / "ledger.jsonl"
    lines = [{"start": 0, "devices": 2, "processes": 1}, {"step": 0, "ids": "a", "loss": "0x1p+0"}]
    watch = Watch(tmp_path)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn + '\n{"start": 0, "devices": 1}\n')
    assert read_ledger(path) == [Segment(0, 2, [(0, "a", "0x1p+0")]), Segment(0, 1, [])]
    watch.look()
    assert watch.done == 1


def test_the_table_has_a_row_for_each_checkpoint_and_the_end():
    half = Run([segment(0, 4), segment(4, STEPS, loss_of=lambda step: 1.5 / (step + 1))], DIGESTS)
    half.segments[1].steps[2] = (6, "f" * 16, half.segments[1].steps[2][2])
    rows = table_rows({"whole": WHOLE, "killed": half}, STEPS, 5)
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert [row["killed"]["ids"] for row in rows] == [True, False, False]
    assert rows[0]["whole"] == step_of(4)[2]
    assert rows[0]["killed"]["difference"] == pytest.approx(1 / 3)
    # A run that is cut short has no loss there.
    rows = table_rows({"whole": WHOLE, "killed": Run([segment(0, 7)], {})}, STEPS, 6)
    assert rows[1]["killed"] == {"ids": False, "loss": None, "difference": None}
    rows = table_rows({"whole": Run([segment(0, 7)], {}), "killed": WHOLE}, STEPS, 6)
    assert (rows[1]["whole"], rows[1]["killed"]["ids"], rows[1]["killed"]["difference"]) == (None, False, None)


def test_what_a_training_in_a_bucket_shows_of_itself(gcs):
    """A step without a manifest is being saved, or, below one with it, removed."""
    watch = Watch(as_path(f"{gcs}/run"))
    for name in ("3/run.json", "6/manifest.json", "9/run.json"):
        gcs.put(f"run/checkpoints/{name}", b"{}")
    watch.look()
    assert (watch.done, watch.saving, watch.newest) == (None, [], 0)  # they may be of an earlier start
    gcs.put("run/ledger.jsonl", b'{"start": 6, "devices": 2}\n{"step": 6, "ids": "a", "loss": "0x1p+0"}\n{"step": 7')
    watch.look()
    assert (watch.done, watch.saving, watch.newest) == (7, [9], 9)
    gcs.put("run/checkpoints/9/manifest.json", b"{}")
    watch.look()
    assert (watch.done, watch.saving, watch.newest) == (7, [], 9)
