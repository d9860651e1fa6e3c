"""Several runs on one page, and the command that writes pages."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from proxykd_jax import report
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.config import dump_config
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation.sums import write_sums
from proxykd_jax.reporting.first_screen import between
from proxykd_jax.reporting.page import render
from proxykd_jax.reporting.run_folder import read_run, read_runs
from proxykd_jax.training.metrics import read_metrics
from tests.reporting.html_page import Page


@pytest.fixture(scope="module")
def page(made, other) -> Page:
    return Page(render(read_runs([made.folder, other.folder])))


def test_it_is_well_formed_and_holds_each_runs_own_sections(page, made, other):
    assert page.open == []
    levels = [level for level, _ in page.headings]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    titles = [text for _, text in page.headings]
    assert f"Run {made.name}" in titles and f"Run {other.name}" in titles
    assert titles.count("Corpus") == 2 and titles.count("Curves") == 1


def test_only_keys_that_differ_are_listed(page):
    heading = page.text.index("Settings that differ", page.text.index("Final figures"))
    listed = page.text[heading : page.text.index("Final figures", heading)]
    assert "distill.alpha" in listed and "10.0" in listed and "3.0" in listed
    assert "name" in listed and "align.num_rounds" not in listed and "2 of " in listed


def test_figures_stand_beside_their_differences(page, made, other):
    summaries = [read_json(c.folder / "eval" / "summary.json")["models"] for c in (made, other)]
    rows = page.csvs["teacher_token_nll_nats.csv"]
    assert rows[0] == ["model", "rows of", made.name, other.name, f"{other.name} − {made.name}"]
    found = {(row[0], row[1]): [float(cell) for cell in row[2:]] for row in rows[1:]}
    for split in ("validation", "test"):
        first, second = (s["student"][split]["nll"]["token_mean"] for s in summaries)
        assert found["student", split] == [first, second, second - first]
    best = [read_json(c.folder / "student" / MANIFEST)["best_nll"] for c in (made, other)]
    rows = {row[0]: row[1:] for row in page.csvs["training.csv"][1:]}
    assert [float(cell) for cell in rows["student: lowest validation NLL"][:2]] == best


def test_curves_of_both_runs_share_a_plot(page, made, other):
    rows = page.csvs["student_nll_on_validation_rows_nats.csv"][1:]
    for config in (made, other):
        lines, _ = read_metrics(config.folder / "metrics.jsonl")
        logged = [(line["step"], line["validation/nll"]) for line in lines
                  if line["stage"] == "distill" and "validation/nll" in line]  # fmt: skip
        assert [(float(x), float(y)) for name, x, y in rows if name == config.name] == logged


def test_a_run_without_figures_can_be_compared(made, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(made.folder / "config.yaml", bare)
    found = Page(render(read_runs([made.folder, bare])))
    rows = found.csvs["training.csv"]
    assert rows[1][2:] == ["", ""] and "The runs have the same settings." in found.text


def test_runs_of_one_name_are_told_apart(made, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(made.folder, tmp_path / place / "run")
    runs = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [run.label for run in runs] == ["a/run", "b/run"]


def test_plain_fine_tuning_is_what_a_student_is_held_against(made, other, tmp_path):
    places = [Path(shutil.copytree(c.folder, tmp_path / c.name)) for c in (made, other)]
    one, second = read_runs(places)
    plain = dataclasses.replace(second, settings={"method": {"name": "black_box_kd"}})
    text = Page(render([one, plain])).text
    assert "plain fine-tuning (other)" in text and "40 test rows, not paired." in text
    assert "Whether the proxy helps shows only" not in text
    # The sums by row make the comparison paired.
    tokens = np.full(20, 4.0)
    for place, nll in zip(places, (1.0, 2.0), strict=True):
        sums = {"test/tokens": tokens, "test/nll": nll * tokens + np.arange(20) % 3}
        write_sums(place / "eval" / "student.safetensors", {}, sums)
    found = between(one, plain, "The student", "plain fine-tuning")
    assert found is not None and found.outcome == "better" and "not paired" not in found.detail
    assert found.detail.startswith("NLL better (−1.0000 ± 0.0000 nats a token)")


# --- the command ----------------------------------------------------------------------------------


def test_the_page_lies_in_the_run_and_is_left_when_nothing_changed(folder, capsys):
    assert report.command(["--run", str(folder)]) == 0
    path = folder / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert report.command(["--run", str(folder)]) == 0
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_a_run_is_named_by_its_config_too(made, other, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(made))
    out = tmp_path / "deep" / "page.html"
    assert report.command(["--config", str(config), "--out", str(out)]) == 0
    assert f"<h1>{made.name}</h1>" in out.read_text()
    arguments = ["--config", str(config), "--set", f"name={other.name}", "--out", str(out)]
    assert report.command(arguments) == 0
    assert f"<h1>{other.name}</h1>" in out.read_text()


def test_mistakes_are_sentences(made, other, tmp_path, capsys):
    runs = [str(made.folder), str(other.folder)]
    for arguments, sentence in (
        (["--run", *runs], "name the page with --out FILE"),
        (["--run", runs[0], runs[0], "--out", "x.html"], "is named twice"),
        (["--run", str(tmp_path / "none")], "is not a folder"),
        (["--run", str(tmp_path)], "holds no run"),
        (["--run", str(made.runs_dir)], f"It holds the runs {other.name}, {made.name}: name one."),
        (["--run", runs[0], "--out", str(tmp_path)], "--out names a file"),
    ):
        assert report.command(arguments) == 2
        err = capsys.readouterr().err
        assert sentence in err and err.startswith("error: ") and "Traceback" not in err
    for arguments in ([], ["--run", runs[0], "--config", "x"], ["--run", runs[0], "--set", "a=1"]):
        with pytest.raises(SystemExit) as ended:
            report.command(arguments)
        assert ended.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_no_model_is_loaded(made, monkeypatch):
    """The page is made from files, so no accelerator is needed either."""
    for module in ("models.hf_weights", "training.restore"):
        monkeypatch.setitem(sys.modules, f"proxykd_jax.{module}", None)
    render([read_run(made.folder)])


def test_main_takes_a_config_and_gives_the_file(made):
    assert report.main(made) == made.folder / "report.html"
    with pytest.raises(UserError, match="not a folder"):
        report.main(made.model_copy(update={"name": "never_run"}))
