"""Estimates, verdicts and tables on synthetic records whose answers are known."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper_tables import join, tables
from benchmarks.paper_tables.metrics import ACCURACY, BEST, KL, LAST, Record
from benchmarks.paper_tables.statistics import (
    CLAIMS,
    HOLDS,
    REVERSED,
    TOO_FEW,
    WITHIN_NOISE,
    Claim,
    Results,
    estimate,
    verdict,
    verdicts,
)
from proxykd_jax.artifacts import write_json

CLAIM = Claim("one > other", "one", "other")
COMMON = np.array([0.1, 0.9, 0.4, 0.6])  # seeds differ far more than methods do
SPREAD = np.array([-0.01, 0.01, -0.02, 0.02])
SPREAD_ERROR = math.sqrt((SPREAD**2).sum() / 3 / 4)


def records_of(
    method: str,
    best: np.ndarray,
    last: np.ndarray,
    *,
    metric: str = ACCURACY,
    preset: str = "paper",
) -> list[Record]:
    return [
        Record("fmt", preset, method, checkpoint, seed, metric, float(value))
        for checkpoint, values in ((BEST, best), (LAST, last))
        for seed, value in enumerate(values)
    ]


def results_of(
    best: np.ndarray, last: np.ndarray, *, metric: str = ACCURACY, seeds: int = 4
) -> Results:
    """``one`` exceeds ``other`` by ``best`` and ``last``, seed by seed."""
    base = COMMON[:seeds]
    records = records_of("one", base + best[:seeds], base + last[:seeds], metric=metric)
    return Results(records + records_of("other", base, base, metric=metric), "fmt", "paper")


def test_estimate_of_known_values() -> None:
    found = estimate(np.array([1.0, 2.0, 3.0, 6.0]))
    assert found.mean == 3.0
    assert found.error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert estimate(np.array([2.0])).error is None


def test_interval_is_students() -> None:
    # 4 seeds: the 97.5 % point of t with 3 degrees of freedom.
    found = estimate(np.array([1.0, 2.0, 3.0, 6.0]))
    assert found.error is not None
    np.testing.assert_allclose(
        found.interval, (3 - 3.182446 * found.error, 3 + 3.182446 * found.error), rtol=1e-6
    )
    assert estimate(np.array([2.0])).interval is None
    assert estimate(np.array([2.0])).with_interval() == "+2.000"


def test_difference_is_paired() -> None:
    found = results_of(SPREAD + 0.1, SPREAD).difference("one", "other", BEST, ACCURACY)
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(SPREAD_ERROR)  # the spread between seeds cancels


@pytest.mark.parametrize(
    ("best", "last", "expected"),
    [
        (3.1, 3.1, HOLDS),
        (3.1, 2.9, WITHIN_NOISE),
        (2.9, 3.1, WITHIN_NOISE),
        (-3.1, -3.1, REVERSED),
        (3.1, -3.1, WITHIN_NOISE),
        (0.0, 0.0, WITHIN_NOISE),
    ],
)
def test_verdict_needs_three_errors_under_both_rules(
    best: float, last: float, expected: str
) -> None:
    results = results_of(SPREAD + best * SPREAD_ERROR, SPREAD + last * SPREAD_ERROR)
    assert verdict(results, CLAIM, ACCURACY) == expected


def test_lower_kl_is_better() -> None:
    lower = SPREAD - 4 * SPREAD_ERROR
    assert verdict(results_of(lower, lower, metric=KL), CLAIM, KL) == HOLDS
    assert verdict(results_of(-lower, -lower, metric=KL), CLAIM, KL) == REVERSED


def test_two_seeds_are_too_few() -> None:
    assert verdict(results_of(SPREAD + 1, SPREAD + 1, seeds=2), CLAIM, ACCURACY) == TOO_FEW


def test_other_seeds_are_no_pair() -> None:
    records = records_of("one", COMMON, COMMON) + records_of("other", COMMON[:3], COMMON[:3])
    with pytest.raises(ValueError, match="same seeds"):
        Results(records, "fmt", "paper").difference("one", "other", BEST, ACCURACY)


def test_records_of_no_preset_serve_every_preset() -> None:
    records = records_of("one", COMMON, COMMON, preset="both")
    records += records_of("other", COMMON, COMMON, preset="paper")
    assert Results(records, "fmt", "recommended").has("one", ACCURACY)
    assert not Results(records, "fmt", "recommended").has("other", ACCURACY)
    assert not Results(records, "weak", "paper").has("one", ACCURACY)


def test_claims_name_methods_that_exist() -> None:
    from benchmarks.paper_tables.methods import METHODS
    from benchmarks.paper_tables.proxies import STATES

    known = {*METHODS, *(f"proxy/{state}" for state in STATES)}
    for claim in CLAIMS:
        assert {claim.better, claim.worse} <= known
        assert claim.better != claim.worse


def test_tables_show_every_cell() -> None:
    gain = SPREAD + 10 * SPREAD_ERROR
    records = []
    for regime, sign in (("fmt", 1), ("strong", -1)):
        for method, shift in (("proxy_kd", sign * gain), ("black_box_kd", 0 * gain)):
            for metric in (ACCURACY, KL, "agreement", "nll"):
                toward = -shift if metric == KL else shift
                records += [
                    Record(regime, "paper", method, c, seed, metric, float(value))
                    for c in (BEST, LAST)
                    for seed, value in enumerate(COMMON + toward)
                ]
    cells = [("fmt", "paper"), ("strong", "paper")]
    text = tables.write_tables(records, cells, command="the command", notes=["a note"])
    assert "the command" in text
    line = next(li for li in text.splitlines() if li.startswith("| Proxy-KD > black-box KD on D_s"))
    # The table has all regimes side by side.
    assert line.endswith(f"| {HOLDS} | {REVERSED} |")
    students = section_of(text, "## Students side by side, preset paper")
    row = next(li for li in students if li.startswith("| Proxy-KD |"))
    both = [str(estimate(COMMON + gain)), str(estimate(COMMON - gain))]
    assert row == f"| Proxy-KD | {both[0]} | {both[1]} | {both[1]} | {both[0]} |"
    assert f"{COMMON.mean():.3f} ±{estimate(COMMON).error:.3f}" in text
    found = verdicts(Results(records, "strong", "paper"))
    assert {(claim.text, said) for claim, _, said in found} == {
        ("Proxy-KD > black-box KD on D_s", REVERSED)
    }


def test_metrics_and_checkpoints_that_disagree_are_both_said() -> None:
    gain = SPREAD + 10 * SPREAD_ERROR
    records = whole("black_box_kd", 0 * gain, "paper")
    for metric in (ACCURACY, KL, "agreement", "nll"):
        # One is more accurate and farther from the teacher; the last state is better by another 1.
        best, last = COMMON + gain, COMMON + gain + 1
        records += records_of("proxy_kd", best, last, metric=metric)
    text = tables.write_tables(records, [("fmt", "paper")], command="", notes=[])
    line = next(li for li in text.splitlines() if li.startswith("| Proxy-KD > black-box KD on D_s"))
    assert line.endswith(f"| {HOLDS} / {REVERSED} |")
    students = section_of(text, "## Students side by side, preset paper")
    row = next(li for li in students if li.startswith("| Proxy-KD |"))
    assert row.count(f"{estimate(COMMON + gain)} / {(COMMON + gain + 1).mean():.3f}") == 2


def section_of(text: str, title: str) -> list[str]:
    lines = text.splitlines()
    rest = lines[lines.index(title) + 1 :]
    return list(itertools.takewhile(lambda line: not line.startswith("#"), rest))


def whole(method: str, shift: np.ndarray, preset: str) -> list[Record]:
    """Records in which accuracy and agreement are higher by ``shift``, and KL and NLL lower."""
    found = []
    for metric in (ACCURACY, KL, "agreement", "nll"):
        values = COMMON - shift if metric in (KL, "nll") else COMMON + shift
        found += records_of(method, values, values, metric=metric, preset=preset)
    return found


def test_presets_are_compared_by_seed() -> None:
    gain = SPREAD + 10 * SPREAD_ERROR
    records = whole("proxy_kd", 0 * gain, "paper") + whole("proxy_kd", gain, "recommended")
    cells = [("fmt", "paper"), ("fmt", "recommended")]
    text = tables.write_tables(records, cells, command="", notes=[])
    rows = section_of(text, "## The recommended preset against the paper's")
    assert len(rows) == 6 and "recommended Proxy-KD > Proxy-KD" in rows[3]
    # The spread between seeds is far larger than the error of the paired difference.
    assert estimate(gain).with_interval() in rows[3] and rows[3].endswith(f"{HOLDS} |")
    assert rows[4].endswith(f"{HOLDS} |")
    alone = tables.write_tables(records, cells[:1], command="", notes=[])
    assert "recommended preset against" not in alone


def test_sweeps_are_compared_with_the_same_method() -> None:
    records = whole("proxy_kd", SPREAD, "paper") + whole("proxy/nll", 2 * SPREAD, "paper")
    records += whole("sweep alpha 1/proxy_kd", SPREAD + 0.25, "paper")
    records += whole("sweep beta 5/nll", 2 * SPREAD + 0.5, "paper")
    text = tables.write_tables(records, [("fmt", "paper")], command="", notes=[])
    rows = section_of(text, "### Sweeps: one change each")
    changed = {row.split(" | ")[0].removeprefix("| "): row for row in rows}
    assert "+0.250 ±0.000 [+0.250, +0.250]" in changed["sweep alpha 1: Proxy-KD"]
    assert "-0.500 ±0.000 [-0.500, -0.500]" in changed["sweep beta 5, + L_NLL"]


def test_joined_runs_are_one(tmp_path: Path, capsys) -> None:
    for name, seeds in (("a", (0, 1)), ("b", (2, 3))):
        records = records_of("one", COMMON, COMMON, metric=KL)
        records += records_of("one", COMMON, COMMON) + records_of(
            "one", COMMON, COMMON, metric="agreement"
        )
        write_json(
            tmp_path / name / "tables.json", [r.to_json() for r in records if r.seed in seeds]
        )
    folders = [tmp_path / "a", tmp_path / "b"]
    found = join.join(folders, tmp_path / "both")
    assert Results(found, "fmt", "paper").mean("one", BEST, KL) == estimate(COMMON)
    assert "Seeds 0, 1, 2, 3 of 2 runs" in (tmp_path / "both" / "tables.md").read_text()
    # A seed that two runs hold would count twice.
    assert join.main([str(folders[0]), str(folders[0]), "--out", str(tmp_path / "twice")]) == 2
    assert "both hold" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
