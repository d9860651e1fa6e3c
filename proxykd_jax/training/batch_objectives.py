"""Eq. 6 and eq. 11 on batches: from a model and rows of tokens to a loss with its metrics.

An objective computes its counts before the forward pass, because they depend on masks alone. The
loss of a micro-batch is then its share of the whole batch's loss, so gradients simply add up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from proxykd_jax.config import AlignConfig, DistillConfig, PreferenceConfig
from proxykd_jax.losses import (
    REFERENCE_LOSSES,
    Term,
    alignment_objective,
    batch_count,
    count_tokens,
    distill_objective,
    drawn_cross_entropy_tokens,
    example_terms,
    nll,
    preference_loss,
    preference_metrics,
    reduce_examples,
    reduce_tokens,
    token_reduction,
    topk_kl,
    weighted_kl,
)
from proxykd_jax.training.logprobs import label_logps, pair_label_logps, pair_sums
from proxykd_jax.training.state import ModelSpec, Weights
from proxykd_jax.types import DistillBatch, Pairs, TokenBatch

Counts = dict[str, jax.Array]
Metrics = dict[str, Term]


class Objective(Hashable, Protocol):
    """What a step minimises."""

    def counts(self, batch: Any) -> Counts:
        """Returns the denominators of the whole batch's sums."""

    def share(
        self,
        models: Any,
        batch: Any,
        counts: Counts,
        spec: Any,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        """Returns this micro-batch's share of the loss, and metrics as (sum, count) to be added up.

        ``models`` is what ``spec.bind`` returns: the weights of one model, or of several by name.
        """

    def terms(self) -> dict[str, Objective]:
        """Returns each weighted term of the loss alone, for gradient norms."""


@dataclass(frozen=True)
class NllObjective:
    """Eqs. 1, 3 and 7: the NLL of the teacher's answers."""

    reduction: str
    weight: float = 1.0

    def counts(self, batch: TokenBatch) -> Counts:
        return {"nll": _count(batch, batch.mask_BL, self.reduction)}

    def share(
        self,
        models: Weights,
        batch: TokenBatch,
        counts: Counts,
        spec: ModelSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        logps_BL, _, _ = label_logps(*models, batch, spec, dropout_key=dropout_key)
        term = nll_term(logps_BL, batch, batch.mask_BL, self.reduction)
        return alignment_objective(term, nll_weight=self.weight, nll_count=counts["nll"])

    def terms(self) -> dict[str, Objective]:
        return {}


@dataclass(frozen=True)
class AlignObjective:
    """Eq. 6: NLL of the teacher's answers, and preference for them over the proxy's own."""

    preference: PreferenceConfig
    reduction: str
    nll_weight: float
    preference_weight: float

    @staticmethod
    def of(config: AlignConfig) -> AlignObjective:
        return AlignObjective(
            config.preference, config.reduction, config.nll_weight, config.preference_weight
        )

    def counts(self, batch: Pairs) -> Counts:
        chosen = batch.chosen
        return {
            "nll": _count(chosen, chosen.mask_BL, self.reduction),
            "preference": jnp.sum(batch.pair_mask_B, dtype=jnp.float32),
        }

    def share(
        self,
        models: Weights,
        batch: Pairs,
        counts: Counts,
        spec: ModelSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        logps_BL = pair_label_logps(*models, batch, spec, dropout_key=dropout_key)
        chosen = batch.chosen
        referenced = self.preference.loss in REFERENCE_LOSSES
        four = (
            *pair_sums(logps_BL, batch),
            batch.reference_chosen_B if referenced else None,
            batch.reference_rejected_B if referenced else None,
        )
        options: dict[str, Any] = {
            "loss": self.preference.loss,
            "beta": self.preference.beta,
            "length_normalize": self.preference.length_normalize,
            "chosen_tokens_B": count_tokens(chosen.mask_BL),
            "rejected_tokens_B": count_tokens(batch.rejected.mask_BL),
        }
        loss_B = preference_loss(*four, margin=self.preference.margin, **options)
        pair_metrics = preference_metrics(*four, **options)
        return alignment_objective(
            nll_term(logps_BL[0], chosen, chosen.mask_BL, self.reduction),
            reduce_examples(loss_B, batch.pair_mask_B),
            nll_weight=self.nll_weight,
            preference_weight=self.preference_weight,
            nll_count=counts["nll"],
            preference_count=counts["preference"],
            pair_metrics=pair_metrics,
            pair_mask_B=batch.pair_mask_B,
        )

    def terms(self) -> dict[str, Objective]:
        return {
            "nll": dataclasses.replace(self, preference_weight=0.0),
            "preference": dataclasses.replace(self, nll_weight=0.0),
        }


@dataclass(frozen=True)
class DistillObjective:
    """Eq. 11: NLL of the teacher's answers plus alpha times the weighted KL from the proxy.

    With ``drawn`` the batch's log-probs are logs of randomly drawn targets. The KL is then replaced
    by the cross-entropy, which has the same gradient and an unbiased value.
    """

    alpha: float
    nll_weight: float
    tail: str
    reduction: str
    temperature: float = 1.0
    rescale: bool = True
    drawn: bool = False

    @staticmethod
    def of(
        config: DistillConfig, temperature: float, *, rescale: bool = True, drawn: bool = False
    ) -> DistillObjective:
        """Returns the objective of a config.

        ``temperature`` is that of the soft labels. If it is not 1, the KL is multiplied by its
        square so that its gradient keeps its size (Hinton et al., 2015). ``rescale=False`` turns
        this off. The paper has no such factor.
        """
        return DistillObjective(
            config.alpha,
            config.nll_weight,
            config.tail,
            config.reduction,
            temperature,
            rescale,
            drawn,
        )

    def counts(self, batch: DistillBatch) -> Counts:
        return {
            "nll": _count(batch.rows, _teacher_mask(batch), self.reduction),
            "kl": _count(batch.rows, batch.rows.mask_BL, self.reduction),
        }

    def share(
        self,
        models: Weights,
        batch: DistillBatch,
        counts: Counts,
        spec: ModelSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        rows = batch.rows
        logps_BL, topk_BLK, tail_BL = label_logps(
            *models,
            rows,
            spec,
            topk_ids_BLK=batch.topk_ids_BLK,
            temperature=self.temperature,
            dropout_key=dropout_key,
        )
        of_tokens = {"reduction": token_reduction(self.reduction), **_segments(rows)}
        if self.drawn:
            drawn_BL = drawn_cross_entropy_tokens(topk_BLK, batch.topk_logps_BLK)
            kl_BS = reduce_tokens(drawn_BL, rows.mask_BL, **of_tokens)
        else:
            student, proxy = (topk_BLK, tail_BL), (batch.topk_logps_BLK, batch.tail_logps_BL)
            kl_BS = topk_kl(student, proxy, rows.mask_BL, tail=self.tail, **of_tokens)
        if self.rescale:
            kl_BS = self.temperature**2 * kl_BS
        weighted_BS = weighted_kl(kl_BS, batch.sample_weight_BS)
        loss, metrics = distill_objective(
            nll_term(logps_BL, rows, _teacher_mask(batch), self.reduction),
            _term(weighted_BS, rows, rows.mask_BL, self.reduction),
            alpha=self.alpha,
            nll_weight=self.nll_weight,
            nll_count=counts["nll"],
            kl_count=counts["kl"],
            kl=_term(kl_BS, rows, rows.mask_BL, self.reduction),
            sample_weight=reduce_examples(batch.sample_weight_BS, rows.example_mask_BS),
        )
        if self.drawn:
            metrics = {name.replace("kl", "cross_entropy"): m for name, m in metrics.items()}
        return loss, metrics

    def terms(self) -> dict[str, Objective]:
        return {
            "nll": dataclasses.replace(self, alpha=0.0),
            "kl": dataclasses.replace(self, nll_weight=0.0),
        }


def _segments(rows: TokenBatch) -> dict[str, Any]:
    return {
        "segment_ids_BL": rows.segment_ids_BL,
        "num_segments": rows.example_mask_BS.shape[1],
    }


def _count(rows: TokenBatch, mask_BL: Any, reduction: str) -> jax.Array:
    return batch_count(mask_BL, reduction=reduction, **_segments(rows))


def _term(value_BS: jax.Array, rows: TokenBatch, mask_BL: Any, reduction: str) -> Term:
    return example_terms(value_BS, mask_BL, reduction=reduction, **_segments(rows))


def nll_term(logps_BL: jax.Array, rows: TokenBatch, mask_BL: Any, reduction: str) -> Term:
    """Returns (sum, count) of the NLL of the rows' examples.

    Args:
      logps_BL: log-probs of the labels from ``label_logps``, nats.
      rows: the batch; its segments are the examples.
      mask_BL: response tokens that count.
      reduction: as in ``example_terms``.
    """
    nll_BS = nll(logps_BL, mask_BL, reduction=token_reduction(reduction), **_segments(rows))
    return _term(nll_BS, rows, mask_BL, reduction)


def _teacher_mask(batch: DistillBatch) -> Any:
    """Returns mask_BL without the answers that the proxy gave."""
    places = jnp.arange(1, batch.nll_mask_BS.shape[1] + 1)
    here_BLS = batch.rows.segment_ids_BL[:, :, None] == places[None, None, :]
    teacher_BL = jnp.any(here_BLS & batch.nll_mask_BS[:, None, :], axis=-1)
    return batch.rows.mask_BL & teacher_BL
