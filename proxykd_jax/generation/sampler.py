"""Batched sampling: answers for many prompts of mixed lengths.

Prompts are sorted by length and decoded in batches. When half of a batch's rows are done, the
others move to a batch of half the size, so the cost follows the tokens that are really produced.
Shapes come from a short ladder (``shapes.py``), so few programs are compiled: one prefill per
(rows, prompt length, slots) and one decoding loop per (rows, slots). One CPU device runs the
batches in another way (``cpu_schedule.py``).
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from proxykd_jax.errors import UserError
from proxykd_jax.generation.cpu_schedule import CpuSchedule, find_cpu_schedule
from proxykd_jax.generation.decode import (
    DecodeState,
    DrawSettings,
    Mixing,
    PromptBatch,
    decode,
    move_rows,
    prefill,
    weights_apart,
)
from proxykd_jax.generation.shapes import prompt_bucket, row_counts, slot_bucket
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.parallel.mappings import make_room
from proxykd_jax.parallel.processes import fetch

# Words of a row id's digest in the random key: 128 bits.
_ROW_WORDS = 4


@dataclass(frozen=True)
class Sample:
    """An answer.

    Attributes:
      tokens: int32 ``[R]``, including the end token if one was drawn.
      finished: an end token was drawn. A truncated answer has none and must not be given one.
      logps: float32 ``[R]``, log-prob of each token at temperature 1 under the full softmax; NaN
        if a server drew the answer, because it does not report them.
      spelled: False if a server's text could not be turned into tokens; there are none then.
    """

    tokens: np.ndarray
    finished: bool
    logps: np.ndarray
    spelled: bool = True

    @property
    def loglik(self) -> float:
        """Log-prob of the answer; the sum is float64."""
        return float(np.sum(self.logps, dtype=np.float64))


def sample(
    params: Any,
    adapter: Any,
    prompts: Sequence[np.ndarray],
    row_ids: Sequence[str],
    *,
    config: ModelConfig,
    seed: int,
    round_index: int,
    end_token_ids: Sequence[int],
    max_new_tokens: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 32,
    vocab_size: int | None = None,
    put: Callable[[PromptBatch], PromptBatch] | None = None,
    rows_multiple: int = 1,
    other: tuple[Any, Any] | None = None,
    mixing: Mixing | None = None,
) -> list[Sample]:
    """Draws one answer for each prompt.

    The draw for a row depends on (seed, round_index, row id, prompt) and the model. The other rows,
    their order and ``batch_size`` do not matter, except through rounding (see ``decode.py``).

    Args:
      params, adapter: the model, already on its devices.
      prompts: token ids, at least one each.
      row_ids: any text that names the row; rows with equal id and prompt get the same answer.
      config: the model's shapes.
      seed, round_index: integers in [0, 2**31).
      end_token_ids: tokens that end an answer.
      max_new_tokens: budget of each row in tokens, including the end token. 0 draws nothing.
      temperature: 0 is greedy.
      top_p: nucleus; 1 draws from all tokens.
      batch_size: most rows decoded together.
      vocab_size: larger or equal ids are never drawn (default: all of the model's ids may be).
      put: places a batch of prompts on devices; by default jax decides.
      rows_multiple: every batch has a multiple of this many rows (the number of data shards);
        ``batch_size`` must be a multiple, too.
      other, mixing: another model's (params, adapter) and how to mix it in; both or neither.
        Log-probs are then the mixture's.

    Returns:
      One sample per prompt, in the given order.

    Raises:
      ValueError: lists of different lengths, an empty prompt, arguments out of range.
      UserError: the model gives NaN log-probs.
    """
    if (other is None) != (mixing is None):
        raise ValueError("other and mixing are given together, or neither.")
    settings = _check(
        prompts,
        row_ids,
        max_new_tokens,
        config,
        temperature,
        top_p,
        batch_size,
        rows_multiple,
        vocab_size,
        end_token_ids,
    )
    make_room()
    cpu = find_cpu_schedule(
        params, num_layers=config.num_layers, batch_size=batch_size, rows_multiple=rows_multiple
    )
    runner = Batches(
        params=params,
        adapter=adapter,
        other=other,
        prompts=prompts,
        row_ids=row_ids,
        budgets=max_new_tokens,
        config=config,
        settings=settings,
        mixing=mixing,
        seed=seed,
        round_index=round_index,
        put=put or (lambda batch: batch),
        cpu=cpu,
        row_counts=row_counts(
            batch_size if cpu is None else cpu.part_size,
            rows_multiple,
            between=cpu is not None and cpu.between,
        ),
    )
    samples = [Sample(np.zeros(0, np.int32), False, np.zeros(0, np.float32)) for _ in prompts]
    todo = [index for index in range(len(prompts)) if max_new_tokens[index] > 0]
    todo.sort(key=lambda i: (prompt_bucket(len(prompts[i])), max_new_tokens[i], len(prompts[i]), i))
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    answered = map(runner.answers, batches) if cpu is None else cpu.answers(runner.answers, batches)
    for found in answered:
        for row, answer in found:
            samples[row] = answer
    return samples


@dataclass(frozen=True)
class Batches:
    """Runs batches of prompts until their answers are done.

    Attributes:
      params, adapter, other, config, mixing, seed, round_index, settings: as in ``sample``.
      prompts, row_ids, budgets: of all rows.
      put: places a batch of prompts on devices.
      cpu: how one CPU device runs them, several at a time; None on other devices.
      row_counts: the sizes that a batch shrinks through, largest first.
      turns: held while a program is compiled and started, not while it runs.
    """

    params: Any
    adapter: Any
    other: tuple[Any, Any] | None
    prompts: Sequence[np.ndarray]
    row_ids: Sequence[str]
    budgets: Sequence[int]
    config: ModelConfig
    settings: DrawSettings
    mixing: Mixing | None
    seed: int
    round_index: int
    put: Callable[[PromptBatch], PromptBatch]
    cpu: CpuSchedule | None
    row_counts: list[int]
    turns: threading.Lock = field(default_factory=threading.Lock)

    def answers(self, rows: list[int]) -> list[tuple[int, Sample]]:
        """(row, answer) for the prompts of a batch, in ever smaller batches."""
        batch, most_slots = self.prompts_of(rows)
        if self.cpu is None:
            state = self.run_prompts(batch, most_slots)
        else:
            state = self.cpu.run_prompts(self, rows, batch, most_slots)
        answers: list[tuple[int, Sample]] = []
        places: list[int | None] = [*rows, *[None] * (state.done_B.shape[0] - len(rows))]
        while True:
            smaller = max((count for count in self.row_counts if count < len(places)), default=0)
            slots = state.tokens_BS.shape[1]
            state = self._go_on(state, smaller)
            done_B, filled = fetch((state.done_B, state.cache.index))
            for place, answer in _answers_of(state, np.flatnonzero(done_B)):
                row = places[place]
                if row is not None:
                    answers.append((row, answer))
                places[place] = None
            left = np.flatnonzero(~done_B)
            if not left.size:
                return answers
            if self.cpu is not None and filled == slots:
                slots = self.cpu.more_slots(slots, most_slots)
            # Fill empty rows with copies of a finished row; they stay finished.
            size = min(count for count in self.row_counts if count >= left.size)
            idle = np.repeat(np.flatnonzero(done_B)[:1], size - left.size)
            places = [places[place] for place in left] + [None] * len(idle)
            with self.turns:
                chosen = np.concatenate([left, idle]).astype(np.int32)
                state = move_rows(state, chosen, slots=slots)

    def prompts_of(self, rows: list[int]) -> tuple[PromptBatch, int]:
        """The prompts, padded, and the number of cache slots that they need in the end."""
        return _prompt_batch(
            [self.prompts[i] for i in rows],
            [self.row_ids[i] for i in rows],
            [int(self.budgets[i]) for i in rows],
            self.row_counts,
            [self.config] if self.mixing is None else [self.config, self.mixing.config],
        )

    def run_prompts(self, batch: PromptBatch, slots: int) -> DecodeState:
        """The state after the prompts, in a cache of ``slots``."""
        with self.turns:
            return prefill(
                self.params,
                self.adapter,
                self.put(batch),
                np.uint32(self.seed),
                np.uint32(self.round_index),
                self.other,
                config=self.config,
                slots=slots,
                settings=self.settings,
                mixing=self.mixing,
                apart=self.cpu is not None,
            )

    def _go_on(self, state: DecodeState, few: int) -> DecodeState:
        with self.turns:
            (params, adapter), other = self._decoding_weights
            return decode(
                params,
                adapter,
                state,
                np.int32(few),
                other,
                config=self.config,
                settings=self.settings,
                mixing=self.mixing,
            )

    @functools.cached_property
    def _decoding_weights(self) -> tuple[tuple[Any, Any], tuple[Any, Any] | None]:
        """(params, adapter), and the other model's, in the form that ``decode`` takes."""
        weights = (self.params, self.adapter)
        if self.cpu is None:
            return weights, self.other
        other = self.other
        if other is not None and self.mixing is not None:
            other = weights_apart(*other, config=self.mixing.config)
        return weights_apart(*weights, config=self.config), other


def _answers_of(state: DecodeState, places: np.ndarray) -> Iterator[tuple[int, Sample]]:
    """The answers so far at some rows of a state, with the indices of those rows."""
    finished_B, count_B, tokens_BS, logps_BS = fetch(
        (state.finished_B, state.count_B, state.tokens_BS, state.logps_BS)
    )
    if np.isnan(logps_BS[:, : int(count_B.max())]).any():
        raise UserError(
            "The model gives log-probs that are not numbers (NaN) while sampling: its weights "
            "or its adapter are damaged."
        )
    for place in places:
        answer = slice(int(count_B[place]))
        yield (
            int(place),
            Sample(
                tokens_BS[place, answer].copy(),
                bool(finished_B[place]),
                logps_BS[place, answer].copy(),
            ),
        )


def _check(
    prompts: Sequence[np.ndarray],
    row_ids: Sequence[str],
    max_new_tokens: Sequence[int],
    config: ModelConfig,
    temperature: float,
    top_p: float,
    batch_size: int,
    rows_multiple: int,
    vocab_size: int | None,
    end_token_ids: Sequence[int],
) -> DrawSettings:
    if not len(prompts) == len(row_ids) == len(max_new_tokens):
        raise ValueError(
            f"{len(prompts)} prompts, {len(row_ids)} row ids and {len(max_new_tokens)} budgets: "
            "there must be as many of each."
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("A prompt has no token: there is nothing to continue.")
    vocab_size = config.vocab_size if vocab_size is None else min(vocab_size, config.vocab_size)
    if not (temperature >= 0 and 0 < top_p <= 1 and batch_size >= 1 and vocab_size >= 1):
        raise ValueError(
            f"Out of range: temperature {temperature} (at least 0), top_p {top_p} (in (0, 1]), "
            f"batch_size {batch_size} or vocab_size {vocab_size} (at least 1)."
        )
    if batch_size % rows_multiple:
        raise ValueError(f"batch_size {batch_size} must be a multiple of {rows_multiple}.")
    return DrawSettings(
        temperature=float(temperature),
        top_p=float(top_p),
        vocab_size=vocab_size,
        end_token_ids=tuple(sorted({int(token) for token in end_token_ids})),
    )


def _prompt_batch(
    prompts: list[np.ndarray],
    row_ids: list[str],
    budgets: list[int],
    row_counts: list[int],
    configs: list[ModelConfig],
) -> tuple[PromptBatch, int]:
    """The prompts padded to the ladder's shapes, and the number of cache slots they need."""
    num_rows = min(count for count in row_counts if count >= len(prompts))
    longest = max(len(prompt) for prompt in prompts)
    needed = longest + max(budgets)
    # Padding must not exceed a model's positions.
    most = min(config.max_positions for config in configs)
    length = min(prompt_bucket(longest), max(longest, most - max(budgets)))
    slots = slot_bucket(length + max(budgets))
    for config in configs:
        if config.rope.kind == "dynamic":  # undefined beyond, even for slots that stay empty
            slots = min(slots, max(needed, config.max_positions))
    tokens_BL = np.zeros((num_rows, length), np.int32)
    valid_BL = np.zeros((num_rows, length), bool)
    words_BW = np.zeros((num_rows, _ROW_WORDS), np.uint32)
    budgets_B = np.zeros(num_rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, length - len(prompt) :] = prompt
        valid_BL[row, length - len(prompt) :] = True
        words_BW[row] = row_words(row_ids[row])
        budgets_B[row] = budgets[row]
    valid_BL[len(prompts) :, -1] = True
    return PromptBatch(tokens_BL, valid_BL, words_BW, budgets_B), slots


def row_words(row_id: str) -> np.ndarray:
    """uint32 ``[W]``: the part of a row's random key that comes from its id."""
    digest = hashlib.sha256(row_id.encode()).digest()
    return np.frombuffer(digest[: 4 * _ROW_WORDS], "<u4")
