"""Calibration: whether a model's confidence matches its agreement with the teacher's tokens.

At each position of an answer the confidence is the probability of the model's most probable token,
and the model is right if that is the teacher's token. Positions are grouped into bins of equal
width by confidence. The expected calibration error is the mean distance between confidence and
agreement over bins, weighted by their positions (Guo et al., 2017, eq. 5, with their 15 bins).

Axes: n rows (examples), M bins, 3 sums: tokens, confidence, agreement.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NUM_BINS = 15
_RESAMPLES = 200


def binned(confidence_BL: np.ndarray, agreement_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
    """float64 ``[B, M, 3]``: tokens, summed confidence and agreement of each row by bin.

    Args:
      confidence_BL: in [0, 1]; a value on an edge belongs to the bin above, 1 to the last bin.
      agreement_BL: whether the most probable token is the teacher's.
      mask_BL: positions of answers; others do not count.
    """
    rows, places = np.nonzero(mask_BL)
    confidence = np.asarray(confidence_BL, np.float64)[rows, places]
    agreement = np.asarray(agreement_BL, np.float64)[rows, places]
    bins = np.clip((np.nan_to_num(confidence) * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    sums = np.zeros((len(mask_BL), NUM_BINS, 3))
    values = np.stack([np.ones_like(confidence), confidence, agreement], axis=-1)
    np.add.at(sums, (rows, bins), values)
    return sums


def expected_error(bins_M3: np.ndarray) -> np.ndarray:
    """Expected calibration error of summed bins, in [0, 1]; more leading axes are allowed."""
    gaps = np.abs(bins_M3[..., 1] - bins_M3[..., 2]).sum(axis=-1)
    return np.asarray(gaps / bins_M3[..., 0].sum(axis=-1))


def calibration(bins_nM3: np.ndarray) -> dict[str, Any]:
    """Calibration over all rows, ready for JSON.

    Returns:
      ``ece``, and ``ece_se``: its spread over 200 bootstrap draws of the rows (None for fewer than
      two rows). Bins with few positions bias ``ece`` upwards. ``confidence``: the mean; above
      agreement means overconfident. ``bins``: the non-empty ones, as ``{from, to, tokens,
      confidence, agreement}``.
    """
    total_M3 = bins_nM3.sum(axis=0)
    num = len(bins_nM3)
    spread = None
    if num > 1:
        draws = np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), _RESAMPLES)
        drawn = np.tensordot(draws.astype(np.float64), bins_nM3, axes=1)
        spread = float(expected_error(drawn).std(ddof=1))
    tokens, confidence, agreement = total_M3.T
    return {
        "ece": float(expected_error(total_M3)),
        "ece_se": spread,
        "confidence": float(confidence.sum() / tokens.sum()),
        "bins": [
            {
                "from": m / NUM_BINS,
                "to": (m + 1) / NUM_BINS,
                "tokens": int(tokens[m]),
                "confidence": float(confidence[m] / tokens[m]),
                "agreement": float(agreement[m] / tokens[m]),
            }
            for m in np.flatnonzero(tokens).tolist()
        ],
    }
