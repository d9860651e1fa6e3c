"""A tiny student with a tiny scorer, batches of answers, and float64 references for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax import distill
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.baselines.beside_scorer import ScoredSpec
from proxykd_jax.baselines.rollouts import Answer, AnswerBatch, answer_batch
from proxykd_jax.config import Config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.models.decoder import forward
from proxykd_jax.models.params import init_params
from proxykd_jax.training.state import ModelSpec
from tests.baselines.runs import check_counted, watch_phases
from tests.tiny_run import copy_run, files_of, log_lines, unfinish
from tests.training.conftest import VOCAB, tiny_config

END = 2
# A cheap run with all parts: a warm-up of 2 steps, then 4 steps with a checkpoint after 3.
SHORT: dict[str, Any] = {
    "distill": {"batch_size": 8, "max_steps": 4, "checkpoint_every": 3, "stop": {"every": 2}}
}
IN_THE_MIDDLE = 5
ONLINE = {"warmup_max_steps": 2, "sample_batch_size": 32, "max_new_tokens": 4}


def pair(vocab_size: int = VOCAB) -> tuple[ScoredSpec, Any, Any]:
    """Returns (spec, frozen, trainable) of a fully trained student and another scorer."""
    config = tiny_config()
    spec = ModelSpec(config, "full", "float32", "none")
    scorer = init_params(jax.random.key(8), config)
    frozen = {"student": {}, "scorer": (scorer, None)}
    return ScoredSpec(spec, spec, vocab_size), frozen, init_params(jax.random.key(3), config)


def answers(count: int, seed: int = 0, longest: int = 12) -> list[Answer | None]:
    """Returns prompts with answers of mixed lengths, a place without a row, and an empty answer."""
    rng = np.random.default_rng(seed)
    found: list[Answer | None] = []
    for index in range(count):
        total = int(rng.integers(4, longest + 1))
        prompt = int(rng.integers(1, total - 1))
        tokens = rng.integers(3, VOCAB, total).astype(np.int32)
        finished = bool(rng.integers(2))
        if finished:
            tokens[-1] = END
        found.append(Answer(TokenRow(tokens, prompt, f"row {index}"), finished, True))
    found[1] = None
    empty = found[2]
    assert empty is not None
    row = empty.row
    found[2] = Answer(TokenRow(row.prompt, row.prompt_length, row.row_id), False, True)
    return found


def batch_of(count: int = 7, seed: int = 0, max_length: int = 12) -> AnswerBatch:
    """Returns a batch of such answers."""
    return answer_batch(answers(count, seed), max_length)


def logps_of(params: Any, rows: Any, temperature: float = 1.0, most: int = VOCAB) -> np.ndarray:
    """Returns float64 ``[B, L, V]`` log-probs by the plain forward pass."""
    logits = forward(params, None, jnp.asarray(rows.tokens_BL), config=tiny_config())
    logits = np.asarray(logits, np.float64)[..., :most] / temperature
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def example_mean(values_BL: np.ndarray, mask_BL: np.ndarray) -> float:
    """Returns the mean over examples (that have a token) of their token means."""
    return float(np.mean([v[m].mean() for v, m in zip(values_BL, mask_BL, strict=True) if m.any()]))


def loss_of(objective: Any, spec: Any, frozen: Any, batch: Any) -> Callable[[Any], jax.Array]:
    """Returns the whole batch's loss as a function of what learns."""
    counts = objective.counts(batch)

    def loss(trainable: Any) -> jax.Array:
        return objective.share(spec.bind(frozen, trainable), batch, counts, spec, None)[0]

    return loss


def assert_gradient_is_of_value(loss: Callable[[Any], jax.Array], trainable: Any) -> None:
    """Checks that the gradient along a direction is the slope of the value, so sampling adds no
    term."""
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    direction = jax.tree.unflatten(
        tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )
    value = jax.jit(loss)
    at = [
        float(value(jax.tree.map(lambda x, d, e=e: x + e * d, trainable, direction)))
        for e in (-2e-3, 2e-3)
    ]
    grads = jax.jit(jax.grad(loss))(trainable)
    slope = sum(
        float(jnp.vdot(g, d))
        for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    )
    assert abs(slope) > 1e-2
    np.testing.assert_allclose((at[1] - at[0]) / 4e-3, slope, rtol=2e-2)


def corpus_of(vocab_size: int, max_length: int, end: Sequence[int]) -> Any:
    """Returns an object with what ``Answering`` reads of a corpus."""
    return SimpleNamespace(vocab_size=vocab_size, max_length=max_length, end_token_ids=tuple(end))


def check_resumed(config: Config, runs: Path, step: int) -> None:
    """Checks that a copy of a finished run, resumed from a checkpoint, ends with the same weights,
    and that the run took what ``--dry-run`` counts."""
    with pytest.MonkeyPatch.context() as patch:
        seen = watch_phases(patch)
        distill.main(config)
    check_counted(config, seen)
    copy = copy_run(config, runs)
    assert (copy.folder / "student" / "checkpoints" / str(step)).is_dir()
    unfinish(copy, "student", step)
    (copy.folder / "export" / "student.json").unlink()
    distill.main(copy)
    manifests = [read_json(c.folder / "student" / MANIFEST) for c in (copy, config)]
    assert manifests[0] == manifests[1] and manifests[0]["content"]
    assert files_of(copy.folder / "export") == files_of(config.folder / "export")
    timed = ("time/step_s", "time")
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in log_lines(c, "distill")]
        for c in (copy, config)
    ]
    assert lines[0] == lines[1]


def steps_of(config: Config, phase: str) -> list[dict[str, Any]]:
    """Returns the metrics of a phase's steps."""
    return [x for x in log_lines(config, "distill") if x["phase"] == phase and "loss" in x]
