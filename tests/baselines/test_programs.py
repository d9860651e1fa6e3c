"""What ``plan`` compiles for each method: the programs that its stages start, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxykd_jax.config import load_config
from proxykd_jax.models.hf_config import read_config
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.model import lora_config
from proxykd_jax.training.programs import programs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("black_box_kd", ["distill"]),
        ("gkd", ["distill"]),
        ("on_policy", ["warmup", "sample", "reference", "round", "distill"]),
        ("minillm", ["distill"]),
        ("gad", ["distill"]),
        ("soda", ["sample", "distill", "prefer"]),
        ("forward_kl", ["sample", "score", "distill"]),
        ("takd", ["warmup", "round", "score", "distill"]),
        ("mentor_kd", ["warmup", "sample", "round", "score", "distill"]),
        ("random_labels", ["warmup", "sample", "reference", "round", "score", "distill"]),
    ],
)
def test_the_programs_of_a_method(assets: Path, monkeypatch, name: str, expected: list[str]):
    monkeypatch.setenv("PROXYKD_ASSETS", str(assets))
    config = load_config(CONFIGS / f"{name}.yaml")
    student = read_config(assets / "models" / "stories260K")
    proxy = student.replace(lora=lora_config(config.proxy))
    found = programs(config, proxy, student)
    assert [program.name for program in found] == expected
    mesh = make_mesh(config.mesh)
    for program in found:
        if program.name in ("distill", "prefer"):
            assert program.lower(mesh, program.rows)
