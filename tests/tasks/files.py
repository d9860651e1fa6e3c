"""Files and configs for the tests of benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from proxykd_jax.config import Config, make_config


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(tmp_path: Path, benchmarks: dict[str, Any], model: Path | None = None) -> Config:
    model = model or tmp_path / "model"
    corpus = write(tmp_path / "corpus.jsonl", [{"prompt": "Hello?", "response": "Yes."}])
    return make_config(
        {
            "preset": "recommended",
            "name": "run",
            "runs_dir": str(tmp_path / "runs"),
            "corpus": {"sources": [{"path": corpus}], "template": "plain", "max_length": 64},
            "proxy": {"path": str(model), "dtype": "float32"},
            "student": {"path": str(model), "dtype": "float32"},
            "export": {"dtype": "float32", "state": "best"},
            "evaluate": {"benchmarks": benchmarks},
        }
    )
