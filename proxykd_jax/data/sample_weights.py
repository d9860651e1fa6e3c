"""Sample weights of eq. 9, over a whole split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Weights:
    """Sample weights of a split (eq. 9) and the statistics behind them.

    Attributes:
      sample_weight: float32 ``[n]``.
      loglik_mean, loglik_std: mu and gamma over the finished answers.
      length_correlation: Pearson correlation of the weights with the answers' lengths, over the
        finished answers; near -1, the weights are a bonus for short answers.
    """

    sample_weight: np.ndarray
    loglik_mean: float
    loglik_std: float
    length_correlation: float


def weights_of(
    seq_logliks: np.ndarray,
    lengths: np.ndarray,
    finished: np.ndarray | None = None,
    *,
    loglik: str = "sum",
    normalize: bool = False,
    enabled: bool = True,
) -> Weights:
    """w(x, y) of eq. 9 for all rows of a split.

    mu and gamma are computed over the whole split in float64, in two passes. Only finished answers
    count, because the likelihood of a truncated answer is that of a beginning only.

    Args:
      seq_logliks: float64 ``[n]``, summed log-likelihoods in nats.
      lengths: ``[n]`` response tokens.
      finished: bool ``[n]`` (default: all).
      loglik: ``sum``, as printed, or ``token_mean``.
      normalize: scale the weights to mean 1 over the split.
      enabled: if False, every weight is 1.
    """
    from proxykd_jax.losses import alignment_weights, length_correlation, normalize_weights

    values = np.asarray(seq_logliks, np.float64)
    lengths = np.asarray(lengths, np.float64)
    inside = np.ones(len(values), bool) if finished is None else np.asarray(finished, bool)
    if loglik == "token_mean":
        values = values / np.maximum(lengths, 1)
    elif loglik != "sum":
        raise ValueError(f"loglik must be sum or token_mean, got {loglik!r}.")
    mean = float(values[inside].mean()) if inside.any() else 0.0
    std = float(np.sqrt(np.square(values[inside] - mean).mean())) if inside.any() else 0.0
    if not enabled:
        weights = np.ones(len(values), np.float32)
    else:
        # Subtract in float64: in float32 the difference of long sums keeps few digits.
        found = alignment_weights(values - mean, 0.0, std)
        weights = np.asarray(normalize_weights(found) if normalize else found)
    correlation = float(length_correlation(weights, lengths, example_mask_B=inside))
    return Weights(weights, mean, std, correlation)
