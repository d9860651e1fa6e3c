"""Losses of Proxy-KD: pure functions on arrays.

All functions can be jitted and compute in float32, whatever the type of their inputs. They return
one value per example, or one per token if their name ends in `_tokens`. The reduction over a batch
is a separate step that returns a sum and a count. Labels and masks are aligned with the logits:
position t of all three belongs to the same token.

Array names end in their axes: B batch, L length, V vocabulary, K top-k or drawn ids, S segments in
a packed row, G samples of one prompt (its group).
"""

from proxykd_jax.losses.advantages import group_advantages, log_ratio_rewards, rewards_to_go, whiten
from proxykd_jax.losses.discriminator import discriminator_loss
from proxykd_jax.losses.divergence import (
    forward_kl,
    forward_kl_tokens,
    generalized_jsd,
    generalized_jsd_tokens,
    reverse_kl,
    reverse_kl_tokens,
    tempered_kl,
    tempered_kl_tokens,
    total_variation,
    total_variation_tokens,
)
from proxykd_jax.losses.nll import nll, token_logps
from proxykd_jax.losses.objectives import alignment_objective, distill_objective, mixed_objective
from proxykd_jax.losses.policy_gradient import (
    low_variance_kl_tokens,
    mixture_logps,
    mixture_weights,
    policy_gradient_tokens,
    sampled_reverse_kl_tokens,
    single_step_kl_tokens,
)
from proxykd_jax.losses.preference import (
    PREFERENCE_LOSSES,
    REFERENCE_LOSSES,
    dpo_loss,
    preference_loss,
    preference_metrics,
)
from proxykd_jax.losses.reduction import (
    BATCH_REDUCTIONS,
    TOKEN_REDUCTIONS,
    Term,
    batch_count,
    batch_mean,
    batch_terms,
    count_tokens,
    example_terms,
    reduce_examples,
    reduce_tokens,
    token_reduction,
)
from proxykd_jax.losses.sampled_labels import (
    DrawnLabels,
    draw_ids,
    draw_labels,
    drawn_cross_entropy_tokens,
    drawn_label_tokens,
)
from proxykd_jax.losses.topk import (
    TAILS,
    topk_and_label_logps,
    topk_kl,
    topk_kl_tokens,
    topk_logps,
    weighted_kl,
)
from proxykd_jax.losses.weights import alignment_weights, length_correlation, normalize_weights

__all__ = [
    "BATCH_REDUCTIONS",
    "PREFERENCE_LOSSES",
    "REFERENCE_LOSSES",
    "TAILS",
    "TOKEN_REDUCTIONS",
    "DrawnLabels",
    "Term",
    "alignment_objective",
    "alignment_weights",
    "batch_count",
    "batch_mean",
    "batch_terms",
    "count_tokens",
    "discriminator_loss",
    "distill_objective",
    "dpo_loss",
    "draw_ids",
    "draw_labels",
    "drawn_cross_entropy_tokens",
    "drawn_label_tokens",
    "example_terms",
    "forward_kl",
    "forward_kl_tokens",
    "generalized_jsd",
    "generalized_jsd_tokens",
    "group_advantages",
    "length_correlation",
    "log_ratio_rewards",
    "low_variance_kl_tokens",
    "mixed_objective",
    "mixture_logps",
    "mixture_weights",
    "nll",
    "normalize_weights",
    "policy_gradient_tokens",
    "preference_loss",
    "preference_metrics",
    "reduce_examples",
    "reduce_tokens",
    "reverse_kl",
    "reverse_kl_tokens",
    "rewards_to_go",
    "sampled_reverse_kl_tokens",
    "single_step_kl_tokens",
    "tempered_kl",
    "tempered_kl_tokens",
    "token_logps",
    "token_reduction",
    "topk_and_label_logps",
    "topk_kl",
    "topk_kl_tokens",
    "topk_logps",
    "total_variation",
    "total_variation_tokens",
    "weighted_kl",
    "whiten",
]
