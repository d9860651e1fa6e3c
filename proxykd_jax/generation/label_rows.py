"""Computes soft labels of a split: rows in, parts of a store out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from proxykd_jax.data.collate import Rows, TokenRow, collate_rows
from proxykd_jax.data.order import by_length, default_buckets
from proxykd_jax.data.soft_labels import SoftLabels, SoftLabelWriter
from proxykd_jax.generation.label_batch import TopKLabels, hidden_rows, soft_labels_of_hidden
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.parallel.processes import fetch
from proxykd_jax.peers import stop_if_wanted
from proxykd_jax.types import TokenBatch

# Logits projected at once: 64 MiB of float32, within the bounds below.
_LOGITS_ALIVE = 1 << 24
_FEWEST_POSITIONS, _MOST_POSITIONS = 128, 2048

_take = jax.jit(lambda hidden, places: hidden[places])


def score_split(
    rows: Rows,
    writer: SoftLabelWriter,
    scorer: RowScorer,
    *,
    end_token_ids: Sequence[int],
    rows_per_part: int,
    report: Callable[[int, int, int], None] | None = None,
) -> None:
    """Makes the missing parts of a split's soft labels, if any.

    A part depends only on the scorer and its rows, so a killed run continues with the same bytes.
    While one part is computed, the previous one is written.

    Args:
      rows: prompts with answers.
      writer: receives the labels.
      scorer: the proxy, with a ``label`` that gives ``TopKLabels``, such as ``top_k_labels``.
      end_token_ids: an answer that ends with one of these is finished.
      rows_per_part: a killed run loses at most the part being computed and the one being written.
      report: called with (parts done, all parts, tokens scored) after each part.
    """
    num_parts = -(-len(rows) // rows_per_part)
    missing = writer.missing(num_parts)
    ends = frozenset(end_token_ids)
    written = num_parts - len(missing)

    def finish(index: int, token_rows: list[TokenRow], pieces: list[Piece]) -> None:
        nonlocal written
        writer.commit(index, _assemble(token_rows, pieces, writer.top_k, ends))
        written += 1
        if report is not None:
            report(written, num_parts, sum(len(row.tokens) for row in token_rows))
        stop_if_wanted()

    pending: tuple[int, list[TokenRow], list[Piece]] | None = None
    for index in missing:
        last = min((index + 1) * rows_per_part, len(rows))
        token_rows = rows.read(range(index * rows_per_part, last))
        pieces = scorer.dispatch(token_rows)
        if pending is not None:
            finish(*pending)
        pending = index, token_rows, pieces
    if pending is not None:
        finish(*pending)


def positions_at_once(vocab_size: int) -> int:
    """Number of positions that are projected onto the vocabulary together."""
    return min(max(_LOGITS_ALIVE // vocab_size, _FEWEST_POSITIONS), _MOST_POSITIONS)


class Positions(NamedTuple):
    """M positions of answers; M is always the same, so the last ones may be padding.

    Attributes:
      hidden_MD: the proxy's hidden states that predict the labels.
      labels_M: int32, the tokens that follow.
      row_words_M: uint32, the first four bytes of the row's id.
      offsets_M: int32, the token's number among those of its row that are in the loss.
    """

    hidden_MD: jax.Array
    labels_M: np.ndarray
    row_words_M: np.ndarray
    offsets_M: np.ndarray


@dataclass(frozen=True)
class Piece:
    """Labels still being computed, with the (row, token of the answer) of each."""

    labels: Any
    rows: np.ndarray
    offsets: np.ndarray

    def by_row(self) -> Iterator[tuple[int, slice, slice]]:
        """(row, its tokens, their indices among the labels); labels of one row are contiguous."""
        begins = np.flatnonzero(np.diff(self.rows, prepend=-1))
        for begin, end in zip(begins, [*begins[1:], len(self.rows)], strict=True):
            first = self.offsets[begin]
            yield int(self.rows[begin]), slice(first, first + end - begin), slice(begin, end)


@dataclass(frozen=True)
class RowScorer:
    """Runs rows of similar length through the proxy, and its hidden states through ``label``.

    Attributes:
      params, adapter, config: the proxy.
      label: computes the result for some positions asynchronously.
      batch_size: rows computed together.
      max_length: tokens of the longest possible row; it bounds the compiled shapes.
      put: places a batch on devices; by default jax decides.
    """

    params: Any
    adapter: Any
    config: ModelConfig
    label: Callable[[Positions], Any]
    batch_size: int
    max_length: int
    put: Callable[[TokenBatch], TokenBatch] | None = None

    def dispatch(self, token_rows: list[TokenRow]) -> list[Piece]:
        """Starts the computation of all rows, batching rows of similar length."""
        lengths = np.array([len(row.tokens) - 1 for row in token_rows])
        buckets = default_buckets(self.max_length)
        size = positions_at_once(self.config.vocab_size)
        pieces: list[Piece] = []
        for chosen, length in by_length(lengths, self.batch_size, buckets):
            batch = collate_rows([[token_rows[i]] for i in chosen], length, 1, self.batch_size)
            places = np.flatnonzero(batch.mask_BL).astype(np.int32)
            labels = np.asarray(batch.labels_BL).reshape(-1)
            words = np.array([int(token_rows[i].row_id[:8], 16) for i in chosen], np.uint32)
            # The number of each label within its row; the first token of a row is no label.
            first = np.array([[token_rows[i].prompt_length == 0] for i in chosen])
            ranks_BL = np.cumsum(batch.mask_BL, axis=1) - 1
            ranks_BL[: len(chosen)] += first
            ranks = ranks_BL.reshape(-1)
            hidden = hidden_rows(
                self.params,
                self.adapter,
                batch if self.put is None else self.put(batch),
                config=self.config,
            )
            for begin in range(0, len(places), size):
                some = places[begin : begin + size]
                padded = np.pad(some, (0, size - len(some)))
                row = padded // length
                offsets = ranks[padded].astype(np.int32)
                positions = Positions(_take(hidden, padded), labels[padded], words[row], offsets)
                found, count = self.label(positions), len(some)
                pieces.append(Piece(found, chosen[row[:count]], offsets[:count]))
        return pieces


def top_k_labels(
    params: Any,
    positions: Positions,
    *,
    config: ModelConfig,
    top_k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TopKLabels:
    """Soft labels of some positions; the options are those of ``soft_labels_of_logits``."""
    return soft_labels_of_hidden(
        params,
        positions.hidden_MD,
        positions.labels_M,
        config=config,
        top_k=top_k,
        temperature=temperature,
        vocab_size=vocab_size,
    )


def _assemble(
    token_rows: list[TokenRow], pieces: list[Piece], top_k: int, ends: frozenset[int]
) -> list[SoftLabels]:
    """Waits for the labels and groups them by row."""
    out = []
    for row in token_rows:
        size = row.num_learnt
        out.append(
            SoftLabels(
                row.row_id,
                np.zeros((size, top_k), np.int32),
                np.zeros((size, top_k), np.float32),
                np.zeros(size, np.float32),
                np.zeros(size, np.float32),
                finished=int(row.tokens[-1]) in ends,
            )
        )
    for piece in pieces:
        labels = fetch(piece.labels)
        for number, place, some in piece.by_row():
            target = out[number]
            target.ids[place] = labels.ids_K[some]
            target.logps[place] = labels.logps_K[some]
            target.gold_logps[place] = labels.gold_logps[some]
            target.tail_logps[place] = labels.tail_logps[some]
    return out
