"""The stages of the demo run end to end through the commands, with a few steps each."""

import json
from pathlib import Path

import pytest

from benchmarks.miniature import make as maker
from benchmarks.miniature import pretrain, report, students
from benchmarks.miniature.recipes import HEADLINE, STUDENTS
from proxykd_jax import align, distill, evaluate
from proxykd_jax.config import load_config

FEW = (
    ("warmup_max_steps: 25", "warmup_max_steps: 2"),
    ("round_max_steps: 40", "round_max_steps: 2"),
    ("num_rounds: 4", "num_rounds: 2"),
    ("max_steps: 400", "max_steps: 3"),
)


@pytest.mark.slow
def test_from_files_to_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pretrain, "STEPS_A_CALL", 2)
    maker.make(tmp_path, steps_share=0.002, num_corpus=200, num_test=24, num_fresh=30)
    for recipe in (tmp_path / "configs").iterdir():
        text = recipe.read_text()
        for found, few in FEW:
            assert found in text
            text = text.replace(found, few)
        recipe.write_text(text)
    config = load_config(tmp_path / "configs" / f"{HEADLINE}.yaml")
    align.main(config)
    distill.main(config)
    evaluate.main(config)
    students.run_students(tmp_path, [name for name in STUDENTS if name != HEADLINE])
    summary = report.report(tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"models", "time"}
    assert set(summary["models"]) == {"teacher", *report.MODELS}
    for figures in summary["models"].values():
        assert set(figures) == {"accuracy", "kl", "agreement", "nll", "n"}
        assert figures["n"] == 24
    # With alpha 0 no proxy is used. The student with fresh prompts uses the aligned proxy.
    assert not (tmp_path / "runs" / "black_box_ds" / "proxy").exists()
    fresh = json.loads((tmp_path / "runs" / "proxy_kd_fresh" / "eval" / "summary.json").read_text())
    aligned = summary["models"]["proxy_aligned"]["kl"]
    assert fresh["models"]["proxy_raw"]["test"]["kl"]["token_mean"] == pytest.approx(aligned, 1e-5)
    assert "Proxy-KD + fresh prompts" in capsys.readouterr().out
