"""The rows of the paper's tables: their configs, what they share, and the command."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxykd_jax import distill, tables
from proxykd_jax.artifacts import read_json, write_json
from proxykd_jax.config import Config, dump_config
from proxykd_jax.config.table_file import TableFile, TableRow, load_table
from proxykd_jax.errors import UserError
from proxykd_jax.reporting.paper import FIGURE_3, TABLE_1, TABLE_2, TABLE_3, TABLE_5
from proxykd_jax.reporting.paper_table import ROW, paper_row
from tests.conftest import REPOSITORY
from tests.tiny_run import copy_run, files_of, without_student

TABLES = REPOSITORY / "configs" / "tables"
NUMBERS = (1, 2, 3, 5)
FIGURES = (3, 6, 7)
NAMES = [*(f"table_{number}" for number in NUMBERS), *(f"figure_{number}" for number in FIGURES)]
FILES = [f"{name}{twin}" for name in NAMES for twin in ("", "_tiny")]
PAPER = {1: TABLE_1, 2: TABLE_2, 5: TABLE_5}


@pytest.fixture(autouse=True)
def _assets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXYKD_ASSETS", os.environ.get("PROXYKD_ASSETS", "assets"))


# --- the rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_the_rows_are_the_papers(name):
    table = load_table(TABLES / f"{name}.yaml")
    assert table.name == name
    if table.table == 3:
        assert [row.method for row in table.rows] == [method for method, _, _ in TABLE_3]
    elif table.figure == 3:  # the paper prints figures of the 70B alone, in Table 2
        found = [paper_row(table, row) for row in table.rows]
        assert found == [None, None, *FIGURE_3]
        assert [row.model for row in table.rows] == ["proxy", "student"] * 2
    elif table.has_curves:
        ends = [row for row in TABLE_1 if row.student == table.rows[0].student]
        ends = [row for row in ends if row.teacher != "Llama-2-70B-Proxy"]
        curves = [(row.method, row.student, row.teacher) for row in table.rows]
        assert set(curves) <= {(row.method, row.student, row.teacher) for row in ends}
        assert len(set(curves)) == (3 if table.figure == 6 else 2)
    else:
        first = tuple(paper_row(table, row) for row in table.rows if not row.reading)
        assert first == PAPER[table.table]
        assert all(paper_row(table, row) in first for row in table.rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_has_the_same_rows(name):
    columns = {"name", "group", "method", "student", "proxy", "teacher", "reading"}
    columns |= {"model", "phase", "after"}
    real, tiny = (load_table(TABLES / f"{name}{twin}.yaml").rows for twin in ("", "_tiny"))
    assert [r.model_dump(include=columns) for r in real] == [
        r.model_dump(include=columns) for r in tiny
    ]


MODELS = {
    "Llama-1-7B": "huggyllama/llama-7b",
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama-2-70B": "meta-llama/Llama-2-70b-hf",
    "Llama-2-70B-Chat": "meta-llama/Llama-2-70b-chat-hf",
    "Llama-2-70B-Proxy": "meta-llama/Llama-2-70b-hf",
    "Qwen-2.5-7B": "Qwen/Qwen2.5-7B",
    "Qwen-2.5-32B": "Qwen/Qwen2.5-32B",
}
METHODS = {
    "Forward KL": "forward_kl",
    "MiniLLM": "minillm",
    "GKD": "gkd",
    "Black-Box KD": "black_box_kd",
    "Mentor-KD": "mentor_kd",
    "TAKD": "takd",
    "Proxy-KD": "proxy_kd",
}


@pytest.mark.parametrize("number", [1, 5])
def test_a_rows_run_is_what_its_columns_say(number):
    """Method, student, writer and scorer follow the columns; all other values are the paper's."""
    table = load_table(TABLES / f"table_{number}.yaml")
    for row in table.rows:
        config = table.run_of(row)
        assert config.preset == "paper" and config.folder == Path(f"runs/table_{number}/{row.name}")
        assert set(config.evaluate.benchmarks.paths) == {
            *("agieval", "arc", "bbh", "csqa", "gsm8k", "mmlu")
        }
        assert config.evaluate.benchmarks.models == (row.model,)
        if row.method == "GPT-4":
            assert row.model.endswith(".jsonl")
            continue
        assert row.model == "student"
        assert config.method.name == METHODS[row.method]
        assert config.student.path == MODELS[row.student]
        assert config.distill.optimizer.learning_rate == 1e-5 and config.distill.epochs == 1
        assert config.distill.data == "distill"
        if row.teacher != "GPT-4":  # this model writes the answers and scores them
            assert config.proxy.path == MODELS[row.teacher]
            aligned = row.teacher.endswith("Proxy")
            assert config.method.scorer == ("aligned" if aligned else "unaligned")
            assert config.align.alignment == ("nll_preference" if aligned else "none")
        if row.method == "Proxy-KD":
            assert config.align.alignment == "nll_preference" and config.align.num_rounds == 16
            assert config.proxy.path == MODELS[row.proxy if number == 5 else "Llama-2-70B"]
            assert config.distill.alpha == 100 and config.distill.weights.enabled
        if row.method in ("TAKD", "Mentor-KD"):
            assert config.align.alignment == ("none" if row.reading else "nll")
            assert not config.distill.weights.enabled
        if row.method in ("MiniLLM", "GKD"):  # no text of GPT-4 is learnt
            assert config.method.warmup_text == "scorer" and config.method.warms_up


def test_an_ablation_lacks_what_its_row_names_and_nothing_else():
    table = load_table(TABLES / "table_2.yaml")
    runs = {row.name: table.run_of(row) for row in table.rows}
    whole = runs["proxy_kd"].model_dump()
    changes = {
        "without_proxy": {"method.name": "black_box_kd", "distill.alpha": 0.0},
        "without_alignment": {"align.alignment": "none"},
        "without_alignment_warmed_up": {"align.alignment": "warmup"},
        "without_preference": {"align.alignment": "nll"},
        "without_weights": {"distill.weights.enabled": False},
        "proxy_aligned": {},
        "proxy_without_preference": {"align.alignment": "nll"},
        "proxy_without_both": {},
        "proxy_warmed_up": {"align.alignment": "warmup"},
    }
    for name, expected in changes.items():
        differing = dict(_differences(whole, runs[name].model_dump()))
        models = differing.pop("evaluate.benchmarks.models", ("student",))
        assert models == (next(row.model for row in table.rows if row.name == name),)
        # A 70B is split over devices to answer the benchmarks.
        if name.startswith("proxy_") and name != "proxy_kd":
            assert differing.pop("mesh.evaluate.tensor") == 8
        for key in [key for key in differing if key.startswith("method.") and key != "method.name"]:
            del differing[key]  # these keys belong to Proxy-KD alone
        assert differing.pop("name") == name and differing == expected, name
    models = [row.model for row in table.rows if row.group == "Proxy"]
    assert models == ["proxy", "proxy", "proxy:raw", "proxy"]
    # These rows are the same runs as in Table 1, so they are taken from there.
    first = load_table(TABLES / "table_1.yaml")
    for ours, theirs in (("proxy_kd", "proxy_kd_llama2"), ("without_proxy", "black_box_kd_llama2")):
        row = next(row for row in first.rows if row.name == theirs)
        same = {"name", "runs_dir"}
        assert runs[ours].model_dump(exclude=same) == first.run_of(row).model_dump(exclude=same)


def _differences(one, other, key=""):
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            yield from _differences(one.get(name), other.get(name), f"{key}.{name}".strip("."))
    elif one != other:
        yield key, other


def test_what_table_3_times():
    table = load_table(TABLES / "table_3.yaml")
    runs = {row.method: (row.phase, table.run_of(row)) for row in table.rows}
    for method, (phase, config) in runs.items():
        size, kind = method.rpartition("-")[::2]
        timed = config.student if phase == "student" else config.proxy
        assert size.removeprefix("Llama-").lower() in timed.path.lower(), method
        # So the number of samples of a step is known.
        assert config.distill.batching == config.align.batching == "bucket"
        expected = {"SFT": "warmup", "Pref": "rounds"}.get(kind, "student")
        assert phase == ("student" if size == "Llama-7B" else expected)
        if kind == "Pref":
            assert config.align.uses_pairs
        # There are at least ten steps; the first is not timed.
        splits = dict(config.corpus.shares)
        share = {"warmup": "warmup", "rounds": "align", "student": "distill"}[phase]
        rows = config.corpus.max_rows * splits[share]
        steps = rows / config.align.batch_size
        steps *= config.align.warmup_epochs if phase == "warmup" else 1
        assert steps / (config.align.num_rounds if phase == "rounds" else 1) > 12
    assert runs["Llama-7B-SFT"][1].needs == "nothing"
    assert runs["Llama-7B-Distill"][1].needs == "labels"
    gkd = runs["Llama-7B-GKD"][1]
    assert gkd.needs == "proxy" and "70b-chat" in gkd.proxy.path


@pytest.mark.parametrize("number", NUMBERS)
def test_dry_run_of_the_real_tables_needs_neither_weights_nor_data(
    number, tmp_path, monkeypatch, capsys
):
    """One row of each kind; other tests make dry runs of the recipes themselves."""
    monkeypatch.setattr(distill, "main", _never)
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    before = files_of(tmp_path, times=True)
    only = {1: "gkd", 2: "without_preference", 3: "llama_13b_pref", 5: "forward_kl"}[number]
    path = f"configs/tables/table_{number}.yaml"
    assert tables.command(["--table", path, "--dry-run", "--only", only]) == 0
    out = capsys.readouterr().out
    assert f"\n{only}: " in out and "every key is valid" in out and "B parameters" in out
    assert ("evaluate.benchmarks.mmlu" in out) == (number != 3)  # not on this machine
    assert files_of(tmp_path, times=True) == before


def _never(*_: object) -> None:
    raise AssertionError("nothing is trained here")


# --- mistakes -------------------------------------------------------------------------------------


def _write(folder: Path, text: str) -> str:
    path = folder / "table.yaml"
    path.write_text(text)
    return str(path)


HEAD = "table: 2\nname: t\nconfig: run.yaml\n"
MISTAKES = [
    ("table: 4\nname: t\nrows: [{name: a, method: b, config: c}]", "table: must be 1, 2, 3 or 5"),
    ("name: t\nrows: [{name: a, method: b, config: c}]", "either the paper's table or its figure"),
    ("table: 1\nfigure: 3\nname: t\nrows: [{name: a, method: b, config: c}]", "by number"),
    (HEAD + "rows: []", "rows: needs at least 1 entry"),
    (HEAD + "rows: [{name: a, metod: b}]", "did you mean 'method'?"),
    (HEAD + "rows: [{name: a, method: b, after: c}]", "row a: after names no row above it (c)"),
    (HEAD + "rows: [{name: a, method: b}, {name: a, method: b}]", "two rows are called a"),
    (HEAD + "rows: [{name: a, method: b, phase: rounds}]", "row a has a phase"),
    ("table: 3\nname: t\nrows: [{name: a, method: b, config: c}]", "row a needs a phase"),
    ("table: 2\nname: t\nrows: [{name: a, method: b}]", "neither the row nor the table names"),
    (HEAD + "rows: [{name: a, method: b}]", "row a: cannot read the config"),
    (HEAD + "name: u\nrows: [{name: a, method: b}]", "name: repeated on line 4"),
    ("- 1", "should be a section of keys"),
]


@pytest.mark.parametrize("text, sentence", MISTAKES)
def test_mistakes_are_sentences(tmp_path, capsys, text, sentence):
    assert tables.command(["--table", _write(tmp_path, text)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and "Traceback" not in error


def test_rows_and_keys_that_are_not_there(tmp_path, capsys):
    path = str(TABLES / "table_5.yaml")
    assert tables.command(["--table", path, "--list", "--only", "proxy"]) == 2
    assert "the rows are forward_kl, black_box_kd, proxy_kd" in capsys.readouterr().err
    assert tables.command(["--table", path, "--dry-run", "--set", "distill.alpa=1"]) == 2
    assert "row forward_kl: " in capsys.readouterr().err
    assert tables.command(["--table", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read the table" in capsys.readouterr().err


def test_jobs_of_rows_wait_for_the_rows_that_they_take_stages_from(tmp_path):
    """launch/slurm/table.sh runs with an sbatch that records its arguments."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\ncd {tmp_path}\necho "$@" >> asked\necho "$((100 + $(wc -l < asked)))"\n'
    )
    sbatch.chmod(0o755)
    done = subprocess.run(
        ["bash", "launch/slurm/table.sh", "configs/tables/table_2.yaml", "--gpus-per-node=8"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PROXYKD_PYTHON": sys.executable,
        },
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == "proxy_kd 101"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 10 and all("--gpus-per-node=8" in line for line in asked)
    ends = "launch/slurm/stage.sbatch tables configs/tables/table_2.yaml --only without_weights"
    assert "--dependency=afterok:101" in asked[5] and asked[5].endswith(ends)
    assert "--dependency" not in asked[0]


# --- what rows share ------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"{n} + {n}?", "answer": f"#### {2 * n}"} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table_of(config: Config, folder: Path, questions: str, *rows: TableRow) -> TableFile:
    """A table whose rows are based on the config of a run."""
    (folder / "run.yaml").write_text(dump_config(config))
    text = {
        "table": 2,
        "name": "made",
        "runs": str(folder / "runs"),
        "config": "run.yaml",
        "set": [f"evaluate.benchmarks.gsm8k={questions}"],
        "rows": [row.model_dump(mode="json") for row in rows],
    }
    return load_table(_write(folder, json.dumps(text)))


def test_a_row_takes_what_is_the_same_and_is_bitwise_a_run_of_its_own(
    finished_run, tmp_path, questions, capsys
):
    """The proxy and its soft labels do not depend on the student's weights, so they are linked."""
    lender = copy_run(finished_run, tmp_path / "runs" / "other")
    before = files_of(lender.folder, times=True)
    rows = [
        TableRow(name="same", method="m"),
        TableRow(name="unweighted", method="m", set=("distill.weights.enabled=false",)),
        TableRow(name="aligned", method="m", model="proxy"),
        TableRow(name="raw", method="m", model="proxy:raw"),
        TableRow(name="gpt4", method="m", model=str(tmp_path / "none.jsonl")),
    ]
    table = table_of(finished_run, tmp_path, questions, *rows)
    out = tables.main(table)

    links = {
        row.name: {
            str(path.relative_to(table.folder / row.name))
            for path in (table.folder / row.name).rglob("*")
            if path.is_symlink()
        }
        for row in rows
    }
    shared = {"corpus", "proxy", "samples/fresh", "soft_labels"}
    assert links["same"] == {*shared, "student"} and links["unweighted"] == shared
    assert links["aligned"] == {"corpus", "proxy"} and not links["raw"]
    assert files_of(lender.folder, times=True) == before  # only read

    alone = without_student(
        finished_run, tmp_path / "alone", {"distill": {"weights": {"enabled": False}}}
    )
    distill.main(alone)
    exported = "export/student/model.safetensors"
    own = (alone.folder / exported).read_bytes()
    assert (table.folder / "unweighted" / exported).read_bytes() == own
    assert (table.folder / "same" / exported).read_bytes() != own
    assert (table.folder / "same" / exported).read_bytes() == (
        finished_run.folder / exported
    ).read_bytes()

    text = out.read_text()
    assert "4 of 5 rows are measured" in text and f"there is no {tmp_path / 'none.jsonl'}" in text
    assert read_json(table.folder / "raw" / ROW)["model"] == "proxy_raw"
    # The second call runs nothing and writes only the table, which stays the same.
    files = files_of(table.folder)
    capsys.readouterr()
    tables.main(table)
    assert files_of(table.folder) == files
    assert capsys.readouterr().err.count("is finished") == 4


def test_another_key_runs_a_row_again_as_far_as_it_decides(finished_run, tmp_path, questions):
    copy_run(finished_run, tmp_path / "runs" / "other")
    table = table_of(finished_run, tmp_path, questions, TableRow(name="row", method="m"))
    tables.main(table)
    record = read_json(table.folder / "row" / ROW)
    tables.main(table, overrides=["logging.tensorboard=false", "distill.log_every=2"])
    assert read_json(table.folder / "row" / ROW)["made_from"] != record["made_from"]
    with pytest.raises(UserError, match="was made with other settings"):
        tables.main(table, overrides=["distill.alpha=3"])
    write_json(table.folder / "row" / ROW, record)
    tables.main(table)


def test_a_row_of_table_3_takes_its_own_steps(finished_run, tmp_path):
    """A linked stage has no steps that could be timed, so only the corpus is linked."""
    copy_run(finished_run, tmp_path / "runs" / "other")
    (tmp_path / "run.yaml").write_text(dump_config(finished_run))
    row = TableRow(name="pref", method="Llama-70B-Pref", phase="rounds")
    fields = {"table": 3, "name": "made", "runs": str(tmp_path / "runs"), "config": "run.yaml"}
    fields["rows"] = [row.model_dump()]
    table = load_table(_write(tmp_path, json.dumps(fields)))
    text = tables.main(table).read_text()
    links = [path.name for path in (table.folder / "pref").rglob("*") if path.is_symlink()]
    assert links == ["corpus"] and "was not timed" not in text
    line = next(line for line in text.splitlines() if line.startswith("| Llama-70B-Pref"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:3] == ["8", "28"] and cells[4] == "cpu" and float(cells[6]) > 0
    assert cells[7] == "–"  # the table has no SFT of the same size


def test_paths_of_a_table_may_hold_variables_and_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "/data")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("ABSENT_FOLDER", raising=False)
    row = {"name": "a", "method": "m", "config": "$SOME_FOLDER/a.yaml", "model": "x=~/a.jsonl"}
    fields = {"table": 2, "name": "made", "runs": "~/runs", "config": "$SOME_FOLDER/b.yaml"}
    path = _write(tmp_path, json.dumps({**fields, "rows": [row]}))
    table = load_table(path)
    assert table.folder == Path("/home/somebody/runs/made") and table.config == "/data/b.yaml"
    assert table.rows[0].config == "/data/a.yaml"
    assert table.rows[0].model == "x=/home/somebody/a.jsonl"
    assert load_table(path, runs="$SOME_FOLDER/r").folder == Path("/data/r/made")
    with pytest.raises(UserError, match="runs: the environment variable ABSENT_FOLDER is not set"):
        load_table(path, runs="$ABSENT_FOLDER/r")


# --- the twins, on real weights -------------------------------------------------------------------


@pytest.fixture
def twin(assets, tmp_path, monkeypatch):
    """Runs rows of a tiny table in ``tmp_path/<folder>`` and returns the written table."""
    monkeypatch.setenv("PROXYKD_ASSETS", str(assets))

    def run(name: str, *only: str, folder: str = "runs") -> Path:
        arguments = ["--table", str(TABLES / f"{name}.yaml"), "--runs", str(tmp_path / folder)]
        assert tables.command([*arguments, *(["--only", ",".join(only)] if only else [])]) == 0
        return tmp_path / folder / name / f"{name}.md"

    return run


@pytest.mark.slow
def test_table_2_runs_and_its_rows_are_bitwise_runs_of_their_own(twin, capfd):
    out = twin("table_2_tiny")
    table, text = out.parent, out.read_text()
    assert "10 of 10 rows are measured" in text and "prints no averages here" in text
    links = {str(p.relative_to(table)): os.readlink(p) for p in table.rglob("*") if p.is_symlink()}
    shared = ("corpus", "proxy", "soft_labels")
    assert all(links[f"without_weights/{name}"] == f"../proxy_kd/{name}" for name in shared)
    assert links["proxy_without_preference/proxy"] == "../without_preference/proxy"
    for made in ("without_alignment/proxy", "without_preference/proxy", "without_weights/student"):
        assert made not in links
    for kind in ("html", "csv"):
        assert (table / f"table_2_tiny.{kind}").stat().st_size > 1000

    files = files_of(table, times=True)
    capfd.readouterr()
    assert twin("table_2_tiny") == out
    said = capfd.readouterr()
    assert said.err.count("is finished") == 10 and "train" not in said.err + said.out
    after = files_of(table, times=True)
    tables_own = {f"table_2_tiny.{kind}" for kind in ("md", "html", "csv")}
    assert {name for name in after if after[name] != files[name]} <= tables_own
    assert all(after[name][0] == files[name][0] for name in tables_own)

    alone = twin("table_2_tiny", "without_weights", folder="alone").parent / "without_weights"
    assert not any(path.is_symlink() for path in alone.rglob("*"))
    ours = table / "without_weights"
    for part in ("export", "soft_labels", "eval"):
        assert _content(ours / part) == _content(alone / part), part


def _content(folder: Path) -> dict[str, bytes]:
    """The content of all files of a folder, or of the folder that it links to."""
    return {name: data for name, (data, _) in files_of(folder.resolve()).items()}


@pytest.mark.slow
def test_table_1_runs(twin):
    """One row of each kind: the aligned proxy and its students, and a student that answers."""
    rows = ("gpt4", "forward_kl_proxy", "minillm", "gkd", "mentor_kd", "proxy_kd_llama1")
    out = twin("table_1_tiny", *rows)
    text = out.read_text()
    assert "5 of 15 rows are measured" in text and "there is no data/gpt4/benchmarks.jsonl" in text
    assert os.readlink(out.parent / "proxy_kd_llama1" / "proxy") == "../forward_kl_proxy/proxy"
    assert not (out.parent / "mentor_kd" / "proxy").is_symlink()
    assert text.count("not run yet") == 9 and text.count("53.22 †") == 1


@pytest.mark.slow
def test_table_3_runs(twin):
    rows = ("llama_7b_sft", "llama_7b_distill", "llama_7b_gkd", "llama_70b_sft", "llama_70b_pref")
    out = twin("table_3_tiny", *rows)
    assert "5 of 7 rows are measured" in out.read_text()
    ratios = {
        line["model and method"]: float(line["here: times SFT"] or 0)
        for line in csv.DictReader(out.with_suffix(".csv").open())
    }
    assert ratios["Llama-7B-SFT"] == ratios["Llama-70B-SFT"] == 1
    assert ratios["Llama-70B-Pref"] > 1  # this includes drawing the answers
    assert ratios["Llama-7B-Distill"] > 0 and ratios["Llama-7B-GKD"] > 0
    assert ratios["Llama-13B-Pref"] == 0


@pytest.mark.slow
def test_table_5_runs(twin):
    assert "3 of 3 rows are measured" in twin("table_5_tiny").read_text()
