"""The stream: exact at any step, equal for any number of processes, and with clear errors."""

import threading

import numpy as np
import pytest

from proxykd_jax.data.collate import TokenRow, collate_rows
from proxykd_jax.data.order import default_buckets, plan_epoch
from proxykd_jax.data.stream import BatchStream, import_tensorflow
from proxykd_jax.errors import UserError

RNG = np.random.default_rng(0)
ROWS = [
    TokenRow(np.arange(1, n + 1, dtype=np.int32) + 1000 * i, int(RNG.integers(1, n)), f"{i:064x}")
    for i, n in enumerate(RNG.integers(2, 200, 70))
]
LENGTHS = np.array([len(row.tokens) - 1 for row in ROWS])


def plan_of(batching, batch_size=8):
    def plan_of_epoch(epoch):
        return plan_epoch(
            LENGTHS,
            seed=5,
            epoch=epoch,
            batch_size=batch_size,
            batching=batching,
            buckets=default_buckets(256),
        )

    return plan_of_epoch


def collate(batch):
    rows = [[ROWS[i] for i in row] for row in batch.rows]
    return collate_rows(rows, batch.length, batch.num_segments, len(batch.rows))


def equal(a, b):
    for name in ("tokens", "labels", "mask", "segment_ids", "positions"):
        np.testing.assert_array_equal(getattr(a, f"{name}_BL"), getattr(b, f"{name}_BL"))
    np.testing.assert_array_equal(a.example_mask_BS, b.example_mask_BS)


# --- collation ------------------------------------------------------------------------------------


def test_mask_is_shifted_with_the_labels():
    row = TokenRow(np.array([5, 6, 7, 8, 9], np.int32), 3, "")
    batch = collate_rows([[row]], 6, 1, 2)
    assert batch.tokens_BL[0].tolist() == [5, 6, 7, 8, 0, 0]
    assert batch.labels_BL[0].tolist() == [6, 7, 8, 9, 0, 0]
    assert batch.mask_BL[0].tolist() == [False, False, True, True, False, False]
    assert batch.labels_BL[0][batch.mask_BL[0]].tolist() == row.answer.tolist()
    assert batch.segment_ids_BL[0].tolist() == [1, 1, 1, 1, 0, 0]
    assert not batch.mask_BL[1].any() and not batch.example_mask_BS[1].any()


def test_places_are_those_inside_the_mask():
    row = TokenRow(np.array([5, 6, 7, 8, 9], np.int32), 3, "")
    batch = collate_rows([[row, row], [row]], 12, 2, 3, answers=5)
    assert batch.places_GA.tolist() == [[2, 3, 6, 7, 12], [2, 3, 12, 12, 12], [12] * 5]
    shared = collate_rows([[row, row], [row]], 12, 2, 4, answers=7, together=2)
    assert shared.places_GA.tolist() == [[2, 3, 6, 7, 14, 15, 24], [24] * 7]
    with pytest.raises(ValueError, match="4 answer tokens do not fit 3 places"):
        collate_rows([[row, row]], 12, 2, 1, answers=3)


@pytest.mark.parametrize("batching", ["pad", "bucket", "pack"])
def test_batches_hold_exactly_the_rows(batching):
    """The test takes the examples out of the arrays again, by their segments."""
    found = []
    for planned in plan_of(batching)(0):
        batch = collate(planned)
        for b in range(8):
            for s in range(batch.example_mask_BS.shape[1]):
                at = np.flatnonzero(batch.segment_ids_BL[b] == s + 1)
                assert len(at) > 0 if batch.example_mask_BS[b, s] else len(at) == 0
                if len(at) == 0:
                    continue
                assert batch.positions_BL[b, at].tolist() == list(range(len(at)))
                tokens = [*batch.tokens_BL[b, at], batch.labels_BL[b, at[-1]]]
                assert tokens[1:] == batch.labels_BL[b, at].tolist()
                prompt_length = len(tokens) - int(batch.mask_BL[b, at].sum())
                found.append((tuple(int(t) for t in tokens), prompt_length))
    expected = [(tuple(row.tokens.tolist()), row.prompt_length) for row in ROWS]
    assert sorted(found) == sorted(expected)


def test_rows_that_do_not_fit_are_an_error():
    row = TokenRow(np.arange(9, dtype=np.int32), 3, "")
    with pytest.raises(ValueError, match="8 positions"):
        collate_rows([[row]], 7, 1, 1)
    with pytest.raises(ValueError, match="2 examples"):
        collate_rows([[row, row]], 32, 1, 1)
    with pytest.raises(ValueError, match="2 rows"):
        collate_rows([[row], [row]], 32, 1, 1)


# --- streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_resume_at_any_step_equals_the_uninterrupted_stream(batching):
    whole = list(BatchStream(plan_of(batching), collate, 0, 25))
    steps = len(plan_of(batching)(0))
    assert len(whole) == 25 and steps < 12  # more than two epochs
    for start in range(25):
        rest = list(BatchStream(plan_of(batching), collate, start, 25))
        assert len(rest) == 25 - start
        for a, b in zip(rest, whole[start:], strict=True):
            equal(a, b)


def test_steps_count_over_epochs():
    plan_of_epoch = plan_of("bucket")
    stream = BatchStream(plan_of_epoch, collate, 0, 30)
    expected = [batch for epoch in range(4) for batch in plan_of_epoch(epoch)][:30]
    for batch, planned in zip(stream, expected, strict=True):
        equal(batch, collate(planned))


@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_processes_share_the_global_batch(batching):
    whole = list(BatchStream(plan_of(batching), collate, 2, 9))
    parts = [
        list(BatchStream(plan_of(batching), collate, 2, 9, process_index=p, process_count=4))
        for p in range(4)
    ]
    for batch, *mine in zip(whole, *parts, strict=True):
        assert all(part.tokens_BL.shape == (2, batch.tokens_BL.shape[1]) for part in mine)
        for name in ("tokens_BL", "mask_BL", "segment_ids_BL", "example_mask_BS"):
            joined = np.concatenate([getattr(part, name) for part in mine])
            np.testing.assert_array_equal(joined, getattr(batch, name))


def test_iterating_again_begins_again_and_leaving_early_is_fine():
    stream = BatchStream(plan_of("pad"), collate)
    first = next(iter(stream))
    for i, batch in enumerate(stream):
        if i == 0:
            equal(first, batch)
        if i == 20:
            break


@pytest.mark.parametrize("there_at", [1, 7, 20])
def test_batches_do_not_wait_for_tensorflow(monkeypatch, there_at):
    """Batches arrive while TensorFlow is still imported, and equal those of tf.data."""
    there, waited = threading.Event(), []

    def slow_import():
        waited.append(there.wait(60))
        return import_tensorflow()

    monkeypatch.setattr("proxykd_jax.data.stream.import_tensorflow", slow_import)
    found = []
    for batch in BatchStream(plan_of("bucket"), collate, 3, 20):
        found.append(batch)
        if len(found) == there_at:
            there.set()
    there.set()
    planned = [batch for epoch in range(3) for batch in plan_of("bucket")(epoch)]
    for batch, expected in zip(found, planned[3:20], strict=True):
        equal(batch, collate(expected))
    assert all(waited)


def test_batch_that_cannot_be_divided():
    with pytest.raises(UserError, match="multiple of 3"):
        next(iter(BatchStream(plan_of("pad"), collate, process_count=3)))


def test_errors_of_collation_come_through():
    class BrokenRowError(Exception):
        pass

    def collate_until(batch):
        if ROWS[batch.rows[0][0]].tokens[0] == failing:
            raise BrokenRowError("row is damaged")
        return collate(batch)

    planned = plan_of("pad")(0)
    failing = ROWS[planned[4].rows[0][0]].tokens[0]
    seen = 0
    with pytest.raises(BrokenRowError, match="row is damaged"):
        for _ in BatchStream(plan_of("pad"), collate_until, 0, 9):
            seen += 1
    assert seen == 4


def test_epoch_without_batches_is_an_error():
    def empty(epoch):
        return []

    with pytest.raises(ValueError, match="no batches"):
        list(BatchStream(empty, collate, 0, 3))


def test_no_steps_no_batches():
    assert list(BatchStream(plan_of("pad"), collate, 5, 5)) == []
