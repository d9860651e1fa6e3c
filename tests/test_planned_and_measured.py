"""The programs of a run are measured on the devices of this machine, with random weights."""

import json

import pytest

from benchmarks import planned_and_measured as benchmark
from proxykd_jax.config import dump_config
from tests.tiny_run import changed


@pytest.fixture
def recipe(tiny_files, tmp_path):
    from tests import tiny_run

    config = tiny_run.recipe(tiny_files, tmp_path)
    return changed(config, {"align": {"batch_size": 4, "microbatch_size": 2}})


@pytest.mark.parametrize("stage", ["warmup", "round", "reference", "sample", "score", "distill"])
def test_every_program_runs_and_its_work_is_counted(recipe, stage):
    found = benchmark.measure(recipe, stage, 1)
    assert found["seconds"] > 0 and found["flops"] > 0
    # A step with accumulation computes two micro-batches, each of the rows at once.
    parts = 2 if stage in ("warmup", "round") else 1
    assert found["rows"] == parts * found["batch"]
    assert found["flops_a_second"] == pytest.approx(found["flops"] / found["seconds"])


def test_a_stage_has_a_process_of_its_own_and_stands_beside_the_plan(recipe, tmp_path, capfd):
    file, plan, out = (tmp_path / name for name in ("run.yaml", "plan.json", "out.json"))
    file.write_text(dump_config(recipe))
    planned = {"peak_bytes": 3 << 30, "floor_seconds": {"flops": 0.5, "memory": 0.25}}
    plan.write_text(json.dumps({"score": planned}))
    argv = ["--config", str(file), "--plan", str(plan), "--steps", "1", "--json", str(out)]
    assert benchmark.main(argv) == 0
    assert "(planned   3.00)" in capfd.readouterr().out
    assert json.loads(out.read_text())["score"]["batch"] == recipe.score.batch_size
    assert benchmark.main([*argv, "--stages", "score,lunch"]) == 1
    assert "this run has warmup" in capfd.readouterr().out


def test_mistakes_are_sentences(recipe, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(recipe))
    assert benchmark.main(["--config", str(file)]) == 2
    assert "give --stages" in capsys.readouterr().err
    assert benchmark.main(["--config", str(file), "--stage", "lunch"]) == 2
    assert "--stage lunch" in capsys.readouterr().err
