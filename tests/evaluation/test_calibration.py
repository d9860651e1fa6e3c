"""Bins of confidence and the expected calibration error are compared with explicit sums."""

from __future__ import annotations

import numpy as np
import pytest

from proxykd_jax.evaluation.calibration import NUM_BINS, binned, calibration, expected_error


def test_sums_go_to_the_bin_of_the_confidence() -> None:
    confidence = np.array([[0.0, 0.5 / NUM_BINS, 1 / NUM_BINS, 1.0], [0.99, 0.3, 0.3, 0.3]])
    agreement = np.array([[True, False, True, True], [False, True, True, False]])
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 1]], bool)
    got = binned(confidence, agreement, mask)
    assert got.shape == (2, NUM_BINS, 3)
    np.testing.assert_allclose(got[0, 0], [2, 0.5 / NUM_BINS, 1])
    np.testing.assert_allclose(got[0, 1], [1, 1 / NUM_BINS, 1])
    np.testing.assert_allclose(got[0, -1], [1, 1.0, 1])
    np.testing.assert_allclose(got[1, -1], [1, 0.99, 0])
    np.testing.assert_allclose(got[1, int(0.3 * NUM_BINS)], [2, 0.6, 1])
    assert got[..., 0].sum() == mask.sum()


def test_the_error_is_the_weighed_distance_over_bins() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random((40, 25))
    agreement = rng.random((40, 25)) < confidence**2
    mask = rng.random((40, 25)) < 0.7
    by_hand = 0.0
    for m in range(NUM_BINS):
        inside = mask & (confidence >= m / NUM_BINS) & (confidence < (m + 1) / NUM_BINS)
        gap = abs(confidence[inside].mean() - agreement[inside].mean())
        by_hand += inside.sum() / mask.sum() * gap
    found = calibration(binned(confidence, agreement, mask))
    assert found["ece"] == pytest.approx(by_hand, abs=1e-12)
    assert found["confidence"] == pytest.approx(confidence[mask].mean())
    assert sum(each["tokens"] for each in found["bins"]) == mask.sum()
    for each in found["bins"]:
        assert each["from"] <= each["confidence"] < each["to"]


def test_a_calibrated_model_has_little_error_and_a_boastful_one_its_excess() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.2, 0.8, (200, 100))
    mask = np.ones_like(confidence, bool)
    honest = calibration(binned(confidence, rng.random(confidence.shape) < confidence, mask))
    assert honest["ece"] < 0.015
    boastful = rng.random(confidence.shape) < confidence - 0.1
    found = calibration(binned(confidence, boastful, mask))
    assert found["ece"] == pytest.approx(0.1, abs=0.01)
    # The tolerance follows from 200 rows of 100 positions each.
    assert found["ece_se"] == pytest.approx(np.sqrt(0.24 / 20_000), rel=0.3)


def test_one_row_has_no_spread_and_a_broken_model_no_error_that_looks_well() -> None:
    one = binned(np.full((1, 3), 0.5), np.array([[1, 0, 1]], bool), np.ones((1, 3), bool))
    assert calibration(one)["ece_se"] is None
    broken = binned(np.full((1, 3), np.nan), np.zeros((1, 3), bool), np.ones((1, 3), bool))
    assert np.isnan(expected_error(broken.sum(axis=0)))
