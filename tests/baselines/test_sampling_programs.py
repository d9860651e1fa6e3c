"""``plan`` compiles exactly the programs that the stages of each method start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from proxykd_jax.checking.findings import Findings
from proxykd_jax.checking.shapes import CountedPhases, check_shapes
from proxykd_jax.config import Config, load_config
from proxykd_jax.models.config import LoraConfig, ModelConfig
from proxykd_jax.models.hf_config import read_config
from proxykd_jax.models.lora import abstract_adapter
from proxykd_jax.models.params import abstract_params
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.parallel.sharding import bytes_per_device
from proxykd_jax.planning.run_programs import run_phases, run_programs
from proxykd_jax.training.abstract import state_of
from proxykd_jax.training.model import lora_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("black_box_kd", ["distill"]),
        ("gkd", ["sample", "nll", "answer", "distill"]),
        ("on_policy", ["warmup", "sample", "reference", "round", "nll", "answer", "distill"]),
        ("minillm", ["sample", "nll", "answer", "logps", "distill"]),
        ("gad", ["answer", "nll", "distill"]),
        ("soda", ["sample", "distill", "prefer"]),
        ("forward_kl", ["sample", "score", "distill"]),
        ("takd", ["warmup", "round", "score", "distill"]),
        ("mentor_kd", ["warmup", "round", "sample", "score", "distill"]),
        ("random_labels", ["warmup", "sample", "reference", "round", "score", "distill"]),
    ],
)
def test_the_programs_of_a_method(assets: Path, monkeypatch, name: str, expected: list[str]):
    monkeypatch.setenv("PROXYKD_ASSETS", str(assets))
    config = load_config(CONFIGS / f"{name}.yaml")
    student = read_config(assets / "models" / "stories260K")
    proxy = student.replace(lora=lora_config(config.proxy))
    found = run_programs(config, proxy, student)
    assert [program.name for program in found] == expected
    mesh = make_mesh(config.mesh)
    for program in found:
        if program.work == "distill" or program.name == "answer":
            assert program.lower(mesh, program.rows)


# --- a student that answers during training -------------------------------------------------------

ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


def size_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.fixture
def stories(assets: Path, monkeypatch) -> tuple[ModelConfig, ModelConfig]:
    """Returns (proxy with an adapter, student)."""
    monkeypatch.setenv("PROXYKD_ASSETS", str(assets))
    student = read_config(assets / "models" / "stories260K")
    return student.replace(lora=LoraConfig(rank=4)), student


def beside_the_student(config: Config, models: tuple[ModelConfig, ModelConfig]) -> dict[str, int]:
    last = run_phases(config, *models)["distill"][-1]
    found = last.spec.beside(last.frozen, state_of(last))
    return {name: size_of(tree) for name, tree in found.items()}


def with_scorer(config: Config, models: tuple[ModelConfig, ModelConfig]) -> tuple[dict, int]:
    """Returns programs by name, and the independently counted bytes of the scorer."""
    proxy, _ = models
    weights = abstract_params(proxy, config.proxy.dtype), abstract_adapter(proxy)
    assert beside_the_student(config, models) == {"scorer": size_of(weights)}
    return {p.name: p for p in run_programs(config, *models)}, size_of(weights)


def test_the_scorer_is_an_argument_of_a_step_and_stays_while_the_student_answers(stories):
    found, scorer = with_scorer(load_config(CONFIGS / "gkd.yaml"), stories)
    mesh = make_mesh(load_config(CONFIGS / "gkd.yaml").mesh)
    step, warmup, answer = (found[name] for name in ("distill", "nll", "answer"))
    assert step.held(ONE_DEVICE) == warmup.held(ONE_DEVICE) + scorer
    assert step.resident(mesh) == warmup.resident(mesh) == 0
    weights = abstract_params(stories[1])
    assert answer.resident(mesh) == pytest.approx(scorer + 2 * size_of(weights), abs=64)  # Adam
    memory = step.lower(mesh, 1)[0].compile().memory_analysis()
    # The rest is rows. No part of the scorer is dropped as unused.
    assert 0 <= memory.argument_size_in_bytes - step.held(ONE_DEVICE) < 100_000 < scorer


def test_a_second_copy_answers_on_another_mesh(stories):
    """While answers are drawn, what trains stays on its mesh, and so does a mixed-in scorer."""
    proxy, student = stories
    trained = {"data": 1, "fsdp": 4, "tensor": 1}
    copies = {"gkd": 0, "minillm": bytes_per_device(abstract_params(proxy), trained)}
    copies["minillm"] += bytes_per_device(abstract_adapter(proxy), trained)
    for name, scorer in copies.items():
        found = {}
        for axes in (trained, {"data": 1, "fsdp": 1, "tensor": 4}):
            drawing = f"mesh.sample={json.dumps(axes)}"
            config = load_config(CONFIGS / f"{name}.yaml", ["mesh.fsdp=4", drawing])
            answer = {p.name: p for p in run_programs(config, *stories)}["answer"]
            mesh: Any = SimpleNamespace(shape=axes)
            assert answer.work == "sample"
            found[axes["tensor"]] = answer.resident(mesh)
        copy = bytes_per_device(abstract_params(student), trained)
        assert found[4] - found[1] == copy + scorer


def test_a_scorer_that_is_mixed_in_is_an_argument_of_the_answers(stories):
    config = load_config(CONFIGS / "minillm.yaml")
    found, scorer = with_scorer(config, stories)
    answer, mesh = found["answer"], make_mesh(config.mesh)
    alone, _ = with_scorer(
        load_config(CONFIGS / "minillm.yaml", ["method.teacher_mixing=0"]), stories
    )
    assert answer.held(ONE_DEVICE) == alone["answer"].held(ONE_DEVICE) + scorer
    assert answer.resident(mesh) == alone["answer"].resident(mesh) - scorer
    assert found["distill"].times == config.method.inner_epochs and found["logps"].whole


def test_steps_on_stored_labels_have_the_scorer_beside(stories):
    options = ["method.name=proxy_kd", "method.student_share=0.25", "method.sample_batch_size=16"]
    config = load_config(CONFIGS / "stories260k.yaml", options)
    found, scorer = with_scorer(config, stories)
    assert list(found)[-3:] == ["distill", "answer", "own"]
    mesh = make_mesh(config.mesh)
    assert found["distill"].resident(mesh) == scorer
    assert found["own"].held(ONE_DEVICE) == found["distill"].held(ONE_DEVICE) + scorer
    assert [found[name].times for name in ("distill", "answer", "own")] == [0.75, 0.25, 0.25]
    assert found["answer"].rows == 16
    plain = run_programs(load_config(CONFIGS / "stories260k.yaml"), *stories)
    assert [p.name for p in plain] == list(found)[:-2]
    assert beside_the_student(load_config(CONFIGS / "stories260k.yaml"), stories) == {}


def test_a_merge_and_benchmarks_are_programs_too(stories):
    proxy, _ = stories
    config = load_config(
        CONFIGS / "stories260k.yaml",
        ["export.proxy=merged", "evaluate.benchmarks={arc: x, models: [student, 'a=proxy:raw']}"],
    )
    *_, merge, ask_proxy, ask_student = run_programs(config, *stories)
    assert [p.name for p in (merge, ask_proxy, ask_student)] == [
        *("export_proxy", "ask_proxy", "ask_student")
    ]
    assert ask_student.work == "evaluate" and ask_student.rows == 32
    mesh = make_mesh(config.mesh)
    lowered = merge.lower(mesh, merge.rows)
    assert len(lowered) == len(merge.runs(0, None)) == 7  # type: ignore[arg-type]
    # One layer of the largest kernel is the output; everything else is the model.
    memory = [one.compile().memory_analysis() for one in lowered]
    largest = 4 * proxy.model_dim * proxy.ffn_dim
    assert max(one.output_size_in_bytes for one in memory) == largest
    model = size_of((abstract_params(proxy, config.proxy.dtype), abstract_adapter(proxy)))
    peak = merge.resident(mesh) + max(one.argument_size_in_bytes for one in memory)
    assert model <= peak < 1.1 * model


def test_a_discriminator_learns_beside_the_student(stories):
    config = load_config(CONFIGS / "gad.yaml")
    found = {p.name: p for p in run_programs(config, *stories)}
    student = abstract_params(stories[1])
    body = size_of({name: tree for name, tree in student.items() if name != "lm_head"})
    discriminator = 3 * (body + 4 * stories[1].model_dim)  # with Adam's moments
    beside = beside_the_student(config, stories)
    assert beside["warmed-up student"] == size_of(student)
    assert beside["discriminator and its optimizer"] == pytest.approx(discriminator, abs=64)
    mesh, trained = make_mesh(config.mesh), 3 * size_of(student)
    held = [found[name].held(ONE_DEVICE) for name in ("nll", "distill")]
    np.testing.assert_allclose(held[0], trained + discriminator, atol=128)
    assert held[1] == held[0] + size_of(student)
    answering = found["answer"].held(ONE_DEVICE) + found["answer"].resident(mesh)
    np.testing.assert_allclose(answering, held[1], atol=128)
    assert found["answer"].times == config.method.samples_per_prompt


def test_a_dry_run_says_what_is_beside_the_student(stories, capsys):
    proxy, student = stories
    for name, beside in (
        ("gkd", "scorer"),
        ("gad", r"discriminator and its optimizer \S+ GiB, warmed-up student"),
    ):
        findings, nothing = Findings(), cast(Any, None)
        config = load_config(CONFIGS / f"{name}.yaml")
        taught = run_phases(config, proxy, student)["distill"]
        counted = CountedPhases([], taught, nothing, proxy_known=True)
        check_shapes(config, "student", student, counted, findings)
        assert not findings.problems
        (line,) = re.findall(r"^student .*$", capsys.readouterr().out, re.MULTILINE)
        assert re.search(rf"optimizer \S+ GiB, {beside} \S+ GiB, plus activations", line), line
