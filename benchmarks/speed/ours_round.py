"""A round of preference optimisation beside a round of fine-tuning on the same rows."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.ours_models import device_peak, token_rows
from benchmarks.speed.ours_training import Examples, Trainer, examples_of, objective_of
from benchmarks.speed.protocol import Program
from benchmarks.speed.rows import Rows
from proxykd_jax.config import MeshConfig
from proxykd_jax.data.collate import RowsInMemory, TokenRow
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Prompt, Sample, sample
from proxykd_jax.generation.samples import KEPT, SampledRow, SampleStore
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.batches import Plan, answer_positions
from proxykd_jax.training.model import Model
from proxykd_jax.training.pairs import PairRows
from proxykd_jax.training.reference import store_references

# The method's paper reports this ratio of its preference rounds to plain fine-tuning.
PAPERS_RATIO = 5.1


def floor_ratio(rows: Rows) -> float:
    """The arithmetic of a preference round over that of an SFT round, with LoRA.

    P and R are the mean lengths of prompt and answer; work is counted in forward passes a token.
    SFT takes a forward and a backward pass (towards inputs alone) over P + R. A preference round
    samples P + R, whose log-probs are the references of y-hat; computes the references of y, P + R;
    and trains on both answers behind one prompt, 2 P + 4 R.
    """
    prompt = float(np.mean(rows.prompt_lengths))
    answer = float(np.mean(rows.lengths - rows.prompt_lengths))
    return (4 * prompt + 6 * answer) / (2 * (prompt + answer))


def sft_round(task: dict[str, Any]) -> Program:
    """Trains on every row once, by NLL alone."""
    rows = Rows.load(task["rows"])
    trainer = Trainer(task)
    examples = examples_of("sft", rows)
    planned = examples.epoch(task["batch_size"], "bucket")

    def run() -> None:
        trainer.epoch("sft", examples, planned)

    run()
    return Program(run=run, units=float(rows.answer_tokens), peak=device_peak())


def preference_round(task: dict[str, Any]) -> Program:
    """Takes ``rounds`` (default: one): samples, references of both answers, a step on every batch.

    Answers are as long as the teacher's, so the shapes of all rounds are the same.
    """
    rows = Rows.load(task["rows"])
    trainer = Trainer(task)
    chosen = token_rows(rows)
    budgets = rows.budgets
    numbers = iter(range(1, 1 << 30))

    def one_round() -> None:
        drawn = sample(
            (trainer.frozen, trainer.state.trainable),
            [
                Prompt(row.prompt, row.row_id, budget)
                for row, budget in zip(chosen, budgets, strict=True)
            ],
            config=trainer.config,
            settings=DrawSettings(1.0, 1.0, trainer.config.vocab_size, ()),
            seed=0,
            round_index=next(numbers),
            batch_size=task["sample_batch_size"],
        )
        with tempfile.TemporaryDirectory() as folder:
            pairs = _with_references(Path(folder), chosen, drawn, trainer, task["batch_size"])
            examples = Examples(pairs.collate, pairs.positions, pairs.answers)
            trainer.epoch("dpo", examples, examples.epoch(task["batch_size"], "bucket"))

    def run() -> None:
        for _ in range(task.get("rounds", 1)):
            one_round()

    one_round()
    extra = {"floor": floor_ratio(rows), "papers_ratio": PAPERS_RATIO}
    return Program(run=run, units=float(rows.answer_tokens), peak=device_peak(), extra=extra)


def _with_references(
    folder: Path, chosen: list[TokenRow], drawn: list[Sample], trainer: Trainer, batch_size: int
) -> PairRows:
    """The pairs of a round with references by the current model, stored as ``align`` does."""
    rows, store = RowsInMemory(chosen), SampleStore(folder)
    sampled = [
        SampledRow(place, row.row_id, answer.tokens, answer.finished, KEPT, answer.loglik)
        for place, (row, answer) in enumerate(zip(chosen, drawn, strict=True))
    ]
    store.append(0, sampled)
    preference = objective_of("dpo").preference
    pairs = PairRows(rows, store, preference, trainer.config)

    def plan(positions: np.ndarray, answers: np.ndarray) -> Plan:
        return Examples(pairs.collate, positions, answers).plan(batch_size, "bucket")

    store_references(
        store,
        plan(pairs.positions, pairs.answers),
        pairs.collate,
        Model(trainer.spec, trainer.frozen, trainer.state.trainable, folder),
        rows=rows,
        plan_chosen=lambda some: plan(some.lengths - 1, answer_positions(some)),
        microbatches=1,
        batches_per_part=len(rows),
        mesh=make_mesh(MeshConfig()),
        report=lambda done, parts: None,
    )
    return PairRows(rows, store, preference, trainer.config)
