"""The losses in float64 NumPy, written like their definitions.

Nothing is shared with the package. Entries of probability zero follow 0 log 0 = 0.
"""

import math

import numpy as np


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _xlogy_ratio(p, q):
    """sum p log(p / q) of two vectors of probabilities."""
    total = 0.0
    for p_v, q_v in zip(p, q, strict=True):
        if p_v > 0:
            total += p_v * (math.log(p_v) - math.log(q_v)) if q_v > 0 else math.inf
    return total


def kl(p_logits, q_logits):
    return _xlogy_ratio(np.exp(log_softmax(p_logits)), np.exp(log_softmax(q_logits)))


def jsd(t_logits, s_logits, beta):
    if beta == 0:
        return kl(t_logits, s_logits)
    if beta == 1:
        return kl(s_logits, t_logits)
    t, s = np.exp(log_softmax(t_logits)), np.exp(log_softmax(s_logits))
    m = beta * t + (1 - beta) * s
    return beta * _xlogy_ratio(t, m) + (1 - beta) * _xlogy_ratio(s, m)


def total_variation(t_logits, s_logits):
    t, s = np.exp(log_softmax(t_logits)), np.exp(log_softmax(s_logits))
    return 0.5 * np.abs(t - s).sum()


def topk_kl(student_logits, proxy_logits, ids, tail):
    """The top-k KL of one position. The proxy is given in full, so its tail mass is exact."""
    q_all, p_all = np.exp(log_softmax(student_logits)), np.exp(log_softmax(proxy_logits))
    p, q = p_all[ids], q_all[ids]
    if tail == "zero":
        return _xlogy_ratio(p, q)
    if tail == "renormalize":
        return _xlogy_ratio(p / p.sum(), q / q.sum())
    if tail == "renormalize_proxy":
        return _xlogy_ratio(p / p.sum(), q)
    outside = np.setdiff1d(np.arange(len(p_all)), ids)
    return _xlogy_ratio(
        np.append(p, p_all[outside].sum()), np.append(q, q_all[outside].sum() or 1e-300)
    )


def topk_gradient(student_logits, proxy_logits, ids, tail):
    """The derivative of `topk_kl` for the student's logits, derived by hand."""
    q, p_all = np.exp(log_softmax(student_logits)), np.exp(log_softmax(proxy_logits))
    inside = np.zeros(len(q), bool)
    inside[ids] = True
    p = np.where(inside, p_all, 0.0)
    if tail == "zero":
        return q * p.sum() - p
    if tail == "renormalize_proxy":
        return q - p / p.sum()
    if tail == "renormalize":
        return np.where(inside, q / q[inside].sum(), 0.0) - p / p.sum()
    tail_share = np.where(inside, 0.0, q)
    if tail_share.sum() > 0:
        tail_share = tail_share / tail_share.sum()
    return q - p - p_all[~inside].sum() * tail_share


def per_example(position_values, mask, reduction):
    """Reduces [B, L] values to [B], with loops."""
    out = []
    for values, row_mask in zip(position_values, mask, strict=True):
        kept = [v for v, m in zip(values, row_mask, strict=True) if m]
        total = math.fsum(kept)
        out.append(total / max(len(kept), 1) if reduction == "mean" else total)
    return np.array(out)


def over_positions(function, *logits):
    """Applies a function of vectors at each position of [B, L, V] arrays."""
    batch, length = logits[0].shape[:2]
    return np.array(
        [[function(*(x[b, t] for x in logits)) for t in range(length)] for b in range(batch)]
    )


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -700 else x


def preference(
    chosen, rejected, ref_chosen, ref_rejected, *, loss, beta, margin=0.0, smoothing=0.0,
    chosen_tokens=1, rejected_tokens=1, length_normalize=False,
):  # fmt: skip
    """The loss of one pair."""
    if loss in ("simpo", "orpo"):
        a, b = chosen / chosen_tokens, rejected / rejected_tokens
        if loss == "simpo":
            x = beta * (a - b) - margin
            return -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)
        odds = (a - math.log(1 - math.exp(a))) - (b - math.log(1 - math.exp(b)))
        return -beta * log_sigmoid(odds)
    a, b = chosen - ref_chosen, rejected - ref_rejected
    if length_normalize:
        a, b = a / chosen_tokens, b / rejected_tokens
    if loss == "ipo":
        return (a - b - 1 / (2 * beta)) ** 2
    x = beta * (a - b)
    return -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)
