"""SODA (arXiv 2604.03873): DPO of the teacher's answers over the student's own from before.

1. y-hat: the base student q_0 answers every prompt once, before any training; drawn once, frozen.
2. Warm-up: NLL of the teacher's answers takes the student to q_w.
3. DPO on (y, y-hat) from q_w, with q_w as the reference; its log-probs are stored at the start.

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
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.parallel.sharding import check_rows
from proxykd_jax.training.answers import draw_answers
from proxykd_jax.training.batches import (
    Joined,
    Plan,
    answer_positions,
    count_steps,
    placed_batches,
    token_collate,
)
from proxykd_jax.training.console import Console
from proxykd_jax.training.distillation import teacher_rows
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.model import model_identity
from proxykd_jax.training.objectives import AlignObjective, NllObjective, Objective
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.pairs import PairRows
from proxykd_jax.training.reference import check_first_dpo_loss, store_references
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.steps import make_diagnosis, make_train_step
from proxykd_jax.training.student import StudentRun

# Phases of the stage: the look at the untrained student is 0.
_WARMUP, _DPO = 1, 2


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Nothing is scored."""
    return {}


def train(run: StudentRun) -> None:
    """Sample, warm up, prefer."""
    rows = Joined(teacher_rows(run.config, run.corpus))
    samples = sample_base_student(run, rows)
    soda = _Soda(run, rows, samples)
    soda.look_at_untrained_student()
    soda.warm_up()
    soda.store_references()
    soda.prefer()
    soda.finish()


def sample_base_student(run: StudentRun, rows: Joined) -> SampleStore:
    """y-hat of every row from the student as loaded, in ``samples/base_student``.

    What decides them is the student, the corpus, and how it is sampled: no key of the training.
    """
    config, method = run.config, _method(run)
    sampling = config.align.sampling
    mesh = make_mesh(config.mesh.of("sample"))
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
        "student": config.student.model_dump(mode="json", exclude={"config", "remat"}),
    }
    inputs = {"corpus": run.corpus.identity, "student": model_identity(config.student)}
    if not store.begin(settings, inputs):
        student, say = run.student, Console("distill").say
        draw_answers(
            store,
            rows,
            range(len(rows)),
            config,
            student.config,
            student.params,
            student.adapter,
            corpus=run.corpus,
            mesh=mesh,
            round_index=0,
            temperature=method.temperature,
            top_p=1.0,
            against_teacher=True,
            report=lambda done, total: say(f"untrained student answered {done}/{total} parts"),
        )
        store.complete()
    return store


def _method(run: StudentRun) -> Soda:
    assert isinstance(run.config.method, Soda)
    return run.config.method


class _Soda:
    """The phases of one run."""

    def __init__(self, run: StudentRun, rows: Joined, samples: SampleStore) -> None:
        self._run, self._rows, self._samples = run, rows, samples
        self._distill, method = run.config.distill, _method(run)
        self._nll = NllObjective(self._distill.reduction)
        self._preference = PreferenceConfig(loss="dpo", beta=method.beta)
        self._dpo = AlignObjective(
            self._preference,
            self._distill.reduction,
            nll_weight=method.nll_weight,
            preference_weight=1.0,
        )
        self._texts = run.plan(rows.lengths - 1, "soda/warmup", answers=answer_positions(rows))
        pairs = self._pair_rows()
        self._pairs = run.plan(
            pairs.positions,
            "soda/dpo",
            packs=False,
            answers=pairs.answers,
            max_length=pairs.longest(run.corpus.max_length),
        )
        self._warmup_steps = count_steps(self._texts, method.warmup_epochs, method.warmup_max_steps)
        self._dpo_steps = count_steps(self._pairs, self._distill.epochs, self._distill.max_steps)
        self._optimizer = make_optimizer(
            self._distill.optimizer, self._warmup_steps + self._dpo_steps
        )
        self._trainer: Trainer = run.open_trainer(self._optimizer)

    def look_at_untrained_student(self) -> None:
        """Its figures, and what became of y-hat."""
        counts = {f"samples/{name}": value for name, value in self._samples.counts().items()}
        figures = {
            "rows": len(self._rows),
            "planned_steps": self._warmup_steps + self._dpo_steps,
            **counts,
        }
        self._run.look_at_untrained(self._trainer, figures)

    def warm_up(self) -> None:
        """NLL of the teacher's answers: from q_0 to q_w."""
        if self._trainer.progress.phase > _WARMUP:
            return
        self._train("warmup", self._nll, self._texts, token_collate(self._rows), self._warmup_steps)
        self._trainer.finish_phase("warmup", {}, keep=True)

    def store_references(self) -> None:
        """log q_w of y and y-hat: once, before the first step that moves the student from q_w."""
        progress = self._trainer.progress
        if progress.phase != _DPO or progress.phase_step > 0:
            return
        model = self._run.student.at(self._trainer.state.trainable)
        size = self._distill.batch_size
        say = self._trainer.console.say
        store_references(
            self._samples,
            self._pairs,
            self._pair_rows().collate,
            model,
            rows=self._rows,
            plan_chosen=None,  # q_0 answered, q_w is the reference
            microbatches=self._distill.microbatches,
            batches_per_part=max(self._run.config.align.sampling.rows_per_part // size, 1),
            mesh=self._run.mesh,
            report=lambda done, total: say(f"reference of {done}/{total} parts"),
        )

    def prefer(self) -> None:
        """DPO from q_w."""
        progress = self._trainer.progress
        if progress.phase > _DPO:
            return
        if self._samples.num_references < len(self._rows):
            raise UserError(
                f"{self._run.folder / 'reference'} lacks log-probs of the warmed-up student, and "
                f"the student has moved on. Remove {self._run.folder} to train it again."
            )
        self._train(
            "dpo",
            self._dpo,
            self._pairs,
            self._pair_rows().collate,
            self._dpo_steps,
        )
        self._trainer.finish_phase("dpo", {}, keep=False)

    def _pair_rows(self) -> PairRows:
        return PairRows(self._rows, self._samples, self._preference, self._run.student.config)

    def finish(self) -> None:
        """Marks the stage complete."""
        self._trainer.finish(self._run.folder, {"rows": len(self._rows)})

    # --- pieces -----------------------------------------------------------------------------------

    def _train(
        self, phase: str, objective: Objective, plan: Plan, collate: Any, steps: int
    ) -> None:
        run, start = self._run, self._trainer.progress.phase_step
        spec, options = run.student.spec, {"microbatches": self._distill.microbatches}
        prefers = objective is self._dpo
        self._trainer.run_phase(
            phase,
            make_train_step(spec, objective, self._optimizer, seed=run.config.seed, **options),
            placed_batches(plan, collate, start=start, stop=steps, mesh=run.mesh),
            steps,
            diagnose=make_diagnosis(spec, objective, **options) if prefers else None,
            check_first=self._check_first_loss if prefers else None,
        )

    def _check_first_loss(self, metrics: dict[str, float]) -> None:
        check_first_dpo_loss(
            metrics["preference"],
            self._run.student.spec,
            beta=self._preference.beta,
            tokens=self._pair_rows().mean_tokens,
            folder=self._run.folder / "reference",
        )
