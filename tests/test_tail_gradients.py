"""The gradients of the four tails are compared with that of the full KL, on a finished run."""

import pytest

from benchmarks import tail_gradients


def test_each_tail_nears_the_full_gradient_as_more_is_stored(finished_run):
    found = {
        (top_k, tail): (cosine, ratio)
        for top_k, tail, cosine, ratio in tail_gradients.compare(finished_run, rows=4)
    }
    stored = sorted({top_k for top_k, _ in found})
    assert len(stored) >= 3
    for tail in tail_gradients.TAILS:
        cosines = [found[top_k, tail][0] for top_k in stored]
        assert cosines[0] < cosines[-1] <= 1 + 1e-5
    # With one token, renormalising gives a probability of 1 and no gradient.
    assert found[1, "renormalize"] == pytest.approx((0.0, 0.0), abs=1e-5)
    assert found[3, "bucket"][0] > found[3, "renormalize"][0]
