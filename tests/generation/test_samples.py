"""Samples on disk: what is kept, dropped and counted; a killed run ends with the same bytes."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from proxykd_jax.data.collate import TokenRow
from proxykd_jax.errors import UserError
from proxykd_jax.generation.fresh_split import AnsweredSplit
from proxykd_jax.generation.sampler import Sample
from proxykd_jax.generation.samples import LengthBudget, SampleStore, sample_round

END = 9


def row_id_of(tokens, prompt_length) -> str:
    state = hashlib.sha256(np.asarray(tokens, "<i4").tobytes())
    state.update(np.array([prompt_length], "<i4").tobytes())
    return state.hexdigest()


class Rows:
    """A split that is kept in memory."""

    name = "align"

    def __init__(self, count: int = 11, answers: bool = True) -> None:
        rng = np.random.default_rng(0)
        self._rows = []
        for _ in range(count):
            prompt = rng.integers(0, 9, rng.integers(1, 6))
            answer = [*rng.integers(0, 9, rng.integers(1, 6)), END] if answers else []
            tokens = np.array([*prompt, *answer], np.int32)
            self._rows.append(TokenRow(tokens, len(prompt), row_id_of(tokens, len(prompt))))
        self.lengths = np.array([len(row.tokens) for row in self._rows], np.int32)
        self.prompt_lengths = np.array([row.prompt_length for row in self._rows], np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices):
        return [self._rows[index] for index in indices]


class Sampler:
    """Makes answers from the row id; every fourth is empty, and every fourth is the teacher's."""

    def __init__(self, split: Rows, fail_at: int | None = None) -> None:
        self.calls: list[tuple[list[str], list[int]]] = []
        self._split, self._fail_at = split, fail_at

    def __call__(self, prompts, row_ids, budgets):
        if len(self.calls) == self._fail_at:
            raise KeyboardInterrupt
        self.calls.append((row_ids, budgets))
        by_id = {row.row_id: row for row in self._split.read(range(len(self._split)))}
        samples = []
        for prompt, row_id, budget in zip(prompts, row_ids, budgets, strict=True):
            row, kind = by_id[row_id], int(row_id[:4], 16) % 4
            np.testing.assert_array_equal(prompt, row.prompt)
            tokens = {0: [END], 1: row.answer, 2: [1, 2, 3], 3: [4, END]}[kind][:budget]
            tokens = np.asarray(tokens, np.int32)
            samples.append(Sample(tokens, END in tokens, -np.ones(len(tokens), np.float32)))
        return samples


def make(folder: Path, split: Rows, sampler: Sampler, rows=None, against_teacher=True):
    store = SampleStore(folder)
    if not store.begin({"seed": 1}, {"proxy": "p"}):
        sample_round(
            store, split, range(len(split)) if rows is None else rows,
            sample_fn=sampler, against_teacher=against_teacher, rows_per_part=3,
            budget=LengthBudget(12, 7), end_token_ids=[END],
        )  # fmt: skip
        store.complete()
    return store


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_answers_and_drops(tmp_path):
    split = Rows()
    rows = [10, 2, 5, 0, 1, 7, 8]
    sampler = Sampler(split)
    store = make(tmp_path / "r", split, sampler, rows)
    assert len(store) == 7 and store.is_complete
    assert [len(ids) for ids, _ in sampler.calls] == [3, 3, 1]
    kinds = {0: 1, 1: 2, 2: 0, 3: 0}  # the sampler's kinds by drop code
    for place, sampled in enumerate(store.read(range(7))):
        (row,) = split.read([rows[place]])
        assert sampled.row == rows[place] and sampled.row_id == row.row_id
        kind = int(row.row_id[:4], 16) % 4
        assert sampled.drop == kinds[kind]
        assert sampled.finished == (END in sampled.tokens)
        assert sampled.loglik == -len(sampled.tokens)
    counts = store.counts()
    assert counts["rows"] == 7
    assert counts["kept"] + counts["dropped_empty"] + counts["dropped_equals_chosen"] == 7
    assert counts["kept"] == (store.drops == 0).sum() > 0
    assert counts["dropped_empty"] > 0 and counts["dropped_equals_chosen"] > 0
    assert counts["finish_rate"] == pytest.approx(store.finished.mean())
    assert "reference_gap" not in counts
    np.testing.assert_array_equal(store.lengths, [len(s.tokens) for s in store.read(range(7))])
    with pytest.raises(IndexError):
        store.read([7])


def test_budgets_leave_room_for_the_prompt(tmp_path):
    split = Rows()
    sampler = Sampler(split)
    make(tmp_path / "r", split, sampler)
    budgets = [budget for _, part in sampler.calls for budget in part]
    np.testing.assert_array_equal(budgets, np.minimum(12 - split.prompt_lengths, 7))


@pytest.mark.parametrize("parts_done", [0, 1, 3])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, parts_done):
    split = Rows()
    make(tmp_path / "whole", split, Sampler(split))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", split, Sampler(split, fail_at=parts_done))
    (tmp_path / "cut" / ".part_00003.safetensors.tmp").write_bytes(b"half")
    assert not SampleStore(tmp_path / "cut").is_complete
    again = Sampler(split)
    make(tmp_path / "cut", split, again)
    assert len(again.calls) == 4 - parts_done
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    # The store is complete, so nothing is sampled.
    make(tmp_path / "cut", split, Sampler(split, fail_at=0))


def test_other_settings_or_rows_are_refused(tmp_path):
    split = Rows()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "r", split, Sampler(split, fail_at=2))
    with pytest.raises(UserError, match="seed: 1 then, 2 now"):
        SampleStore(tmp_path / "r").begin({"seed": 2}, {"proxy": "p"})
    with pytest.raises(UserError, match="other rows"):
        make(tmp_path / "r", split, Sampler(split), rows=range(10, -1, -1))


def test_references_beside_the_answers(tmp_path):
    """References have their own parts, may come in any order, and are 0 until then."""
    split = Rows()
    store = make(tmp_path / "r", split, Sampler(split))
    chosen = -np.arange(1, 12, dtype=np.float32)
    rejected = np.where(store.drops == 0, chosen / 2, 0).astype(np.float32)
    places = np.array([4, 0, 9, 1, 10, 2, 3, 5, 8, 7, 6], np.int32)
    assert store.missing_references(2) == [0, 1]
    store.append_references(1, places[6:], chosen[places[6:]], rejected[places[6:]])
    assert store.missing_references(2) == [0]
    np.testing.assert_array_equal(store.references()[0][places[:6]], 0)
    np.testing.assert_array_equal(store.references()[0][places[6:]], chosen[places[6:]])
    store.append_references(0, places[:6], chosen[places[:6]], rejected[places[:6]])
    np.testing.assert_array_equal(store.references(), [chosen, rejected])
    gaps = [abs(s.loglik - r) for s, r in zip(store.read(range(11)), rejected, strict=True)]
    kept = store.drops == 0
    assert store.counts()["reference_gap"] == pytest.approx(np.max(np.array(gaps)[kept]))
    store.append_references(0, places[:6] + 90, chosen[places[:6]], rejected[places[:6]])
    with pytest.raises(UserError, match="do not fit the answers"):
        store.references()


def test_log_probs_that_are_no_numbers_stop_the_round(tmp_path):
    split = Rows()
    store = make(tmp_path / "r", split, Sampler(split))
    good, bad = np.zeros(11, np.float32), np.full(11, np.nan, np.float32)
    for chosen, rejected in ((bad, good), (good, bad)):
        with pytest.raises(UserError, match="not finite"):
            store.append_references(0, np.arange(11, dtype=np.int32), chosen, rejected)
    assert store.missing_references(1) == [0]


def test_answered_prompts_read_like_a_split(tmp_path):
    split = Rows(answers=False)
    store = make(tmp_path / "r", split, Sampler(split), against_teacher=False)
    assert set(store.drops.tolist()) == {0, 1}
    assert "reference_gap" not in store.counts()
    answered = AnsweredSplit(split, SampleStore(tmp_path / "r"))
    assert len(answered) == (store.drops == 0).sum()
    rows = answered.read(range(len(answered)))
    np.testing.assert_array_equal(answered.lengths, [len(row.tokens) for row in rows])
    np.testing.assert_array_equal(answered.prompt_lengths, [row.prompt_length for row in rows])
    assert answered.row_ids == [row_id_of(row.tokens, row.prompt_length) for row in rows]
    kept = [s for s in store.read(range(len(store))) if s.drop == 0]
    for row, sampled, finished in zip(rows, kept, answered.finished, strict=True):
        np.testing.assert_array_equal(row.answer, sampled.tokens)
        assert finished == sampled.finished == (row.answer[-1] == END)
        np.testing.assert_array_equal(row.prompt, split.read([sampled.row])[0].prompt)
    (first,) = answered.read([2])
    assert first.row_id == rows[2].row_id
    with pytest.raises(IndexError):
        answered.read([len(answered)])
    changed = Rows(answers=False)
    changed._rows = changed._rows[::-1]
    with pytest.raises(UserError, match="other prompts"):
        AnsweredSplit(changed, store).read([0])


def test_a_store_that_is_not_complete_is_no_split(tmp_path):
    split = Rows(answers=False)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "r", split, Sampler(split, fail_at=1), against_teacher=False)
    with pytest.raises(UserError, match="not complete"):
        AnsweredSplit(split, SampleStore(tmp_path / "r"))


def test_an_empty_round(tmp_path):
    split = Rows()
    store = make(tmp_path / "r", split, Sampler(split), rows=[])
    assert len(store) == 0 and store.is_complete
    assert store.counts()["finish_rate"] == 0.0
