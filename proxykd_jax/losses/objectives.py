"""Objectives: the proxy's (eq. 6), the student's (eq. 11), and weighted sums of other terms.

They combine terms that are already sums with counts (`example_terms`, `reduce_examples`), so one
function serves a notebook with a single batch and a training step with micro-batches and packed
rows. A micro-batch passes the counts of its whole batch (`nll_count=...`, from `batch_count`):
its loss is then a share, and the shares and their gradients add up to those of the whole batch.

Metrics are `Term`s with the micro-batch's own counts: add them up, then take `batch_mean`.
"""

from collections.abc import Mapping

import chex
import jax

from proxykd_jax.losses.numerics import float32
from proxykd_jax.losses.reduction import Term, batch_mean, reduce_examples

TermLike = tuple[chex.Array, chex.Array]


def alignment_objective(
    nll: TermLike,
    preference: TermLike | None = None,
    *,
    nll_weight: float = 1.0,
    preference_weight: float = 1.0,
    nll_count: chex.Numeric | None = None,
    preference_count: chex.Numeric | None = None,
    pair_metrics: Mapping[str, chex.Array] | None = None,
    pair_mask_B: chex.Array | None = None,
) -> tuple[jax.Array, dict[str, Term]]:
    """nll_weight * NLL + preference_weight * preference loss (eq. 6; the paper's weights are 1).

    >>> pairs = (policy_chosen_B, policy_rejected_B, reference_chosen_B, reference_rejected_B)
    >>> loss, metrics = alignment_objective(
    ...     example_terms(nll(logps_BL, mask_BL), mask_BL, reduction="example_mean"),
    ...     reduce_examples(dpo_loss(*pairs, beta=1.0), pair_mask_B),
    ...     pair_metrics=preference_metrics(*pairs, beta=1.0), pair_mask_B=pair_mask_B)

    Args:
        nll: (sum, count) of the chosen responses' NLL.
        preference: (sum, count) of the preference loss over valid pairs; None for NLL alone.
        nll_weight, preference_weight: factors of the two means.
        nll_count, preference_count: divide by these instead of the terms' own counts.
        pair_metrics: arrays from `preference_metrics`, to be reduced over valid pairs.
        pair_mask_B: valid pairs; required with `pair_metrics`.

    Returns:
        The loss, and Terms: `nll`, with pairs also `preference`, `preference_to_nll` (ratio of
        the weighted parts of the loss) and each of `pair_metrics`.

    Raises:
        ValueError: `pair_metrics` without `pair_mask_B`.
    """
    nll_part = nll_weight * _mean(nll, nll_count)
    metrics = {"nll": _detached(nll)}
    if preference is None:
        return nll_part, metrics
    preference_part = preference_weight * _mean(preference, preference_count)
    metrics["preference"] = _detached(preference)
    metrics["preference_to_nll"] = _detached((preference_part, nll_part))
    if pair_metrics is not None:
        if pair_mask_B is None:
            raise ValueError("pair_metrics are averaged over valid pairs: give pair_mask_B.")
        for name, value_B in pair_metrics.items():
            metrics[name] = _detached(reduce_examples(value_B, pair_mask_B))
    return nll_part + preference_part, metrics


def distill_objective(
    nll: TermLike,
    weighted_kl: TermLike,
    *,
    alpha: float,
    nll_weight: float = 1.0,
    nll_count: chex.Numeric | None = None,
    kl_count: chex.Numeric | None = None,
    kl: TermLike | None = None,
    sample_weight: TermLike | None = None,
) -> tuple[jax.Array, dict[str, Term]]:
    """NLL + alpha * weighted KL (eq. 11; the paper's alpha is 100).

    What alpha means depends on how the two are reduced, which the paper does not say. The ratio
    of the two parts is therefore among the metrics.

    Args:
        nll: (sum, count) of the teacher's tokens' NLL. Prompts without a teacher's answer are in
            neither (their NLL mask is empty).
        weighted_kl: (sum, count) of the KL from the proxy, weights applied, not in the count.
        alpha: factor of the mean weighted KL.
        nll_weight: factor of the mean NLL; 0 trains on soft labels alone.
        nll_count, kl_count: divide by these instead of the terms' own counts.
        kl: (sum, count) of the KL without weights, for the metrics.
        sample_weight: (sum, count) of the weights, for the metrics.

    Returns:
        The loss, and Terms: `nll`, `weighted_kl`, `kl_to_nll` (alpha * weighted KL over
        nll_weight * NLL), and `kl` and `sample_weight` where given.
    """
    nll_part = nll_weight * _mean(nll, nll_count)
    kl_part = alpha * _mean(weighted_kl, kl_count)
    metrics = {
        "nll": _detached(nll),
        "weighted_kl": _detached(weighted_kl),
        "kl_to_nll": _detached((kl_part, nll_part)),
    }
    if kl is not None:
        metrics["kl"] = _detached(kl)
    if sample_weight is not None:
        metrics["sample_weight"] = _detached(sample_weight)
    return nll_part + kl_part, metrics


def mixed_objective(
    terms: Mapping[str, TermLike],
    weights: Mapping[str, float],
    *,
    counts: Mapping[str, chex.Numeric] | None = None,
) -> tuple[jax.Array, dict[str, Term]]:
    """The sum of weight * mean over named terms, for objectives other than eqs. 6 and 11.

    >>> loss, metrics = mixed_objective(
    ...     {"policy_gradient": batch_terms(pg_BL, mask_BL, reduction="token_mean"),
    ...      "single_step_kl": batch_terms(kl_BL, mask_BL, reduction="token_mean")},
    ...     {"policy_gradient": 1.0, "single_step_kl": 1.0})

    Args:
        terms: (sum, count) of each.
        weights: a factor for each mean, under the same names.
        counts: divide by these instead of the terms' own counts, where a name is in it.

    Returns:
        The loss, and each term without gradient.

    Raises:
        ValueError: terms and weights do not have the same names, or a count has another one.
    """
    counts = counts or {}
    if not terms or set(terms) != set(weights) or not set(counts) <= set(terms):
        raise ValueError(
            f"terms are {', '.join(terms) or 'none'}, weights {', '.join(weights) or 'none'}, "
            f"counts {', '.join(counts) or 'none'}; every term has a weight and may have a count, "
            "under its name."
        )
    parts = [weights[name] * _mean(term, counts.get(name)) for name, term in terms.items()]
    return sum(parts[1:], parts[0]), {name: _detached(term) for name, term in terms.items()}


def _mean(term: TermLike, count: chex.Numeric | None) -> jax.Array:
    return batch_mean(term if count is None else (term[0], float32(count)))


def _detached(term: TermLike) -> Term:
    return Term(*(jax.lax.stop_gradient(float32(part)) for part in term))
