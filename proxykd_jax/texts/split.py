"""Assigns a row to a split by a hash of its first user message.

For a plain text the hash is that of its prompt (``text_prompts.py``). Order, machine and the other
rows do not matter, and one question never gets into two splits. The shares hold in expectation: of
n rows, a split of share p gets n p with standard deviation sqrt(n p (1 - p)), and more where
prompts repeat, because their rows stay together.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from proxykd_jax.config.schema import SharesConfig
from proxykd_jax.texts.normalise import normalise_text
from proxykd_jax.texts.records import TextRow

SplitName = Literal["warmup", "align", "distill", "validation"]
LARGEST_AUTOMATIC_FRACTION = 0.1


def split_name(
    first_message_key: str, *, shares: SharesConfig, validation_fraction: float
) -> SplitName:
    """The split of a row.

    Args:
      first_message_key: ``TextRow.first_user_message``; a text that is not normalised gives the
        same result.
      shares: shares of the rows that validation leaves.
      validation_fraction: share set aside first, by bytes of the hash that the shares do not use. A
        row that is held out at one fraction is also held out at every larger one.
    """
    return split_at(
        split_places(first_message_key), shares=shares, validation_fraction=validation_fraction
    )


def split_places(first_message_key: str) -> tuple[float, float]:
    """Two numbers in [0, 1) from the hash: one for validation, one for the shares.

    ``split_at`` needs nothing else of a row once the fraction is known.
    """
    digest = hashlib.sha256(normalise_text(first_message_key).encode("utf-8")).digest()
    return _uniform(digest[:8]), _uniform(digest[8:16])


def split_at(
    places: tuple[float, float], *, shares: SharesConfig, validation_fraction: float
) -> SplitName:
    """``split_name`` of a row with these ``split_places``."""
    held_out, place = places
    if held_out < validation_fraction:
        return "validation"
    if place < shares.warmup:
        return "warmup"
    if place < shares.warmup + shares.align:
        return "align"
    # The shares add up to 1 only within 1e-6. A share of 0 must still stay empty.
    return "distill" if shares.distill > 0 else "align" if shares.align > 0 else "warmup"


def effective_validation_fraction(
    rows: int, *, validation_fraction: float, validation_rows: int
) -> float:
    """``validation_fraction``, or more if it gives fewer than ``validation_rows`` rows.

    It rises to 10 % at most, so a corpus of fewer than ten times ``validation_rows`` rows gives a
    tenth of its rows.
    """
    if rows <= 0:
        return validation_fraction
    return max(validation_fraction, min(LARGEST_AUTOMATIC_FRACTION, validation_rows / rows))


def selection_hash(row: TextRow) -> int:
    """A 64-bit number that decides whether ``max_rows`` keeps the row.

    It depends on the whole conversation, and is independent of the split.
    """
    state = hashlib.sha256(b"select")
    for role, content in row_parts(row):
        state.update(f"\0{role}\0{content}".encode())
    return int.from_bytes(state.digest()[:8], "big")


def row_parts(row: TextRow) -> list[tuple[str, str]]:
    """Role and normalised content of each turn, with calls and thoughts; a plain text is one."""
    if row.text is not None:
        return [("text", normalise_text(row.text))]
    parts = [("tools", normalise_text(row.tools))] if row.tools is not None else []
    for message in row.messages:
        content, extras = message.content, message.extras
        if extras is not None:
            spelled = content if extras.spelled is None else extras.spelled
            thought = extras.thought if extras.spelled is None else None
            content = "\n".join(text for text in (thought, spelled, extras.calls) if text)
        parts.append((message.role, normalise_text(content)))
    return parts


def _uniform(eight_bytes: bytes) -> float:
    # 53 bits: every value is exact in float64, so all machines agree, and it is below 1.
    return (int.from_bytes(eight_bytes, "big") >> 11) * 2.0**-53
