"""Reductions: from a value per token to a value per example, and on to a (sum, count) of a batch.

A batch may be cut into micro-batches or spread over devices. Its mean is then not the mean of the
parts' means. So each part is reduced to a sum and a count, the sums and the counts are added, and
one division comes last (`batch_mean`). Counts depend on masks alone, so they are known before the
forward pass (`batch_count`).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.numerics import float32, inside

TOKEN_REDUCTIONS = ("mean", "sum")
BATCH_REDUCTIONS = ("example_mean", "token_mean", "sum")


class Term(NamedTuple):
    """A sum and the count to divide it by, two float32 scalars.

    Terms of several micro-batches are added field by field.
    """

    total: jax.Array
    # The name cannot be `count`, because every tuple has a method of that name.
    divisor: jax.Array


def count_tokens(
    mask_BL: chex.Array,
    *,
    segment_ids_BL: chex.Array | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """The number of tokens inside the mask, one float32 count per example.

    Arguments, shapes and errors are as in `reduce_tokens`.
    """
    mask_BL = inside(mask_BL)
    return reduce_tokens(
        mask_BL, mask_BL, reduction="sum", segment_ids_BL=segment_ids_BL, num_segments=num_segments
    )


def reduce_tokens(
    values_BL: chex.Array,
    mask_BL: chex.Array,
    *,
    reduction: str = "mean",
    segment_ids_BL: chex.Array | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """Reduces the values inside the mask to one value per example.

    Args:
        values_BL: one value per token. Values outside the mask are ignored, infinities and NaN too.
        mask_BL: bool, integer or float; nonzero means inside.
        reduction: `mean` over the example's tokens inside the mask, or `sum`.
        segment_ids_BL: for packed rows, the example that a token belongs to, 1 to `num_segments`.
            0 is padding, which is never counted.
        num_segments: the number of examples in a row, required with `segment_ids_BL`. A token
            inside the mask with a greater id makes its whole row NaN, so that no example is lost
            without notice.

    Returns:
        `[B]` float32, or `[B, num_segments]` for packed rows. An example without a token inside
        the mask gives 0, with gradient 0.

    Raises:
        ValueError: the reduction is unknown, or only one of `segment_ids_BL` and `num_segments` is
            given.
    """
    if reduction not in TOKEN_REDUCTIONS:
        raise ValueError(
            f"reduction is {reduction!r}; a token reduction is one of "
            f"{', '.join(TOKEN_REDUCTIONS)}."
        )
    if (segment_ids_BL is None) != (num_segments is None):
        raise ValueError("Packed rows need both segment_ids_BL and num_segments.")
    mask_BL = inside(mask_BL)
    chex.assert_rank(mask_BL, 2)
    chex.assert_shape(values_BL, mask_BL.shape)
    values_BL = jnp.where(mask_BL, float32(values_BL), 0.0)
    if segment_ids_BL is None or num_segments is None:
        total = values_BL.sum(axis=-1)
        count = mask_BL.sum(axis=-1, dtype=jnp.float32)
    else:
        segment_ids_BL = jnp.asarray(segment_ids_BL)
        chex.assert_shape(segment_ids_BL, mask_BL.shape)
        here_BLS = segment_ids_BL[:, :, None] == jnp.arange(1, num_segments + 1)[None, None, :]
        total = jnp.where(here_BLS, values_BL[:, :, None], 0.0).sum(axis=1)
        count = (here_BLS & mask_BL[:, :, None]).sum(axis=1, dtype=jnp.float32)
        lost_B = (mask_BL & (segment_ids_BL > num_segments)).any(axis=1)
        total = jnp.where(lost_B[:, None], jnp.nan, total)
    return total / jnp.maximum(count, 1.0) if reduction == "mean" else total


def reduce_examples(value_B: chex.Array, example_mask_B: chex.Array) -> Term:
    """The sum and the count of the values of valid examples.

    Args:
        value_B: one value per example, `[B]` or `[B, S]` for packed rows. Values of examples that
            are not valid are ignored, NaN too.
        example_mask_B: the same shape; nonzero means valid.

    Returns:
        `Term(total, divisor)`, two float32 scalars.
    """
    valid_B = inside(example_mask_B)
    chex.assert_shape(value_B, valid_B.shape)
    return Term(jnp.where(valid_B, float32(value_B), 0.0).sum(), valid_B.sum(dtype=jnp.float32))


def token_reduction(reduction: str) -> str:
    """The token reduction that a batch reduction needs: `mean` for `example_mean`, else `sum`.

    >>> value_B = nll(logps_BL, mask_BL, reduction=token_reduction("token_mean"))
    >>> term = example_terms(value_B, mask_BL, reduction="token_mean")

    Args:
        reduction: `example_mean`, `token_mean` or `sum`.

    Raises:
        ValueError: the reduction is unknown.
    """
    _check_batch_reduction(reduction)
    return "mean" if reduction == "example_mean" else "sum"


def example_terms(
    value_B: chex.Array,
    mask_BL: chex.Array,
    *,
    reduction: str,
    segment_ids_BL: chex.Array | None = None,
    num_segments: int | None = None,
) -> Term:
    """Reduces one value per example to a sum and a count over the batch.

    | reduction      | an example's value is a | the count is the number of     |
    |----------------|-------------------------|--------------------------------|
    | `example_mean` | mean over tokens        | examples with a response token |
    | `token_mean`   | sum over tokens         | response tokens                |
    | `sum`          | sum over tokens         | examples with a response token |

    The total is the sum of the values. `sum` follows the paper's eqs. 1, 7, 8 and 10 as printed:
    a sum over y and a mean over examples.

    Args:
        value_B: one value per example, `[B]` or `[B, S]` for packed rows. It must be reduced over
            the tokens by `token_reduction(reduction)`. It may contain a factor such as a sample
            weight, which does not change the count.
        mask_BL: response tokens; bool, integer or float.
        reduction: `example_mean`, `token_mean` or `sum`.
        segment_ids_BL, num_segments: packed rows, as in `reduce_tokens`.

    Returns:
        `Term(total, divisor)`, two float32 scalars.

    Raises:
        ValueError: the reduction is unknown, or only one of the packing arguments is given.
    """
    tokens_B = count_tokens(mask_BL, segment_ids_BL=segment_ids_BL, num_segments=num_segments)
    chex.assert_equal_shape([value_B, tokens_B])
    return Term(float32(value_B).sum(), _batch_count(tokens_B, reduction))


def batch_terms(
    values_BL: chex.Array,
    mask_BL: chex.Array,
    *,
    reduction: str,
    segment_ids_BL: chex.Array | None = None,
    num_segments: int | None = None,
) -> Term:
    """Reduces one value per token to a sum and a count over the batch.

    It calls `reduce_tokens` with `token_reduction(reduction)`, and then `example_terms`.

    Args:
        values_BL: one value per token.
        mask_BL: response tokens; bool, integer or float.
        reduction: `example_mean`, `token_mean` or `sum`.
        segment_ids_BL, num_segments: packed rows, as in `reduce_tokens`.

    Returns:
        `Term(total, divisor)`, two float32 scalars.

    Raises:
        ValueError: the reduction is unknown, or only one of the packing arguments is given.
    """
    value_B = reduce_tokens(
        values_BL,
        mask_BL,
        reduction=token_reduction(reduction),
        segment_ids_BL=segment_ids_BL,
        num_segments=num_segments,
    )
    return example_terms(
        value_B,
        mask_BL,
        reduction=reduction,
        segment_ids_BL=segment_ids_BL,
        num_segments=num_segments,
    )


def batch_count(
    mask_BL: chex.Array,
    *,
    reduction: str,
    segment_ids_BL: chex.Array | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """The count that `example_terms` and `batch_terms` return, from the mask alone.

    Arguments and errors are as in `batch_terms`. The result is a float32 scalar.
    """
    tokens_B = count_tokens(mask_BL, segment_ids_BL=segment_ids_BL, num_segments=num_segments)
    return _batch_count(tokens_B, reduction)


def batch_mean(term: tuple[chex.Array, chex.Array]) -> jax.Array:
    """total / count, a float32 scalar; 0 if the count is 0."""
    total, count = float32(term[0]), float32(term[1])
    return jnp.where(count == 0, 0.0, total / jnp.where(count == 0, 1.0, count))


def _batch_count(tokens_B: jax.Array, reduction: str) -> jax.Array:
    _check_batch_reduction(reduction)
    return tokens_B.sum() if reduction == "token_mean" else (tokens_B > 0).sum(dtype=jnp.float32)


def _check_batch_reduction(reduction: str) -> None:
    if reduction not in BATCH_REDUCTIONS:
        raise ValueError(
            f"reduction is {reduction!r}; a batch reduction is one of "
            f"{', '.join(BATCH_REDUCTIONS)}."
        )
