"""--dry-run: what it prints before a run, what it refuses, and that it writes nothing."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from proxykd_jax import run
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.cli import run_command
from proxykd_jax.config import Config, dump_config
from proxykd_jax.training import loop
from tests.conftest import REPOSITORY
from tests.generation.fake_server import FakeServer, Reply
from tests.tiny_run import changed, copy_run, files_of, recipe

# Billions of parameters of proxy and student.
LARGE_RECIPES = {
    "llama2_70b_to_7b": ("68.98B", "6.74B"),
    "llama2_13b_to_7b": ("13.02B", "6.74B"),
    "llama1_7b_student": ("68.98B", "6.74B"),
    "qwen2_5_32b_to_7b": ("32.76B", "7.62B"),
    "llama2_70b_to_7b_one_gpu": ("68.98B", "6.74B"),
    "llama2_7b_to_1b_one_gpu": ("6.74B", "1.10B"),
}


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args, **options):
        raise AssertionError("a dry run trains nothing")

    monkeypatch.setattr(loop.Trainer, "open", never)
    monkeypatch.setattr(run, "main", never)


def dry_run(path: Path | str, *arguments: str) -> int:
    return run_command("run", run.main, "", ["--config", str(path), "--dry-run", *arguments])


def written(config: Config, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return path


@pytest.mark.parametrize("name", LARGE_RECIPES)
def test_the_large_recipes_need_neither_weights_nor_data(name, tmp_path, monkeypatch, capsys):
    """With nothing but configs/models, the dry run knows shapes, steps and memory."""
    (tmp_path / "configs").mkdir()
    shutil.copytree(REPOSITORY / "configs" / "models", tmp_path / "configs" / "models")
    shutil.copy(REPOSITORY / "configs" / f"{name}.yaml", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    before = files_of(tmp_path, times=True)
    path = f"configs/{name}.yaml"
    assert dry_run(path) == 0
    out = capsys.readouterr().out
    for role, size in zip(("proxy", "student"), LARGE_RECIPES[name], strict=True):
        (line,) = re.findall(rf"^{role} .*$", out, re.MULTILINE)
        assert f"{size} parameters" in line and "trained weights and optimizer" in line
        assert re.search(r"a device holds frozen weights \d+\.\d\d GiB", line)
    # 10 / 45 / 45 % of 1M rows (paper, 4.1), or 100,000 rows on one card; 16 rounds, batches of 32.
    steps = (
        "313, 16 rounds of 88, student 1407"
        if "one_gpu" in name
        else ("3125, 16 rounds of 879, student 14063")
    )
    rows = 100_000 if "one_gpu" in name else 1_000_000
    assert f"about: warm-up {steps} (from {rows} rows" in out
    assert f"{rows * 1024} tokens" in out
    unchecked = re.findall(r"^unchecked .*$", out, re.MULTILINE)
    for what in ("tokenizer:", "proxy: the weights", "student: the weights", "corpus.sources.0:"):
        assert any(what in line for line in unchecked)
    assert dry_run(path, "--strict") == 2
    assert files_of(tmp_path, times=True) == before


def test_memory_is_a_devices_share(tmp_path, monkeypatch, capsys):
    """With half of the devices each holds twice the weights."""
    monkeypatch.chdir(REPOSITORY)
    sizes = []
    for fsdp in (4, 8):
        path = "configs/llama2_13b_to_7b.yaml"
        arguments = [f"mesh.fsdp={fsdp}", f"runs_dir={tmp_path}"]
        assert dry_run(path, *(x for a in arguments for x in ("--set", a))) == 0
        out = capsys.readouterr().out
        sizes.append(float(re.findall(r"proxy .* frozen weights (\S+) GiB", out)[0]))
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=0.01)
    assert sizes[1] == pytest.approx(13.02e9 * 2 / 8 / 2**30, rel=0.01)  # bfloat16


def test_a_run_whose_files_are_here(tiny_files, tmp_path, capsys):
    config = recipe(tiny_files, tmp_path / "runs")
    path = written(config, tmp_path)
    before = files_of(tmp_path, times=True), files_of(tiny_files, times=True)
    assert dry_run(path, "--strict") == 0
    captured = capsys.readouterr()
    first = (tiny_files / "teacher.jsonl").read_text().splitlines()[0]
    prompt, answer = re.findall(r'"(?:prompt|response)": "([^"]*)"', first)
    assert f"prompt (not in the loss): '{prompt}'" in captured.out
    assert f"answer (in the loss):     '{answer} </s>'" in captured.out
    assert "12 tokens, of which 5 are the prompt" in captured.out
    # All rows are read and tokenised, so these are nearly the steps of the run.
    assert "about: warm-up 2, 2 rounds of 5, student 8 (from 128 rows of about 13" in captured.out
    assert "140 of 140 rows fit corpus.max_length 12" in captured.out
    assert captured.out.endswith("dry run: nothing is wrong with what could be checked\n")
    assert captured.err == ""
    assert (files_of(tmp_path, times=True), files_of(tiny_files, times=True)) == before
    assert not (tmp_path / "runs").exists()


def test_steps_of_a_prepared_corpus_are_those_that_are_taken(finished_run, tmp_path, capsys):
    config = copy_run(finished_run, tmp_path / "runs")
    before = files_of(tmp_path / "runs", times=True)
    assert dry_run(written(config, tmp_path)) == 0
    assert files_of(tmp_path / "runs", times=True) == before
    (line,) = re.findall(r"^steps .*$", capsys.readouterr().out, re.MULTILINE)
    found = [int(number) for number in re.findall(r"(?:warm-up|rounds of|student) (\d+)", line)]
    results = read_json(finished_run.folder / "proxy" / MANIFEST)["results"]
    ends = [result["step"] for result in results]
    student = read_json(finished_run.folder / "student" / MANIFEST)["last_step"]
    assert found == [ends[1], max(ends[2] - ends[1], ends[3] - ends[2]), student]
    counts = read_json(finished_run.folder / "corpus" / MANIFEST)["counts"]["splits"]
    tokens = sum(counts[name]["tokens"] for name in ("warmup", "align", "distill"))
    assert f"of {tokens} tokens" in line


def test_all_that_does_not_fit_is_said_at_once(tiny_files, tmp_path, capsys):
    """One message names tokenizer, lengths, top_k and batches; exit code 2, no traceback."""
    other = tmp_path / "other"
    shutil.copytree(tiny_files / "student", other)
    text = (other / "tokenizer.json").read_text()
    a, b = '"f3": 13', '"f4": 14'
    assert a in text and b in text
    (other / "tokenizer.json").write_text(text.replace(a, '"f3": 14').replace(b, '"f4": 13'))
    config = recipe(
        tiny_files,
        tmp_path / "runs",
        {"student": {"path": str(other)}},
        {"corpus": {"max_length": 4096}, "score": {"top_k": 900}},
        {"mesh": {"fsdp": 3}},
    )
    path = written(config, tmp_path)
    assert dry_run(path) == 2
    out, err = capsys.readouterr()
    assert "max_length is 4096, but the model has" in out  # the run could start
    assert err.startswith("error: ") and "Traceback" not in err
    for said in ("one vocabulary", "score.top_k: 900", "align.batch_size: 8"):
        assert said in err
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "other"]


def test_a_damaged_corpus_file_is_found(tiny_files, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 f1 . . =", "response": "s0 2"}\n{"prompt": "1 f2\n')
    source = {"sources": [{"path": str(rows), "format": "prompt_response"}]}
    config = recipe(tiny_files, tmp_path / "runs", {"corpus": source})
    assert dry_run(written(config, tmp_path)) == 2
    assert f"{rows}:2" in capsys.readouterr().err


def test_what_is_not_read_of_a_folder_is_said(tiny_files, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    row = '{"prompt": "%d f%d . . =", "response": "s0 2", "remark": "r", "finish_reason": "%s"}\n'
    asked = [(a, b) for a in range(10) for b in range(1, 13)]
    rows = [row % (*pair, "stop" if number else "length") for number, pair in enumerate(asked)]
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "test.jsonl").write_text(rows[-1])
    source = {"sources": [{"path": str(folder), "format": "prompt_response"}]}
    config = recipe(tiny_files, tmp_path / "runs", {"corpus": source})
    assert dry_run(written(config, tmp_path)) == 0
    said = capsys.readouterr().out
    assert "corpus.sources.0: 1 file passed over: test.jsonl (its name says test)" in said
    assert "1 row left out: an answer that was cut off (finish_reason: length) (first at " in said
    assert "120 rows: the key remark is not read (first " in said
    assert "dry run: no error" in said


def test_a_template_that_no_row_passes_is_found(tiny_files, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('never') }}")
    config = recipe(tiny_files, tmp_path / "runs", {"corpus": {"template": str(template)}})
    assert dry_run(written(config, tmp_path)) == 2
    assert "rows can be rendered: the chat template fails: never: 100" in capsys.readouterr().err


def test_a_sampling_server_is_looked_for(finished_run, tmp_path, monkeypatch, capsys):
    """The server is printed, or unchecked if it does not answer; another model is an error."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    base = str(finished_run.proxy.path)

    def said(fake_models: tuple[str, ...], **keys: object) -> tuple[int, str, str]:
        with FakeServer(lambda body: Reply(), models=fake_models) as fake:
            server = {"url": fake.url, "api": "vllm", "retries": 3, **keys}
            config = changed(finished_run, {"align": {"sampling": {"server": server}}})
            code = dry_run(written(config, tmp_path))
            assert [path for path, _, _ in fake.requests] == ["/v1/models"] * (not keys)
        return (code, *capsys.readouterr())

    code, out, _ = said((base,))
    assert code == 0 and re.search(
        r"^server .* answers \(vllm, serves adapter\)", out, re.MULTILINE
    )
    code, out, _ = said((base,), url="http://127.0.0.1:9")
    assert code == 0 and "not checked: align.sampling.server: http://127.0.0.1:9" in out
    code, _, err = said(("other",))
    assert code == 2 and f"serves other, not {base}" in err
