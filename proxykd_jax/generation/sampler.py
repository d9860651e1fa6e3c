"""Batched sampling: answers for many prompts of mixed lengths.

Prompts are sorted by length and decoded in batches. When half of a batch's rows are done, the
others move to a batch of half the size, so the cost follows the tokens that are really produced.
Shapes come from a short ladder (``shapes.py``), so few programs are compiled: one prefill per
(rows, prompt length, slots) and one decoding loop per (rows, slots). One CPU device runs the
batches in another way (``cpu_schedule.py``).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.errors import UserError
from proxykd_jax.generation.cpu_schedule import CpuSchedule, find_cpu_schedule
from proxykd_jax.generation.decode import (
    DecodeState,
    DrawSettings,
    PromptBatch,
    decode,
    move_rows,
    prefill,
    unstack_weights,
)
from proxykd_jax.generation.shapes import prompt_bucket, row_counts, slot_bucket
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.parallel.mappings import make_room
from proxykd_jax.parallel.processes import fetch
from proxykd_jax.parallel.sharding import put_rows, row_ways
from proxykd_jax.random_keys import ROW_WORDS, row_words


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


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    Attributes:
      tokens: int32 ``[P]``, at least one.
      row_id: any text that names the row; prompts with equal row_id and tokens get the same answer.
      budget: most tokens of the answer, including the end token. 0 draws nothing.
    """

    tokens: np.ndarray
    row_id: str
    budget: int


def sample(
    weights: tuple[Any, Any],
    prompts: Sequence[Prompt],
    *,
    config: ModelConfig,
    settings: DrawSettings,
    seed: int,
    round_index: int,
    batch_size: int = 32,
    mesh: Mesh | None = None,
    other: tuple[Any, Any] | None = None,
) -> list[Sample]:
    """Draws one answer for each prompt.

    The draw for a row depends on (seed, round_index, row id, prompt) and the model. The other rows,
    their order and ``batch_size`` do not matter, except through rounding (see ``decode.py``).

    Args:
      weights: (params, adapter) of the model, already on its devices.
      prompts: prompts of any lengths.
      config: the model's shapes.
      settings: how a token is drawn. Ids that the model does not have are never drawn.
      seed, round_index: integers in [0, 2**31).
      batch_size: most rows decoded together; a multiple of the mesh's number of data shards.
      mesh: over which rows are split; by default jax decides.
      other: (params, adapter) of the model that ``settings.mixing`` describes; both or neither.

    Returns:
      One sample per prompt, in the given order.

    Raises:
      ValueError: an empty prompt, arguments out of range.
      UserError: the model gives NaN log-probs.
    """
    rows_multiple = 1 if mesh is None else row_ways(mesh.shape)
    _check(prompts, batch_size, rows_multiple)
    if (other is None) != (settings.mixing is None):
        raise ValueError("other and settings.mixing are given together, or neither.")
    make_room()
    cpu = find_cpu_schedule(
        weights[0], num_layers=config.num_layers, batch_size=batch_size, rows_multiple=rows_multiple
    )
    runner = Batches(
        weights=weights,
        other=other,
        prompts=prompts,
        config=config,
        settings=_canonical(settings, config),
        seed=seed,
        round_index=round_index,
        mesh=mesh,
        cpu=cpu,
        row_counts=row_counts(
            batch_size if cpu is None else cpu.part_size,
            rows_multiple,
            between=cpu is not None and cpu.between,
        ),
    )
    samples = [Sample(np.zeros(0, np.int32), False, np.zeros(0, np.float32)) for _ in prompts]
    lengths = [len(prompt.tokens) for prompt in prompts]
    todo = [index for index, prompt in enumerate(prompts) if prompt.budget > 0]
    todo.sort(key=lambda i: (prompt_bucket(lengths[i]), prompts[i].budget, lengths[i], i))
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    answered = map(runner.answers, batches) if cpu is None else cpu.answers(runner.answers, batches)
    for found in answered:
        for row, answer in found:
            samples[row] = answer
    return samples


def stream(
    weights: tuple[Any, Any],
    prompt: Prompt,
    *,
    config: ModelConfig,
    settings: DrawSettings,
    seed: int,
    round_index: int,
    every: int = 8,
) -> Iterator[Sample]:
    """Draws one answer and shows it while it grows.

    Args:
      weights, config, settings, seed, round_index: as in ``sample``.
      prompt: the prompt, with a budget of at least 1.
      every: number of tokens that are drawn between two looks.

    Yields:
      The answer so far; the last one is what ``sample`` returns.

    Raises:
      ValueError, UserError: as in ``sample``.
    """
    _check([prompt], 1, 1)
    runner = Batches(
        weights=weights,
        other=None,
        prompts=[prompt],
        config=config,
        settings=_canonical(settings, config),
        seed=seed,
        round_index=round_index,
        mesh=None,
        cpu=find_cpu_schedule(
            weights[0], num_layers=config.num_layers, batch_size=1, rows_multiple=1
        ),
        row_counts=[1],
    )
    batch, slots = runner.prompts_of([0])
    # The prompt's own program draws the first token.
    state = runner.run_prompts(replace(batch, budgets_B=np.ones(1, np.int32)), slots)
    while True:
        ((_, answer),) = _answers_of(state, np.zeros(1, np.int64))
        yield answer
        if answer.finished or len(answer.tokens) == prompt.budget:
            return
        # A row that has used up its budget goes on where it stopped once it has a larger one.
        drawn = min(len(answer.tokens) + every, prompt.budget)
        state = replace(
            state,
            done_B=jnp.zeros_like(state.done_B),
            budgets_B=jnp.full_like(state.budgets_B, drawn),
        )
        state = runner.go_on(state, 0)


@dataclass(frozen=True)
class Batches:
    """Runs batches of prompts until their answers are done.

    Attributes:
      weights, other, prompts, config, settings, seed, round_index, mesh: as in ``sample``.
      cpu: how one CPU device runs them, several at a time; None on other devices.
      row_counts: the sizes that a batch shrinks through, largest first.
      launch_lock: held while a program is compiled and started, not while it runs.
    """

    weights: tuple[Any, Any]
    other: tuple[Any, Any] | None
    prompts: Sequence[Prompt]
    config: ModelConfig
    settings: DrawSettings
    seed: int
    round_index: int
    mesh: Mesh | None
    cpu: CpuSchedule | None
    row_counts: list[int]
    launch_lock: threading.Lock = field(default_factory=threading.Lock)

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
            state = self.go_on(state, smaller)
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
            with self.launch_lock:
                chosen = np.concatenate([left, idle]).astype(np.int32)
                state = move_rows(state, chosen, slots=slots)

    def prompts_of(self, rows: list[int]) -> tuple[PromptBatch, int]:
        """The prompts, padded, and the number of cache slots that they need in the end."""
        mixing = self.settings.mixing
        configs = [self.config] if mixing is None else [self.config, mixing.config]
        return _prompt_batch([self.prompts[i] for i in rows], self.row_counts, configs)

    def run_prompts(self, batch: PromptBatch, slots: int) -> DecodeState:
        """The state after the prompts, in a cache of ``slots``."""
        with self.launch_lock:
            return prefill(
                self.weights,
                batch if self.mesh is None else put_rows(batch, self.mesh),
                np.uint32(self.seed),
                np.uint32(self.round_index),
                self.other,
                config=self.config,
                slots=slots,
                settings=self.settings,
                unstacked=self.cpu is not None,
            )

    def go_on(self, state: DecodeState, few: int) -> DecodeState:
        """The state when at most ``few`` rows are not done, or all slots are filled."""
        with self.launch_lock:
            weights, other = self._decoding_weights
            few_rows = np.int32(few)
            return decode(
                weights, state, few_rows, other, config=self.config, settings=self.settings
            )

    @functools.cached_property
    def _decoding_weights(self) -> tuple[tuple[Any, Any], tuple[Any, Any] | None]:
        """(params, adapter), and the other model's, in the form that ``decode`` takes."""
        if self.cpu is None:
            return self.weights, self.other
        other, mixing = self.other, self.settings.mixing
        if other is not None and mixing is not None:
            other = unstack_weights(*other, config=mixing.config)
        return unstack_weights(*self.weights, config=self.config), other


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


def _check(prompts: Sequence[Prompt], batch_size: int, rows_multiple: int) -> None:
    if any(len(prompt.tokens) == 0 for prompt in prompts):
        raise ValueError("A prompt has no token: there is nothing to continue.")
    if batch_size < 1 or batch_size % rows_multiple:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of {rows_multiple}.")


def _canonical(settings: DrawSettings, config: ModelConfig) -> DrawSettings:
    """Equal settings for equal draws, so that nothing is compiled twice."""
    return replace(
        settings,
        temperature=float(settings.temperature),
        top_p=float(settings.top_p),
        vocab_size=min(settings.vocab_size, config.vocab_size),
        end_token_ids=tuple(sorted({int(token) for token in settings.end_token_ids})),
    )


def _prompt_batch(
    prompts: list[Prompt], counts: list[int], configs: list[ModelConfig]
) -> tuple[PromptBatch, int]:
    """The prompts padded to the ladder's shapes, and the number of cache slots they need."""
    num_rows = min(count for count in counts if count >= len(prompts))
    longest = max(len(prompt.tokens) for prompt in prompts)
    most_new = max(prompt.budget for prompt in prompts)
    needed = longest + most_new
    # Padding must not exceed a model's positions.
    most = min(config.max_positions for config in configs)
    length = min(prompt_bucket(longest), max(longest, most - most_new))
    slots = slot_bucket(length + most_new)
    for config in configs:
        if config.rope.kind == "dynamic":  # undefined beyond, even for slots that stay empty
            slots = min(slots, max(needed, config.max_positions))
    tokens_BL = np.zeros((num_rows, length), np.int32)
    valid_BL = np.zeros((num_rows, length), bool)
    words_BW = np.zeros((num_rows, ROW_WORDS), np.uint32)
    budgets_B = np.zeros(num_rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, length - len(prompt.tokens) :] = prompt.tokens
        valid_BL[row, length - len(prompt.tokens) :] = True
        words_BW[row] = row_words(prompt.row_id)
        budgets_B[row] = prompt.budget
    valid_BL[len(prompts) :, -1] = True
    return PromptBatch(tokens_BL, valid_BL, words_BW, budgets_B), slots
