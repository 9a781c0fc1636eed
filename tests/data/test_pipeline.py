import threading
import time

import jax
import numpy as np
import pytest

from cmd_jax import defaults
from cmd_jax.data import pipeline
from cmd_jax.data.pipeline import BatchPlan, batches, local_rows, to_global, video_reader
from cmd_jax.errors import UserError
from cmd_jax.sharding import BATCH_AXES, make_mesh

T, H, W = 3, 2, 4


class CountedSource:
    """Clip i is full of i, but for its first value, which the generator draws."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return self.clips

    def clip(self, index, rng):
        video = np.full((T, H, W, 3), index, np.uint8)
        video[0, 0, 0, 0] = rng.integers(256)
        return video, index % 5, None


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(defaults.stage("content").mesh)


def read_batches(mesh, start, stop, seed=0, clips=11, batch_size=4, threads=2, prefetch=3, read=None):
    plan = BatchPlan(clips, batch_size, seed)
    read = read or video_reader(CountedSource(clips))
    return batches(read, plan, mesh, start=start, stop=stop, threads=threads, prefetch=prefetch)


def host(batches):
    return [jax.tree.map(np.asarray, batch) for batch in batches]


def test_a_batch_depends_on_seed_and_step_alone(mesh):
    whole = host(read_batches(mesh, 0, 12))
    for start, stop, threads, prefetch in ((0, 12, 1, 1), (5, 12, 4, 8), (11, 12, 2, 1)):
        again = host(read_batches(mesh, start, stop, threads=threads, prefetch=prefetch))
        assert len(again) == stop - start
        for ours, theirs in zip(again, whole[start:], strict=True):
            assert np.array_equal(ours["video"], theirs["video"]) and np.array_equal(ours["label"], theirs["label"])
    other = host(read_batches(mesh, 0, 12, seed=1))
    assert sum(not np.array_equal(a["video"], b["video"]) for a, b in zip(whole, other, strict=True)) == 12


def test_the_batch_is_that_of_the_plan(mesh):
    plan = BatchPlan(11, 4, seed=0)
    for step, batch in enumerate(host(read_batches(mesh, 0, 6))):
        assert batch["video"].shape == (4, T, H, W, 3) and batch["video"].dtype == np.uint8
        assert np.array_equal(batch["video"][:, 1, 0, 0, 0], plan.ids(step))
        assert batch["label"].dtype == np.int32 and np.array_equal(batch["label"], plan.ids(step) % 5)
        drawn = [plan.rng(step, row).integers(256) for row in range(4)]
        assert np.array_equal(batch["video"][:, 0, 0, 0, 0], drawn)


@pytest.mark.parametrize("clips, batch_size", [(12, 4), (11, 4), (8, 8), (7, 5)])
def test_every_epoch_visits_every_clip_once_in_its_own_order(clips, batch_size):
    epochs = 6
    plan = BatchPlan(clips, batch_size, seed=3)
    ids = np.concatenate([plan.ids(step) for step in range(-(-epochs * clips // batch_size))])[: epochs * clips]
    orders = ids.reshape(epochs, clips)
    assert (np.sort(orders, axis=1) == np.arange(clips)).all()
    assert len({tuple(order) for order in orders}) == epochs
    assert not np.array_equal(BatchPlan(clips, batch_size, seed=4).ids(0), plan.ids(0))


def test_draws_differ_between_steps_rows_and_seeds():
    draws = {
        BatchPlan(9, 2, seed).rng(step, row).integers(2**60) for seed in (0, 1) for step in range(3) for row in range(2)
    }
    assert len(draws) == 12


def test_a_generator_is_made_when_something_is_drawn(monkeypatch):
    ours, numpy_s = BatchPlan(9, 2, 7).rng(3, 1), np.random.default_rng((7, 1, 3, 1))
    for _ in range(3):
        assert ours.integers(1000) == numpy_s.integers(1000) and ours.random() == numpy_s.random()
    assert np.array_equal(ours.permutation(9), numpy_s.permutation(9))
    monkeypatch.setattr(np.random, "default_rng", None)
    BatchPlan(9, 2, 7).rng(3, 1)


def test_a_thread_at_another_epoch_may_replace_the_table_of_orders_at_any_moment():
    class Evicted(BatchPlan):
        _orders = property(lambda self: {}, lambda self, table: None)

    assert np.array_equal(Evicted(4, 4, seed=0).ids(7), BatchPlan(4, 4, seed=0).ids(7))


def test_fewer_clips_than_a_batch_is_an_error():
    with pytest.raises(
        UserError, match="^train.batch_size=8: more than the 7 usable clips: no batch per epoch; use at "
    ):
        BatchPlan(7, 8, seed=0)
    assert sorted(BatchPlan(8, 8, seed=0).ids(0)) == list(range(8))


def test_one_of_several_captions_is_drawn_by_seed_step_and_row():
    class Captioned(CountedSource):
        def clip(self, index, rng):
            return (*super().clip(index, rng)[:2], f"{index} {rng.integers(1000)}")

    read, plan = (
        video_reader(Captioned(4), lambda texts: np.array([[int(n) for n in texts[0].split()]])),
        BatchPlan(4, 4, 0),
    )
    seen = set()
    for step in range(3):
        for row, index in enumerate(plan.ids(step)):
            example, rng = read(int(index), plan.rng(step, row)), plan.rng(step, row)
            assert example["video"][0, 0, 0, 0] == rng.integers(256)  # the start is drawn before, as without captions
            assert example["ids"].tolist() == [index, drawn := rng.integers(1000)]
            seen.add(int(drawn))
    assert len(seen) > 8


def test_batches_are_global_arrays_split_over_the_batch(mesh):
    batch = next(read_batches(mesh, 0, 1))
    for array in batch.values():
        assert isinstance(array, jax.Array) and array.shape[0] == 4
        assert array.sharding.mesh == mesh and array.sharding.spec[0] == BATCH_AXES
    assert local_rows(4, mesh) == [0, 1, 2, 3]
    rows = {row: {"x": np.float32(row)} for row in range(4)}
    assert np.asarray(to_global(rows, 4, mesh)["x"]).tolist() == [0, 1, 2, 3]


def test_an_error_of_the_reader_reaches_the_consumer_after_the_batches_before_it(mesh):
    plan = BatchPlan(11, 4, seed=0)
    source = CountedSource(11)

    def read(index, rng):
        if index == plan.ids(2)[1]:
            raise UserError("data.root", f"clip {index}", "has changed", "restore it")
        return video_reader(source)(index, rng)

    # Which steps come before the first one that holds the clip:
    first = next(step for step in range(9) if plan.ids(2)[1] in plan.ids(step))
    got = read_batches(mesh, 0, 9, read=read, threads=3)
    for _ in range(first):
        next(got)
    with pytest.raises(UserError, match="data.root=clip .*: has changed; restore it"):
        next(got)


def test_a_consumer_may_leave_early(mesh):
    """The readers run ahead by the prefetched batches only, and stop with their consumer."""
    reads, read = [], video_reader(CountedSource(11))
    got = read_batches(mesh, 0, 10**6, threads=2, prefetch=4, read=lambda *a: reads.append(1) or read(*a))
    next(got)
    got.close()
    time.sleep(0.2)
    assert 4 <= len(reads) <= 4 + 4 * 4 + 2


def test_the_clips_of_a_batch_are_read_at_the_same_time_by_as_many_threads(mesh):
    """And none waits in memory for a thread to finish its batch."""
    together, inside, most, read = threading.Barrier(3), [], [], video_reader(CountedSource(11))

    def slow(index, rng):
        inside.append(index)
        most.append(len(inside))
        together.wait(20)  # broken, unless there are three clips of the one batch in reading
        inside.pop()
        return read(index, rng)

    (batch,) = read_batches(mesh, 4, 5, threads=3, prefetch=1, batch_size=6, read=slow)
    assert max(most) == 3
    assert np.asarray(batch["id"]).tolist() == BatchPlan(11, 6, seed=0).ids(4).tolist()


def test_rows_that_take_no_time_are_read_many_in_a_turn(mesh, monkeypatch):
    """And those that take longer one by one, so that all threads work at a batch."""
    turns = []

    class Counted(pipeline.ThreadPoolExecutor):
        def submit(self, load, positions):
            turns.append(len(positions))
            return super().submit(load, positions)

    monkeypatch.setattr(pipeline, "ThreadPoolExecutor", Counted)
    monkeypatch.setattr(pipeline, "to_global", lambda rows, *_: [rows[row]["id"] for row in sorted(rows)])
    plan = BatchPlan(1000, 64, 0)
    for seconds, most in ((0, 32), (2 * pipeline.TURN, 1)):
        turns.clear()
        read = lambda index, rng, seconds=seconds: time.sleep(seconds) or {}  # noqa: E731
        got = list(batches(read, plan, mesh, start=2, stop=8 if most > 1 else 3, threads=2, prefetch=2))
        assert got == [plan.ids(2 + n).tolist() for n in range(len(got))]
        assert max(turns) == most and sum(turns) == 64 * len(got)


def test_threads_end_with_their_consumer(mesh):
    before = {*threading.enumerate()}
    for stop in (3, 10**6):
        got = read_batches(mesh, 0, stop, threads=3)
        for _ in range(3):
            next(got)
        got.close()
    for _ in range(100):
        if before >= {*threading.enumerate()}:
            break
        time.sleep(0.02)
    assert before >= {*threading.enumerate()}


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 3], [1], [2]], [[0, 1, 2, 3], [0, 1, 2, 3]]])
def test_a_process_reads_its_own_rows_of_the_one_batch(mesh, monkeypatch, parts):
    """Whatever their number: bits and order are those of a process alone, from any step on."""
    monkeypatch.setattr(pipeline, "to_global", lambda rows, batch_size, mesh: rows)
    plan, source = BatchPlan(11, 4, seed=0), CountedSource(11)
    for rows in parts:
        monkeypatch.setattr(pipeline, "local_rows", lambda batch_size, mesh, rows=rows: rows)
        for step, batch in enumerate(read_batches(mesh, 3, 9, threads=3, prefetch=2), 3):
            assert list(batch) == rows
            for row, example in batch.items():
                video, label, _ = source.clip(int(plan.ids(step)[row]), plan.rng(step, row))
                assert np.array_equal(example["video"], video) and example["label"] == label
                assert example["id"] == plan.ids(step)[row]
        assert step == 8
