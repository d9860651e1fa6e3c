"""A round of preference optimisation beside a round of fine-tuning on the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.speed.ours_models import device_peak, token_rows
from benchmarks.speed.ours_training import Trainer, examples_of
from benchmarks.speed.protocol import Program
from benchmarks.speed.rows import Rows
from proxykd_jax.generation.sampler import sample
from proxykd_jax.training.reference import pair_logps

# What the method's paper reports for its preference rounds beside plain fine-tuning.
PAPERS_RATIO = 5.1


def floor_ratio(rows: Rows) -> float:
    """Arithmetic of a preference round over that of an SFT round, LoRA, for mean prompt and answer
    lengths P and R, in forward passes a token.

    SFT: forward and backward (towards inputs alone) of P + R. Preference: sampling P + R, whose
    log-probs are the references of y-hat; references of y, P + R; training on both answers
    behind one prompt, 2 P + 4 R.
    """
    prompt = float(np.mean(rows.prompt_lengths))
    answer = float(np.mean(rows.lengths - rows.prompt_lengths))
    return (4 * prompt + 6 * answer) / (2 * (prompt + answer))


def sft_round(task: dict[str, Any]) -> Program:
    """Every row once, NLL alone."""
    rows = Rows.load(task["rows"])
    trainer = Trainer(task)
    examples = examples_of("sft", rows)
    planned = examples.epoch(task["batch_size"], "bucket")

    def run() -> None:
        trainer.epoch("sft", examples, planned)

    run()
    return Program(run=run, units=float(rows.answer_tokens), peak=device_peak())


def preference_round(task: dict[str, Any]) -> Program:
    """Samples of the model as it stands, references of both answers, a step on every batch; so
    many ``rounds`` (default: one) one after another.

    Answers have as many tokens as the teacher's: what is drawn differs from round to round, the
    shapes do not.
    """
    rows = Rows.load(task["rows"])
    trainer = Trainer(task)
    chosen = token_rows(rows)
    budgets = (rows.lengths - rows.prompt_lengths).tolist()
    numbers = iter(range(1, 1 << 30))

    def one_round() -> None:
        drawn = sample(
            trainer.frozen,
            trainer.state.trainable,
            [row.prompt for row in chosen],
            [row.row_id for row in chosen],
            config=trainer.config,
            seed=0,
            round_index=next(numbers),
            end_token_ids=(),
            max_new_tokens=budgets,
            batch_size=task["sample_batch_size"],
        )
        rejected = [
            np.concatenate([row.prompt, answer.tokens]).astype(np.int32)
            for row, answer in zip(chosen, drawn, strict=True)
        ]
        found = _with_references(rows, rejected, trainer, task)
        examples = examples_of("dpo", found)
        trainer.epoch("dpo", examples, examples.epoch(task["batch_size"], "bucket"))

    def run() -> None:
        for _ in range(task.get("rounds", 1)):
            one_round()

    one_round()
    extra = {"floor": floor_ratio(rows), "papers_ratio": PAPERS_RATIO}
    return Program(run=run, units=float(rows.answer_tokens), peak=device_peak(), extra=extra)


def _with_references(
    rows: Rows,
    rejected: list[np.ndarray],
    trainer: Trainer,
    task: dict[str, Any],
) -> Rows:
    """The rows with the answers that were drawn, and log-probs of both in the model as it is."""
    found = Rows(
        **{
            **vars(rows),
            "rejected": rejected,
            "reference_chosen": np.zeros(len(rows), np.float32),
            "reference_rejected": np.zeros(len(rows), np.float32),
        }
    )
    examples = examples_of("dpo", found)
    params, adapter = trainer.spec.bind(trainer.frozen, trainer.state.trainable)
    planned = examples.epoch(task["batch_size"], "bucket")
    pending = [
        pair_logps(params, adapter, examples.collate(batch), spec=trainer.spec, microbatches=1)
        for batch in planned
    ]
    for batch, pair in zip(planned, pending, strict=True):
        places = np.array([row[0] for row in batch.rows if row])
        chosen_B, rejected_B = (np.asarray(x)[: len(places)] for x in pair)
        found.reference_chosen[places] = chosen_B
        found.reference_rejected[places] = rejected_B
    return found
