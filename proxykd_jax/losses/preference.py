"""Preference losses behind one interface: DPO, IPO, SimPO and ORPO.

All take log-probs of whole responses, summed over tokens, and return one value per pair. The
log-probs are those of the policy and, for DPO and IPO, also those of a frozen reference. In the
table `bar` divides a log-prob by the number of the response's tokens, and

    h = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)

| loss    | value                                                      | lengths                 |
|---------|------------------------------------------------------------|-------------------------|
| `dpo`   | -log sigmoid(beta h)                                       | sums; means on request  |
| `ipo`   | (h - 1 / (2 beta))^2                                       | sums; means on request  |
| `simpo` | -log sigmoid(beta (bar chosen - bar rejected) - margin)    | always means            |
| `orpo`  | -beta log sigmoid(logit(bar chosen) - logit(bar rejected)) | always means            |

with logit(b) = b - log(1 - exp b). Sources: DPO arXiv 2305.18290 eq. 7, IPO 2310.12036 eq. 17,
SimPO 2405.14734 eq. 6, ORPO 2403.07691 eqs. 6 to 8. ORPO's loss also contains the NLL of the chosen
response. `alignment_objective` adds that part, and this module does not.
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
REFERENCE_LOSSES = ("dpo", "ipo")  # the losses that use a reference
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
        policy_chosen_B: log pi(y|x) of the chosen response, nats, summed over its tokens.
        policy_rejected_B: log pi(y-hat|x) of the rejected response, likewise.
        reference_chosen_B, reference_rejected_B: the same two log-probs under the reference.
            Required by DPO and IPO, ignored by SimPO and ORPO.
        loss: `dpo`, `simpo`, `orpo` or `ipo`.
        beta: > 0. The scale of rewards in DPO and SimPO, tau in IPO, the weight lambda in ORPO.
        margin: SimPO's gamma in nats of reward: gamma itself, not the ratio gamma / beta. Required
            by SimPO, refused by the others.
        label_smoothing: the assumed share of pairs in the wrong order, at least 0 and below 0.5.
            For DPO and SimPO only.
        length_normalize: for DPO and IPO, divide log-ratios by the number of tokens. Without this,
            IPO pulls every pair to the same margin, whatever its length.
        chosen_tokens_B, rejected_tokens_B: the number of tokens of each response. Required if
            log-probs are divided by it. An empty response counts as one token.
        pair_mask_B: pairs outside the mask give a constant with gradient exactly 0, even if their
            log-probs are infinite or NaN. Leave them out of the mean with `reduce_examples`. None:
            no mask.

    Returns:
        `[B]` float32, not reduced. If policy and reference are equal, DPO gives ln 2 and IPO
        1 / (4 beta^2).

    Raises:
        ValueError: the loss is unknown, an input that the loss needs is missing, an option is out
            of its range, or an option is given that the loss does not use.
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

    The paper prints eq. 4 without the minus sign. Minimising the printed form would move the policy
    as far from the teacher as it can go. The loss is ln 2 where the policy equals the reference. A
    gradient step from there raises the log-prob of y and lowers that of y-hat.

    Args:
        policy_chosen_B, policy_rejected_B: log-probs summed over the response's tokens, nats.
        reference_chosen_B, reference_rejected_B: the same under the proxy of the previous round.
        beta: > 0. If each round is trained to convergence, every round multiplies the error of the
            sequence log-ratio to the teacher by 1 - 1 / beta.
        label_smoothing, length_normalize, chosen_tokens_B, rejected_tokens_B, pair_mask_B: as in
            `preference_loss`; the paper uses none of them.

    Returns:
        `[B]` float32, not reduced.

    Raises:
        ValueError: as in `preference_loss`.
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
    """Rewards, margin and accuracy of each pair; arguments are as in `preference_loss`.

    The reward of a response is beta log(pi / pi_ref) for DPO and IPO, and beta times the mean token
    log-prob for SimPO and ORPO.

    Returns:
        Four `[B]` float32 arrays without gradient: `reward_chosen`, `reward_rejected`,
        `reward_margin` (chosen minus rejected) and `reward_accuracy`. The accuracy is 1 if the
        margin is positive, 0 if it is negative, and 0.5 if it is exactly 0. It is exactly 0 for
        every pair if policy and reference are equal.

    Raises:
        ValueError: as in `preference_loss`.
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
    """-log sigmoid(logit), mixed with the loss of the opposite order, -log sigmoid(-logit)."""
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
    # A traced beta has no value that could be checked.
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
    """The scores of y and y-hat: log-probs or log-ratios, as sums or as token means."""
    chosen_B = _usable(chosen.policy_B, pair_mask_B)
    rejected_B = _usable(rejected.policy_B, pair_mask_B)
    chex.assert_equal_shape([chosen_B, rejected_B])
    if loss in REFERENCE_LOSSES:
        if chosen.reference_B is None or rejected.reference_B is None:
            raise ValueError(
                f"{loss} compares with a reference: give reference_chosen_B and "
                "reference_rejected_B, or use simpo or orpo, which need none."
            )
        chex.assert_shape([chosen.reference_B, rejected.reference_B], chosen_B.shape)
        chosen_B = chosen_B - _usable(chosen.reference_B, pair_mask_B)
        rejected_B = rejected_B - _usable(rejected.reference_B, pair_mask_B)
    if length_normalize or loss not in REFERENCE_LOSSES:
        if chosen.tokens_B is None or rejected.tokens_B is None:
            raise ValueError(
                f"{loss} divides by the number of tokens here: give chosen_tokens_B and "
                "rejected_tokens_B."
            )
        chex.assert_shape([chosen.tokens_B, rejected.tokens_B], chosen_B.shape)
        chosen_B = chosen_B / jnp.maximum(float32(chosen.tokens_B), 1.0)
        rejected_B = rejected_B / jnp.maximum(float32(rejected.tokens_B), 1.0)
    return chosen_B, rejected_B


def _usable(seq_loglik_B: chex.Array, pair_mask_B: chex.Array | None) -> jax.Array:
    """Log-probs with a finite floor; if policy and reference both gave -inf, h would be NaN."""
    loglik_B = float32(seq_loglik_B)
    if pair_mask_B is not None:
        chex.assert_shape(pair_mask_B, loglik_B.shape)
        loglik_B = jnp.where(inside(pair_mask_B), loglik_B, -1.0)
    return finite_log(loglik_B, SEQUENCE_LOGP_FLOOR)
