"""Tiny runs of the methods other than Proxy-KD, and comparisons for their tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from proxykd_jax import distill
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.config import Config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.errors import Stopped
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.planning.look import architecture
from proxykd_jax.planning.run_programs import run_phases
from proxykd_jax.training import loop
from proxykd_jax.training.abstract import state_of
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.restore import load_student
from proxykd_jax.types import SharedPairBatch
from tests.tiny_run import changed, files_of, log_lines, recipe, whole_logps

NO_FRESH: dict[str, Any] = {"corpus": {"fresh_prompts": []}}
# One step takes all rows in one batch: its loss is that of the untrained student on all rows.
ONE_STEP: dict[str, Any] = {"distill": {"batch_size": 160, "max_steps": 1}}


def method_recipe(files: Path, runs: Path, method: Any, *changes: Mapping[str, Any]) -> Config:
    """Returns the tiny recipe with another method, no fresh prompts and less alignment."""
    short = {"align": {"warmup_max_steps": 3, "round_max_steps": 3}}
    return recipe(files, runs, NO_FRESH, short, {"method": method}, *changes)


def first_step(config: Config) -> dict[str, Any]:
    """Returns the metrics of the student's first step; runs the missing stages."""
    distill.main(config)
    return next(line for line in log_lines(config, "distill") if "loss" in line)


def check_stopped_run_equals_unbroken(
    config: Config, runs: Path, patch: pytest.MonkeyPatch, at: int
) -> None:
    """Checks that a run that stops after ``at`` training steps and starts again equals an
    uninterrupted run in models, samples and log, and that it takes what ``--dry-run`` counts."""
    with patch.context() as patched:
        seen = watch_phases(patched)
        distill.main(config)
    check_counted(config, seen)
    stopped = changed(config, {"runs_dir": str(runs)})
    calls = iter(range(at))
    with patch.context() as patched:
        patched.setattr(loop, "stop_wanted", lambda: next(calls, None) is None)
        while True:
            try:
                distill.main(stopped)
                break
            except Stopped:
                calls = iter(range(1_000_000))
    manifests = [read_json(c.folder / "student" / MANIFEST) for c in (stopped, config)]
    for name in ("content", "best_step", "best_nll", "last_step", "results", "counts"):
        assert manifests[0][name] == manifests[1][name], name
    for name in ("samples", "soft_labels"):
        assert arrays_of(stopped.folder / name) == arrays_of(config.folder / name)
    assert _timeless(stopped) == _timeless(config)


@dataclass
class Seen:
    """What was observed of a phase.

    Attributes:
      state, frozen: bytes of each at its first step.
      tokens: tokens of the corpus in its batches; None if batches are made from the state.
    """

    state: int
    frozen: int
    tokens: int | None


def watch_phases(patch: pytest.MonkeyPatch) -> dict[tuple[str, str], Seen]:
    """Records each (stage, phase) that takes steps from now on."""
    found: dict[tuple[str, str], Seen] = {}
    take_steps, batches = loop.Trainer._take_steps, loop.Trainer._batches

    def noting(trainer: loop.Trainer, phase: Phase) -> None:
        tokens = 0 if phase.make_batch is None else None
        seen = Seen(_bytes(trainer.state), _bytes(phase.frozen), tokens)
        found[trainer.stage, phase.name] = seen
        take_steps(trainer, phase)

    def counting(trainer: loop.Trainer, phase: Phase) -> Iterator[Any]:
        seen = found[trainer.stage, phase.name]
        for batch in batches(trainer, phase):
            if seen.tokens is not None:
                seen.tokens += _corpus_tokens(batch)
            yield batch

    patch.setattr(loop.Trainer, "_take_steps", noting)
    patch.setattr(loop.Trainer, "_batches", counting)
    return found


def _corpus_tokens(batch: Any) -> int:
    """Returns the tokens that a batch took from the corpus; of pairs only those of y."""
    rows = getattr(batch, "chosen", getattr(batch, "rows", batch))
    if isinstance(batch, SharedPairBatch):  # y-hat has no tokens from the corpus
        rows = rows.replace(segment_ids_BL=np.where(rows.segment_ids_BL == 1, 1, 0))
        return int((rows.segment_ids_BL > 0).sum() + rows.example_mask_BS[:, 0].sum())
    # An example of n tokens takes n - 1 positions.
    return int((rows.segment_ids_BL > 0).sum() + rows.example_mask_BS.sum())


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_counted(config: Config, seen: Mapping[tuple[str, str], Seen]) -> None:
    """Checks that a finished run took the phases that ``--dry-run`` counts.

    Args:
      config: config of the run.
      seen: from ``watch_phases``, without phases that were already complete.
    """
    proxy, student = (architecture(getattr(config, role), role) for role in ("proxy", "student"))
    corpus = open_corpus(config.folder / "corpus")
    for stage, phases in run_phases(config, proxy, student, corpus).items():
        if not phases:
            continue
        folder = config.folder / ("proxy" if stage == "align" else "student")
        results = read_json(folder / MANIFEST)["results"]
        assert [phase.name for phase in phases] == [result["phase"] for result in results[1:]]
        counted = [phase.steps for phase in phases]
        taken = np.diff([result["step"] for result in results]).tolist()
        # A proxy's answers that are empty or wrong are dropped.
        exact = stage == "align" or not config.method.proxy_answers
        assert counted == taken or (not exact and min(np.subtract(counted, taken)) >= 0)
        for phase in phases:
            found = seen.get((stage, phase.name))
            if found is None:
                continue
            assert (found.state, found.frozen) == (_bytes(state_of(phase)), _bytes(phase.frozen))
            # The lengths of texts that a proxy has drawn are not known beforehand.
            if found.tokens is not None and exact and not config.method.reads_scorer_text:
                assert found.tokens == phase.tokens


def _timeless(config: Config) -> list[dict[str, Any]]:
    timed = {"time", "time/step_s"}
    lines = log_lines(config, "distill")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def arrays_of(folder: Path) -> dict[str, Any]:
    """Returns the files below a folder except manifests, which name what a stage was made from."""
    if not folder.exists():
        return {}
    return {path: data for path, data in files_of(folder).items() if not path.endswith(MANIFEST)}


def untrained_student(config: Config) -> Any:
    """Returns the student at step 0 of a finished run."""
    return load_student(config, make_mesh(config.mesh), 0)


def answer_logps(model: Any, rows: Sequence[TokenRow]) -> list[np.ndarray]:
    """Returns the whole softmax at each answer token in float64, ``[R, V]`` for each row."""
    logps = whole_logps(model, [row.tokens for row in rows])
    return [logps[i, row.prompt_length - 1 : len(row.tokens) - 1] for i, row in enumerate(rows)]


def tempered(logps_RV: np.ndarray, temperature: float) -> np.ndarray:
    """Returns the log-softmax at another temperature."""
    scaled = logps_RV / temperature
    top = scaled.max(-1, keepdims=True)
    return scaled - top - np.log(np.exp(scaled - top).sum(-1, keepdims=True))


def mean_nll(logps: Sequence[np.ndarray], rows: Sequence[TokenRow]) -> float:
    """Returns the mean over examples of token means."""
    return float(
        np.mean(
            [-q[np.arange(len(q)), row.answer].mean() for q, row in zip(logps, rows, strict=True)]
        )
    )


def mean_kl(p: Sequence[np.ndarray], q: Sequence[np.ndarray], temperature: float = 1.0) -> float:
    """Computes KL(p || q) over the vocabulary: the mean over examples of token means."""
    kls = []
    for p_RV, q_RV in zip(p, q, strict=True):
        p_RV, q_RV = tempered(p_RV, temperature), tempered(q_RV, temperature)
        kls.append((np.exp(p_RV) * (p_RV - q_RV)).sum(-1).mean())
    return float(np.mean(kls))
