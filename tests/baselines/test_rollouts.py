"""Answers of a student during training: what they depend on, and the batches made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from proxykd_jax.baselines.rollouts import (
    Answering,
    answer_batch,
    answer_figures,
    given_answers,
)
from proxykd_jax.config import AxesConfig
from proxykd_jax.config.online_methods import Gkd
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.losses import batch_mean
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.model import Model
from proxykd_jax.training.state import ModelSpec
from tests.baselines.online import answers, batch_of, corpus_of
from tests.generation.tiny import some_prompts, tiny_model

CONFIG, PARAMS, ADAPTER = tiny_model()
STUDENT = Model(ModelSpec(CONFIG, "lora", "float32", "none"), PARAMS, ADAPTER, Path())
END = 3


@pytest.fixture(scope="module")
def places() -> list[TokenRow | None]:
    prompts, ids = some_prompts(9, longest=8)
    rng = np.random.default_rng(1)
    rows = [
        TokenRow(np.concatenate([p, rng.integers(1, 24, 4).astype(np.int32)]), len(p), i)
        for p, i in zip(prompts, ids, strict=True)
    ]
    return [*rows[:4], None, *rows[4:]]


def draw(places, step=2, **changes):
    keys = {"sample_batch_size": 16, "per_prompt": 2, "temperature": 1.0, "max_length": 14}
    keys |= changes
    method = Gkd(sample_batch_size=keys["sample_batch_size"], max_new_tokens=keys.get("most"))
    corpus = corpus_of(24, keys["max_length"], [END])
    mesh = make_mesh(AxesConfig())
    answering = Answering(CONFIG, method, corpus, mesh, 5, keys["temperature"], keys["per_prompt"])
    return answering.answer(STUDENT, places, step)


def tokens(found) -> list[list[int] | None]:
    return [None if answer is None else answer.row.tokens.tolist() for answer in found]


def test_an_answer_depends_on_its_row_its_number_and_the_step_alone(places):
    found = tokens(draw(places))
    assert len(found) == 20 and found[8:10] == [None, None]
    pairs = [tuple(found[i : i + 2]) for i in range(0, 20, 2)]
    assert sum(a != b for a, b in pairs if a) > 6
    assert tokens(draw(places[::-1])) == [x for pair in pairs[::-1] for x in pair]
    assert tokens(draw(places, sample_batch_size=8)) == found
    assert tokens(draw(places[2:3])) == found[4:6]
    assert tokens(draw(places, per_prompt=1)) == found[::2]
    other = tokens(draw(places, step=3))
    assert sum(a != b for a, b in zip(found, other, strict=True)) > 12


def test_what_a_row_holds_beside_its_prompt_is_not_looked_at(places):
    bare = [
        None if row is None else TokenRow(row.prompt, row.prompt_length, row.row_id)
        for row in places
    ]
    assert tokens(draw(bare)) == tokens(draw(places))


def test_truncated_answers_have_no_end_token_and_budgets_hold(places):
    found = [answer for answer in draw(places, most=3) if answer is not None]
    assert {answer.finished for answer in found} == {True, False}
    for answer in found:
        drawn = answer.row.answer.tolist()
        assert (drawn[-1] == END) == answer.finished and END not in drawn[:-1]
        assert len(drawn) == 3 or (answer.finished and len(drawn) < 3)
    short = [answer for answer in draw(places, max_length=7) if answer is not None]
    lengths = [(len(answer.row.prompt), len(answer.row.tokens)) for answer in short]
    assert all(total <= max(7, prompt) for prompt, total in lengths)
    assert any(total == prompt for prompt, total in lengths)


def test_a_batch_masks_the_answers_tokens_alone():
    found, batch = answers(7), batch_of(7)
    rows = batch.rows
    for b, answer in enumerate(found):
        mask = np.zeros(rows.mask_BL.shape[1], bool)
        if answer is not None:
            row = answer.row
            mask[row.prompt_length - 1 : len(row.tokens) - 1] = True
            np.testing.assert_array_equal(rows.labels_BL[b][mask], row.answer)
        np.testing.assert_array_equal(rows.mask_BL[b], mask)
    assert not rows.mask_BL[1].any() and not rows.mask_BL[2].any()
    there = [a for i, a in enumerate(found) if a is not None and i != 2]
    figures = {k: float(batch_mean(v)) for k, v in answer_figures(batch).items()}
    assert figures["answer_tokens"] == pytest.approx(np.mean([len(a.row.answer) for a in there]))
    assert figures["finished"] == pytest.approx(np.mean([a.finished for a in there]))
    assert figures["student_share"] == 1.0


def test_given_answers_are_finished_where_they_end(places):
    rows = [row for row in places if row is not None][:3]
    ended = TokenRow(np.append(rows[0].tokens, END).astype(np.int32), rows[0].prompt_length, "e")
    found = given_answers([ended, None, *rows[1:]], [END])
    assert [a and (a.finished, a.sampled) for a in found] == [
        (True, False),
        None,
        (bool(rows[1].answer[-1] == END), False),
        (bool(rows[2].answer[-1] == END), False),
    ]
    longest = answer_batch(found, 16)
    assert longest.rows.tokens_BL.shape == (4, 16)
