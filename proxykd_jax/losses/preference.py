"""Preference losses behind one interface: DPO, IPO, SimPO and ORPO.

All take log-probs of whole responses, summed over tokens, of the policy and (DPO, IPO) of a
frozen reference, and give one value a pair. With a bar for division by the response's tokens and

    h = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)

| loss    | value                                                      | lengths                 |
|---------|------------------------------------------------------------|-------------------------|
| `dpo`   | -log sigmoid(beta h)                                       | sums; means on request  |
| `ipo`   | (h - 1 / (2 beta))^2                                       | sums; means on request  |
| `simpo` | -log sigmoid(beta (bar chosen - bar rejected) - margin)    | always means            |
| `orpo`  | -beta log sigmoid(logit(bar chosen) - logit(bar rejected)) | always means            |

with logit(b) = b - log(1 - exp b). Sources: DPO arXiv 2305.18290 eq. 7, IPO 2310.12036 eq. 17,
SimPO 2405.14734 eq. 6, ORPO 2403.07691 eqs. 6 to 8. ORPO's other half, the NLL of the chosen
response, is the objective's (`alignment_objective`), so that it is never added twice.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.numerics import (
    SEQUENCE_LOGP_FLOOR,
    finite_log,
    float32,
    inside,
    log1mexp,
)

PREFERENCE_LOSSES = ("dpo", "simpo", "orpo", "ipo")
REFERENCE_LOSSES = ("dpo", "ipo")  # which of them look at a reference
_SMOOTHED = ("dpo", "simpo")


def preference_loss(
    policy_chosen_B: chex.Array,
    policy_rejected_B: chex.Array,
    reference_chosen_B: chex.Array | None = None,
    reference_rejected_B: chex.Array | None = None,
    *,
    loss: str = "dpo",
    beta: float,
    margin: float | None = None,
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    chosen_tokens_B: chex.Array | None = None,
    rejected_tokens_B: chex.Array | None = None,
    pair_mask_B: chex.Array | None = None,
) -> jax.Array:
    """Loss of each pair of a chosen (the teacher's) and a rejected (the proxy's) response.

    Args:
        policy_chosen_B: log pi(y|x), nats, summed over the response's tokens.
        policy_rejected_B: the same of y-hat.
        reference_chosen_B, reference_rejected_B: the same under the reference. DPO and IPO need
            them, SimPO and ORPO have no reference and do not look at them.
        loss: `dpo`, `simpo`, `orpo` or `ipo`.
        beta: DPO's and SimPO's scale of rewards, IPO's tau, ORPO's weight lambda; > 0.
        margin: SimPO's gamma, nats of reward. It is gamma itself, not the ratio gamma / beta.
            Required by SimPO, refused by the others.
        label_smoothing: share of pairs assumed to be in the wrong order, 0 to below 0.5 (DPO and
            SimPO).
        length_normalize: DPO and IPO on token means instead of sums. Summed IPO pulls
            every pair to one margin whatever its length.
        chosen_tokens_B, rejected_tokens_B: response tokens. Required where means are taken; an
            empty response counts as one token.
        pair_mask_B: where given, pairs outside it give a constant with gradient exactly 0, even
            if their log-probs are infinite or NaN. Leave them out of the mean with
            `reduce_examples`.

    Returns:
        `[B]` float32, not reduced. At policy == reference DPO is ln 2 and IPO 1 / (4 beta^2).

    Raises:
        ValueError: an unknown loss, something the loss needs is missing, or something was given
            that it would ignore.
    """
    _check_options(loss, beta, margin, label_smoothing)
    if loss == "dpo":
        return dpo_loss(
            policy_chosen_B,
            policy_rejected_B,
            reference_chosen_B,
            reference_rejected_B,
            beta=beta,
            label_smoothing=label_smoothing,
            length_normalize=length_normalize,
            chosen_tokens_B=chosen_tokens_B,
            rejected_tokens_B=rejected_tokens_B,
            pair_mask_B=pair_mask_B,
        )
    chosen_B, rejected_B = _scores(
        _Response(policy_chosen_B, reference_chosen_B, chosen_tokens_B),
        _Response(policy_rejected_B, reference_rejected_B, rejected_tokens_B),
        pair_mask_B,
        loss=loss,
        length_normalize=length_normalize,
    )
    if loss == "ipo":
        return jnp.square(chosen_B - rejected_B - 1 / (2 * beta))
    if loss == "orpo":
        log_odds_B = (chosen_B - log1mexp(chosen_B)) - (rejected_B - log1mexp(rejected_B))
        return -beta * jax.nn.log_sigmoid(log_odds_B)
    return _logistic(beta * (chosen_B - rejected_B) - (margin or 0.0), label_smoothing)


def dpo_loss(
    policy_chosen_B: chex.Array,
    policy_rejected_B: chex.Array,
    reference_chosen_B: chex.Array | None,
    reference_rejected_B: chex.Array | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalize: bool = False,
    chosen_tokens_B: chex.Array | None = None,
    rejected_tokens_B: chex.Array | None = None,
    pair_mask_B: chex.Array | None = None,
) -> jax.Array:
    """-log sigmoid(beta [(log pi - log pi_ref)(y) - (log pi - log pi_ref)(y-hat)]) (eq. 4).

    Eq. 4 is printed without its minus sign, and its minimum would be as far from the teacher as
    the policy can go. The loss is ln 2 where the policy equals the reference, and descending it
    there raises y and lowers y-hat.

    Args:
        policy_chosen_B, policy_rejected_B: log-probs summed over the response's tokens, nats.
        reference_chosen_B, reference_rejected_B: the same under the previous round's proxy.
        beta: > 0. Where each round is run to convergence, the error of the sequence log-ratio to
            the teacher is multiplied by 1 - 1 / beta a round.
        label_smoothing, length_normalize, chosen_tokens_B, rejected_tokens_B, pair_mask_B: as in
            `preference_loss`; the paper has none of them.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: as `preference_loss`.
    """
    _check_options("dpo", beta, label_smoothing=label_smoothing)
    chosen_B, rejected_B = _scores(
        _Response(policy_chosen_B, reference_chosen_B, chosen_tokens_B),
        _Response(policy_rejected_B, reference_rejected_B, rejected_tokens_B),
        pair_mask_B,
        loss="dpo",
        length_normalize=length_normalize,
    )
    return _logistic(beta * (chosen_B - rejected_B), label_smoothing)


def preference_metrics(
    policy_chosen_B: chex.Array,
    policy_rejected_B: chex.Array,
    reference_chosen_B: chex.Array | None = None,
    reference_rejected_B: chex.Array | None = None,
    *,
    loss: str = "dpo",
    beta: float,
    length_normalize: bool = False,
    chosen_tokens_B: chex.Array | None = None,
    rejected_tokens_B: chex.Array | None = None,
    pair_mask_B: chex.Array | None = None,
) -> dict[str, jax.Array]:
    """What a preference loss sees of each pair; arguments as in `preference_loss`.

    The reward is beta log(pi / pi_ref) for DPO and IPO, beta times the mean token log-prob for
    SimPO and ORPO.

    Returns:
        `reward_chosen`, `reward_rejected`, `reward_margin` (their difference) and
        `reward_accuracy` (1 where the margin is positive, one half where it is exactly 0, as for
        all pairs at policy == reference), each `[B]` float32, without gradient.

    Raises:
        ValueError: as `preference_loss`.
    """
    _check_options(loss, beta)
    chosen_B, rejected_B = _scores(
        _Response(policy_chosen_B, reference_chosen_B, chosen_tokens_B),
        _Response(policy_rejected_B, reference_rejected_B, rejected_tokens_B),
        pair_mask_B,
        loss=loss,
        length_normalize=length_normalize,
    )
    margin_B = beta * (chosen_B - rejected_B)
    metrics = {
        "reward_chosen": beta * chosen_B,
        "reward_rejected": beta * rejected_B,
        "reward_margin": margin_B,
        "reward_accuracy": 0.5 * (1.0 + jnp.sign(margin_B)),
    }
    return jax.lax.stop_gradient(metrics)


def _logistic(logit_B: jax.Array, label_smoothing: float) -> jax.Array:
    """-log sigmoid(logit), mixed with that of the opposite order."""
    return -(
        (1 - label_smoothing) * jax.nn.log_sigmoid(logit_B)
        + label_smoothing * jax.nn.log_sigmoid(-logit_B)
    )


def _check_options(
    loss: str, beta: float, margin: float | None = 0.0, label_smoothing: float = 0.0
) -> None:
    if loss not in PREFERENCE_LOSSES:
        raise ValueError(
            f"loss is {loss!r}; a preference loss is one of {', '.join(PREFERENCE_LOSSES)}."
        )
    # A traced beta has no value to look at.
    if isinstance(beta, int | float) and not beta > 0:
        raise ValueError(f"beta is {beta}; it must be above 0.")
    if loss == "simpo" and margin is None:
        raise ValueError("SimPO needs margin, its gamma in nats of reward (not gamma / beta).")
    if loss != "simpo" and margin:
        raise ValueError(f"margin is SimPO's gamma; {loss} has none and would ignore {margin}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it takes 0 to below 0.5.")
    if label_smoothing and loss not in _SMOOTHED:
        raise ValueError(
            f"label_smoothing is defined for {' and '.join(_SMOOTHED)}, not for {loss}."
        )


class _Response(NamedTuple):
    """One response of each pair: log-probs under policy and reference, and number of tokens."""

    policy_B: chex.Array
    reference_B: chex.Array | None
    tokens_B: chex.Array | None


def _scores(
    chosen: _Response,
    rejected: _Response,
    pair_mask_B: chex.Array | None,
    *,
    loss: str,
    length_normalize: bool,
) -> tuple[jax.Array, jax.Array]:
    """What is compared: log-probs or log-ratios of y and y-hat, as sums or as token means."""
    chosen_B = _usable(chosen.policy_B, pair_mask_B)
    rejected_B = _usable(rejected.policy_B, pair_mask_B)
    chex.assert_equal_shape([chosen_B, rejected_B])
    if loss in REFERENCE_LOSSES:
        if chosen.reference_B is None or rejected.reference_B is None:
            raise ValueError(
                f"{loss} compares with a reference: give reference_chosen_B and "
                "reference_rejected_B, or use simpo or orpo, which have none."
            )
        chex.assert_shape([chosen.reference_B, rejected.reference_B], chosen_B.shape)
        chosen_B = chosen_B - _usable(chosen.reference_B, pair_mask_B)
        rejected_B = rejected_B - _usable(rejected.reference_B, pair_mask_B)
    if length_normalize or loss not in REFERENCE_LOSSES:
        if chosen.tokens_B is None or rejected.tokens_B is None:
            raise ValueError(
                f"{loss} takes means over tokens here: give chosen_tokens_B and rejected_tokens_B."
            )
        chex.assert_shape([chosen.tokens_B, rejected.tokens_B], chosen_B.shape)
        chosen_B = chosen_B / jnp.maximum(float32(chosen.tokens_B), 1.0)
        rejected_B = rejected_B / jnp.maximum(float32(rejected.tokens_B), 1.0)
    return chosen_B, rejected_B


def _usable(seq_loglik_B: chex.Array, pair_mask_B: chex.Array | None) -> jax.Array:
    """Finite log-probs: -inf under both policy and reference would make their difference NaN."""
    loglik_B = float32(seq_loglik_B)
    if pair_mask_B is not None:
        chex.assert_shape(pair_mask_B, loglik_B.shape)
        loglik_B = jnp.where(inside(pair_mask_B), loglik_B, -1.0)
    return finite_log(loglik_B, SEQUENCE_LOGP_FLOOR)
