"""Students that learn from rows on hand: the product's text and label phases on rows in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.miniature import world as w
from benchmarks.paper_tables import models
from benchmarks.paper_tables.seeds import Rows, Seed, Teacher
from benchmarks.paper_tables.settings import Setting
from benchmarks.paper_tables.training import Run
from proxykd_jax.baselines.mixing import with_own_answers
from proxykd_jax.config.methods import ProxyKd
from proxykd_jax.data.order import PlannedBatch
from proxykd_jax.data.soft_labels import SoftLabels
from proxykd_jax.generation.label_batch import TopKLabels, soft_labels_of_logits
from proxykd_jax.training.batches import Joined
from proxykd_jax.training.distillation import label_phase, text_phase
from proxykd_jax.training.phase import Phase
from proxykd_jax.types import DistillBatch, TokenBatch

DISTILL, FRESH = "distill", "fresh"
ALL = ("warmup", "align", "distill")
TRUTH = "teacher"  # As labels it stands for the teacher's own distribution, which is the ceiling.
STUDENT_ROUND = 1000  # The round index of answers that are drawn for students.


@dataclass(frozen=True)
class Source:
    """Rows that a student learns from.

    Attributes:
      prompts: a split of the corpus, or ``fresh``.
      writer: ``teacher``, or the state of the proxy that answers.
      labels: the state of the proxy that gives the soft labels; None for no labels.
      nll: whether the answers' own tokens count.
      drawn: whether drawn ids replace the most probable ones.
    """

    prompts: str
    writer: str = TRUTH
    labels: str | None = None
    nll: bool = True
    drawn: bool = False

    @property
    def name(self) -> str:
        """The name of the rows in a run."""
        return f"{self.prompts}/{self.writer}"


@dataclass(frozen=True)
class Method:
    """What a student learns from.

    Attributes:
      sources: of rows.
      alpha: the factor of the KL beside an NLL of weight 1; at 0 there are no soft labels.
      weighted: whether eq. 9 weighs the examples that have an NLL.
      temperature: of both softmaxes; None for the config's. The KL is then not rescaled.
      student_share: the share of the steps on the student's own answers (``mixing``).
      tail: of the stored labels; None for the config's.
    """

    sources: tuple[Source, ...]
    alpha: float = 0.0
    weighted: bool = False
    temperature: float | None = None
    student_share: float = 0.0
    tail: str | None = None


class LabelsInMemory:
    """Soft labels of rows in memory, with the interface of a ``SoftLabelStore``.

    Args:
      splits: the rows of each split, and the labels at all positions of their batch.
    """

    def __init__(self, splits: Mapping[str, tuple[Rows, TopKLabels]]) -> None:
        self._splits = splits

    def read(self, split: str, indices: Sequence[int], row_ids: Sequence[str]) -> list[SoftLabels]:
        """The labels of some rows."""
        rows, labels = self._splits[split]
        found = []
        for index, row_id in zip(indices, row_ids, strict=True):
            tokens = rows.rows[index].tokens
            at = (index, slice(w.PROMPT_LENGTH - 1, len(tokens) - 1))
            ids, logps, gold, tail = (
                np.asarray(part[at])
                for part in (labels.ids_K, labels.logps_K, labels.gold_logps, labels.tail_logps)
            )
            ends = bool(tokens[-1] == w.END)
            found.append(SoftLabels(row_id, ids, logps, gold, tail, ends))
        return found

    def seq_logliks(self, split: str) -> np.ndarray:
        """float64 ``[N]``, the log-likelihood of each answer."""
        rows, labels = self._splits[split]
        gold_NL = np.where(rows.batch.mask_BL, labels.gold_logps, 0).astype(np.float64)
        return gold_NL.sum(axis=1)[:-1]

    def lengths(self, split: str) -> np.ndarray:
        """The number of tokens of each answer."""
        return self._splits[split][0].answer_lengths

    def finished(self, split: str) -> np.ndarray:
        """Which answers have their end token."""
        return self._splits[split][0].finished


class Material:
    """Answers and soft labels of all seeds, made when they are first asked for.

    Args:
      setting, data, seeds: the study's.
      proxies: parameters by state of the proxy.
      teacher: asked for its distribution by ``teacher_logits`` alone.
    """

    def __init__(
        self,
        setting: Setting,
        data: Sequence[Seed],
        seeds: Sequence[int],
        proxies: dict[str, Any],
        teacher: Teacher,
    ) -> None:
        self.setting, self.data, self.seeds = setting, data, seeds
        self.proxies, self.teacher = proxies, teacher
        self._rows: dict[tuple[str, str], list[Rows]] = {}
        self._labels: dict[tuple[Source, float], list[TopKLabels]] = {}

    def rows(self, prompts: str, writer: str = TRUTH) -> list[Rows]:
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
            asked = [rows.prompts_NP for rows in self.rows(prompts)]
            ids = [rows.ids for rows in self.rows(prompts)]
        model, params_S = self.setting.proxy_model, self.proxies[writer]
        options: dict[str, Any] = {"seeds": self.seeds, "salt": STUDENT_ROUND}
        drawn = models.answer(model, params_S, asked, ids, **options)
        return models.answered_rows(asked, drawn)

    def labels(self, source: Source, temperature: float) -> list[TopKLabels]:
        """The soft labels of a source's answers."""
        key = (dataclasses.replace(source, nll=True), temperature)
        if key not in self._labels:
            self._labels[key] = self._made_labels(source, temperature)
        return self._labels[key]

    def _made_labels(self, source: Source, temperature: float) -> list[TopKLabels]:
        rows, top_k = self.rows(source.prompts, source.writer), self.setting.config.score.top_k
        if source.labels == TRUTH:
            return self._true_labels(rows, top_k)
        assert source.labels is not None
        model, params_S = self.setting.proxy_model, self.proxies[source.labels]
        if not source.drawn:
            return models.score(model, params_S, rows, top_k=top_k, temperature=temperature)
        drawn = models.drawn_labels(model, params_S, rows, seeds=self.seeds, num_draws=top_k)
        kept = self.labels(dataclasses.replace(source, drawn=False), temperature)
        # The shares of the drawn ids add up to 1, so the tail is empty and every treatment of it
        # gives the same loss.
        found = []
        for (ids, logps), its in zip(drawn, kept, strict=True):
            no_tail = np.full_like(its.tail_logps, -np.inf)
            changed: dict[str, Any] = {"ids_K": ids, "logps_K": logps, "tail_logps": no_tail}
            found.append(dataclasses.replace(its, **changed))
        return found

    def _true_labels(self, rows_S: list[Rows], top_k: int) -> list[TopKLabels]:
        prompts, answers = [r.prompts_NP for r in rows_S], [r.answers_NT for r in rows_S]
        found = []
        for rows, logps in zip(rows_S, self.teacher.logps(prompts, answers), strict=True):
            whole_NLV = jnp.asarray(at_places(logps, rows.batch.tokens_BL.shape))
            labels_NL = jnp.asarray(rows.batch.labels_BL)
            labels = soft_labels_of_logits(whole_NLV, labels_NL, top_k=top_k)
            found.append(jax.device_get(labels))
        return found


def at_places(logps_NTV: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``[N, L, V]`` log-probs at a batch's positions; they are uniform outside the answers."""
    num_tokens, vocabulary = logps_NTV.shape[1:]
    whole = np.full((*shape, vocabulary), -np.log(vocabulary), np.float32)
    whole[: len(logps_NTV), w.PROMPT_LENGTH - 1 : w.PROMPT_LENGTH - 1 + num_tokens] = logps_NTV
    return whole


def phases_of(material: Material, method: Method) -> list[Phase]:
    """Every seed's phase of the product: eq. 7 where alpha is 0, else eq. 11."""
    config, sources = material.setting.config, method.sources
    rows = {source.name: material.rows(source.prompts, source.writer) for source in sources}
    fixed, weights = method.temperature, config.distill.weights
    temperature = config.score.temperature if fixed is None else fixed
    changes = {
        "alpha": method.alpha,
        "tail": method.tail or config.distill.tail,
        "weights": weights.model_copy(update={"enabled": weights.enabled and method.weighted}),
    }
    labels = {
        source.name: material.labels(source, temperature) for source in sources if method.alpha
    }
    phases = []
    for i, seed in enumerate(material.seeds):
        splits = {name: its[i] for name, its in rows.items()}
        sketch = material.setting.run(
            "distill", seed, splits, distill=changes, score={"temperature": temperature}
        )
        if not method.alpha:
            phases.append(text_phase(sketch, splits))
            continue
        store: Any = LabelsInMemory({name: (splits[name], its[i]) for name, its in labels.items()})
        run = dataclasses.replace(sketch, scorer=None, labels=store)
        nll_splits = [source.name for source in sources if source.nll]
        phase = label_phase(run, splits, nll_splits=nll_splits, rescale=fixed is None)
        phase = _with_alpha_in_weights(phase, method.alpha)
        if method.student_share:
            share = ProxyKd(student_share=method.student_share)
            phase = with_own_answers(sketch, share, phase, Joined(splits))
        phases.append(phase)
    return phases


def _with_alpha_in_weights(phase: Phase, alpha: float) -> Phase:
    """The same loss with alpha as a factor of the weights, so that one program serves every
    alpha."""
    collate = phase.collate
    assert collate is not None

    def collate_weighted(planned: PlannedBatch) -> DistillBatch:
        batch: DistillBatch = collate(planned)
        weight_BS = np.float32(alpha) * batch.sample_weight_BS
        return dataclasses.replace(batch, sample_weight_BS=weight_BS)

    objective: Any = phase.objective
    objective = dataclasses.replace(objective, alpha=1.0)
    return phase.with_(objective=objective, collate=collate_weighted)


def train(
    material: Material, method: Method, student_S: Any, validation: TokenBatch, **options: Any
) -> Run:
    """Trains the students of all seeds by a method."""
    phases = phases_of(material, method)
    run = Run.start(phases[0], material.setting.config.distill, student_S, validation)
    run.take(phases, **options)
    return run
