"""``init``: the config that it writes is valid, fits the data, and says why."""

from __future__ import annotations

import json

import pytest

from proxykd_jax import init
from proxykd_jax.checking import dry_run
from proxykd_jax.config import load_config


@pytest.fixture
def given(tiny_files, tmp_path) -> list[str]:
    """The arguments that every call has."""
    answers = ["--answers", str(tiny_files / "teacher.jsonl")]
    return [*answers, "--proxy", str(tiny_files / "proxy"), "--out", str(tmp_path / "run.yaml")]


def test_a_config_of_the_users_files(given, tiny_files, tmp_path, capsys):
    test, prompts = str(tiny_files / "test.jsonl"), str(tiny_files / "fresh.jsonl")
    student = str(tiny_files / "student")
    more = ["--student", student, "--test", test, "--prompts", prompts, "--name", "mine"]
    assert init.command([*given, *more]) == 0
    text = (tmp_path / "run.yaml").read_text()
    assert capsys.readouterr().out.startswith(text)
    assert "preset: recommended\nname: mine\n" in text
    assert "fit (median 10, longest 12); answers end with </s>" in text
    assert "trainable: full  # small enough to train all weights" in text
    assert "dtype: float32  # faster than bfloat16 on a CPU" in text
    config = load_config(tmp_path / "run.yaml", [f"runs_dir={tmp_path / 'runs'}"])
    assert (config.corpus.test[0].path, config.corpus.fresh_prompts[0].path) == (test, prompts)
    assert config.student.path == student
    assert dry_run(config) == []


def test_a_cut_student_learns_with_all_weights(given, tiny_files, tmp_path):
    assert init.command([*given, "--first-layers", "1"]) == 0
    config = load_config(tmp_path / "run.yaml", [])
    assert config.student.init is not None and config.student.init.first_layers == 1
    assert config.student.trainable == "full" and config.proxy.trainable == "lora"


def test_what_does_not_fit_at_once_gets_micro_batches(given, tmp_path, monkeypatch):
    from proxykd_jax.checking import first_config

    monkeypatch.setattr(first_config, "memory_limit", lambda device: 4 << 20)
    assert init.command([*given, "--first-layers", "1"]) == 0
    config = load_config(tmp_path / "run.yaml", [])
    assert config.align.microbatch_size is not None
    assert config.align.batch_size % config.align.microbatch_size == 0
    monkeypatch.setattr(first_config, "memory_limit", lambda device: 1 << 10)
    assert init.command([*given, "--first-layers", "1", "--force"]) == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "Name the student with --student, or cut it out of the proxy with --first-layers."),
        (["--first-layers", "99"], "99"),
        (["--student", "nowhere/absent/model"], "nowhere/absent/model"),
    ],
)
def test_mistakes_are_sentences(given, tmp_path, capsys, arguments, said):
    assert init.command([*given, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err
    assert not (tmp_path / "run.yaml").exists()


def test_a_file_with_names_of_its_own(given, tmp_path, capsys):
    rows = [f"{a} f{b} . . =,s0 {b % 7},x" for a in range(10) for b in range(1, 9)]
    path = tmp_path / "faq.csv"
    path.write_text("\n".join(["question,said,topic", *rows]) + "\n")
    arguments = [*given, "--first-layers", "1"]
    arguments[1] = str(path)
    assert init.command(arguments) == 2  # the message has an example for columns
    assert "columns" in capsys.readouterr().err
    assert init.command([*arguments, "--columns", "prompt=question", "answer"]) == 2
    assert "--columns takes KEY=COLUMN" in capsys.readouterr().err
    assert init.command([*arguments, "--columns", "prompt=question", "response=sayd"]) == 2
    assert "said" in capsys.readouterr().err
    assert init.command([*arguments, "--columns", "prompt=question", "response=said"]) == 0
    config = load_config(tmp_path / "run.yaml", [])
    assert config.corpus.sources[0].columns == {"prompt": "question", "response": "said"}


def test_an_existing_file_stays(given, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("name: precious\n")
    assert init.command([*given, "--first-layers", "1"]) == 2
    assert "run.yaml exists" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text() == "name: precious\n"


def test_rows_that_cannot_be_used_are_said(given, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": " "}) + "\n")
    arguments = [*given, "--first-layers", "1"]
    arguments[1] = str(tmp_path / "rows.jsonl")
    assert init.command(arguments) == 2
    assert "empty answer" in capsys.readouterr().err
