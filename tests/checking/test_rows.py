"""What is lost of a corpus: said by every check, refused where a run is to start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxykd_jax import run
from proxykd_jax.checking.findings import Findings
from proxykd_jax.checking.rows import Sample, _judge_sample, judge_counts
from proxykd_jax.cli import FORCE, run_command
from proxykd_jax.config import Config, dump_config
from proxykd_jax.texts.records import Drops
from tests.tiny_run import recipe


def corpus_of(folder: Path, answers: list[str], **keys: object) -> dict:
    """A file with one row for each answer, and the keys of the corpus."""
    rows = [
        {"prompt": f"{a} f{b} . . =", "response": answer}
        for (a, b), answer in zip(
            ((a, b) for a in range(10) for b in range(1, 17)), answers, strict=False
        )
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "format": "prompt_response"}
    return {"corpus": {"sources": [source], "test": [], "fresh_prompts": [], **keys}}


def command(config: Config, folder: Path, *arguments: str) -> int:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return run_command("run", run.main, "", ["--config", str(path), *arguments], flags=FORCE)


class Reached(Exception):  # noqa: N818
    """The run went on to a later stage."""


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args, **options):
        raise Reached

    monkeypatch.setattr("proxykd_jax.align.main", reached)


LONG = "s0 2 " * 20


def test_a_run_that_would_lose_many_rows_does_not_start(tiny_files, tmp_path, capsys):
    corpus = corpus_of(tmp_path, [LONG] * 40 + ["s0 2"] * 110)
    config = recipe(tiny_files, tmp_path / "runs", corpus)
    assert command(config, tmp_path) == 2
    err = capsys.readouterr().err
    assert "110 of 150 rows fit corpus.max_length 12 (tokens: median" in err
    assert "Set corpus.max_length to 64 to keep 99 % of the rows." in err
    assert "--force starts the run nevertheless" in err
    assert not (tmp_path / "runs").exists()
    assert command(config, tmp_path, "--dry-run") == 0
    assert "warning    corpus: 110 of 150 rows fit" in capsys.readouterr().out
    with pytest.raises(Reached):
        command(config, tmp_path, "--force")
    said = capsys.readouterr().out
    assert "40 of 150 rows are lost, more than a fifth: 40 longer than max_length" in said


def test_a_run_that_gets_the_rows_it_asks_for_loses_none(tiny_files, tmp_path):
    corpus = corpus_of(tmp_path, [LONG] * 70 + ["s0 2"] * 80, max_rows=80)
    config = recipe(tiny_files, tmp_path / "runs", corpus)
    with pytest.raises(Reached):
        command(config, tmp_path)


def test_what_only_the_whole_corpus_shows_stops_before_training(tiny_files, tmp_path, capsys):
    """The first rows are fine, and nine in ten of the others are too long."""
    answers = ["s0 2"] * 20 + [LONG] * 130
    config = recipe(tiny_files, tmp_path / "runs", corpus_of(tmp_path, answers))
    from proxykd_jax.checking import rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_QUICK_SAMPLE", 20)
        assert command(config, tmp_path) == 2
    assert "130 of 150 rows are lost, more than a fifth" in capsys.readouterr().err
    assert {path.name for path in config.folder.iterdir() if path.is_dir()} == {"corpus"}


def test_a_validation_split_without_rows_is_refused(tiny_files, tmp_path, capsys):
    keys = {"validation_fraction": 0.001, "validation_rows": 0}
    config = recipe(tiny_files, tmp_path / "runs", corpus_of(tmp_path, ["s0 2"] * 100, **keys))
    assert command(config, tmp_path) == 2
    assert "the validation split has no row" in capsys.readouterr().err
    with pytest.raises(Reached):
        command(config, tmp_path, "--force")


def test_the_check_of_a_run_that_fits(finished_run, tmp_path, capsys):
    """Devices, memory, time and disk of this machine, and whether greedy answers end."""
    from proxykd_jax import check
    from tests.tiny_run import changed

    config = changed(finished_run, {"runs_dir": str(tmp_path / "runs")})
    check.main(config)
    said = capsys.readouterr().out
    for title in ("devices", "memory", "time", "disk", "lengths", "padding", "steps"):
        assert f"\n{title:<10} " in said
    assert "greedy answers of the untrained proxy end with '</s>'" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("reason", "lost"), [("an answer of another model (m)", False), ("empty answer", True)]
)
def test_rows_that_the_config_leaves_out_are_not_lost(tiny_files, tmp_path, reason, lost):
    config = recipe(tiny_files, tmp_path / "runs", corpus_of(tmp_path, ["s0 2"]))
    source = {"read": 100, "kept": 10, "drops": {reason: {"count": 90, "first": ["f:1"]}}}
    counts = {"sources": {"sources.0 (f)": source}, "splits": {"validation": {"rows": 1}}}
    findings = Findings(here=True)
    judge_counts(config, counts, findings)
    assert bool(findings.problems) == lost
    sample = Sample([5], [2], Drops({reason: 90}, {reason: ["f:1"]}))
    share = _judge_sample(config.corpus, sample, Findings(here=True))
    assert share == (1 / 91 if lost else 1.0)
