"""Sharing a prompt between both answers of a pair gives the same numbers as one row each."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.speed.ours_models import model_config
from benchmarks.speed.shapes import SHAPES
from proxykd_jax.config import PreferenceConfig
from proxykd_jax.data.collate import RowsInMemory, TokenRow
from proxykd_jax.data.order import PlannedBatch
from proxykd_jax.generation.samples import SampledRow, SampleStore
from proxykd_jax.models.config import LoraConfig
from proxykd_jax.training.batch_objectives import AlignObjective
from proxykd_jax.training.batches import make_plan
from proxykd_jax.training.pairs import PairRows, collate_pairs, shares_prompt
from proxykd_jax.training.reference import pair_logps

from .conftest import VOCAB, tiny_config
from .test_steps import _step

ROW_ID = "ab" * 32
# (prompt, y, y-hat or None): no prompt, one token, much longer than its answers, no y-hat.
SIZES = [(0, 5, 4), (1, 3, 7), (9, 2, 2), (6, 8, None), (4, 1, 9), (3, 6, 1)]


def made_pairs(rng: np.random.Generator) -> list[tuple[TokenRow, TokenRow | None]]:
    pairs = []
    for prompt, chosen, rejected in SIZES:
        ids = rng.integers(3, VOCAB, prompt)
        y, own = (
            np.concatenate([ids, rng.integers(3, VOCAB, size or 0)]).astype(np.int32)
            for size in (chosen, rejected)
        )
        second = None if rejected is None else TokenRow(own, prompt, ROW_ID)
        pairs.append((TokenRow(y, prompt, ROW_ID), second))
    return pairs


def batches(answers: bool = True):
    """Returns the same pairs with one row per answer, and with shared prompts."""
    rng = np.random.default_rng(0)
    pairs = made_pairs(rng)
    references = tuple(rng.normal(-15, 3, len(pairs)).astype(np.float32) for _ in range(2))
    rows = (*((i,) for i in range(len(pairs))), (), ())
    single = PlannedBatch(rows, 16, answers=12 if answers else None)
    shared = PlannedBatch(rows, 24, answers=18 if answers else None)
    return (
        collate_pairs(pairs, single, references, share_prompt=False),
        collate_pairs(pairs, shared, references, share_prompt=True),
    )


@pytest.mark.parametrize(
    "kind, loss, answers, microbatches",
    [
        ("lora_model", "dpo", True, 1),
        ("full_model", "dpo", False, 1),
        ("full_model", "simpo", True, 2),
        ("lora_model", "orpo", False, 2),
        ("full_model", "ipo", True, 1),
    ],
)
def test_one_row_a_pair_has_the_loss_and_gradient_of_two(
    kind, loss, answers, microbatches, request
) -> None:
    model = request.getfixturevalue(kind)
    objective = AlignObjective(PreferenceConfig(loss=loss, beta=0.3), "token_mean", 0.7, 1.3)
    single, shared = batches(answers)
    found, metrics = _step(model, objective, shared, microbatches)
    expected, of_two = _step(model, objective, single)
    assert metrics.keys() == of_two.keys() and metrics["loss"] != 0
    for name, value in of_two.items():
        np.testing.assert_allclose(metrics[name], value, rtol=3e-5, atol=1e-6, err_msg=name)
    # The step is 0.05 times the gradient, whose own rounding grows with its norm.
    rounding = 1e-7 * (10 + of_two["grad_norm"])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=rounding)


@pytest.mark.parametrize("reduction", ["example_mean", "token_mean", "sum"])
def test_nll_beside_the_preference_is_of_the_teachers_answers_alone(full_model, reduction) -> None:
    objective = AlignObjective(PreferenceConfig(loss="dpo", beta=1.0), reduction, 1.0, 0.0)
    single, shared = batches()
    of_one, of_two = (_step(full_model, objective, batch)[1]["nll"] for batch in (shared, single))
    np.testing.assert_allclose(of_one, of_two, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_an_answer_sees_its_prompt_and_itself(lora_model, window) -> None:
    """Neither log-prob changes with the other answer; both change with the prompt."""
    spec, frozen, trainable = lora_model
    if window:
        config = spec.config.replace(sliding_window=window, sliding_layers=(0, 1))
        spec = dataclasses.replace(spec, config=config)
    single, shared = batches()

    def logps(batch):
        found = pair_logps(frozen, trainable, batch, spec=spec, microbatches=1)
        return np.array(found)

    before = logps(shared)
    np.testing.assert_allclose(before, logps(single), rtol=1e-5, atol=1e-5)
    assert (before[1] == 0).tolist() == [False, False, False, True, False, False, True, True]
    rows = shared.rows
    for number in (1, 2):
        of_answer = rows.positions_BL > rows.prefix_B[:, None]
        here = (rows.segment_ids_BL == number) & of_answer
        changed = rows.replace(tokens_BL=np.where(here, 3 + rows.tokens_BL % 30, rows.tokens_BL))
        after = logps(shared.replace(rows=changed))
        np.testing.assert_array_equal(after[2 - number], before[2 - number])
        assert np.any(after[number - 1] != before[number - 1])
    first = rows.tokens_BL.copy()
    first[4, 0] = 3 + first[4, 0] % 30
    after = logps(shared.replace(rows=rows.replace(tokens_BL=first)))
    if window is None:  # with a window of 4, the ends of the longer answers miss the first token
        assert after[0, 4] != before[0, 4] and after[1, 4] != before[1, 4]


def test_batches_of_a_round_hold_every_token_once(tmp_path) -> None:
    """The planned positions are those that the collated rows take."""
    rng = np.random.default_rng(1)
    pairs = made_pairs(rng)
    rows = RowsInMemory([row for row, _ in pairs])
    store = SampleStore(tmp_path / "samples")
    store.begin({}, {})
    drawn = [
        SampledRow(i, ROW_ID, (row or first).answer, True, 0, -1.0)
        for i, (first, row) in enumerate(pairs)
    ]
    drawn[3] = dataclasses.replace(drawn[3], drop=2)
    store.append(0, drawn)

    def of(share_prompt: bool) -> PairRows:
        return PairRows(rows, store, wanted(share_prompt), tiny_config())

    for share_prompt in (True, False):
        found = of(share_prompt)
        assert found.share_prompt == share_prompt
        plan = make_plan(
            found.positions,
            seed=0,
            batch_size=4,
            batching="bucket",
            max_length=found.longest(16),
            answers=found.answers,
            together=2,
        )
        inside = 0
        for planned in plan(0):
            batch = found.collate(planned)
            inside += int(batch.chosen.mask_BL.sum() + batch.rejected.mask_BL.sum())
            widths = (batch.chosen.segment_ids_BL > 0).sum(1)
            if not share_prompt:
                widths = np.maximum(widths, (batch.rejected.segment_ids_BL > 0).sum(1))
            places = [row[0] for row in planned.rows if row]
            np.testing.assert_array_equal(widths[: len(places)], found.positions[places])
        # Without a prompt, nothing predicts an answer's first token.
        assert inside == sum(c + (r or 0) for _, c, r in SIZES) - 2
    assert of(True).positions.tolist() == [7, 10, 12, 13, 13, 9]
    assert of(False).positions.tolist() == [4, 7, 10, 13, 12, 8]


def wanted(share_prompt: bool | str) -> PreferenceConfig:
    return PreferenceConfig(beta=1.0, share_prompt=share_prompt)


# (shape, tokens of the prompt, tokens of each answer, whether sharing was measured to be faster)
MEASURED = [
    ("15m", 128, 64, True),
    ("15m", 96, 96, True),
    ("100m", 96, 96, True),
    ("15m", 50, 235, False),
    ("260k", 30, 220, False),
]


@pytest.mark.parametrize("shape, prompt, answer, shared", MEASURED)
def test_a_prompt_is_shared_where_that_was_measured_to_be_faster(shape, prompt, answer, shared):
    model = model_config(SHAPES[shape]).replace(lora=LoraConfig(rank=16, alpha=32.0))
    lengths = (np.array([prompt]), np.array([answer]), np.array([answer]))
    assert shares_prompt(wanted("auto"), model, *lengths) == shared
    assert shares_prompt(wanted(True), model, *lengths)
    assert not shares_prompt(wanted(False), model, *lengths)


def test_what_makes_sharing_pay():
    """Sharing pays with long prompts, wide models, and answers of unequal lengths (two rows both
    have the length of the longer answer), but not if rope scaling follows the row's length."""

    def pays(model, prompt: int, chosen: int, rejected: int) -> bool:
        lengths = (np.array([n]) for n in (prompt, chosen, rejected))
        return shares_prompt(wanted("auto"), model, *lengths)

    small, large = (model_config(SHAPES[shape]) for shape in ("15m", "7b"))
    assert not pays(small, 10, 235, 235)
    assert pays(small, 400, 235, 235)
    assert pays(small, 10, 235, 20)
    assert pays(large, 50, 235, 235)
    found = [pays(small, prompt, 235, 235) for prompt in range(0, 400, 10)]
    assert found == sorted(found)
    dynamic = small.replace(rope=dataclasses.replace(small.rope, kind="dynamic"))
    assert not pays(dynamic, 400, 235, 235)
