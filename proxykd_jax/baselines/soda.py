"""SODA (arXiv 2604.03873): DPO with the teacher's answers preferred to the base student's.

1. The base student q_0 answers every prompt once (y-hat), before any training.
2. Warm-up: training by NLL on the teacher's answers turns q_0 into q_w.
3. DPO on (y, y-hat) starts from q_w, with q_w as the reference; its log-probs are stored first.

The sampler is q_0 but the reference is q_w, so the optimum q_w (teacher / q_0)^(1 / beta) lies
*beyond* the teacher: stop early, and do not expect the KL to the teacher to fall to 0. What is
known of the method is second-hand (docs/methods.md).
"""

from __future__ import annotations

from typing import Any

from proxykd_jax.config import PreferenceConfig
from proxykd_jax.config.methods import Soda
from proxykd_jax.data.collate import Rows
from proxykd_jax.errors import UserError
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.parallel.sharding import check_rows
from proxykd_jax.training.abstract import Program
from proxykd_jax.training.batch_objectives import AlignObjective
from proxykd_jax.training.batches import (
    Joined,
    Plan,
    count_steps,
)
from proxykd_jax.training.console import Console
from proxykd_jax.training.distillation import planned_figures, teacher_rows
from proxykd_jax.training.draw_answers import Answerer
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.model import model_identity
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.pairs import PairRows
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.programs import pair_program, sampling_program, text_programs
from proxykd_jax.training.reference import check_first_dpo_loss, store_references
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import TrainState


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns nothing: this method needs no soft labels."""
    return {}


def phases(run: StageRun) -> list[Phase]:
    """Draws y-hat, and returns the warm-up and the preference phase."""
    rows = Joined(teacher_rows(run.config, run.corpus))
    samples = None if run.scorer is not None else sample_base_student(run, rows)
    return _Soda(run, rows, samples).phases()


def sample_base_student(run: StageRun, rows: Joined) -> SampleStore:
    """Draws y-hat of every row from the student as loaded, in ``samples/base_student``.

    The answers depend on the student, the corpus and the sampling keys, but not on training keys.
    """
    config, method = run.config, _method(run)
    sampling = config.align.sampling
    mesh = run.sample_mesh
    check_rows(sampling.batch_size, mesh, "align.sampling.batch_size")
    store = SampleStore(
        config.folder / "samples" / "base_student", references=run.folder / "reference"
    )
    settings = {
        "round": 0,
        "seed": config.seed,
        "temperature": method.temperature,
        "top_p": 1.0,
        "max_new_tokens": sampling.max_new_tokens,
        "rows_per_part": sampling.rows_per_part,
        "data": config.distill.data,
        "student": config.student.model_dump(mode="json", exclude={"config", "remat", "license"}),
    }
    inputs = {"corpus": run.corpus.identity, "student": model_identity(config.student)}
    if not store.begin(settings, inputs):
        student = run.model
        Answerer(config, run.corpus, student.config, student.weights, mesh).fill(
            store,
            rows,
            range(len(rows)),
            round_index=0,
            temperature=method.temperature,
            against_teacher=True,
            report=Console("distill").parts("untrained student answered"),
        )
        store.complete()
    return store


def _method(run: StageRun) -> Soda:
    assert isinstance(run.config.method, Soda)
    return run.config.method


class _Soda:
    """The phases of one run.

    Args:
      run: the run of the stage.
      rows: the teacher's answers.
      samples: y-hat of each row; None for a sketch.
    """

    def __init__(self, run: StageRun, rows: Joined, samples: SampleStore | None) -> None:
        self._run, self._rows, self._store = run, rows, samples
        self._distill, self._method = run.config.distill, _method(run)
        self._preference = PreferenceConfig(loss="dpo", beta=self._method.beta)
        self._options: dict[str, Any] = {
            "epochs": self._distill.epochs,
            "most": self._distill.max_steps,
        }

    @property
    def _samples(self) -> SampleStore:
        assert self._store is not None
        return self._store

    def _plan(self) -> Plan:
        """Returns the batches of DPO; a sketch has as many batches, of other lengths."""
        if self._store is None:
            positions = self._rows.lengths - 1
            return self._run.plan(positions, "soda/dpo", packs=False, **self._options)
        pairs = self._pairs()
        return self._run.plan(
            pairs.positions,
            "soda/dpo",
            packs=False,
            answers=pairs.answers,
            max_length=pairs.longest(self._run.corpus.max_length),
            **self._options,
        )

    def phases(self) -> list[Phase]:
        """Returns NLL from q_0 to q_w, then DPO from q_w, with one optimizer."""
        method, plan = self._method, self._plan()
        steps = count_steps(plan, **self._options)
        warmup = self._run.nll_phase(
            "warmup",
            self._rows,
            lambda warmup_steps: make_optimizer(self._distill.optimizer, warmup_steps + steps),
            order="soda/warmup",
            epochs=method.warmup_epochs,
            most=method.warmup_max_steps,
            program="distill",
            programs=self._first_programs,
            keep=True,
        )
        objective = AlignObjective(
            self._preference,
            self._distill.reduction,
            nll_weight=method.nll_weight,
            preference_weight=1.0,
        )

        def before(state: TrainState) -> dict[str, float]:
            counts = {f"samples/{name}": value for name, value in self._samples.counts().items()}
            return {**planned_figures(self._rows, warmup.steps + steps), **counts}

        preference = self._run.phase(
            "dpo",
            objective,
            warmup.optimizer,
            self._rows,
            plan,
            steps,
            prepare=self._prepare,
            check_first=self._check_first_loss,
            before=before,
            programs=lambda phase: [pair_program(self._run, phase, "prefer")],
        )
        return [warmup, preference]

    def _first_programs(self, phase: Phase) -> list[Program]:
        run = self._run
        return [sampling_program(run, run.model, phase), *text_programs(run, "distill", phase)]

    def _prepare(self, phase: Phase, trainer: Trainer) -> Phase:
        """Computes log q_w of y and y-hat once, before the first step that changes q_w."""
        if trainer.progress.phase_step == 0:
            self._store_references(phase, trainer)
        if self._samples.num_references < len(self._rows):
            raise UserError(
                f"{self._run.folder / 'reference'} lacks log-probs of the warmed-up student, but "
                f"the student was trained further. Remove {self._run.folder} to train it again."
            )
        return phase.with_(collate=self._pairs().collate)

    def _store_references(self, phase: Phase, trainer: Trainer) -> None:
        rows_per_part = self._run.config.align.sampling.rows_per_part
        store_references(
            self._samples,
            phase.plan,
            self._pairs().collate,
            self._run.model.at(trainer.state.trainable),
            rows=self._rows,
            plan_chosen=None,  # q_0 answered, q_w is the reference
            microbatches=self._distill.microbatches,
            batches_per_part=max(rows_per_part // self._distill.batch_size, 1),
            mesh=self._run.mesh,
            report=trainer.console.parts("reference of"),
        )

    def _pairs(self) -> PairRows:
        """Returns the pairs with the reference log-probs that are stored so far."""
        return PairRows(self._rows, self._samples, self._preference, self._run.model.config)

    def _check_first_loss(self, metrics: dict[str, float]) -> None:
        check_first_dpo_loss(
            metrics["preference"],
            self._run.model.spec,
            beta=self._preference.beta,
            tokens=self._pairs().mean_tokens,
            folder=self._run.folder / "reference",
        )
