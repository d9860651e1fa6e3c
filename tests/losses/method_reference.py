"""The losses of the comparison methods in float64, with loops, as their papers define them."""

import math

import numpy as np


def returns(rewards, mask, *, include_current, discount=1.0, length_normalize=True):
    out = np.zeros(np.shape(rewards))
    for b, row in enumerate(mask):
        places = [t for t, m in enumerate(row) if m]
        for n, t in enumerate(places):
            rest = places[n:] if include_current else places[n + 1 :]
            total = math.fsum(discount**i * float(rewards[b][t2]) for i, t2 in enumerate(rest))
            out[b, t] = total / max(len(rest), 1) if length_normalize else total
    return out


def whiten(values, mask, include_padding, eps=1e-8):
    inside = np.asarray(mask) != 0
    values = np.where(inside, np.asarray(values, np.float64), 0)
    counted = values.ravel() if include_padding else values[inside]
    return np.where(inside, (values - counted.mean()) / np.sqrt(counted.var() + eps), 0)


def surrogate(logp, old_logp, advantage, clip=None, weight=1.0):
    """The clipped surrogate of one token."""
    rho = weight * math.exp(logp - old_logp)
    if clip is None:
        return -advantage * rho
    return max(-advantage * rho, -advantage * min(max(rho, 1 - clip), 1 + clip))


def mixture_weight(logp, logq, share):
    return math.exp(logq) / (share * math.exp(logp) + (1 - share) * math.exp(logq))


def group_advantages(rewards, ddof, eps=1e-6):
    rewards = np.asarray(rewards, np.float64)
    return (rewards - rewards.mean()) / (rewards.std(ddof=ddof) + eps)


def drawn_label(student_logps, ids, targets):
    """The KL and the cross-entropy of one position."""
    kl = cross_entropy = 0.0
    for v, t in zip(ids, targets, strict=True):
        if t > 0:
            cross_entropy -= t * float(student_logps[v])
            kl += t * (math.log(t) - float(student_logps[v]))
    return kl, cross_entropy
