"""Tiny runs of the methods beside Proxy-KD, and what their tests compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proxykd_jax import distill
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.config import Config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.restore import load_student
from tests.tiny_run import changed, copy_run, files_of, log_lines, recipe, unfinish, whole_logps

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


def student_files(config: Config) -> dict[str, Any]:
    """What ``distill`` left behind, byte by byte."""
    found = {}
    for name in ("student", "export"):
        files = files_of(config.folder / name)
        found |= {f"{name}/{path}": content for path, content in files.items()}
    return found


def check_resumed_run_equals_unbroken(config: Config, runs: Path, step: int) -> None:
    """A finished run, taken back to a checkpoint in a copy, goes on to the same bytes."""
    distill.main(config)
    copy = copy_run(config, runs)
    unfinish(copy, "student", step)
    (copy.folder / "export" / "student.json").unlink()
    assert read_json(copy.folder / "student" / MANIFEST)["status"] == "running"
    distill.main(copy)
    assert student_files(copy) == student_files(config)
    timed = ("time/step_s", "time")
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in log_lines(c, "distill")]
        for c in (copy, config)
    ]
    assert lines[0] == lines[1]


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


__all__ = [
    "ONE_STEP",
    "answer_logps",
    "changed",
    "check_resumed_run_equals_unbroken",
    "first_step",
    "mean_kl",
    "mean_nll",
    "method_recipe",
    "student_files",
    "untrained_student",
]
