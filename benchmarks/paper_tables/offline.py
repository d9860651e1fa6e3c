"""Students whose data lie ready before their training: eqs. 7 and 11 on rows of several sources.

A method is a list of sources and the weights of its two terms; the objectives are the product's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.miniature import world as w
from benchmarks.paper_tables import models
from benchmarks.paper_tables.models import Labels
from benchmarks.paper_tables.seeds import Rows, Seed
from benchmarks.paper_tables.settings import Setting
from benchmarks.paper_tables.training import Run, plan_rows, planned
from proxykd_jax.data.sample_weights import weights_of
from proxykd_jax.generation.label_batch import soft_labels_of_logits
from proxykd_jax.training.batch_objectives import DistillObjective, NllObjective, Objective
from proxykd_jax.types import DistillBatch, TokenBatch

DISTILL, FRESH = "distill", "fresh"
ALL = ("warmup", "align", "distill")
TRUTH = "teacher"  # the teacher's own distribution as labels: the ceiling
STUDENT_ROUND = 1000  # round index of answers that are drawn for students


@dataclass(frozen=True)
class Source:
    """Rows that a student learns from.

    Attributes:
      prompts: a split of the corpus, or ``fresh``.
      writer: ``teacher``, or the state of the proxy that answers.
      labels: whose soft labels; None for none.
      nll: whether the answers' own tokens count.
      weighted: whether eq. 9 weighs the examples.
      drawn: keep drawn ids in place of the most probable ones.
    """

    prompts: str
    writer: str = TRUTH
    labels: str | None = None
    nll: bool = True
    weighted: bool = False
    drawn: bool = False


@dataclass(frozen=True)
class Method:
    """What a student learns from.

    Attributes:
      sources: of rows.
      alpha: factor of the KL beside an NLL of weight 1; 0 has no soft labels at all.
      temperature: of both softmaxes, None for the config's; then the KL is not rescaled.
      student_share: of the steps, those on the student's own answers (``mixing``).
      tail: of the stored labels, None for the config's.
    """

    sources: tuple[Source, ...]
    alpha: float = 0.0
    temperature: float | None = None
    student_share: float = 0.0
    tail: str | None = None


class Material:
    """Answers and soft labels of all seeds, made when they are first asked for.

    Args:
      setting, data, seeds: of the study.
      proxies: parameters by state of the proxy.
      teacher: its text is in the splits; asked for its distribution by the ceiling alone.
    """

    def __init__(
        self,
        setting: Setting,
        data: Sequence[Seed],
        seeds: Sequence[int],
        proxies: dict[str, Any],
        teacher: Any,
    ) -> None:
        self.setting, self.data, self.seeds = setting, data, seeds
        self.proxies, self.teacher = proxies, teacher
        self._rows: dict[tuple[str, str], list[Rows]] = {}
        self._labels: dict[tuple[str, str, str, float], list[Labels]] = {}

    def rows(self, prompts: str, writer: str) -> list[Rows]:
        """The answers of a writer to the prompts, of every seed."""
        key = (prompts, writer)
        if key not in self._rows:
            if writer == TRUTH:
                self._rows[key] = [seed.splits[prompts] for seed in self.data]
            else:
                self._rows[key] = self._answered(prompts, writer)
        return self._rows[key]

    def _answered(self, prompts: str, writer: str) -> list[Rows]:
        if prompts == FRESH:
            asked = [seed.fresh_NP for seed in self.data]
            ids = [[str(row) for row in range(len(each))] for each in asked]
        else:
            asked = [seed.splits[prompts].prompts_NP for seed in self.data]
            ids = [seed.splits[prompts].ids for seed in self.data]
        drawn = models.answer(
            self.setting.proxy_model,
            self.proxies[writer],
            asked,
            ids,
            seeds=self.seeds,
            salt=STUDENT_ROUND,
        )
        return models.answered_rows(asked, drawn)

    def labels(
        self, prompts: str, writer: str, scorer: str, temperature: float | None = None
    ) -> list[Labels]:
        """Soft labels of these answers by a state of the proxy, or by the teacher itself."""
        score = self.setting.config.score
        temperature = score.temperature if temperature is None else temperature
        key = (prompts, writer, scorer, temperature)
        if key not in self._labels:
            rows = self.rows(prompts, writer)
            if scorer == TRUTH:
                self._labels[key] = self._true_labels(rows, score.top_k)
            else:
                self._labels[key] = models.score(
                    self.setting.proxy_model,
                    self.proxies[scorer],
                    rows,
                    top_k=score.top_k,
                    temperature=temperature,
                )
        return self._labels[key]

    def _true_labels(self, rows_S: list[Rows], top_k: int) -> list[Labels]:
        answers = [padded_answers(rows) for rows in rows_S]
        logps_S = self.teacher.logps([rows.prompts_NP for rows in rows_S], answers)
        found = []
        for rows, logps_NTV in zip(rows_S, logps_S, strict=True):
            whole_NLV = at_places(logps_NTV, rows.batch.tokens_BL.shape)
            labels = jax.device_get(
                soft_labels_of_logits(
                    jnp.asarray(whole_NLV), jnp.asarray(rows.batch.labels_BL), top_k=top_k
                )
            )
            found.append(Labels(labels.ids_K, labels.logps_K, labels.gold_logps, labels.tail_logps))
        return found

    def drawn_labels(self, prompts: str, writer: str, scorer: str) -> list[Labels]:
        """As many ids drawn from the distribution as others keep of its top, with their shares.

        The shares add up to 1, so that nothing is in the tail and every choice of it is the same.
        """
        drawn = models.drawn_labels(
            self.setting.proxy_model,
            self.proxies[scorer],
            self.rows(prompts, writer),
            seeds=self.seeds,
            num_draws=self.setting.config.score.top_k,
        )
        return [
            Labels(ids, logps, kept.gold_NL, np.full_like(kept.tail_NL, -np.inf))
            for (ids, logps), kept in zip(drawn, self.labels(prompts, writer, scorer), strict=True)
        ]


def padded_answers(rows: Rows) -> np.ndarray:
    """``[N, T]`` answers filled up with end tokens."""
    answers = np.full((len(rows.rows), w.MAX_ANSWER), w.END, np.int32)
    for answer, row in zip(answers, rows.rows, strict=True):
        answer[: len(row.answer)] = row.answer
    return answers


def at_places(logps_NTV: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``[N, L, V]`` log-probs at a batch's places; where no answer is, all tokens are alike."""
    num_tokens, vocabulary = logps_NTV.shape[1:]
    whole = np.full((*shape, vocabulary), -np.log(vocabulary), np.float32)
    whole[: len(logps_NTV), w.PROMPT_LENGTH - 1 : w.PROMPT_LENGTH - 1 + num_tokens] = logps_NTV
    return whole


def batches_of(material: Material, method: Method) -> list[TokenBatch] | list[DistillBatch]:
    """Every seed's rows of a method, its row of padding last."""
    parts = [_part(material, source, method) for source in method.sources]
    return [joined([part[i] for part in parts]) for i in range(len(material.seeds))]


def _part(material: Material, source: Source, method: Method) -> list[Any]:
    rows_S, alpha = material.rows(source.prompts, source.writer), method.alpha
    if not alpha:
        return [rows.batch for rows in rows_S]
    assert source.labels is not None
    labels_S = material.labels(source.prompts, source.writer, source.labels, method.temperature)
    if source.drawn:
        labels_S = material.drawn_labels(source.prompts, source.writer, source.labels)
    return [
        _distill_batch(material.setting, rows, labels, source, alpha)
        for rows, labels in zip(rows_S, labels_S, strict=True)
    ]


def _distill_batch(
    setting: Setting, rows: Rows, labels: Labels, source: Source, alpha: float
) -> DistillBatch:
    mask_NL = rows.batch.mask_BL
    weight = setting.config.distill.weights
    logliks = np.where(mask_NL, labels.gold_NL, 0).astype(np.float64).sum(axis=1)
    found = weights_of(
        logliks[:-1],
        rows.lengths,
        rows.finished,
        loglik=weight.loglik,
        normalize=weight.normalize,
        enabled=weight.enabled and source.weighted,
    )
    column = (len(rows.rows) + 1, 1)
    return DistillBatch(
        rows=rows.batch,
        topk_ids_BLK=labels.ids_NLK,
        topk_logps_BLK=labels.logps_NLK,
        tail_logps_BL=labels.tail_NL,
        sample_weight_BS=np.append(alpha * found.sample_weight, 0).astype(np.float32)[:, None],
        nll_mask_BS=np.full(column, source.nll),
    )


def joined(batches: list[Any]) -> Any:
    """One after another, the padding of the last at the end."""

    def join(*leaves: np.ndarray) -> np.ndarray:
        return np.concatenate([*(leaf[:-1] for leaf in leaves), leaves[-1][-1:]])

    return jax.tree.map(join, *batches)


def objective_of(setting: Setting, method: Method) -> Objective:
    """Eq. 7 where alpha is 0, else eq. 11.

    Alpha is a factor of the weights (``_distill_batch``), so that one program serves all methods.
    """
    distill = setting.config.distill
    if not method.alpha:
        return NllObjective(distill.reduction, distill.nll_weight)
    fixed = method.temperature
    temperature = setting.config.score.temperature if fixed is None else fixed
    return DistillObjective(
        1.0,
        distill.nll_weight,
        method.tail or distill.tail,
        distill.reduction,
        temperature,
        rescale=fixed is None,
    )


def train(
    material: Material, method: Method, student_S: Any, validation: TokenBatch, **options: Any
) -> Run:
    """Trains the students of all seeds by a method."""
    setting = material.setting
    run = Run.start(setting.student, setting.distill_optimizer, student_S, validation)
    pools = batches_of(material, method)
    plans = [
        plan_rows(
            jax.tree.leaves(pool)[0].shape[0] - 1,
            setting.config.distill,
            seed,
            "distill",
            setting.student_steps,
        )
        for pool, seed in zip(pools, material.seeds, strict=True)
    ]
    run.train(
        objective_of(setting, method),
        planned(pools, plans),
        setting.student_steps,
        every=setting.config.distill.stop.every,
        **options,
    )
    return run
