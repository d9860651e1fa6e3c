"""The command line: exit codes, sentences instead of tracebacks, help for every key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxykd_jax.cli import config_keys, describe_keys, run_command
from proxykd_jax.config import Config, load_config
from proxykd_jax.config.presets import PRESETS
from proxykd_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent

MINIMAL = """\
preset: recommended
name: run-1
corpus:
  sources:
    - path: answers.jsonl
proxy: {path: big}
student: {path: small}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return str(path)


def _never(config: Config) -> None:
    raise AssertionError("main must not run")


def test_a_stage_gets_the_checked_config(config_file, capsys):
    seen: list[Config] = []
    code = run_command(
        "align", seen.append, "Aligns.", ["--config", config_file, "--set", "align.num_rounds=2"]
    )
    assert code == 0
    assert seen[0].align.num_rounds == 2 and seen[0].preset == "recommended"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--set", "align.num_roundz=2"], "did you mean 'num_rounds'"),
        (["--set", "align.num_rounds=-2", "--set", "nme=x"], "greater than 0"),
        (["--set", "novalue"], "section.key=value"),
    ],
)
def test_mistakes_of_the_user_are_sentences_and_code_2(config_file, capsys, arguments, said):
    code = run_command("align", _never, "Aligns.", ["--config", config_file, *arguments])
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("error: ") and said in err
    assert "Traceback" not in err and out == ""


def test_a_missing_config_is_a_sentence(tmp_path, capsys):
    absent = str(tmp_path / "absent.yaml")
    assert run_command("align", _never, "Aligns.", ["--config", absent]) == 2
    assert capsys.readouterr().err == (
        f"error: cannot read the config {absent}: No such file or directory.\n"
    )


def test_a_users_mistake_found_by_the_stage(config_file, capsys):
    def main(config: Config) -> None:
        raise UserError("The tokenizers differ.")

    assert run_command("align", main, "Aligns.", ["--config", config_file]) == 2
    assert capsys.readouterr().err == "error: The tokenizers differ.\n"


def test_a_fault_of_ours_is_not_hidden(config_file):
    def main(config: Config) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command("align", main, "Aligns.", ["--config", config_file])


def test_an_interrupt_says_how_to_go_on(config_file, capsys):
    def main(config: Config) -> None:
        raise KeyboardInterrupt

    assert run_command("align", main, "Aligns.", ["--config", config_file]) == 130
    assert "same command goes on" in capsys.readouterr().err


def test_print_config_prints_what_can_be_loaded(config_file, tmp_path, capsys):
    arguments = ["--config", config_file, "--set", "seed=7", "--print-config"]
    assert run_command("align", _never, "Aligns.", arguments) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(config_file, ["seed=7"])


@pytest.mark.parametrize(
    "arguments",
    [[], ["--config"], ["--cfg", "x"], ["--conf", "x"], ["--config", "x", "--strict"], ["x"]],
)
def test_wrong_arguments_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("align", _never, "Aligns.", arguments)
    assert ended.value.code == 2
    assert "usage: python -m proxykd_jax.align" in capsys.readouterr().err


def test_help_tells_every_key_its_default_and_its_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("align", _never, "Aligns the proxy.", ["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "Aligns the proxy." in text
    keys = list(config_keys())
    lines = text.splitlines()
    for key, kind, _, meaning in keys:
        place = next(i for i, line in enumerate(lines) if line.startswith(f"  {key}  ["))
        assert kind in lines[place]
        assert meaning and lines[place + 1].strip() == meaning


def test_no_key_of_the_schema_is_forgotten():
    """Every value of a resolved config has its line in the help."""
    described = {key.replace("[]", "") for key, *_ in config_keys()}
    data = {
        "preset": "paper",
        "name": "x",
        "corpus": {"sources": [{"path": "a"}], "test": [{"path": "b"}]},
        "proxy": {"path": "p"},
        "student": {"init": {"path": "p", "first_layers": 1}},
    }
    from proxykd_jax.config import make_config

    def leaves(node: Any, prefix: str) -> set[str]:
        if isinstance(node, dict):
            return set().union(*(leaves(v, f"{prefix}.{k}") for k, v in node.items()))
        if isinstance(node, list) and node and isinstance(node[0], dict):
            return leaves(node[0], prefix)
        return {prefix[1:]}

    values = leaves(make_config(data).model_dump(mode="json"), "")
    missing = {key for key in values if key not in described and f"{key}.path" not in described}
    assert not missing


def test_help_shows_the_value_of_each_preset():
    text = describe_keys()
    assert "  align.num_rounds  [int]  default 16 (paper), 4 (recommended)" in text
    assert "  distill.alpha  [number]  default 100.0 (paper), 10.0 (recommended)" in text
    assert "  preset  [paper|recommended]\n" in text
    defaults = {key: default for key, _, default, _ in config_keys()}
    for preset, values in PRESETS.items():
        shown = defaults["align.optimizer.learning_rate"]
        assert f"{values['align']['optimizer']['learning_rate']} ({preset})" in shown
    assert defaults["score.top_k"] == "10"
    assert defaults["student.adapter"] == "null"
    assert defaults["name"] == ""


def test_a_real_process_ends_with_code_2_and_no_traceback(tmp_path):
    program = (
        "import sys\nfrom proxykd_jax.cli import run_command\n"
        "sys.exit(run_command('align', print, 'Aligns.'))"
    )
    config = tmp_path / "c.yaml"
    config.write_text("preset: paper\npreset: paper\nseed: !!python/name:os.system\n")
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", str(config)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.startswith("error: ")
