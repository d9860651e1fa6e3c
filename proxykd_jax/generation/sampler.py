"""Batched sampling: answers for many prompts of mixed lengths.

Prompts are sorted by length and decoded in batches. When half of a batch's rows are done, the
others move to a batch of half the size, so the cost follows the tokens that are really produced.
Shapes come from a short ladder, so few programs are compiled: one prefill per (rows, prompt length,
slots) and one decoding loop per (rows, slots).

On a CPU, the rows of a batch are divided among the cores, and each part shrinks by quarters. Its
cache starts small and grows when it is full. Growing copies the cache, so on other devices it would
need the memory of both copies.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from proxykd_jax.errors import UserError
from proxykd_jax.generation.decode import (
    DecodeState,
    DrawSettings,
    Mixing,
    PromptBatch,
    decode,
    join_rows,
    move_rows,
    prefill,
    weights_apart,
)
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.parallel import cpu
from proxykd_jax.parallel.mappings import make_room
from proxykd_jax.parallel.processes import fetch

# Smallest batch: below this, reading the weights takes a step's time, and compiling another shape
# would cost more than it saves.
_SMALLEST_BATCH = 8
# A batch is divided among cores only while each core gets at least this many rows.
_FEWEST_ROWS_OF_A_CORE = 16
_SHORTEST_PROMPT = 16
_FEWEST_SLOTS = 32
# Initial slots, and the least number added at once; each size is compiled.
_FIRST_SLOTS = 64
_FEWEST_MORE = 32
# Models with more layers use fewer sizes: 30 unrolled layers take 7 s to compile.
_FEW_LAYERS = 12
# Short prompts of a batch run separately if that saves this many FLOPs, since it compiles a shape.
_WORTH_A_PROGRAM = 2e10
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


def prompt_bucket(length: int) -> int:
    """The smallest of 16, 32, 64, 128, ... that is at least ``length``."""
    return max(_SHORTEST_PROMPT, 1 << (length - 1).bit_length())


def slot_bucket(slots: int) -> int:
    """The smallest of 32, 48, 64, 80, 96, 112, 128, 160, ... (four per octave) that is enough."""
    step = max(_SHORTEST_PROMPT, (1 << (slots - 1).bit_length()) // 8)
    return max(_FEWEST_SLOTS, -(-slots // step) * step)


def next_slots(filled: int, most: int, between: bool) -> int:
    """Next size of a cache whose ``filled`` slots are full and that needs ``most`` in the end.

    Sizes are 64, 128, 256, ..., and with ``between`` also 96, 192, .... Small steps help because
    every token reads all slots; few sizes help because each is compiled.
    """
    wanted = filled + _FEWEST_MORE
    size = 1 << (wanted - 1).bit_length()
    if between and wanted <= size * 3 // 4:
        size = size * 3 // 4
    return min(max(size, _FIRST_SLOTS), most)


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
    one_cpu = _is_one_cpu(params)
    cores = _cores(batch_size) if one_cpu and rows_multiple == 1 else 1
    part_size = -(-batch_size // cores)
    between = one_cpu and config.num_layers <= _FEW_LAYERS
    batches = _Batches(
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
        one_cpu=one_cpu,
        between=between,
        row_counts=_row_counts(part_size, rows_multiple, between),
    )
    samples = [Sample(np.zeros(0, np.int32), False, np.zeros(0, np.float32)) for _ in prompts]
    todo = [index for index in range(len(prompts)) if max_new_tokens[index] > 0]
    todo.sort(key=lambda i: (prompt_bucket(len(prompts[i])), max_new_tokens[i], len(prompts[i]), i))
    parts = []
    for start in range(0, len(todo), batch_size):
        rows = todo[start : start + batch_size]
        # The last batch, too, is divided among as many cores as its rows allow.
        count = max(-(-len(rows) // part_size), min(cores, len(rows) // _FEWEST_ROWS_OF_A_CORE))
        parts += [rows[first::count] for first in range(count)]  # short and long ones in each
    for found in _side_by_side(batches.answers, parts, cores):
        for row, answer in found:
            samples[row] = answer
    return samples


@dataclass(frozen=True)
class _Batches:
    """Runs batches of prompts until their answers are done, several batches at a time on a CPU.

    Attributes:
      params, adapter, other, config, mixing, seed, round_index, settings: as in ``sample``.
      prompts, row_ids, budgets: of all rows.
      put: places a batch of prompts on devices.
      one_cpu: one CPU device computes: layers have their own arrays, and caches grow.
      between: rows and slots also use sizes between the powers of two.
      row_counts: the sizes that a batch shrinks through, largest first.
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
    one_cpu: bool
    between: bool
    row_counts: list[int]
    # Held while a program is compiled and started, not while it runs.
    turns: threading.Lock = field(default_factory=threading.Lock)

    def answers(self, rows: list[int]) -> list[tuple[int, Sample]]:
        """The answers to a batch of prompts, in ever smaller batches with ever more slots."""
        state, most_slots = self._begin(rows)
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
            if filled == slots:
                slots = self._more_slots(slots, most_slots)
            # Fill empty rows with copies of a finished row; they stay finished.
            size = min(count for count in self.row_counts if count >= left.size)
            idle = np.repeat(np.flatnonzero(done_B)[:1], size - left.size)
            places = [places[place] for place in left] + [None] * len(idle)
            with self.turns:
                chosen = np.concatenate([left, idle]).astype(np.int32)
                state = move_rows(state, chosen, slots=slots)

    def _begin(self, rows: list[int]) -> tuple[DecodeState, int]:
        """The state after the prompts, and the number of slots that it needs in the end."""
        batch, most_slots = self._prompts_of(rows)
        num_rows, length = batch.tokens_BL.shape
        if not self.one_cpu:
            return self._run_prompts(batch, most_slots), most_slots
        lengths = [len(self.prompts[i]) for i in rows]
        flops = 2.0 * self.config.num_params
        cut = _cut_by_length(lengths, self.row_counts, num_rows * length, flops)
        if cut is None:
            return self._run_prompts(batch, self._more_slots(length, most_slots)), most_slots
        by_length = sorted(range(len(rows)), key=lengths.__getitem__)
        states, places, count = [], np.full(num_rows, -1, np.int32), 0
        for part in (by_length[:cut], by_length[cut:]):
            batch, _ = self._prompts_of([rows[place] for place in part])
            states.append(self._run_prompts(batch, batch.tokens_BL.shape[1]))
            places[part] = count + np.arange(len(part))
            count += len(batch.tokens_BL)
        filled = -(-max(lengths) // _SHORTEST_PROMPT) * _SHORTEST_PROMPT
        with self.turns:
            slots = self._more_slots(filled, most_slots)
            return join_rows(tuple(states), places, filled=filled, slots=slots), most_slots

    def _prompts_of(self, rows: list[int]) -> tuple[PromptBatch, int]:
        """As ``_prompt_batch`` returns them."""
        return _prompt_batch(
            [self.prompts[i] for i in rows],
            [self.row_ids[i] for i in rows],
            [int(self.budgets[i]) for i in rows],
            self.row_counts,
            [self.config] if self.mixing is None else [self.config, self.mixing.config],
        )

    def _run_prompts(self, batch: PromptBatch, slots: int) -> DecodeState:
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
                apart=self.one_cpu,
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
        if not self.one_cpu:
            return weights, self.other
        other = self.other
        if other is not None and self.mixing is not None:
            other = weights_apart(*other, config=self.mixing.config)
        return weights_apart(*weights, config=self.config), other

    def _more_slots(self, filled: int, most: int) -> int:
        return next_slots(filled, most, self.between)


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


def _is_one_cpu(params: Any) -> bool:
    devices = {
        device
        for array in jax.tree.leaves(params)
        for device in (array.devices() if isinstance(array, jax.Array) else jax.local_devices())
    }
    return len(devices) == 1 and devices.pop().platform == "cpu"


def _cores(batch_size: int) -> int:
    """Number of cores among which one CPU device's batch is divided.

    With one query per row, attention is two small products per row and head, and XLA runs them one
    after another on one core. Programs of two threads use two cores (64 rows, 256 slots, 6 layers
    of 6 heads of 48: 18 ms on one core, 9 on two).
    """
    return max(1, min(len(cpu.cores()), batch_size // _FEWEST_ROWS_OF_A_CORE))


def _side_by_side(
    work: Callable[[list[int]], list[tuple[int, Sample]]], parts: list[list[int]], cores: int
) -> Iterator[list[tuple[int, Sample]]]:
    """``work`` of each part, in order, at most ``cores`` at a time; none starts after an error."""
    if cores == 1:
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(cores, thread_name_prefix="sampler")
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)


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


def _row_counts(batch_size: int, multiple: int, between: bool) -> list[int]:
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


def _cut_by_length(
    lengths: list[int], row_counts: list[int], whole: int, flops_a_position: float
) -> int | None:
    """How many of the shortest prompts run separately from the others; None to run all together,
    which takes ``whole`` positions with padding."""
    ordered = sorted(lengths)

    def positions(some: list[int]) -> int:
        count = min(count for count in row_counts if count >= len(some))
        return count * prompt_bucket(some[-1])

    cuts = [
        place
        for place in range(1, len(ordered))
        if prompt_bucket(ordered[place - 1]) < prompt_bucket(ordered[place])
    ]
    costs = {cut: positions(ordered[:cut]) + positions(ordered[cut:]) for cut in cuts}
    best = min(costs, key=costs.__getitem__, default=None)
    if best is None or (whole - costs[best]) * flops_a_position < _WORTH_A_PROGRAM:
        return None
    return best
