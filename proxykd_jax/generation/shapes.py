"""The few shapes that the sampler compiles: prompt lengths, slots of caches, rows of batches."""

from __future__ import annotations

_SHORTEST_PROMPT = 16
_FEWEST_SLOTS = 32
# Smallest batch: below this, reading the weights takes a step's time, and compiling another shape
# would cost more than it saves.
_SMALLEST_BATCH = 8


def prompt_bucket(length: int) -> int:
    """The smallest of 16, 32, 64, 128, ... that is at least ``length``."""
    return max(_SHORTEST_PROMPT, 1 << (length - 1).bit_length())


def slot_bucket(slots: int) -> int:
    """The smallest of 32, 48, 64, 80, 96, 112, 128, 160, ... (four per octave) that is enough."""
    step = max(_SHORTEST_PROMPT, (1 << (slots - 1).bit_length()) // 8)
    return max(_FEWEST_SLOTS, -(-slots // step) * step)


def row_counts(batch_size: int, multiple: int, *, between: bool) -> list[int]:
    """The sizes that a batch shrinks through, largest first.

    These are halves of ``batch_size``, and with ``between`` also three quarters of each, down to
    eight rows and as long as ``multiple`` divides them.
    """
    counts, half = [batch_size], batch_size
    while half % 2 == 0:
        between_counts = [half * 3 // 4] if between and half % 4 == 0 else []
        half //= 2
        counts += [*between_counts, half]
    return [count for count in counts if count % multiple == 0 and count >= _SMALLEST_BATCH] or [
        batch_size
    ]
