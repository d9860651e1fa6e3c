"""Benchmarks during a student's training: when, on what, and that they change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxykd_jax import distill
from proxykd_jax.config import Config, make_config
from proxykd_jax.errors import UserError
from proxykd_jax.tasks.benchmark import run_benchmarks
from proxykd_jax.tasks.during import drawn
from proxykd_jax.tasks.items import read_items
from tests.tasks.files import write


def training_config(
    tmp_path: Path, model: Path, benchmarks: dict[str, Any], name: str = "plain"
) -> Config:
    """Five steps of plain fine-tuning on answers in the form that GSM8K asks for."""
    rows = [{"prompt": f"What is {n} + {n}?", "response": "#### 0"} for n in range(20)]
    corpus = write(tmp_path / "rows.jsonl", rows)
    return make_config(
        {
            "preset": "recommended",
            "name": name,
            "runs_dir": str(tmp_path / "runs"),
            "method": "black_box_kd",
            "corpus": {
                **{"sources": [{"path": corpus}], "template": "plain", "max_length": 64},
                "validation_fraction": 0.0,
            },
            "proxy": {"path": str(model), "dtype": "float32"},
            "student": {"path": str(model), "dtype": "float32", "trainable": "full"},
            "distill": {
                **{"epochs": 50, "max_steps": 5, "batch_size": 4, "checkpoint_every": 2},
                "optimizer": {"learning_rate": 3e-2},
            },
            "export": {"dtype": "float32", "state": "last"},
            "evaluate": {"benchmarks": {"batch_size": 4, **benchmarks}},
        }
    )


def lines_of(config: Config) -> list[dict[str, Any]]:
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith("time")}


def test_a_student_answers_every_so_many_steps_and_learns_the_same(
    tmp_path: Path, byte_model: Path, benchmarks: dict[str, str]
) -> None:
    files = {"gsm8k": benchmarks["gsm8k"], "csqa": benchmarks["csqa"], "max_new_tokens": 8}
    plain = training_config(tmp_path, byte_model, files)
    during = {"every": 2, "items": 4, "max_new_tokens": 8}
    watched = training_config(tmp_path, byte_model, {**files, "during": during}, "watched")
    for config in (plain, watched):
        distill.main(config)
    looks = [line for line in lines_of(watched) if "benchmark/gsm8k" in line]
    assert [line["step"] for line in looks] == [0, 2, 4, 5]
    assert [line["phase"] for line in looks][:2] == ["untrained", "train"]
    for line in looks:
        shares = [line["benchmark/gsm8k"], line["benchmark/csqa"]]
        assert line["benchmark/mean"] == pytest.approx(np.mean(shares))
    others = [without_times(line) for line in lines_of(watched) if "benchmark/gsm8k" not in line]
    assert others == [without_times(line) for line in lines_of(plain)]
    # The last measurement equals that of evaluate for the trained student on the same questions.
    asked = {item.id for item in drawn(read_items("gsm8k", files["gsm8k"]).items, 4, watched.seed)}
    run_benchmarks(watched, ["student:last"], ["gsm8k"])
    path = watched.folder / "eval" / "benchmarks" / "student_last" / "gsm8k.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    scores = [sample["score"] for sample in samples if sample["id"] in asked]
    assert looks[-1]["benchmark/gsm8k"] == np.mean(scores)
    # The student learns one answer, which is right only for the question about 0 and 0.
    assert looks[0]["benchmark/gsm8k"] == 0


def test_a_smaller_draw_is_part_of_a_larger_one(benchmarks: dict[str, str]) -> None:
    items = read_items("gsm8k", benchmarks["gsm8k"]).items
    draws = [drawn(items, count, 3) for count in (1, 3, 99)]
    assert [len(draw) for draw in draws] == [1, 3, 5]
    assert draws[-1] == items
    assert set(draws[0]) < set(draws[1]) < set(draws[2])
    assert {drawn(items, 1, seed)[0] for seed in range(20)} == set(items)


def test_tasks_without_files_are_named(
    tmp_path: Path, byte_model: Path, benchmarks: dict[str, str]
) -> None:
    during = {"every": 2, "tasks": ["gsm8k", "mmlu"]}
    files = {"gsm8k": benchmarks["gsm8k"], "during": during}
    with pytest.raises(UserError, match=r"no files of mmlu.*which has gsm8k"):
        distill.main(training_config(tmp_path, byte_model, files))
