"""A whole run that takes seconds: two random models, a corpus, and a config for them.

Words and teacher come from the miniature, and nothing is pre-trained. All rows fit into 16
positions, so a step is compiled once. Learning rates are large, so that a few steps change the
log-probs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.miniature import pretrain
from benchmarks.miniature import world as w
from benchmarks.miniature.make import write_rows
from proxykd_jax.artifacts import MANIFEST, read_json, write_json
from proxykd_jax.config import Config, make_config
from proxykd_jax.evaluation import measures
from proxykd_jax.models.decoder import forward
from proxykd_jax.models.hf_weights import save_model
from proxykd_jax.models.params import init_params
from proxykd_jax.training.model import Model

PROXY = pretrain.model_config(32, 40).replace(initializer_range=0.3)
STUDENT = pretrain.model_config(16, 24, num_layers=1).replace(initializer_range=0.3)


def keep_compiled(folder: Path) -> None:
    """Lets this process and those it starts keep compiled programs in ``folder``.

    Each run of a stage would compile its steps again, which takes most of its time here. With kept
    programs a second ``align`` took 2.4 seconds instead of 9.8.
    """
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def make_files(
    folder: Path, *, num_corpus: int = 140, num_test: int = 9, num_fresh: int = 14
) -> Path:
    """Writes ``proxy/``, ``student/``, ``teacher.jsonl``, ``test.jsonl`` and ``fresh.jsonl``."""
    teacher = w.make_worlds(0, "fmt").teacher
    pool = w.PromptPool(0)
    rng = np.random.default_rng(0)
    for name, count in (("teacher", num_corpus), ("test", num_test), ("fresh", num_fresh)):
        prompts = pool.take(count)
        answers = None if name == "fresh" else w.sample_answers(teacher, prompts, rng)
        write_rows(folder / f"{name}.jsonl", prompts, answers)
    pretrain.write_tokenizer(folder / "tokenizer")
    for index, (name, config) in enumerate((("proxy", PROXY), ("student", STUDENT))):
        params = init_params(jax.random.key(index), config)
        save_model(folder / name, config, params, source=folder / "tokenizer")
    return folder


def recipe(files: Path, runs: Path, *changes: Mapping[str, Any], name: str = "run") -> Config:
    """The config of a run in ``runs/name``: warm-up, 2 rounds of NLL and DPO, then a student.

    Args:
      files: from ``make_files``.
      runs: folder of runs.
      *changes: sections of keys that override the defaults, one after another.
      name: of the run.
    """
    data: dict[str, Any] = {
        "preset": "recommended",
        "name": name,
        "runs_dir": str(runs),
        "seed": 3,
        "corpus": {
            "sources": [{"path": str(files / "teacher.jsonl"), "format": "prompt_response"}],
            "fresh_prompts": [{"path": str(files / "fresh.jsonl"), "format": "prompt_response"}],
            "test": [{"path": str(files / "test.jsonl"), "format": "prompt_response"}],
            "max_length": 12,
            "validation_fraction": 0.1,
            "validation_rows": 1,
        },
        "proxy": {"path": str(files / "proxy"), "dtype": "float32", "lora": {"rank": 4}},
        "student": {"path": str(files / "student"), "dtype": "float32", "trainable": "full"},
        "align": {
            "num_rounds": 2,
            "epochs_per_round": 1,
            "warmup_epochs": 1,
            "stop_rounds": False,
            "preference": {"beta": 0.5},
            "sampling": {"batch_size": 16, "rows_per_part": 16},
            "batch_size": 8,
            "batching": "pad",
            "optimizer": {"learning_rate": 1e-2},
            "stop": {"enabled": True, "every": 2, "patience": 100},
            "checkpoint_every": 2,
            "diagnose_every": 2,
        },
        "score": {"top_k": 6, "batch_size": 16, "rows_per_part": 32, "store_dtype": "float32"},
        "distill": {
            "epochs": 2,
            "max_steps": 8,
            "batch_size": 16,
            "batching": "pad",
            "optimizer": {"learning_rate": 1e-2},
            "stop": {"enabled": True, "every": 2, "patience": 100},
            "checkpoint_every": 2,
            "diagnose_every": 4,
        },
        "evaluate": {"batch_size": 16},
        "export": {"dtype": "float32", "state": "best"},
    }
    for change in changes:
        data = _over(data, change)
    return make_config(data)


def changed(config: Config, change: Mapping[str, Any]) -> Config:
    """A config in which some keys have other values."""
    return make_config(_over(config.model_dump(mode="json"), change))


def copy_run(config: Config, runs: Path) -> Config:
    """Copies a run's folder to ``runs``, so that it can be changed; returns the copy's config."""
    shutil.copytree(config.folder, runs / config.name)
    return changed(config, {"runs_dir": str(runs)})


def _over(below: Any, above: Any) -> Any:
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}


def without_student(config: Config, runs: Path, change: Mapping[str, Any]) -> Config:
    """A copy of a run without its student, and its config with other values of some keys."""
    config = copy_run(config, runs)
    for name in ("student", "export", "eval"):
        shutil.rmtree(config.folder / name, ignore_errors=True)
    return changed(config, change)


_forward = jax.jit(forward, static_argnames="config")
_ROWS_AT_ONCE = 32


def whole_logps(model: Model, rows: Sequence[np.ndarray]) -> np.ndarray:
    """The full log-softmax of a tiny model by the plain forward pass, normalised in float64.

    Args:
      model: proxy or student.
      rows: token ids, at most 16 each. They are padded on the right, which no token sees.

    Returns:
      ``[n, 16, V]`` log-probs of the token after each position.
    """
    padded = np.zeros((-(-len(rows) // _ROWS_AT_ONCE) * _ROWS_AT_ONCE, 16), np.int32)
    for place, tokens in enumerate(rows):
        padded[place, : len(tokens)] = tokens
    params, adapter = model.params, model.adapter
    logits = [
        _forward(params, adapter, padded[start : start + _ROWS_AT_ONCE], config=model.config)
        for start in range(0, len(padded), _ROWS_AT_ONCE)
    ]
    logits_BLV = np.concatenate(logits).astype(np.float64)[: len(rows)]
    top = logits_BLV.max(-1, keepdims=True)
    return logits_BLV - top - np.log(np.exp(logits_BLV - top).sum(-1, keepdims=True))


def unfinish(config: Config, stage: str, step: int) -> None:
    """Removes what a stage (``proxy`` or ``student``) has made after a checkpoint."""
    folder = config.folder / stage
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            (folder / "digests" / f"{path.name}.json").unlink()
            shutil.rmtree(path)
    manifest = read_json(folder / MANIFEST)
    begun = {key: manifest[key] for key in ("stage", "settings", "inputs", "code_version")}
    write_json(folder / MANIFEST, {**begun, "status": "running"})


def log_lines(config: Config, stage: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that belong to a stage."""
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["stage"] == stage]


def files_of(folder: Path, *, times: bool = False) -> dict[str, Any]:
    """The content of each file below a folder, and with ``times`` also when it was written.

    The lock of ``prepare`` is left out, because each call opens it again.
    """
    return {
        str(path.relative_to(folder)): (
            path.read_bytes(),
            path.stat().st_mtime_ns if times else None,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".prepare.lock"
    }


def scripted_validation(patch: pytest.MonkeyPatch, nlls: Sequence[float]) -> list[float]:
    """Makes the validations of the next stage return these NLLs instead of measuring.

    Returns:
      The NLLs that were not used yet.
    """
    left = list(nlls)

    def figures(model: Any, rows: Any, most: int) -> dict[str, float]:
        return {"nll": left.pop(0), "agreement": 0.5}

    patch.setattr(measures, "validation_figures", lambda batch_size, mesh: figures)
    return left
