"""A table of the paper beside measured values: its three files, and missing rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from proxykd_jax.artifacts import write_bytes, write_json
from proxykd_jax.config import dump_config
from proxykd_jax.config.table_file import TableFile
from proxykd_jax.reporting.paper import TABLE_3
from proxykd_jax.reporting.paper_table import ROW, write_table
from tests.reporting.html_page import Page

SCORES = {"agieval": 0.25, "arc": 0.5, "bbh": 0.4, "csqa": 0.6, "gsm8k": 0.3, "mmlu": 0.35}
TAKD = {"group": "Black-box KD", "method": "TAKD", "student": "Llama-2-7B", "teacher": "GPT-4"}


def table_of(root: Path, number: int, *rows: dict, **keys) -> TableFile:
    fields = {"table": number, "name": "made", "runs": str(root), "config": "run.yaml", **keys}
    return TableFile.model_validate({**fields, "rows": tuple(rows)})


def measure(table: TableFile, name: str, config, scores: dict, model: str = "student") -> Path:
    """Writes the files of a finished row."""
    folder = table.folder / name
    write_bytes(folder / "config.yaml", dump_config(config).encode())
    tasks = {task: {"accuracy": a, "se": 0.03, "n": 200} for task, a in scores.items()}
    summary = {"models": {model: {"generate": {"tasks": tasks}}, "other": {"arc": 0.9}}}
    write_json(folder / "eval" / "benchmarks" / "summary.json", summary)
    write_json(folder / ROW, {"made_from": "x", "model": model, "device": "cpu", "devices": 2})
    return folder


def cells(text: str, begins: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {begins}"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_measured_rows_stand_beside_the_papers(made, tmp_path):
    rows = ({"name": "takd", **TAKD}, {"name": "extra", "method": "Ours | mine"},
            {"name": "proxy_kd", **TAKD, "method": "Proxy-KD"})  # fmt: skip
    table = table_of(tmp_path, 1, *rows, note="A note.")
    measure(table, "takd", made, SCORES)
    partial = {name: SCORES[name] for name in ("arc", "mmlu")}
    measure(table, "extra", made, partial)
    text = write_table(table).read_text()
    assert "2 of 3 rows are measured" in text and "A note." in text
    # The paper prints 53.22, but its six scores give 54.22.
    assert cells(text, "paper | TAKD")[-1] == "53.22 †"
    assert "TAKD, Llama-2-7B: printed 53.22, the six scores give 54.22" in text
    here = cells(text, "here | takd")
    assert here[2:4] == ["model", "by way of model"]
    assert here[4:] == [
        *("25.00 ± 3.00", "50.00 ± 3.00", "40.00 ± 3.00", "60.00 ± 3.00"),
        *("30.00 ± 3.00", "35.00 ± 3.00", "40.00 ± 1.22"),
    ]
    gaps = cells(text, "difference")
    assert gaps[5] == "−18.31" and gaps[-1] == "−14.22"  # the difference to 54.22
    extra = ["–"] * 7
    extra[1], extra[5] = "50.00 ± 3.00", "35.00 ± 3.00"
    assert cells(text, "here | extra")[4:] == extra
    assert cells(text, "here | proxy_kd")[2] == "not run yet"
    assert cells(text, "paper | Proxy-KD")[-1] == "56.78"
    assert text.count("**Black-box KD**") == 2 and text.count("| paper |") == 2

    lines = list(csv.DictReader((table.folder / "made.csv").open()))
    assert len(lines) == 3 * 7
    average = next(row for row in lines if (row["row"], row["benchmark"]) == ("takd", "average"))
    assert float(average["accuracy, %"]) == pytest.approx(40)
    assert float(average["standard error"]) == pytest.approx(3 / 6**0.5)
    assert float(average["paper"]) == pytest.approx(54.2183, abs=1e-3)
    assert lines[1]["questions"] == "200" and lines[15]["accuracy, %"] == ""

    page = Page((table.folder / "made.html").read_text())
    assert not page.open and "a table of the paper" in page.text
    assert page.csvs["made_unrounded.csv"][1:] == [list(row.values()) for row in lines]
    # The same runs give the same files, byte for byte.
    files = [(table.folder / f"made.{end}").read_bytes() for end in ("md", "html", "csv")]
    write_table(table)
    assert files == [(table.folder / f"made.{e}").read_bytes() for e in ("md", "html", "csv")]


def test_table_5_has_a_proxy(made, tmp_path):
    row = {"group": "Qwen", "method": "Proxy-KD", "student": "Qwen-2.5-7B", "teacher": "GPT-4"}
    table = table_of(tmp_path, 5, {"name": "proxy_kd", **row, "proxy": "Qwen-2.5-32B"})
    measure(table, "proxy_kd", made, SCORES)
    text = write_table(table).read_text()
    assert cells(text, "paper")[1:5] == ["Proxy-KD", "Qwen-2.5-7B", "Qwen-2.5-32B", "GPT-4"]
    assert cells(text, "paper")[-1] == "72.20"
    assert cells(text, "here")[2:5] == ["model", "model", ""]


def test_a_damaged_row_spoils_no_other(made, tmp_path):
    rows = [{"name": name, **TAKD} for name in ("whole", "damaged", "gone")]
    table = table_of(tmp_path, 1, *rows)
    for name in ("whole", "damaged", "gone"):
        measure(table, name, made, SCORES)
    summary = Path("eval/benchmarks/summary.json")
    (table.folder / "damaged" / summary).write_text("{")
    (table.folder / "gone" / summary).unlink()
    text = write_table(table).read_text()
    assert "1 of 3 rows" in text and "is damaged" in text and "run the row again" in text


def test_hours_stand_beside_the_papers(made, other, tmp_path):
    rows = [
        {"name": "sft", "method": "Llama-70B-SFT", "phase": "warmup"},
        {"name": "pref", "method": "Llama-70B-Pref", "phase": "rounds"},
        {"name": "distill", "method": "Llama-7B-Distill", "phase": "student"},
        {"name": "gkd", "method": "Llama-7B-GKD", "phase": "student"},
    ]
    table = table_of(tmp_path, 3, *rows)
    for name in ("sft", "pref", "distill"):
        folder = table.folder / name
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(made.folder)
    write_json(made.folder / ROW, {"model": "student", "device": "A100", "devices": 4})
    text = write_table(table).read_text()
    (made.folder / ROW).unlink()
    sft, pref = cells(text, "Llama-70B-SFT"), cells(text, "Llama-70B-Pref")
    assert sft[1:6] == ["8", "5.5", "1", "A100", "4"] and sft[7:] == ["1", "6"]
    assert pref[1:4] == ["8", "28", "5.091"]
    assert float(pref[7]) == pytest.approx(float(pref[6]) / float(sft[6]), rel=1e-3)
    # A step of 32 rows takes 0.125 s; this is for 40,000 rows. No SFT of the same size was run.
    distill = cells(text, "Llama-7B-Distill")
    assert float(distill[6]) == pytest.approx(40_000 * 0.125 / 32 / 3600, rel=1e-3)
    assert distill[7] == "–"
    assert cells(text, "Llama-7B-GKD")[4:7] == ["not run yet", "–", "–"]
    lines = list(csv.DictReader((table.folder / "made.csv").open()))
    assert [line["model and method"] for line in lines] == [row["method"] for row in rows]
    assert {line["model and method"] for line in lines} <= {name for name, _, _ in TABLE_3}


def figure_of(root: Path, number: int, *rows: dict) -> TableFile:
    fields = {"figure": number, "name": "made", "runs": str(root), "config": "run.yaml"}
    return TableFile.model_validate({**fields, "rows": rows})


def test_figure_3_has_the_gap_between_each_proxy_and_its_student(made, tmp_path):
    both = {"proxy": "Llama-2-70B", "teacher": "GPT-4"}
    rows = (
        {**both, "name": "proxy", "group": "Proxy", "method": "aligned", "student": "Llama-2-70B",
         "model": "proxy"},
        {**both, "name": "student", "group": "Student", "method": "Proxy-KD",
         "student": "Llama-2-7B"},
        {"name": "other", "group": "Student", "method": "Proxy-KD", "proxy": "Llama-2-13B"},
    )  # fmt: skip
    table = figure_of(tmp_path, 3, *rows)
    measure(table, "proxy", made, {task: 2 * share for task, share in SCORES.items()}, "proxy")
    measure(table, "student", made, SCORES)
    text = write_table(table).read_text()
    assert "Figure 3 of the paper" in text and "2 of 3 rows are measured" in text
    assert cells(text, "paper | Proxy-KD")[5:7] == ["36.59", "71.09"]  # from Table 2
    assert cells(text, "Llama-2-70B | ARC")[2:] == ["100.00", "50.00", "50.00", "0.50"]
    assert "Llama-2-13B | ARC" not in text
    page = Page((table.folder / "made.html").read_text())
    assert "Llama-2-70B: student" in page.text and "a figure of the paper" in page.text


def test_figure_6_has_a_curve_per_row_by_samples(made, tmp_path):
    rows = [{"name": name, "method": name, "student": "S"} for name in ("first", "second", "third")]
    table = figure_of(tmp_path, 6, *rows)
    for name, shares in (("first", (0.1, 0.3)), ("second", ())):
        folder = measure(table, name, made, {})
        lines = [
            {"stage": "distill", "step": 5 * place, "benchmark/bbh": share, "benchmark/mean": share}
            for place, share in enumerate(shares)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_bytes(folder / "metrics.jsonl", text.encode())
    text = write_table(table).read_text()
    batch = made.distill.batch_size
    assert cells(text, "first")[3:] == ["0", "10.00", "10.00"]
    assert f"| first | first | S | {5 * batch} | 30.00 | 30.00 |" in text
    assert cells(text, "second")[3] == "no benchmark was logged"
    assert cells(text, "third")[3] == "not run yet"
    page = Page((table.folder / "made.html").read_text())
    assert "BBH, accuracy in %" in page.text and "first (S)" in page.text
    assert (table.folder / "made.csv").read_text().splitlines()[1] == "first,first,S,0,10.0,10.0"
