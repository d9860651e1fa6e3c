"""run, and single stages: each stage runs once, in order, and runs are never mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxykd_jax import align, distill, export, run, score
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.cli import run_command
from proxykd_jax.config import Config, dump_config, load_config
from proxykd_jax.training.restore import finished_step
from tests.tiny_run import changed, copy_run, files_of, recipe

STAGES = {
    "corpus": "prepare",
    "proxy": "align",
    "samples/round_01": "sample",
    "samples/round_02": "sample",
    "samples/fresh": "sample",
    "soft_labels": "score",
    "student": "distill",
}


def command(main, config: Config, folder: Path, *arguments: str) -> int:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return run_command("run", main, "", ["--config", str(path), *arguments])


def test_all_stages_are_done(finished_run):
    folder = finished_run.folder
    for name, stage in STAGES.items():
        manifest = read_json(folder / name / MANIFEST)
        assert (manifest["stage"], manifest["status"]) == (stage, "complete")
    for name in ("export/student/model.safetensors", "export/proxy_adapter/adapter_config.json"):
        assert (folder / name).is_file()
    models = json.loads((folder / "eval" / "summary.json").read_text())["models"]
    chosen = finished_step(folder / "proxy", finished_run.export.state)
    rounds = {
        f"proxy_{result['phase']}"
        for result in read_json(folder / "proxy" / MANIFEST)["results"]
        if result["phase"].startswith("round") and result["step"] != chosen
    }
    assert rounds  # the chosen state is measured under the name of the aligned proxy
    assert set(models) == rounds | {
        "proxy_raw",
        "proxy_warmup",
        "proxy_aligned",
        "student_before",
        "student",
    }
    assert all(set(found) == {"validation", "test"} for found in models.values())
    assert load_config(folder / "config.yaml") == finished_run


def test_a_second_run_does_nothing_new(finished_run, tmp_path, monkeypatch, capsys):
    config = copy_run(finished_run, tmp_path / "runs")
    before = files_of(config.folder, times=True)
    loads: list[str] = []
    monkeypatch.setattr("proxykd_jax.training.model.load_model", lambda *a, **k: loads.append("x"))
    assert command(run.main, config, tmp_path) == 0
    after = files_of(config.folder, times=True)
    # The summary is written again, to the same bytes.
    summaries = [files.pop("eval/summary.json")[0] for files in (before, after)]
    assert after == before and summaries[0] == summaries[1]
    assert loads == []
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, folder, key",
    [
        ({"corpus": {"max_length": 13}}, "corpus", "corpus.max_length: 12 then, 13 now"),
        (
            {"align": {"preference": {"beta": 0.7}}},
            "proxy",
            "align.preference.beta: 0.5 then, 0.7 now",
        ),
        ({"proxy": {"lora": {"rank": 8}}}, "proxy", "proxy.lora.rank: 4 then, 8 now"),
        ({"score": {"top_k": 7}}, "soft_labels", "top_k: 6 then, 7 now"),
        ({"distill": {"alpha": 3.0}}, "student", "distill.alpha: 10.0 then, 3.0 now"),
        ({"seed": 4}, "proxy", "seed: 3 then, 4 now"),
    ],
)
def test_a_changed_config_is_a_sentence(finished_run, tmp_path, capsys, change, folder, key):
    config = copy_run(finished_run, tmp_path / "runs")
    before = files_of(config.folder, times=True)
    assert command(run.main, changed(config, change), tmp_path) == 2
    err = capsys.readouterr().err
    assert f"error: {config.folder / folder} was made with other settings:\n  {key}" in err
    assert f"Give the run another name, or remove {config.folder / folder}" in err
    assert "Traceback" not in err
    assert files_of(config.folder, times=True) == before


@pytest.mark.parametrize(
    "change",
    [
        {"align": {"log_every": 7, "checkpoint_every": 9, "diagnose_every": 5}},
        {"logging": {"tensorboard": True}},
        {"proxy": {"remat": "full"}},
    ],
)
def test_keys_that_decide_nothing_may_change(finished_run, tmp_path, change):
    config = copy_run(finished_run, tmp_path / "runs")
    assert command(run.main, changed(config, change), tmp_path) == 0


def test_other_source_files_are_a_sentence(finished_run, tmp_path, tiny_files, capsys):
    """The config is the same, but the corpus of the run was made from other rows."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((tiny_files / "teacher.jsonl").read_bytes())
    source = {"sources": [{"path": str(rows), "format": "prompt_response"}]}
    config = recipe(tiny_files, tmp_path / "runs", {"corpus": source})
    config = changed(config, {"align": {"alignment": "none"}})
    assert command(align.main, config, tmp_path) == 0
    with open(rows, "a") as file:
        file.write('{"prompt": "1 f1 . . =", "response": "s0 2"}\n')
    assert command(align.main, config, tmp_path) == 2
    assert "corpus was made with other settings" in capsys.readouterr().err


def contents(config: Config) -> dict[str, str]:
    return {name: read_json(config.folder / name / MANIFEST)["content"] for name in STAGES}


def test_align_and_then_distill_alone_do_the_whole_job(finished_run, tiny_files, tmp_path):
    """Each makes what it needs (corpus, answers, soft labels), and exports its model."""
    config = recipe(tiny_files, tmp_path)
    align.main(config)
    assert (config.folder / "export" / "proxy_adapter").is_dir()
    assert not (config.folder / "student").exists()
    distill.main(config)
    assert contents(config) == contents(finished_run)
    exported = [files_of(c.folder / "export" / "student") for c in (config, finished_run)]
    for files in exported:
        del files["README.md"]  # the card of a run that was evaluated has its measurements
    assert exported[0] == exported[1]


def test_export_alone_trains_first(finished_run, tiny_files, tmp_path):
    """The last command of the flow starts from nothing; alpha 0 makes the run short."""
    config = recipe(tiny_files, tmp_path, {"distill": {"alpha": 0.0, "max_steps": 1}})
    folder = export.main(config)
    assert (folder / "student" / "model.safetensors").is_file()
    assert not (config.folder / "proxy").exists()


def test_a_stage_takes_what_is_there(finished_run, tmp_path, monkeypatch):
    """score and align use the folders of earlier stages and make none again."""
    config = copy_run(finished_run, tmp_path)
    before = files_of(config.folder, times=True)
    monkeypatch.setattr("proxykd_jax.training.model.load_model", None)
    align.main(config)
    score.main(config)
    export.main(config)
    assert files_of(config.folder, times=True) == before


def test_a_run_ends_with_its_report_and_never_fails_for_it(
    finished_run, tmp_path, monkeypatch, capsys
):
    config = copy_run(finished_run, tmp_path / "runs")
    page = config.folder / "report.html"
    assert page.is_file()
    page.unlink()

    def broken(runs):
        raise RuntimeError("no such thing")

    monkeypatch.setattr("proxykd_jax.reporting.page.render", broken)
    assert command(run.main, config, tmp_path) == 0
    assert "run: no report (no such thing)" in capsys.readouterr().out
    assert not page.exists()
