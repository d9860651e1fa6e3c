"""Worlds, corpus, splits and pre-trained models of every seed, as the demo's files hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.miniature import pretrain
from benchmarks.miniature import world as w
from benchmarks.paper_tables import settings as s
from benchmarks.paper_tables.vectorise import over_seeds
from proxykd_jax.data.collate import TokenRow, collate_rows
from proxykd_jax.data.corpus import row_id_of
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.texts.split import split_name
from proxykd_jax.types import TokenBatch

TEACHER_SPLITS = ("warmup", "align", "distill")


class Teacher(Protocol):
    """Answers prompts. Only ``metrics`` and the ceiling's labels ask for its distribution."""

    def answers(self, prompts_SNP: Sequence[np.ndarray], salt: int) -> list[np.ndarray]:
        """int32 ``[N, T]`` of each seed, filled up with end tokens."""

    def logps(
        self, prompts_SNP: Sequence[np.ndarray], answers_SNT: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """float32 ``[N, T, V]`` of each seed."""


@dataclass(frozen=True)
class AnalyticTeacher:
    """The world itself."""

    worlds: Sequence[w.World]
    seeds: Sequence[int]

    def answers(self, prompts_SNP: Sequence[np.ndarray], salt: int) -> list[np.ndarray]:
        return [
            w.sample_answers(world, prompts, np.random.Generator(np.random.PCG64([seed, salt])))
            for world, seed, prompts in zip(self.worlds, self.seeds, prompts_SNP, strict=True)
        ]

    def logps(
        self, prompts_SNP: Sequence[np.ndarray], answers_SNT: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        with np.errstate(divide="ignore"):
            return [
                np.log(w.answer_probs(world, prompts, answers)).astype(np.float32)
                for world, prompts, answers in zip(
                    self.worlds, prompts_SNP, answers_SNT, strict=True
                )
            ]


@dataclass(frozen=True)
class Rows:
    """Prompts with answers, of one seed.

    Attributes:
      rows: as the product reads them.
      batch: all of them in one batch, with a row of padding at the end.
    """

    rows: list[TokenRow]
    batch: TokenBatch

    @staticmethod
    def of(rows: list[TokenRow]) -> Rows:
        """Collates them."""
        batch = collate_rows([[row] for row in rows], s.ROW_LENGTH - 1, 1, len(rows) + 1)
        return Rows(rows, batch)

    @property
    def prompts_NP(self) -> np.ndarray:
        return np.stack([row.prompt for row in self.rows])

    @property
    def ids(self) -> list[str]:
        return [row.row_id for row in self.rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer."""
        return np.array([len(row.answer) for row in self.rows])

    @property
    def finished(self) -> np.ndarray:
        """Which answers end with the end token."""
        return np.array([row.tokens[-1] == w.END for row in self.rows])


@dataclass(frozen=True)
class Seed:
    """What one seed has.

    Attributes:
      worlds: teacher, public text and truth.
      splits: ``warmup``, ``align``, ``distill`` and ``validation``, as the product splits them.
      test: rows whose prompts occur nowhere else.
      fresh_NP: prompts without answers.
      teacher_logps_NTV: of the test answers, for the evaluator.
    """

    worlds: w.Worlds
    splits: dict[str, Rows]
    test: Rows
    fresh_NP: np.ndarray
    teacher_logps_NTV: np.ndarray


def token_rows(prompts_NP: np.ndarray, answers: Sequence[np.ndarray]) -> list[TokenRow]:
    """Rows of prompts and answers without padding."""
    rows = []
    for prompt, answer in zip(prompts_NP, answers, strict=True):
        tokens = np.concatenate([prompt, answer]).astype(np.int32)
        rows.append(TokenRow(tokens, w.PROMPT_LENGTH, row_id_of(tokens, w.PROMPT_LENGTH)))
    return rows


def make_seeds(
    setting: s.Setting, seeds: Sequence[int], teacher_of: Callable[[list[w.Worlds]], Teacher]
) -> list[Seed]:
    """The data of all seeds; prompts, answers and splits are those of ``miniature.make``."""
    sizes = setting.sizes
    worlds = [w.make_worlds(seed, setting.world_regime) for seed in seeds]
    teacher = teacher_of(worlds)
    pools = [w.PromptPool(seed) for seed in seeds]
    numbers = (sizes.num_test, sizes.num_corpus, sizes.num_fresh)
    test, corpus, fresh = zip(*[[pool.take(n) for n in numbers] for pool in pools], strict=True)
    # One draw for both, in the order of ``make``, so that the files are the same.
    both = [np.concatenate(pair) for pair in zip(test, corpus, strict=True)]
    if isinstance(teacher, AnalyticTeacher):
        test_answers, corpus_answers = [], []
        for world, seed, first, second in zip(worlds, seeds, test, corpus, strict=True):
            rng = np.random.Generator(np.random.PCG64([seed, 4]))
            test_answers.append(w.sample_answers(world.teacher, first, rng))
            corpus_answers.append(w.sample_answers(world.teacher, second, rng))
    else:
        answers = teacher.answers(both, 4)
        test_answers = [a[: sizes.num_test] for a in answers]
        corpus_answers = [a[sizes.num_test :] for a in answers]
    logps = teacher.logps(test, test_answers)
    made = []
    for i in range(len(seeds)):
        rows = token_rows(corpus[i], _cut(corpus_answers[i]))
        names = [
            split_name(
                w.to_text(row.prompt),
                shares=setting.config.corpus.shares,
                validation_fraction=setting.held_out,
            )
            for row in rows
        ]
        splits = {
            name: Rows.of([row for row, its in zip(rows, names, strict=True) if its == name])
            for name in (*TEACHER_SPLITS, "validation")
        }
        tested = Rows.of(token_rows(test[i], _cut(test_answers[i])))
        made.append(Seed(worlds[i], splits, tested, fresh[i], logps[i]))
    return made


def _cut(answers_NT: np.ndarray) -> list[np.ndarray]:
    lengths = w.answer_lengths(answers_NT)
    return [answer[:length] for answer, length in zip(answers_NT, lengths, strict=True)]


def pretrained(
    setting: s.Setting,
    data: Sequence[Seed],
    seeds: Sequence[int],
    model: ModelConfig,
    *,
    salt: int,
    steps: int,
    rate: float,
    teacher_text: bool = False,
) -> Any:
    """A model of every seed, of public text (or of the neural teacher's own).

    Args:
      setting, data, seeds: of the study.
      model: its architecture.
      salt: 0 is the demo's proxy, 1 its student.
      steps, rate: of the pre-training at full size.
      teacher_text: learn the analytic teacher's texts instead.
    """
    return pretrain.pretrain_seeds(
        model,
        [seed.worlds.teacher if teacher_text else seed.worlds.public for seed in data],
        seeds=[2 * seed + salt for seed in seeds],
        num_steps=setting.pretrain_steps(steps),
        learning_rate=rate,
        excluded=[w.encode_prompts(seed.test.prompts_NP) for seed in data],
        over_seeds=over_seeds,
    )
