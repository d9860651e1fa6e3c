"""Tiny runs of the methods beside Proxy-KD, and what their tests compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from tests.tiny_run import changed, files_of, log_lines, recipe, whole_logps

NO_FRESH: dict[str, Any] = {"corpus": {"fresh_prompts": []}}
# All rows in one batch, one step: the first loss is that of the untrained student on all of them.
ONE_STEP: dict[str, Any] = {"distill": {"batch_size": 160, "max_steps": 1}}


def method_recipe(files: Path, runs: Path, method: Any, *changes: Mapping[str, Any]) -> Config:
    """The tiny recipe with another method, without fresh prompts and with less alignment."""
    short = {"align": {"warmup_max_steps": 3, "round_max_steps": 3}}
    return recipe(files, runs, NO_FRESH, short, {"method": method}, *changes)


def first_step(config: Config) -> dict[str, Any]:
    """The metrics of the student's first step; runs what is not there yet."""
    distill.main(config)
    return next(line for line in log_lines(config, "distill") if "loss" in line)


def check_stopped_run_equals_unbroken(
    config: Config, runs: Path, patch: pytest.MonkeyPatch, at: int
) -> None:
    """A run that is stopped after ``at`` steps of training and started again, models and samples
    and log, is one that was never stopped; and it takes what ``--dry-run`` counted."""
    with patch.context() as patched:
        held = bytes_held(patched)
        distill.main(config)
    check_counted(config, held)
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


def bytes_held(patch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """Bytes of state and frozen weights of each phase of the student that takes steps from now."""
    found: dict[str, tuple[int, int]] = {}
    take_steps = loop.Trainer._take_steps

    def noting(trainer: loop.Trainer, phase: Phase) -> None:
        if trainer.stage == "distill":
            found[phase.name] = (_bytes(trainer.state), _bytes(phase.frozen))
        take_steps(trainer, phase)

    patch.setattr(loop.Trainer, "_take_steps", noting)
    return found


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_counted(config: Config, held: dict[str, tuple[int, int]]) -> None:
    """The phases that ``--dry-run`` counts are those that a finished run took.

    Args:
      config: of the run.
      held: from ``bytes_held``; empty where the run had been there already.
    """
    proxy, student = (architecture(getattr(config, role), role) for role in ("proxy", "student"))
    corpus = open_corpus(config.folder / "corpus")
    phases = run_phases(config, proxy, student, corpus)["distill"]
    results = read_json(config.folder / "student" / MANIFEST)["results"]
    assert [phase.name for phase in phases] == [result["phase"] for result in results[1:]]
    counted = [phase.steps for phase in phases]
    taken = np.diff([result["step"] for result in results]).tolist()
    # Answers of the proxy that are empty or wrong are dropped.
    if config.method.proxy_answers:
        assert all(most >= found for most, found in zip(counted, taken, strict=True))
    else:
        assert counted == taken
    for phase in phases:
        if phase.name in held:
            assert (_bytes(state_of(phase)), _bytes(phase.frozen)) == held[phase.name]


def _timeless(config: Config) -> list[dict[str, Any]]:
    timed = {"time", "time/step_s"}
    lines = log_lines(config, "distill")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def arrays_of(folder: Path) -> dict[str, Any]:
    """What lies below a folder, without manifests: they name what a stage was made from."""
    if not folder.exists():
        return {}
    return {path: data for path, data in files_of(folder).items() if not path.endswith(MANIFEST)}


def untrained_student(config: Config) -> Any:
    """The student at step 0 of a finished run."""
    return load_student(config, make_mesh(config.mesh), 0)


def answer_logps(model: Any, rows: Sequence[TokenRow]) -> list[np.ndarray]:
    """The whole softmax at each answer token of each row, in float64: ``[R, V]`` a row."""
    logps = whole_logps(model, [row.tokens for row in rows])
    return [logps[i, row.prompt_length - 1 : len(row.tokens) - 1] for i, row in enumerate(rows)]


def tempered(logps_RV: np.ndarray, temperature: float) -> np.ndarray:
    """log-softmax at another temperature."""
    scaled = logps_RV / temperature
    top = scaled.max(-1, keepdims=True)
    return scaled - top - np.log(np.exp(scaled - top).sum(-1, keepdims=True))


def mean_nll(logps: Sequence[np.ndarray], rows: Sequence[TokenRow]) -> float:
    """Mean over examples of token means."""
    return float(
        np.mean(
            [-q[np.arange(len(q)), row.answer].mean() for q, row in zip(logps, rows, strict=True)]
        )
    )


def mean_kl(p: Sequence[np.ndarray], q: Sequence[np.ndarray], temperature: float = 1.0) -> float:
    """KL(p || q) over the vocabulary at a temperature, mean over examples of token means."""
    kls = []
    for p_RV, q_RV in zip(p, q, strict=True):
        p_RV, q_RV = tempered(p_RV, temperature), tempered(q_RV, temperature)
        kls.append((np.exp(p_RV) * (p_RV - q_RV)).sum(-1).mean())
    return float(np.mean(kls))
