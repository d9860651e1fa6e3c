"""The proxy's answers of one round on disk, so that a restarted run does not sample again.

There is one folder per round (``samples/round_01``), and one for fresh prompts (``samples/fresh``),
committed part by part. A part is a pure function of the model, the rows and the settings, so a
killed run continues with the same bytes. A round's reference log-probs lie beside its answers, in
separate parts (``samples/round_01/reference``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxykd_jax.artifacts import MANIFEST, complete_stage, open_stage, read_manifest
from proxykd_jax.data.collate import Rows, TokenRow
from proxykd_jax.data.parts import Part, PartFolder, damaged
from proxykd_jax.errors import UserError
from proxykd_jax.generation.sampler import Sample
from proxykd_jax.peers import stop_if_wanted

KEPT, EMPTY, EQUALS_CHOSEN, NOT_REENCODABLE = 0, 1, 2, 3
DROP_REASONS = {
    EMPTY: "empty",
    EQUALS_CHOSEN: "equals_chosen",
    NOT_REENCODABLE: "not_reencodable",
}
_ROW_ID_BYTES = 32

SampleFunction = Callable[[list[np.ndarray], list[str], list[int]], list[Sample]]
_REFERENCES = ("places", "chosen", "rejected")


@dataclass(frozen=True)
class LengthBudget:
    """How long an answer may be.

    Attributes:
      max_length: most tokens of prompt and answer together, as for the teacher's answers.
      max_new_tokens: another limit on an answer's tokens, or None.
    """

    max_length: int
    max_new_tokens: int | None = None

    def after(self, prompt_length: int) -> int:
        """Most tokens of an answer to a prompt of so many."""
        left = max(0, self.max_length - prompt_length)
        return left if self.max_new_tokens is None else min(left, self.max_new_tokens)


@dataclass(frozen=True)
class SampledRow:
    """The proxy's answer to a prompt.

    Attributes:
      row: index into the split that holds the prompt.
      row_id: id of that row.
      tokens: int32 ``[R]``, with the end token if ``finished``.
      finished: an end token was drawn.
      drop: 0 kept, 1 empty (no token before the end), 2 equal to the teacher's answer, 3 a
        server's text that our tokens cannot spell within the budget.
      loglik: log-prob of the answer, summed during sampling; NaN if a server drew it.
    """

    row: int
    row_id: str
    tokens: np.ndarray
    finished: bool
    drop: int
    loglik: float


class SampleStore:
    """The answers of one round in ``folder``, in the order in which they were sampled.

    Args:
      folder: where the answers are.
      references: where their reference log-probs are, if these come from another model than the
        one that answered (default: a folder beside the answers).
    """

    def __init__(self, folder: Path, references: Path | None = None) -> None:
        self.folder = Path(folder)
        self._parts = PartFolder(self.folder)
        self._reference_parts = PartFolder(references or self.folder / "reference")
        self._open: list[Part] | None = None

    def begin(self, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> bool:
        """Opens or creates the store; returns whether it is complete.

        Args:
          settings: everything that determines the answers (seed, round, temperature, budgets, ...).
          inputs: identities of the inputs (corpus, model).

        Raises:
          UserError: the folder was made with other settings or inputs.
        """
        return open_stage(self.folder, "sample", settings, inputs)

    def missing(self, num_parts: int) -> list[int]:
        """Parts still to make, after removing what a kill left half-written."""
        return self._parts.resume(num_parts)

    def append(self, index: int, rows: Sequence[SampledRow]) -> None:
        """Commits a part."""
        self._open = None
        self._parts.commit(index, _to_arrays(rows))

    def check_rows(self, index: int, rows: np.ndarray) -> None:
        """Raises UserError if an existing part holds other rows than it should."""
        there = self._parts.open(index).arrays["rows"]
        if not np.array_equal(there, rows):
            raise UserError(
                f"{self._parts.path(index)} holds answers to other rows than this run samples. "
                f"Remove {self.folder} to sample again."
            )

    def missing_references(self, num_parts: int) -> list[int]:
        """Parts of reference log-probs still to make; see ``missing``."""
        return self._reference_parts.resume(num_parts)

    def append_references(
        self, index: int, places: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
    ) -> None:
        """Commits a part of the reference log-probs.

        Args:
          index: the part's number.
          places: int32[m], indices into the store's answers.
          chosen: float32[m], summed log-probs of the teacher's answers.
          rejected: float32[m], those of the proxy's answers; 0 for a dropped answer.

        Raises:
          UserError: a log-prob is not finite.
        """
        if not np.isfinite([chosen, rejected]).all():
            raise UserError(
                "The proxy gives log-probs that are not finite numbers for the teacher's or its "
                "own answers: its weights or its adapter are damaged."
            )
        arrays = dict(zip(_REFERENCES, (places, chosen, rejected), strict=True))
        self._reference_parts.commit(index, arrays)

    @property
    def num_references(self) -> int:
        """Number of answers whose reference log-probs are stored, or that cannot have any."""
        parts = [self._reference_parts.open(i) for i in self._reference_parts.complete()]
        return len(set().union(*(part.arrays["places"].tolist() for part in parts)))

    def references(self) -> tuple[np.ndarray, np.ndarray]:
        """(log-probs of the teacher's answers, of the proxy's), float32, in the store's order.

        0 for a dropped answer, and where it is not computed yet.
        """
        chosen, rejected = np.zeros((2, len(self)), np.float32)
        for index in self._reference_parts.complete():
            part = self._reference_parts.open(index)
            part.verify()
            try:
                places, chosen_n, rejected_n = (part.arrays[name] for name in _REFERENCES)
                chosen[places], rejected[places] = chosen_n, rejected_n
            except (KeyError, IndexError, ValueError) as error:
                raise damaged(part.path, "its arrays do not fit the answers") from error
        return chosen, rejected

    @property
    def sampled_logps(self) -> np.ndarray:
        """float32 log-prob of each answer, summed during sampling, in the store's order.

        NaN if a server drew it; 0 for a dropped answer, as in ``references``.
        """
        return np.where(self.drops == KEPT, self._column("logliks", np.float32), np.float32(0))

    def compare(self, places: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two log-probs of each proxy's answer at these indices, float32: summed during sampling,
        and the reference. Dropped answers are left out."""
        kept = np.asarray(places, np.int64)[self.drops[places] == KEPT]
        return self.sampled_logps[kept], self.references()[1][kept]

    def complete(self) -> None:
        """Marks the store complete, with its counts and digests in the manifest."""
        complete_stage(self.folder, counts=self.counts())

    @property
    def is_complete(self) -> bool:
        path = self.folder / MANIFEST
        return path.exists() and read_manifest(path.parent).get("status") == "complete"

    def __len__(self) -> int:
        return int(self._ends()[-1]) if self._loaded() else 0

    @property
    def rows(self) -> np.ndarray:
        """int32 indices into the split, in the store's order."""
        return self._column("rows", np.int32)

    @property
    def drops(self) -> np.ndarray:
        """uint8 drop codes in the store's order."""
        return self._column("drops", np.uint8)

    @property
    def finished(self) -> np.ndarray:
        """bool: which answers have an end token, in the store's order."""
        return self._column("finished", np.bool_)

    @property
    def lengths(self) -> np.ndarray:
        """int32 tokens of each answer, in the store's order."""
        parts = [np.diff(part.arrays["offsets"]) for part in self._loaded()]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[SampledRow]:
        """Reads answers by their index in the store (0 to ``len - 1``).

        Raises:
          IndexError: an index beyond the store.
        """
        parts, ends = self._loaded(), self._ends()
        out = []
        for index in np.asarray(indices, np.int64):
            if not 0 <= index < len(self):
                raise IndexError(f"Sample {index} of {len(self)}.")
            number = int(np.searchsorted(ends, index, side="right"))
            out.append(_row_at(parts[number], int(index - (ends[number - 1] if number else 0))))
        return out

    def counts(self) -> dict[str, Any]:
        """Counts sampled and dropped answers, and compares sampling with the training forward pass.

        ``reference_gap`` is the largest difference, in nats per sequence, between the log-prob
        summed during sampling and the reference. It is absent if no reference was computed or a
        server drew the answers.
        """
        drops = self.drops
        finished = self.finished
        counts: dict[str, Any] = {
            "rows": len(drops),
            "kept": int((drops == KEPT).sum()),
            "tokens": int(self.lengths.sum()),
            "finished": int(finished.sum()),
            "finish_rate": float(finished.mean()) if len(finished) else 0.0,
            **{
                f"dropped_{name}": int((drops == code).sum()) for code, name in DROP_REASONS.items()
            },
        }
        sampled, reference = self.compare(np.arange(len(self)))
        computed = (reference != 0) & ~np.isnan(sampled)
        if computed.any():
            counts["reference_gap"] = float(np.abs(sampled - reference)[computed].max())
        return counts

    def _column(self, name: str, dtype: Any) -> np.ndarray:
        parts = [part.arrays[name] for part in self._loaded()]
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    def _loaded(self) -> list[Part]:
        if self._open is None:
            parts = [self._parts.open(index) for index in self._parts.complete()]
            for part in parts:
                part.verify()
                _check_arrays(part)
            self._open = parts
        return self._open

    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part.arrays["rows"]) for part in self._loaded()])


def sample_round(
    store: SampleStore,
    split: Rows,
    rows: Sequence[int] | np.ndarray,
    *,
    sample_fn: SampleFunction,
    against_teacher: bool,
    rows_per_part: int,
    budget: LengthBudget,
    end_token_ids: Sequence[int],
    report: Callable[[int, int, int], None] | None = None,
) -> None:
    """Makes the missing parts of a store, if any.

    Call ``store.begin`` before and ``store.complete`` after.

    Args:
      split: holds the prompts (and the teacher's answers).
      rows: indices into the split.
      sample_fn: (prompts, row ids, budgets) -> samples; a pure function.
      against_teacher: drop an answer that equals the teacher's. False for fresh prompts, which
        have no teacher's answer.
      rows_per_part: most rows that a killed run loses.
      budget: how long an answer may be.
      end_token_ids: an answer that consists of these tokens only is empty.
      report: called with (parts done, all parts, tokens drawn) after each part.
    """
    rows = np.asarray(rows, np.int32)
    num_parts = -(-len(rows) // rows_per_part)
    missing = set(store.missing(num_parts))
    for index in range(num_parts):
        part_rows = rows[index * rows_per_part : (index + 1) * rows_per_part]
        sampled: list[SampledRow] = []
        if index not in missing:
            store.check_rows(index, part_rows)
        else:
            sampled = _sample_part(
                split.read(part_rows.tolist()), part_rows, sample_fn, against_teacher, budget,
                frozenset(end_token_ids),
            )  # fmt: skip
            store.append(index, sampled)
        if report is not None:
            report(index + 1, num_parts, sum(len(row.tokens) for row in sampled))
        stop_if_wanted()


def _sample_part(
    token_rows: Sequence[TokenRow],
    indices: np.ndarray,
    sample_fn: SampleFunction,
    against_teacher: bool,
    budget: LengthBudget,
    end_token_ids: frozenset[int],
) -> list[SampledRow]:
    prompts = [row.tokens[: row.prompt_length] for row in token_rows]
    budgets = [budget.after(len(prompt)) for prompt in prompts]
    samples = sample_fn(prompts, [row.row_id for row in token_rows], budgets)
    chosen = [row.tokens[row.prompt_length :] if against_teacher else None for row in token_rows]
    return [
        SampledRow(
            row=int(indices[place]),
            row_id=token_rows[place].row_id,
            tokens=s.tokens,
            finished=s.finished,
            drop=_drop_reason(s, chosen[place], end_token_ids),
            loglik=s.loglik,
        )
        for place, s in enumerate(samples)
    ]


def _drop_reason(sampled: Sample, chosen: np.ndarray | None, end_token_ids: frozenset[int]) -> int:
    if not sampled.spelled:
        return NOT_REENCODABLE
    if all(int(token) in end_token_ids for token in sampled.tokens):
        return EMPTY
    if chosen is not None and np.array_equal(sampled.tokens, chosen):
        return EQUALS_CHOSEN
    return KEPT


def _to_arrays(rows: Sequence[SampledRow]) -> dict[str, np.ndarray]:
    offsets = np.zeros(len(rows) + 1, np.int64)
    offsets[1:] = np.cumsum([len(row.tokens) for row in rows])
    ids = b"".join(bytes.fromhex(row.row_id) for row in rows)
    return {
        "rows": np.array([row.row for row in rows], np.int32),
        "row_ids": np.frombuffer(ids, np.uint8).reshape(len(rows), _ROW_ID_BYTES),
        "offsets": offsets,
        "tokens": np.concatenate([np.zeros(0, np.int32), *(row.tokens for row in rows)]),
        "finished": np.array([row.finished for row in rows], np.bool_),
        "drops": np.array([row.drop for row in rows], np.uint8),
        "logliks": np.array([row.loglik for row in rows], np.float32),
    }


def _check_arrays(part: Part) -> None:
    """Raises UserError if the arrays of a part do not fit together."""
    arrays = part.arrays
    try:
        number, offsets = len(arrays["rows"]), arrays["offsets"]
        fits = (
            offsets.shape == (number + 1,)
            and offsets[0] == 0
            and bool((np.diff(offsets) >= 0).all())
            and offsets[-1] == len(arrays["tokens"])
            and arrays["row_ids"].shape == (number, _ROW_ID_BYTES)
            and all(arrays[name].shape == (number,) for name in ("finished", "drops", "logliks"))
        )
    except KeyError as error:
        raise damaged(part.path, f"it has no array {error}") from error
    if not fits:
        raise damaged(part.path, "its arrays do not fit together")


def _row_at(part: Part, place: int) -> SampledRow:
    arrays = part.arrays
    begin, end = arrays["offsets"][place : place + 2]
    return SampledRow(
        row=int(arrays["rows"][place]),
        row_id=arrays["row_ids"][place].tobytes().hex(),
        tokens=arrays["tokens"][begin:end],
        finished=bool(arrays["finished"][place]),
        drop=int(arrays["drops"][place]),
        loglik=float(arrays["logliks"][place]),
    )
