"""Objectives: the proxy's (eq. 6), the student's (eq. 11), and weighted sums of other terms.

The functions combine terms that are already a sum and a count (`example_terms`, `reduce_examples`).
So the same function serves a notebook with one batch and a training step with micro-batches and
packed rows. A micro-batch passes the counts of its whole batch (`nll_count=...`, from
`batch_count`). Its loss is then its share of the batch's loss: the shares add up to the loss of the
whole batch, and so do their gradients.

Metrics are `Term`s with the micro-batch's own counts. Add them up, then call `batch_mean`.
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
        nll: (sum, count) of the NLL of the chosen responses, nats.
        preference: (sum, count) of the preference loss over valid pairs; None: NLL alone.
        nll_weight, preference_weight: factors of the two means.
        nll_count, preference_count: divide by these instead of the terms' own counts.
        pair_metrics: `[B]` arrays from `preference_metrics`, which are averaged over valid pairs.
        pair_mask_B: valid pairs; required with `pair_metrics`.

    Returns:
        The loss, a float32 scalar, and the metrics as Terms without gradient. `nll` is always
        there. With a preference term there are also `preference`, `preference_to_nll` (the ratio
        of the two weighted parts of the loss) and each of `pair_metrics`.

    Raises:
        ValueError: `pair_metrics` is given without `pair_mask_B`.
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
            raise ValueError("pair_metrics are averaged over valid pairs, so give pair_mask_B.")
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

    The meaning of alpha depends on how the two terms are reduced, and the paper does not say how.
    The ratio of the two parts is therefore among the metrics.

    Args:
        nll: (sum, count) of the NLL of the teacher's tokens, nats. A prompt without a teacher's
            answer adds to neither, because its NLL mask is empty.
        weighted_kl: (sum, count) of the KL from the proxy, nats. The sample weights are applied to
            the sum and not to the count.
        alpha: factor of the mean weighted KL.
        nll_weight: factor of the mean NLL; 0 trains on soft labels alone.
        nll_count, kl_count: divide by these instead of the terms' own counts.
        kl: (sum, count) of the KL without weights, for the metrics.
        sample_weight: (sum, count) of the weights, for the metrics.

    Returns:
        The loss, a float32 scalar, and the metrics as Terms without gradient: `nll`, `weighted_kl`,
        `kl_to_nll` (alpha * weighted KL over nll_weight * NLL), and `kl` and `sample_weight` if
        they were given.
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
        terms: (sum, count) of each term, by name.
        weights: a factor for the mean of each term, under the same names.
        counts: for some of the names, a count to divide by instead of the term's own.

    Returns:
        The loss, a float32 scalar, and each term without gradient.

    Raises:
        ValueError: there is no term, terms and weights have different names, or a count has a name
            that no term has.
    """
    counts = counts or {}
    if not terms or set(terms) != set(weights) or not set(counts) <= set(terms):
        raise ValueError(
            f"terms are {', '.join(terms) or 'none'}, weights {', '.join(weights) or 'none'}, "
            f"counts {', '.join(counts) or 'none'}; every term needs a weight under its name and "
            "may have a count under it."
        )
    parts = [weights[name] * _mean(term, counts.get(name)) for name, term in terms.items()]
    return sum(parts[1:], parts[0]), {name: _detached(term) for name, term in terms.items()}


def _mean(term: TermLike, count: chex.Numeric | None) -> jax.Array:
    return batch_mean(term if count is None else (term[0], float32(count)))


def _detached(term: TermLike) -> Term:
    return Term(*(jax.lax.stop_gradient(float32(part)) for part in term))
