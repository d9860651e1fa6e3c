"""The page of a run: complete, equal to the files, escaped, and the same each time."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxykd_jax import report
from proxykd_jax.artifacts import MANIFEST, read_json, read_manifest, write_json, write_manifest
from proxykd_jax.data.soft_labels import open_soft_labels, weights_of
from proxykd_jax.reporting.blocks import shown
from proxykd_jax.reporting.curves import MOST_POINTS, thinned
from proxykd_jax.reporting.page import render
from proxykd_jax.reporting.paper import TABLE_1, TABLE_2, TABLE_5
from proxykd_jax.reporting.proxy import MODELS
from proxykd_jax.reporting.run_folder import read_run
from proxykd_jax.reporting.teacher import teacher_names
from proxykd_jax.training.metrics import read_metrics
from tests.reporting.html_page import Page
from tests.reporting.made_run import IMAGE, SCRIPT


@pytest.fixture(scope="session")
def page(made) -> Page:
    return Page(render([read_run(made.folder)]))


# --- the form -------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_its_headings_are_in_order(page):
    assert page.open == []
    levels = [level for level, _ in page.headings]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(text.strip() for _, text in page.headings)


def test_the_page_needs_no_network_and_runs_no_script(page):
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "poster", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:text/csv")), (tag, value)


def test_style_loads_nothing():
    style = (Path(report.__file__).parent / "reporting" / "style.css").read_text()
    assert not re.search(r"url\(|@import|https?:", style)


def test_ids_are_unique_and_every_reference_finds_one(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        named = (attributes.get("aria-labelledby") or "").split()
        href = attributes.get("href") or ""
        named += [href[1:]] if href.startswith("#") else []
        assert set(named) <= set(ids)


def test_every_plot_has_words_and_every_table_headers(page):
    tags = [tag for tag, _ in page.tags]
    plots = [attributes for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(plots) > 15 and all(attributes["aria-labelledby"] for attributes in plots)
    assert tags.count("desc") == len(plots)
    assert tags.count("table") == tags.count("caption") == tags.count("thead") > 8
    for tag, attributes in page.tags:
        assert tag != "th" or attributes.get("scope") in {"col", "row", "rowgroup"}
    assert "description" not in page.text and "nan" not in page.text.lower().split()


def test_corpus_text_stays_text(made, page):
    """The words of the corpus look like tags. None becomes a tag, and all can be read."""
    assert not [tag for tag, _ in page.tags if tag in {"script", "img"}]
    assert SCRIPT in page.text and IMAGE in page.text and "&amp;" in page.text
    text = render([read_run(made.folder)])
    assert SCRIPT not in text and html.escape(SCRIPT) in text


def test_labels_and_settings_are_escaped(folder):
    lines = folder / "metrics.jsonl"
    hostile = {"stage": "align", "step": 1, "phase": SCRIPT, IMAGE: 1.0, "nll": 2.0}
    with open(lines, "a") as file:
        for step in (200, 201):
            file.write(json.dumps({**hostile, "step": step}) + "\n")
    found = Page(render([read_run(folder, label=SCRIPT)]))
    assert found.open == [] and SCRIPT in found.text and IMAGE in found.text
    assert not [tag for tag, _ in found.tags if tag in {"script", "img"}]


def test_the_same_run_has_the_same_page(made, folder):
    text = render([read_run(made.folder)])
    assert render([read_run(made.folder)]) == text
    assert render([read_run(folder, label=made.name)]) == text


# --- the figures ----------------------------------------------------------------------------------


def test_plotted_training_figures_are_those_of_the_log(made, page):
    lines, _ = read_metrics(made.folder / "metrics.jsonl")
    rows = page.csvs["nll_of_the_teacher_s_answers_nats.csv"]
    assert rows[0] == ["series", "step", "value"]
    for series, name in (("training batch", "nll"), ("validation rows", "validation/nll")):
        plotted = [(float(x), float(y)) for legend, x, y in rows[1:] if legend == series]
        logged = [(line["step"], line[name]) for line in lines
                  if line["stage"] == "align" and name in line]  # fmt: skip
        assert plotted == logged and len(plotted) > 4


def test_curves_of_both_stages_are_there_once(page):
    names = list(page.csvs)
    assert "nll_of_the_teacher_s_answers_nats.csv+" in names  # the student's
    for name in ("preference_loss_dpo", "share_of_pairs_in_the_right_order", "kl_to_nll"):
        assert names.count(f"{name}.csv") == 1


def test_accuracies_while_the_student_learnt_are_drawn(page):
    rows = page.csvs["accuracy_on_benchmarks.csv"][1:]
    assert [(float(x), float(y)) for name, x, y in rows if name == "gsm8k"] == [
        (8, 25),
        (16, 50),
        (24, 75),
    ]
    assert {y for name, _, y in rows if name == "arc"} == {"25.0"}
    assert "need benchmarks during training" not in page.text


def test_held_out_measures_are_those_of_evaluate(made, page):
    models = read_json(made.folder / "eval" / "summary.json")["models"]
    models = {name: found for name, found in models.items() if name in MODELS}  # without rounds
    rows = page.csvs["held_out_measures.csv"]
    assert len(rows) == 1 + 2 * len(models)
    called = ["agreement", "±", "NLL, nats", "±", "confidence", "calibration error", "±"]
    assert rows[0][4:] == called
    measured = {(row[0], row[1]): row for row in rows[1:]}
    for model, found in models.items():
        for split, figures in found.items():
            row = measured[MODELS[model], split]
            assert row[2] == str(figures["n"])
            expected = [
                figures[m][k] for m in ("agreement", "nll") for k in ("token_mean", "token_se")
            ]
            expected += [figures["calibration"][k] for k in ("confidence", "ece", "ece_se")]
            assert [float(cell) for cell in row[4:]] == expected
            assert shown(expected[0], 4) in page.text and shown(expected[2], 4) in page.text


def test_the_proxy_is_shown_round_by_round_and_by_its_confidence(made, page):
    models = read_json(made.folder / "eval" / "summary.json")["models"]
    header, *rows = page.csvs["the_proxy_round_by_round.csv"]
    assert [row[:2] for row in rows if row[1] == "test"] == [
        [name, "test"] for name in ("proxy, raw", "proxy, warmed up", "proxy, round 1",
                                    "proxy, aligned")
    ]  # fmt: skip
    of_round = {(row[0], row[1]): row for row in rows}["proxy, round 1", "test"]
    figures = models["proxy_round_01"]["test"]
    assert float(of_round[header.index("calibration error")]) == figures["calibration"]["ece"]
    assert float(of_round[header.index("top 10 > 0.95")]) == figures["top_mass"]["10"]
    drawn = page.csvs["agreement_by_confidence_test_rows.csv"][1:]
    bins = models["student"]["test"]["calibration"]["bins"]
    assert [(float(x), float(y)) for name, x, y in drawn if name == "student"] == [
        (each["confidence"], each["agreement"]) for each in bins
    ]


def test_tables_show_what_their_csv_holds(made):
    """Each cell is the rounded value of the CSV."""
    text = render([read_run(made.folder)])
    tables = re.findall(r"<table>.*?</thead>(.*?)</table>.*?</figure>", text, re.S)
    data = re.findall(r"<table>.*?</table>.*?</figure>", text, re.S)
    checked = 0
    for body, whole in zip(tables, data, strict=True):
        link = re.search(r'href="data:text/csv;charset=utf-8;base64,([^"]+)"', whole)
        if link is None:
            continue
        rows = list(csv.reader(io.StringIO(base64.b64decode(link.group(1)).decode())))[1:]
        cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)
                 for row in re.findall(r"<tr>\n(.*?)</tr>", body, re.S)]  # fmt: skip
        cells = [row for row in cells if row]
        assert len(cells) == len(rows)
        for shown_row, row in zip(cells, rows, strict=True):
            for seen, exact in zip(shown_row, row, strict=True):
                seen = html.unescape(seen).replace(",", "").replace("\N{MINUS SIGN}", "-")
                try:
                    number = float(exact)
                except ValueError:
                    assert seen == (exact.replace(",", "") or "–")
                    continue
                digits = len(seen.partition(".")[2].partition("e")[0])
                slack = 0.5 * 10.0**-digits if "e" not in seen else abs(number) * 0.01
                assert abs(float(seen) - number) <= slack * 1.0001
                checked += 1
    assert checked > 100


def test_the_funnel_counts_every_row(made, page):
    counts = read_json(made.folder / "corpus" / MANIFEST)["counts"]
    source = next(iter(counts["sources"].values()))
    rows = {row[0]: row[1] for row in page.csvs["rows_by_source.csv"][1:]}
    assert rows == {"read": "61", "left out: repeats an earlier row": "1", "kept": "60"}
    assert "Notes on the rows" not in page.text and "Files passed over" not in page.text
    assert source["read"] == source["kept"] + 1
    splits = page.csvs["splits.csv"][1:]
    assert {row[0]: int(row[1]) for row in splits} == {
        name: split["rows"] for name, split in counts["splits"].items()
    }
    shares = [float(row[4]) for row in splits if row[4]]
    assert len(shares) == 3 and sum(shares) == pytest.approx(1)


def test_weights_are_those_of_the_student(made, page):
    store = open_soft_labels(made.folder / "soft_labels")
    for split in ("warmup", "align", "distill"):
        number = store.num_rows(split)
        rows = page.csvs[f"weights_of_{split}_{number}_rows.csv"][1:]
        weights = weights_of(
            store.seq_logliks(split), store.lengths(split), store.finished(split),
            loglik="token_mean", normalize=True,
        ).sample_weight  # fmt: skip
        edges = [float(row[0]) for row in rows] + [float(rows[-1][1])]
        counts = np.histogram(weights.astype(np.float64), bins=np.array(edges))[0]
        assert [int(row[2]) for row in rows] == counts.tolist() and counts.sum() == number


def test_times_are_of_steps_that_did_not_compile(made, page):
    rows = {row[1]: row for row in page.csvs["training.csv"][1:]}
    assert float(rows["train"][4]) == 0.125 and float(rows["r1"][5]) == 9.0
    assert 0.25 <= float(rows["r1"][4]) <= 0.35
    hours = {row[0]: float(row[2]) for row in page.csvs["hours_for_40_000_samples_table_3.csv"][1:]}
    assert hours["this run's student, Distill"] == pytest.approx(40_000 / 32 * 0.125 / 3600)
    assert hours["Llama-70B-Pref"] == 28.0
    assert float(rows["r1"][8]) == 0.25  # 48 answers in 12 seconds
    steps = [float(rows[f"r{i}"][4]) for i in (1, 2, 3)]
    expected = 40_000 * (sorted(steps)[1] / 32 + 0.25) / 3600
    assert hours["this run's proxy, Pref"] == pytest.approx(expected)


def test_runs_whose_sampling_was_not_timed_say_so(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"time/sampl', '"other/sampl'))
    found = Page(render([read_run(folder)]))
    assert "was not timed in all rounds" in found.text
    assert {row[8] for row in found.csvs["training.csv"][1:]} == {""}


def test_long_curves_are_means_over_neighbours():
    xs = [float(i) for i in range(1000)]
    short, means, width = thinned(xs, xs)
    assert width == 3 and len(short) == 334 <= MOST_POINTS
    assert means[:2] == [1.0, 4.0] and means[-1] == 999.0
    assert thinned(xs[:MOST_POINTS], xs[:MOST_POINTS])[2] == 1


def test_answers_of_rounds_are_shown_with_their_prompts(made, page):
    assert "Round 1: the proxy's answers before the round's training" in page.text
    assert "left out: equals chosen" in page.text and "not finished" in page.text
    assert page.text.count("log-likelihood before the round") == 2 * 4 * 3


# --- the paper's figures --------------------------------------------------------------------------


def test_two_averages_of_the_paper_do_not_follow():
    wrong = [(row.method, row.student, row.printed, round(row.average, 2))
             for row in (*TABLE_1, *TABLE_2, *TABLE_5) if row.misprinted]  # fmt: skip
    assert wrong == [("TAKD", "Llama-2-7B", 53.22, 54.22), ("Proxy-KD", "Llama-1-7B", 52.09, 51.26)]


def test_the_papers_table_5_is_whole(page):
    rows = page.csvs["table_5_of_the_paper.csv"]
    assert rows[0][:4] == ["method", "student", "proxy", "teacher"]
    assert rows[3] == [
        *("Proxy-KD", "Qwen-2.5-7B", "Qwen-2.5-32B", "GPT-4"),
        *("53.11", "89.64", "69.37", "75.21", "74.56", "71.28", "72.2"),
    ]
    assert "breaks off" not in page.text


def test_benchmarks_stand_above_the_papers(folder):
    scores = {"agieval": 0.25, "arc": 0.5, "bbh": 0.4, "csqa": 0.6, "gsm8k": 0.3, "mmlu": 0.35}
    tasks = {name: {"accuracy": a, "se": 0.01, "n": 200} for name, a in scores.items()}
    arc = {"accuracy": 0.75, "se": None, "n": 1}
    difference = {"tasks": {"arc": {"difference": -0.25, "se": 0.02, "n": 1}}}
    summary = {
        "models": {
            "student": {"generate": {"tasks": tasks}, "loglikelihood": {"raw": {"tasks": {}}}},
            "proxy": {"loglikelihood": {"raw": {"tasks": {"arc": arc}}}},
        },
        "differences": {"student - proxy": difference},
    }
    write_json(folder / "eval" / "benchmarks" / "summary.json", summary)
    write_json(folder / "eval" / "benchmarks" / "other" / "summary.json", {"arc": 0.125})
    found = Page(render([read_run(folder)]))
    rows = {row[0]: row for row in found.csvs["accuracy.csv"][1:]}
    assert [float(cell) for cell in rows["student"][3:]] == [25, 50, 40, 60, 30, 35, 40]
    assert rows["proxy"][4] == "75.0" and rows["proxy"][9] == "" and rows["other"][4] == "12.5"
    points = found.csvs["differences_on_the_same_questions.csv"][1]
    assert points == ["student minus proxy", "ARC", "-25.0", "2.0", "1"]
    assert [r for r in rows if r.endswith("†")] == ["Proxy-KD †"]
    gap = {row[0]: row[1:] for row in found.csvs["gap_between_aligned_proxy_and_student.csv"][1:]}
    assert [float(cell) for cell in gap["ARC, %"]] == [75, 50, 25, pytest.approx(1 / 3)]
    assert "printed 52.09, the six scores give 51.26" in found.text


# --- runs that lack something ---------------------------------------------------------------------

MISSING: list[tuple[str, Any]] = [
    ("corpus", "Not there: proxykd prepare makes it."),
    ("proxy", "Not there: proxykd align makes it."),
    ("soft_labels", "Not there: proxykd score makes it."),
    ("student", "Not there: proxykd distill makes it."),
    ("eval", "Not there: proxykd evaluate measures the models."),
    ("samples", "The run stored no answers of its own"),
    ("config.yaml", "config.yaml is missing"),
    ("metrics.jsonl", "No step was timed."),
]


@pytest.mark.parametrize("name, sentence", MISSING)
def test_what_is_missing_is_said(folder, name, sentence):
    place = folder / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    found = Page(render([read_run(folder)]))
    assert sentence in found.text and "as expected" not in found.text


def test_a_killed_run_has_a_page(folder):
    """The kill is in the second round: manifests say running, and the last line is cut off."""
    for stage in ("soft_labels", "student", "eval", "samples/round_03"):
        shutil.rmtree(folder / stage)
    manifest = read_json(folder / "proxy" / MANIFEST)
    begun = {key: manifest[key] for key in ("stage", "settings", "inputs", "code_version")}
    write_json(folder / "proxy" / MANIFEST, {**begun, "status": "running"})
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:18]) + '{"stage": "align", "phase": "rou')
    run = read_run(folder)
    assert len(run.lines) == 18
    found = Page(render([run]))
    assert "Not finished: proxykd align continues it." in found.text
    assert "1 of its lines" in found.text and "preference_loss_dpo.csv" in found.csvs


def test_only_a_config_is_a_page(folder):
    for path in folder.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Page(render([read_run(folder)])).text.count("Not there") >= 6


@pytest.mark.parametrize("stage", ["corpus", "proxy", "soft_labels", "student"])
def test_damaged_manifests_are_told(folder, stage):
    (folder / stage / MANIFEST).write_text("{")
    assert "is damaged" in Page(render([read_run(folder)])).text


def test_what_was_not_read_is_on_the_page(folder):
    manifest = read_manifest(folder / "corpus")
    (source,) = manifest["counts"]["sources"].values()
    note = {"count": 7, "first": "rows.jsonl:3", "example": "why not"}
    source["notes"] = {"the key remark is not read": note}
    source["passed_over"] = {"test.jsonl": "its name says test"}
    write_manifest(folder / "corpus", manifest)
    found = Page(render([read_run(folder)]))
    for said in ("the key remark is not read", "rows.jsonl:3: why not", "its name says test"):
        assert said in found.text
    # A corpus of an earlier version has neither.
    del source["notes"], source["passed_over"]
    write_manifest(folder / "corpus", manifest)
    assert "Notes on the rows" not in Page(render([read_run(folder)])).text


def test_a_damaged_part_spoils_its_section_alone(folder):
    part = next((folder / "soft_labels" / "distill").glob("part_*"))
    part.write_bytes(part.read_bytes()[:-3])
    found = Page(render([read_run(folder)]))
    assert f"{part} has {part.stat().st_size} bytes, not" in found.text
    assert "kl_to_the_soft_labels_nats.csv" in found.csvs


def test_a_config_of_another_version_is_shown_as_it_stands(folder):
    text = (folder / "config.yaml").read_text().replace("alpha: 10.0", "old_alpha: 3.5")
    (folder / "config.yaml").write_text(text)
    found = Page(render([read_run(folder)]))
    assert "config.yaml is of another version" in found.text and "old_alpha: 3.5" in found.text
    assert "recommended" in found.text


def test_a_tokenizer_that_is_gone_is_said(folder):
    manifest = read_manifest(folder / "corpus")
    manifest["tokenizer"]["path"] = "/nowhere/model"
    write_manifest(folder / "corpus", manifest)
    assert "The tokenizer, /nowhere/model, is not on this machine" in (
        Page(render([read_run(folder)])).text
    )


def test_numbers_that_are_none_leave_gaps(folder):
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["stage"] == "distill" and line["step"] in (3, 4):
            line.update({name: None for name in line if name not in ("stage", "step", "phase")})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = Page(render([read_run(folder)])).csvs["nll_of_the_teacher_s_answers_nats.csv+"]
    assert {"3.0", "4.0"}.isdisjoint(row[1] for row in rows) and len(rows) > 20


# --- the first screen -----------------------------------------------------------------------------


def test_the_page_begins_with_the_verdict_curves_and_answers(made, page):
    first = page.text[page.text.index("The student is better") : page.text.index("The recipe:")]
    assert "NLL better (−0.4321 ± 0.0473 nats a token)" in first  # t of 39 degrees of freedom
    assert "The student is not told apart from the aligned proxy." in first
    assert (
        "as near to the teacher as its proxy" in first and "lower distill.alpha (now 10)" in first
    )
    assert "No answer ended (the student): look at corpus.end_tokens." in first
    assert "proxykd export --config" in first
    assert next(text for level, text in page.headings if level == 2) == "Verdict"
    assert "Student: NLL of held-out answers, nats" in first and "student after" in first
    assert first.count("the teacher's ") >= 5 and "3 more prompts" in first
    rows = page.csvs["student_nll_of_held_out_answers_nats.csv"][1:]
    lines, _ = read_metrics(made.folder / "metrics.jsonl")
    logged = [line["validation/nll"] for line in lines
              if line["stage"] == "distill" and "validation/nll" in line]  # fmt: skip
    assert [float(row[2]) for row in rows] == logged


def test_machine_time_and_price(made, page):
    assert page.csvs["stages_by_time.csv"][1:] == [
        ["prepare", "0.5", "", "h"],
        ["align", "179.5", "8 x TPU v4", "h"],
    ]
    assert "In all 3.0 hours on 8 x TPU v4." in page.text and "an hour" not in page.text
    priced = Page(render([dataclasses.replace(read_run(made.folder), price_per_hour=12.5)]))
    assert "In all 3.0 hours on 8 x TPU v4. At 12.5 an hour this is 37.50." in priced.text


def test_the_paper_is_left_out_where_no_benchmark_was_run(folder):
    shutil.rmtree(folder / "eval" / "benchmarks")
    found = Page(render([read_run(folder)]))
    assert "Benchmarks" not in [text for _, text in found.headings]
    body = found.text.replace("preset: paper", "").replace("# paper", "")
    assert "Table" not in body and "the paper" not in body.lower()


def test_the_teacher_is_named_only_if_it_is_known(made, tmp_path):
    run = read_run(made.folder)
    assert teacher_names(run) == [] and "gpt-4" not in Page(render([run])).text.split("preset:")[0]

    def names(source: dict[str, Any], **sections: Any) -> list[str]:
        settings = {"corpus": {"sources": [source]}, **sections}
        return teacher_names(dataclasses.replace(run, settings=settings))

    assert names({"path": "x.jsonl", "teacher": "qwen-max"}) == ["qwen-max"]
    assert names({"path": "x", "teacher": None, "format": "nectar"}) == ["gpt-4"]
    rows = tmp_path / "answers.jsonl"
    collect = {"folder": str(tmp_path), "model": "gpt-4o"}
    assert names({"path": str(rows), "teacher": None}, collect=collect) == ["gpt-4o"]
    rows.write_text('{"messages": [], "model": "big", "served_model": "b", "finish_reason": "s"}\n')
    assert names({"path": str(tmp_path)}) == ["big"]
