"""The recipes of a miniature: the headline run and the students it is compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from proxykd_jax.artifacts import write_bytes

# Each student differs from the headline only in what its name says. All take at most 400 steps on
# batches of 64 rows and keep the state with the best validation NLL.
HEADLINE = "proxy_kd"
STUDENTS = (
    "black_box_ds",
    "black_box_all",
    "takd",
    "without_alignment",
    HEADLINE,
    "proxy_kd_fresh",
)


def recipes(out: Path) -> dict[str, dict[str, Any]]:
    """The config of each student by name; ``out`` is the miniature's folder."""
    headline = _headline(out)
    made: dict[str, dict[str, Any]] = {HEADLINE: headline}

    def variant(name: str) -> dict[str, Any]:
        made[name] = copy.deepcopy(headline)
        made[name]["name"] = name
        return made[name]

    # With alpha 0 the student is fine-tuned on the teacher's answers, and no proxy is loaded.
    variant("black_box_ds")["distill"]["alpha"] = 0.0
    variant("black_box_all")["distill"].update(alpha=0.0, data="all")
    # This is TAKD as the paper criticises it: it learns the raw proxy's soft labels beside the
    # teacher's answers.
    takd = variant("takd")
    takd["align"] = {**takd["align"], "alignment": "none"}
    takd["distill"].update(alpha=1.0, weights={"enabled": False})
    without = variant("without_alignment")
    without["align"] = {**without["align"], "alignment": "none"}
    # This takes the proxy that the headline's run has exported; it answers the fresh prompts too.
    fresh = variant("proxy_kd_fresh")
    fresh["proxy"]["path"] = str(out / "runs" / HEADLINE / "export" / "proxy")
    fresh["tokenizer"] = str(out / "proxy")
    fresh["align"] = {**fresh["align"], "alignment": "none"}
    fresh["corpus"]["fresh_prompts"] = [
        {"path": str(out / "fresh.jsonl"), "format": "prompt_response"}
    ]
    return made


def write_recipes(out: Path) -> None:
    """Writes ``configs/<name>.yaml`` for each student."""
    for name, recipe in recipes(out).items():
        text = yaml.safe_dump(recipe, sort_keys=False)
        write_bytes(out / "configs" / f"{name}.yaml", text.encode())


def _headline(out: Path) -> dict[str, Any]:
    """The paper's Proxy-KD (alpha 100, eq. 9, DPO) at the miniature's sizes."""
    model = {"trainable": "full", "dtype": "float32"}
    return {
        "preset": "paper",
        "name": HEADLINE,
        "runs_dir": str(out / "runs"),
        "seed": 0,
        "corpus": {
            "sources": [{"path": str(out / "teacher.jsonl"), "format": "prompt_response"}],
            "test": [{"path": str(out / "test.jsonl"), "format": "prompt_response"}],
            "template": "auto",
            "max_length": 12,
            "validation_fraction": 1 / 11,  # 200 of 2200 rows
        },
        "proxy": {"path": str(out / "proxy"), **model},
        "student": {"path": str(out / "student"), **model},
        "align": {
            "alignment": "nll_preference",
            "num_rounds": 4,
            "warmup_epochs": 8,
            "warmup_max_steps": 25,
            "epochs_per_round": 12,
            "round_max_steps": 40,
            "stop_rounds": False,
            "preference": {"beta": 1.0},
            "sampling": {"batch_size": 256, "rows_per_part": 1024},
            "batch_size": 64,
            "batching": "pad",  # All rows fit one length, so no batch needs another one.
            "optimizer": {"learning_rate": 3e-4, "b2": 0.98, "clip_norm": 1.0},
            # Training never stops early: validation only chooses the state that is kept.
            "stop": {"enabled": True, "every": 20, "patience": 1000},
            "checkpoint_every": 1000,
            "diagnose_every": 40,
        },
        "score": {"batch_size": 256, "rows_per_part": 4096, "store_dtype": "float32"},
        "distill": {
            "alpha": 100.0,
            "epochs": 30,
            "max_steps": 400,
            "batch_size": 64,
            "batching": "pad",
            "optimizer": {"learning_rate": 2e-3, "b2": 0.98, "clip_norm": 1.0},
            "stop": {"enabled": True, "every": 20, "patience": 1000},
            "checkpoint_every": 200,
            "diagnose_every": 100,
        },
        "evaluate": {"batch_size": 256, "teacher_logps": str(out / "teacher_logps")},
        "export": {"dtype": "float32", "state": "best"},
    }
