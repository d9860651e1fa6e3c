"""Soft labels drawn at random from the scorer (RS-KD, arXiv 2503.16870).

p is the scorer and q the student. At each position N ids are drawn from p with replacement, and
their counts are kept. The mean of the target t = counts / N is p. So the mean of the forward KL's
gradient q - t is q - p, the gradient over the full vocabulary; no top-k has this property. It holds
for the forward KL only, because reverse KL and JSD are not linear in t.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.divergence import kl_terms
from proxykd_jax.losses.numerics import blank_outside, float32, inside, weigh
from proxykd_jax.losses.topk import topk_logps

LABEL_VALUES = ("cross_entropy", "kl")


class DrawnLabels(NamedTuple):
    """The ids drawn at each position, each once, most frequent first.

    K is the number of draws. Slots that are not needed have count 0 and id 0.
    """

    ids_BLK: jax.Array  # int32
    counts_BLK: jax.Array  # int32; the counts of a position sum to K, and are 0 outside the mask
    weights_BLK: jax.Array  # float32, p divided by the proposal; 1 if the proposal is p


def draw_labels(
    scorer_logits_BLV: chex.Array,
    key: chex.PRNGKey,
    *,
    num_draws: int,
    row_ids_B: chex.Array,
    positions_BL: chex.Array | None = None,
    mask_BL: chex.Array | None = None,
    proposal_power: float = 1.0,
) -> DrawnLabels:
    """Draws ids with replacement at each position, from the proposal p^tau / sum p^tau.

    With tau = 1, the default, the proposal is p. A draw depends only on the key, the row's id, the
    position and p at that position. It does not depend on the other rows of the batch, on padding,
    or on what was drawn before a restart.

    Args:
        scorer_logits_BLV: logits or log-probs of p, any float type.
        key: a threefry key, which is JAX's default. An `rbg` key draws other ids in another batch.
        num_draws: N; about 50 in the paper.
        row_ids_B: unsigned 32-bit integers that differ between rows, such as part of a digest.
        positions_BL: the position of each token in its row; None: 0, 1, 2, ...
        mask_BL: positions outside the mask get counts of 0. None: no mask.
        proposal_power: tau > 0; 0.8 to 1.2 in the paper. With any tau but 1 the loss needs
            `weights_BLK`.

    Returns:
        `DrawnLabels`. The weights are NaN where the scorer's logits are NaN.

    Raises:
        ValueError: num_draws is below 1, or proposal_power is not positive.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; at least one id is drawn.")
    if not proposal_power > 0:
        raise ValueError(f"proposal_power is {proposal_power}; it must be above 0.")
    logps_BLV = jax.nn.log_softmax(blank_outside(scorer_logits_BLV, mask_BL))
    chex.assert_rank(logps_BLV, 3)
    batch, length, _ = logps_BLV.shape
    if positions_BL is None:
        positions_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
    chex.assert_shape(row_ids_B, (batch,))
    chex.assert_shape(positions_BL, (batch, length))

    def draw(logps_V: jax.Array, row_id: jax.Array, position: jax.Array) -> DrawnLabels:
        position_key = jax.random.fold_in(jax.random.fold_in(key, row_id), position)
        proposal_V = proposal_power * logps_V
        ids_K, counts_K = _count(draw_ids(proposal_V, position_key, num_draws))
        if proposal_power == 1:
            # Exactly 1, or NaN if the scorer's logits are NaN.
            weights_K = 1.0 + 0.0 * logps_V.max()
        else:
            log_normalizer = jax.nn.logsumexp(proposal_V)
            weights_K = jnp.exp((1 - proposal_power) * logps_V[ids_K] + log_normalizer)
        return DrawnLabels(ids_K, counts_K, jnp.where(counts_K > 0, weights_K, 1.0))

    drawn = jax.vmap(jax.vmap(draw, in_axes=(0, None, 0)))(
        logps_BLV, jnp.asarray(row_ids_B), jnp.asarray(positions_BL)
    )
    if mask_BL is None:
        return drawn
    inside_BL1 = inside(mask_BL)[..., None]
    return DrawnLabels(
        jnp.where(inside_BL1, drawn.ids_BLK, 0),
        jnp.where(inside_BL1, drawn.counts_BLK, 0),
        jnp.where(inside_BL1, drawn.weights_BLK, 1.0),
    )


def _block_width(size: int) -> int:
    """The divisor of ``size`` nearest to its square root; the root if none is within a factor of 2.

    Other widths need padding, and padding copies the vocabulary. For a large vocabulary the copy
    takes as long as the draw. For a small one it does not matter, so the root is used.
    """
    root = math.isqrt(size - 1) + 1
    if size < 1024:
        return root
    divisors = [n for n in range(-(-root // 2), 2 * root) if size % n == 0]
    return min(divisors, key=lambda n: max(n / root, root / n), default=root)


def draw_ids(logps_V: chex.Array, key: chex.PRNGKey, num_draws: int) -> jax.Array:
    """Draws ids with replacement from unnormalised log-probs.

    An id is drawn in two steps: first a block of about sqrt(V) entries, then an entry of that
    block. Both steps add Gumbel noise. A single step would need V random numbers per draw.
    Inverting a float32 cumulative sum would miss ids whose probability is below 1e-7.

    Args:
        logps_V: float32; an id with -inf is never drawn.
        key: a threefry key.
        num_draws: N.

    Returns:
        `[N]` int32.
    """
    width = _block_width(logps_V.size)
    padding = -logps_V.size % width
    blocks = jnp.pad(logps_V, (0, padding), constant_values=-jnp.inf).reshape(-1, width)
    block_key, entry_key = jax.random.split(key)
    block_N = jax.random.categorical(
        block_key, jax.nn.logsumexp(blocks, axis=-1), shape=(num_draws,)
    )
    entry_N = jax.random.categorical(entry_key, blocks[block_N], axis=-1)
    return block_N * width + entry_N


def drawn_label_tokens(
    student_logits_BLV: chex.Array,
    ids_BLK: chex.Array,
    counts_BLK: chex.Array,
    mask_BL: chex.Array | None = None,
    *,
    num_draws: int,
    weights_BLK: chex.Array | None = None,
    value: str = "cross_entropy",
) -> jax.Array:
    """Forward KL with the drawn target t = counts / N * weights, at each position.

    For notebooks; training calls `drawn_cross_entropy_tokens` on log-probs.

    | `value`         | formula               | mean over draws                                 |
    |-----------------|-----------------------|-------------------------------------------------|
    | `cross_entropy` | -sum t log q          | the cross-entropy with p                        |
    | `kl`            | sum t (log t - log q) | above the KL, because t has less entropy than p |

    Both have the gradient q sum t - t, and the target is constant. A weighted target need not
    sum to 1 and is not normalised, because that would bias it.

    Args:
        student_logits_BLV: any float type and any leading axes.
        ids_BLK: the drawn ids; those with a count above 0 are distinct.
        counts_BLK: how often each id was drawn. A slot with count 0 is ignored, whatever its id.
        mask_BL: positions outside the mask give 0. None: no mask.
        num_draws: N, the sum of a position's counts.
        weights_BLK: p divided by the proposal; None: 1, for draws from p.
        value: `cross_entropy` or `kl`.

    Returns:
        `[B, L]` float32 in nats.

    Raises:
        ValueError: value is unknown, or num_draws is below 1.
    """
    if value not in LABEL_VALUES:
        raise ValueError(
            f"value is {value!r}; drawn labels are for the forward KL alone, with a value of "
            f"{', '.join(LABEL_VALUES)}."
        )
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; at least one id was drawn.")
    chex.assert_equal_shape([ids_BLK, counts_BLK])
    counts_BLK = blank_outside(counts_BLK, mask_BL)
    drawn_BLK = counts_BLK > 0
    ids_BLK = jnp.where(drawn_BLK, ids_BLK, 0)
    target_BLK = counts_BLK / num_draws
    if weights_BLK is not None:
        chex.assert_equal_shape([counts_BLK, weights_BLK])
        target_BLK = target_BLK * jnp.where(drawn_BLK, float32(weights_BLK), 1.0)
    target_BLK = jax.lax.stop_gradient(target_BLK)
    student_BLK, _ = topk_logps(student_logits_BLV, ids_BLK, mask_BL)
    log_target_BLK = jnp.log(target_BLK)
    if value == "kl":
        return kl_terms(log_target_BLK, student_BLK).sum(axis=-1)
    return drawn_cross_entropy_tokens(student_BLK, log_target_BLK)


def drawn_cross_entropy_tokens(
    student_logps_BLK: chex.Array, log_targets_BLK: chex.Array
) -> jax.Array:
    """Cross-entropy -sum t log q with a drawn target t, at each position.

    Args:
        student_logps_BLK: log q, the student's full softmax at the drawn ids; any leading axes.
        log_targets_BLK: log t = log(counts / N * weights); -inf for an empty slot. Constant here.

    Returns:
        `[B, L]` float32 in nats.
    """
    chex.assert_equal_shape([student_logps_BLK, log_targets_BLK])
    target_BLK = jax.lax.stop_gradient(jnp.exp(float32(log_targets_BLK)))
    return -weigh(student_logps_BLK, target_BLK).sum(axis=-1)


def _count(ids_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distinct ids and their counts, most frequent first; the remaining slots are zero."""
    ids_N = jnp.sort(ids_N)
    begin_N = jnp.searchsorted(ids_N, ids_N, side="left")
    end_N = jnp.searchsorted(ids_N, ids_N, side="right")
    counts_N = jnp.where(begin_N == jnp.arange(ids_N.size), end_N - begin_N, 0).astype(jnp.int32)
    order_N = jnp.argsort(-counts_N, stable=True)
    counts_N = counts_N[order_N]
    return jnp.where(counts_N > 0, ids_N[order_N], 0).astype(jnp.int32), counts_N
