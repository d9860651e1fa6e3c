"""The worlds, corpora, splits and pre-trained models of all seeds, as the miniature's files hold
them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from benchmarks.miniature import world as w
from benchmarks.paper_tables import settings as s
from proxykd_jax.data.collate import RowsInMemory, TokenRow, collate_rows
from proxykd_jax.data.corpus import row_id_of
from proxykd_jax.texts.split import split_name
from proxykd_jax.types import TokenBatch


class Teacher(Protocol):
    """The teacher of every seed. Only ``metrics`` and ``teacher_logits`` ask for ``logps``."""

    def answers(self, *prompts_SNP: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """int32 ``[N, T]`` answers of each seed to each set of prompts, filled up with end
        tokens."""

    def logps(
        self, prompts_SNP: Sequence[np.ndarray], answers_SNT: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """float32 ``[N, T, V]`` log-probs of each seed."""


@dataclass(frozen=True)
class AnalyticTeacher:
    """The world itself is the teacher. Its answers are those of ``miniature.make``."""

    worlds: Sequence[w.World]
    seeds: Sequence[int]

    def answers(self, *prompts_SNP: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        rngs = [np.random.Generator(np.random.PCG64([seed, 4])) for seed in self.seeds]
        return [list(map(w.sample_answers, self.worlds, asked, rngs)) for asked in prompts_SNP]

    def logps(
        self, prompts_SNP: Sequence[np.ndarray], answers_SNT: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        with np.errstate(divide="ignore"):
            return [
                np.log(probs).astype(np.float32)
                for probs in map(w.answer_probs, self.worlds, prompts_SNP, answers_SNT)
            ]


class Rows(RowsInMemory):
    """Prompts with answers of one seed, with the interface of a split.

    Attributes:
      rows: the rows, in order.
    """

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        super().__init__(rows)
        self.rows = list(rows)

    @functools.cached_property
    def batch(self) -> TokenBatch:
        """All rows in one batch, with a row of padding at the end."""
        return collate_rows([[row] for row in self.rows], s.ROW_LENGTH - 1, 1, len(self) + 1)

    @property
    def prompts_NP(self) -> np.ndarray:
        return np.stack([row.prompt for row in self.rows])

    @property
    def ids(self) -> list[str]:
        return [row.row_id for row in self.rows]

    @property
    def answer_lengths(self) -> np.ndarray:
        """int32 ``[N]``, the number of tokens of each answer."""
        return self.lengths - self.prompt_lengths

    @property
    def answers_NT(self) -> np.ndarray:
        """int32 ``[N, T]`` answers, filled up with end tokens."""
        answers = np.full((len(self), w.MAX_ANSWER), w.END, np.int32)
        for answer, row in zip(answers, self.rows, strict=True):
            answer[: len(row.answer)] = row.answer
        return answers

    @property
    def finished(self) -> np.ndarray:
        """bool ``[N]``, whether an answer has its end token."""
        return np.array([row.tokens[-1] == w.END for row in self.rows])


@dataclass(frozen=True)
class Seed:
    """The data of one seed.

    Attributes:
      worlds: teacher, public text and truth.
      splits: ``warmup``, ``align``, ``distill`` and ``validation``, as the product splits them.
      test: rows whose prompts occur nowhere else.
      fresh_NP: prompts without answers.
      teacher_logps_NTV: the teacher's log-probs on the test answers, for the evaluator.
    """

    worlds: w.Worlds
    splits: dict[str, Rows]
    test: Rows
    fresh_NP: np.ndarray
    teacher_logps_NTV: np.ndarray


def token_rows(prompts_NP: np.ndarray, answers: Iterable[np.ndarray]) -> list[TokenRow]:
    """Makes rows of prompts and of answers without padding."""
    rows = []
    for prompt, answer in zip(prompts_NP, answers, strict=True):
        tokens = np.concatenate([prompt, answer]).astype(np.int32)
        rows.append(TokenRow(tokens, w.PROMPT_LENGTH, row_id_of(tokens, w.PROMPT_LENGTH)))
    return rows


def rows_of(prompts_NP: np.ndarray, answers_NT: np.ndarray) -> Rows:
    """Makes rows of prompts and of answers that are filled up with end tokens."""
    lengths = w.answer_lengths(answers_NT)
    cut = [answer[:length] for answer, length in zip(answers_NT, lengths, strict=True)]
    return Rows(token_rows(prompts_NP, cut))


def make_seeds(
    setting: s.Setting, seeds: Sequence[int], worlds: Sequence[w.Worlds], teacher: Teacher
) -> list[Seed]:
    """Makes the data of all seeds. Prompts, answers and splits are those of ``miniature.make``."""
    pools = [w.PromptPool(seed) for seed in seeds]
    taken = [[pool.take(n) for n in setting.sizes.prompts] for pool in pools]
    test, corpus, fresh = zip(*taken, strict=True)
    test_answers, corpus_answers = teacher.answers(test, corpus)
    logps = teacher.logps(test, test_answers)

    def splits(rows: Rows) -> dict[str, Rows]:
        names = ("warmup", "align", "distill", "validation")
        found: dict[str, list[TokenRow]] = {name: [] for name in names}
        for row in rows.rows:
            name = split_name(
                w.to_text(row.prompt),
                shares=setting.config.corpus.shares,
                validation_fraction=setting.held_out,
            )
            found[name].append(row)
        return {name: Rows(its) for name, its in found.items()}

    corpora = [splits(rows) for rows in map(rows_of, corpus, corpus_answers)]
    tests = map(rows_of, test, test_answers)
    return list(map(Seed, worlds, corpora, tests, fresh, logps))
