"""The rules of the verdict, one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from proxykd_jax.reporting.verdict import (
    Facts,
    advice,
    compared,
    half_width,
    outcome_of,
    still_falling,
    together,
)

# A run after which there is nothing to say but that plain fine-tuning is to be compared.
QUIET = Facts("runs/a", proxy="worse", alpha=10.0, epochs=3, steps=90)


@pytest.mark.parametrize(
    "difference, error, rows, higher, outcome",
    [
        (-0.2, 0.05, 100, False, "better"),
        (0.2, 0.05, 100, False, "worse"),
        (0.2, 0.05, 100, True, "better"),
        (0.09, 0.05, 100, True, "not told apart"),
        (0.101, 0.05, 100, True, "better"),
        (0.101, 0.05, 6, True, "not told apart"),  # t of 5 degrees of freedom is 2.57
        (0.2, None, 100, True, "not told apart"),
        (0.2, 0.0, 2, True, "not told apart"),
        (0.0, 0.0, 100, True, "not told apart"),
        (float("nan"), 0.1, 100, True, "not told apart"),
    ],
)
def test_a_difference_is_told_apart_by_its_interval(difference, error, rows, higher, outcome):
    assert outcome_of(difference, error, rows, higher_is_better=higher) == outcome


@pytest.mark.parametrize("rows, quantile", [(5, 2.776), (10, 2.262), (31, 2.042), (10**6, 1.960)])
def test_the_interval_is_students(rows, quantile):
    assert half_width(1.0, rows) == pytest.approx(quantile, rel=0.01)


def test_measures_are_judged_together():
    assert together(["not told apart", "better"]) == "better"
    assert together(["better", "worse"]) == "mixed"
    assert together(["not told apart"]) == "not told apart"


def test_a_comparison_is_a_sentence_with_its_figures():
    found = compared(
        "The student", "the proxy",
        {"nll": {"token_mean": -0.2, "token_se": 0.05},
         "agreement": {"token_mean": 0.01, "token_se": 0.05},
         "kl": {"token_mean": -0.1, "token_se": 0.01}},
        rows=1000, split="test",
    )  # fmt: skip
    assert found is not None and found.outcome == "better"
    assert found.headline == "The student is better than the proxy."
    assert found.detail == (
        "NLL better (−0.2000 ± 0.0981 nats a token); top-1 agreement not told apart (+0.0100 ± "
        "0.0981); KL to the teacher better (−0.1000 ± 0.0196 nats a token); 1,000 test rows."
    )
    assert compared("a", "b", {}, rows=9, split="test") is None
    few = compared("a", "b", {"nll": {"token_mean": 9.0, "token_se": 0.1}}, rows=3, split="test",
                   paired=False)  # fmt: skip
    assert few is not None and few.outcome == "not told apart"
    assert not few.judged and found.judged
    assert few.detail.endswith("3 test rows, not paired, too few to judge by.")


@pytest.mark.parametrize(
    "changes, said, command",
    [
        ({"measured": False}, "not measured", "proxykd evaluate --config runs/a/config.yaml"),
        ({"ended": [("the student", 0, 8), ("the proxy in r1", 3, 9)]},
         "No answer ended (the student): look at corpus.end_tokens.", ""),
        ({"empty": 5, "answers": 9}, "5 of the student's 9 greedy answers are empty", ""),
        ({"before": "worse"}, "lower distill.optimizer.learning_rate", ""),
        ({"proxy": "better"}, "lower distill.alpha (now 10), or collect more answers", ""),
        ({"proxy": "not told apart"}, "as near to the teacher as its proxy", ""),
        ({"proxy_against_plain": "not told apart"}, "not ahead of plain fine-tuning", ""),
        ({"student_nll": [3, 2, 1.5]}, "raise distill.epochs (now 3)", ""),
        ({"student_nll": [3, 2, 1.5], "max_steps": 90}, "raise distill.max_steps (now 90)", ""),
        ({"proxy_nll": [3, 2, 1.5]}, "raise align.num_rounds", ""),
        ({"aligned": "worse"}, "align.alignment: nll", ""),
        ({"before": "better", "exported": True}, "Talk to the exported student",
         "proxykd chat --model runs/a/export/student"),
        ({"before": "better"}, "Export the student", "proxykd export --config runs/a/config.yaml"),
        ({"plain_known": False}, "proxykd report --run runs/a OTHER --out compared.html",
         "proxykd run --config runs/a/config.yaml --set name=plain --set distill.alpha=0"),
    ],
)  # fmt: skip
def test_each_rule_of_the_advice(changes: dict[str, Any], said: str, command: str):
    quiet = dataclasses.replace(QUIET, plain_known=True)
    assert advice(quiet) == []
    found = advice(dataclasses.replace(quiet, **changes))
    assert [(said in sentence, to_run) for sentence, to_run in found] == [(True, command)]


def test_advice_on_the_proxy_needs_a_proxy():
    facts = dataclasses.replace(
        QUIET, uses_proxy=False, proxy="better", proxy_nll=[3, 2, 1], aligned="worse"
    )
    assert advice(facts) == []


def test_validation_still_falls_only_by_more_than_noise():
    assert still_falling([3, 2, 1.9])
    assert not still_falling([3, 2, 1.999]) and not still_falling([3, 1.9, 2])
    assert not still_falling([3, 2])
