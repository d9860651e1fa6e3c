"""Fresh prompts with the proxy's answers, read like a split of the corpus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.corpus import TokenSplit, row_id_of
from proxykd_jax.errors import UserError
from proxykd_jax.generation.samples import KEPT, SampleStore


class AnsweredSplit:
    """Rows (prompt, proxy's answer), without the answers that were dropped.

    Attributes:
      name: name of the split that holds the prompts.
      lengths: int32 ``[n]``, tokens of each row.
      prompt_lengths: int32 ``[n]``, tokens of each prompt.
      earlier_lengths: int32 ``[n]`` zeros: only the proxy's answer is in the loss.

    Args:
      prompts: the split of prompts.
      store: their answers; it must be complete.
    """

    def __init__(self, prompts: TokenSplit, store: SampleStore) -> None:
        if not store.is_complete:
            raise UserError(f"{store.folder} is not complete; run score to continue it.")
        self.name = prompts.name
        self._prompts = prompts
        self._store = store
        self._places = np.flatnonzero(store.drops == KEPT)
        self._rows = store.rows[self._places]
        self.prompt_lengths = prompts.prompt_lengths[self._rows]
        self.earlier_lengths = np.zeros_like(self.prompt_lengths)
        self.lengths = self.prompt_lengths + store.lengths[self._places]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def row_ids(self) -> Sequence[str]:
        """Ids of the rows, one per prompt with its answer. Reads all rows."""
        return [row.row_id for row in self.read(range(len(self)))]

    @property
    def finished(self) -> np.ndarray:
        """bool ``[n]``: which answers have an end token."""
        return self._store.finished[self._places]

    def read(self, indices: Iterable[int]) -> list[TokenRow]:
        """Reads rows by number, in the given order.

        Raises:
          IndexError: there is no such row.
          UserError: an answer belongs to another prompt, because the corpus has changed.
        """
        wanted = np.fromiter(indices, np.int64)
        if np.any((wanted < 0) | (wanted >= len(self))):
            raise IndexError(
                f"split {self.name!r} has {len(self)} answered rows, asked for {wanted}"
            )
        prompts = self._prompts.read(self._rows[wanted])
        answers = self._store.read(self._places[wanted])
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt.row_id != answer.row_id:
                raise UserError(
                    f"{self._store.folder} holds answers to other prompts than the corpus has now. "
                    f"Remove {self._store.folder} to sample again."
                )
            tokens = np.concatenate([prompt.prompt, answer.tokens])
            row_id = row_id_of(tokens, prompt.prompt_length)
            rows.append(TokenRow(tokens, prompt.prompt_length, row_id))
        return rows
