"""Compact sets of rows and prompts: 64-bit digests in a hash table with open addressing.

Among n texts two different ones share a digest with probability n^2 / 2^65 (3e-8 at one million
rows); then one row too many is dropped.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import xxhash

from proxykd_jax.texts.normalise import normalise_text
from proxykd_jax.texts.records import TextRow
from proxykd_jax.texts.split import row_parts

_LARGEST_LOAD = 0.8
_EMPTY = 0


class DigestSet:
    """A set of evenly distributed unsigned 64-bit numbers, such as digests.

    It takes 10 to 20 bytes per element (and half as much again while it grows); a Python set takes
    about 80.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._size = 0
        self._has_empty = False  # the number that marks an empty slot may be an element

    def __len__(self) -> int:
        return self._size + self._has_empty

    def __contains__(self, digest: int) -> bool:
        if digest == _EMPTY:
            return self._has_empty
        return self._slots[self._find(self._slots, digest)] == digest

    def add(self, digest: int) -> bool:
        """Adds a digest; returns whether it is new."""
        if digest == _EMPTY:
            new, self._has_empty = not self._has_empty, True
            return new
        place = self._find(self._slots, digest)
        if self._slots[place] == digest:
            return False
        self._slots[place] = digest
        self._size += 1
        if self._size > _LARGEST_LOAD * len(self._slots):
            self._grow()
        return True

    @property
    def nbytes(self) -> int:
        """Size of the table in bytes."""
        return 8 * len(self._slots)

    @staticmethod
    def _find(slots: array[int], digest: int) -> int:
        """The slot of a digest, or the empty slot where it would go (linear probing)."""
        last = len(slots) - 1
        place = digest & last
        while (found := slots[place]) != _EMPTY and found != digest:
            place = (place + 1) & last
        return place

    def _grow(self) -> None:
        slots = array("Q", bytes(16 * len(self._slots)))
        for digest in self._slots:
            if digest != _EMPTY:
                slots[self._find(slots, digest)] = digest
        self._slots = slots


def row_digest(row: TextRow) -> int:
    """64-bit digest of the normalised (prompt, answer): all turns with their roles.

    The prompt alone is not enough, because several answers to one prompt are different rows.
    """
    state = xxhash.xxh3_64()
    for role, content in row_parts(row):
        state.update(f"{role}\0{content}\0".encode())
    return state.intdigest()


class Deduplicator:
    """Remembers rows; ``is_new`` is False for a (prompt, answer) that it has seen."""

    def __init__(self) -> None:
        self._seen = DigestSet()

    def is_new(self, row: TextRow) -> bool:
        return self._seen.add(row_digest(row))

    def __len__(self) -> int:
        return len(self._seen)


class PromptSet:
    """The first user messages of some rows, compared as the split compares them.

    Finds prompts of validation and test that must not occur elsewhere, above all in fresh prompts.
    For a plain text, both its prompt and the whole text count, because another source may cut the
    same text at another position.
    """

    def __init__(self, rows: Iterable[TextRow] = ()) -> None:
        self._keys = DigestSet()
        for row in rows:
            self.add(row)

    def add(self, row: TextRow | str) -> bool:
        """Adds a row's first user message (or the message itself); returns whether it is new."""
        return any([self._keys.add(digest) for digest in prompt_digests(row)])

    def __contains__(self, row: TextRow | str) -> bool:
        return any(digest in self._keys for digest in prompt_digests(row))

    def __len__(self) -> int:
        return len(self._keys)


def prompt_digests(row: TextRow | str) -> set[int]:
    """The 64-bit digests of a row in a ``PromptSet``: one, or up to two for a plain text."""
    if isinstance(row, str):
        keys = {normalise_text(row)}
    else:
        keys = {row.first_user_message}
        if row.text is not None:
            keys.add(normalise_text(row.text))
    return {xxhash.xxh3_64_intdigest(key.encode()) for key in keys}
