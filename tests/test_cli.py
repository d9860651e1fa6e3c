"""The command line: exit codes, sentences instead of tracebacks, help for every key."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxykd_jax.__main__ import COMMANDS
from proxykd_jax.__main__ import main as proxykd
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.cli import run_command
from proxykd_jax.config import Config, dump_config, load_config, make_config
from proxykd_jax.config.keys import config_keys, describe, often_set, stage_keys
from proxykd_jax.config.presets import PRESETS
from proxykd_jax.errors import UserError
from tests.tiny_run import changed, recipe

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
    assert "same command continues" in capsys.readouterr().err


def test_print_config_prints_what_can_be_loaded(config_file, tmp_path, capsys):
    arguments = ["--config", config_file, "--set", "seed=7", "--print-config"]
    assert run_command("align", _never, "Aligns.", arguments) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(config_file, ["seed=7"])


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["--config"], ["--cfg", "x"], ["--conf", "x"], ["--config", "x", "--strict"]),
        *(["x", "y"], ["x", "--config", "y"]),
    ],
)
def test_wrong_arguments_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("align", _never, "Aligns.", arguments)
    assert ended.value.code == 2
    assert "usage: proxykd align" in capsys.readouterr().err


# They are given a folder, or data and models.
OTHER = {"chat", "init", "push", "verify"}


def _help(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        proxykd([*arguments])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_tells_every_key_of_a_stage_its_default_and_its_meaning(capsys):
    text = _help(capsys, "run", "--help", "all")
    assert "Run all stages" in text
    lines = text.splitlines()
    for key, kind, _, meaning in config_keys():
        place = next(i for i, line in enumerate(lines) if line.startswith(f"  {key}  ["))
        assert kind in lines[place]
        assert meaning and lines[place + 1].strip() == meaning
    assert "distill.alpha" not in _help(capsys, "align", "--help", "all")
    found = _help(capsys, "align", "--help", "learning_rate")
    assert "align.optimizer.learning_rate  [" in found and "beta" not in found


@pytest.mark.parametrize("stage", sorted(COMMANDS.keys() - OTHER))
def test_short_help_shows_the_keys_that_are_often_set(stage):
    often = often_set(stage)
    assert set(often) <= set(stage_keys(stage)) and len(often) <= 18


def test_a_mistyped_word_suggests_the_nearest(capsys):
    for arguments, said in (
        (["algin"], "no command algin; did you mean 'align'?"),
        (["align", "x.yaml", "--confg=y"], "no option --confg=y; did you mean '--config'?"),
        (["align", "--help", "lerning_rate"], "did you mean 'learning_rate'?"),
    ):
        with pytest.raises(SystemExit) as ended:
            proxykd(arguments)
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert proxykd([]) == 2 and "commands:" in capsys.readouterr().err


def test_proxykd_says_its_commands_and_its_version(capsys):
    text = _help(capsys, "--help")
    for name, module in COMMANDS.items():
        assert f"  {name:<8}  {module.SUMMARY}\n" in text
    assert _help(capsys, "--version").startswith("proxykd 0.")


def test_a_file_stands_before_or_behind_the_options(config_file, capsys):
    for arguments in (
        [config_file, "--set", "seed=7", "--print-config"],
        ["--set", "seed=7", "--print-config", config_file],
        ["--config", config_file, "--print-config", "--set", "seed=7"],
    ):
        assert proxykd(["align", *arguments]) == 0
        assert "\nseed: 7\n" in capsys.readouterr().out


def test_every_stage_takes_a_path_or_a_dictionary(tmp_path):
    """The mistakes of notebooks are sentences, as on the command line."""
    absent = tmp_path / "absent.yaml"
    for name, module in COMMANDS.items():
        if name in OTHER:
            continue  # these take no run
        more = ("h100", 1) if name == "plan" else ()
        what = "table" if name == "tables" else "config"
        for path in (absent, str(absent)):
            with pytest.raises(UserError, match=f"cannot read the {what} {absent}"):
                module.main(path, *more)
        if name != "tables":
            with pytest.raises(UserError, match=r"config: .*'colect'|config: colect: unknown key"):
                module.main({"colect": {}}, *more)


def test_no_key_of_the_schema_is_forgotten():
    """Every value of a resolved config has its line in the help."""
    # The help shows a method's keys with its name; the config uses the default method.
    described = {key.replace("[]", "").removesuffix(" (proxy_kd)") for key, *_ in config_keys()}
    data = {
        "preset": "paper",
        "name": "x",
        "corpus": {"sources": [{"path": "a"}], "test": [{"path": "b"}], "beam": {}},
        "proxy": {"path": "p"},
        "student": {"init": {"path": "p", "first_layers": 1}},
        "mesh": {"sample": {}, "score": {}, "distill": {}, "evaluate": {}},
        "align": {"sampling": {"server": {"url": "http://127.0.0.1:8000", "api": "vllm"}}},
        "evaluate": {"benchmarks": {"gsm8k": "g", "during": {"every": 1}}},
        "collect": {
            "prompts": [{"path": "p"}],
            "folder": "f",
            "url": "http://127.0.0.1:8000",
            "model": "m",
        },
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
    text = describe(list(config_keys()))
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


def test_all_mistakes_of_a_file_are_said_at_once(tmp_path, capsys):
    """One message lists unknown, repeated and misplaced keys, wrong types, ranges and choices."""
    config = tmp_path / "c.yaml"
    config.write_text(
        """\
preset: recomended
name: run 1
seed: -3
seed: 4
corpus:
  sources: []
  max_lenght: 64
proxy: {path: big, trainable: lorra, lora: {rank: 0}}
student: {path: small, init: {path: big, first_layers: 2}}
align: {num_rounds: "four", beta: 0.1, optimizer: {learning_rate: fast}}
distill: {alpha: -1, microbatch_size: 5, batch_size: 32}
"""
    )
    assert run_command("align", _never, "Aligns.", ["--config", str(config)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and err.startswith("error: ")
    lines = err.removeprefix("error: ").splitlines()
    assert all(line.startswith(f"{config}: ") for line in lines)
    expected = [
        ("seed: repeated on line 4 (first on line 3); keep one",),
        ("preset: must be 'paper' or 'recommended'", "did you mean 'recommended'?"),
        ("name: must match", '"run 1"'),
        ("corpus.sources: needs at least 1 entry",),
        ("corpus.max_lenght: unknown key", "did you mean 'max_length'?", "64"),
        ("proxy.trainable: must be 'lora' or 'full'", "did you mean 'lora'?"),
        ("proxy.lora.rank:", "greater than 0", "(got 0)"),
        ("student: give exactly one of path and init",),
        ("align.num_rounds:", "integer", '"four"'),
        ("align.beta: unknown key", "did you mean 'align.preference.beta'?"),
        ("align.optimizer.learning_rate:", "number", '"fast"'),
        ("distill.alpha:", "greater than or equal to 0", "(got -1)"),
    ]
    for said in expected:
        assert any(all(part in line for part in said) for line in lines), (said, lines)


# --- mistakes that stages find --------------------------------------------------------------------

STAGES = ("prepare", "align", "score", "distill", "export", "evaluate", "run")


def command(stage: str, config: Config, folder: Path) -> int:
    """``python -m proxykd_jax.<stage> --config ...`` in this process."""
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    main = importlib.import_module(f"proxykd_jax.{stage}").main
    return run_command(stage, main, "", ["--config", str(path)])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err[err.index("error: ") :]


def left(config: Config) -> set[str]:
    """The folders with files that a refused run has left."""
    found = {path.name for path in config.folder.glob("*/*") for path in [path.parent]}
    for name in found:
        # The stages that exist are complete.
        assert read_json(config.folder / name / MANIFEST)["status"] == "complete"
        assert not list((config.folder / name).rglob("*.tmp"))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_corpus_file_is_a_sentence(tiny_files, tmp_path, capsys, stage):
    absent = tmp_path / "absent.jsonl"
    config = recipe(tiny_files, tmp_path / "runs", {"corpus": {"sources": [{"path": str(absent)}]}})
    assert command(stage, config, tmp_path) == 2
    found = said(capsys)
    if stage == "run":  # its check names what is there
        assert found.startswith(f"error: corpus.sources.0: {absent} does not exist: {tmp_path} has")
    else:
        assert found == f"error: {absent} does not exist, or matches no file.\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("role", ["proxy", "student"])
@pytest.mark.parametrize("stage", ["align", "distill", "run"])
def test_a_missing_model_is_a_sentence(tiny_files, tmp_path, capsys, stage, role):
    """A missing student is also found before the proxy is trained."""
    absent = str(tmp_path / "absent")
    config = recipe(tiny_files, tmp_path / "runs", {role: {"path": absent}})
    assert command(stage, config, tmp_path) == 2
    found = said(capsys)
    if stage == "run":  # it checks before it makes the corpus
        assert f"{role}: {absent} does not exist: {tmp_path} has no absent. It holds" in found
        assert not config.folder.exists()
        return
    assert found == (
        f"error: {absent}: there is no such folder, and it is not a hub name (owner/model).\n"
    )
    assert not config.folder.exists() or left(config) == {"corpus"}


@pytest.mark.parametrize("stage", ["align", "distill", "run"])
def test_a_student_of_another_vocabulary_is_refused_before_training(
    tiny_files, tmp_path, capsys, stage
):
    other = tmp_path / "other"
    shutil.copytree(tiny_files / "student", other)
    text = (other / "tokenizer.json").read_text()
    for old, new in (('"f3": 13', '"f3": 14'), ('"f4": 14', '"f4": 13')):
        assert old in text
        text = text.replace(old, new)
    (other / "tokenizer.json").write_text(text)
    config = recipe(tiny_files, tmp_path / "runs", {"student": {"path": str(other)}})
    assert command(stage, config, tmp_path) == 2
    message = said(capsys)
    assert "must share one vocabulary" in message and "f3" in message
    assert left(config) == (set() if stage == "run" else {"corpus"})


def test_models_that_the_corpus_is_not_for_are_refused(tiny_files, tmp_path, capsys):
    """A separate key names the tokenizer of the corpus, which has more ids than the models."""
    from tests.texts.conftest import save_bpe

    tokenizer = save_bpe(tmp_path / "bpe", chat_template=None)
    config = recipe(
        tiny_files,
        tmp_path / "runs",
        {"tokenizer": str(tokenizer), "corpus": {"template": "plain", "max_length": 200}},
    )
    assert command("align", config, tmp_path) == 2
    assert "must share one vocabulary" in said(capsys)
    assert left(config) == {"corpus"}


def test_a_damaged_model_is_a_sentence_and_goes_on_when_repaired(tiny_files, tmp_path, capsys):
    proxy = tmp_path / "proxy"
    shutil.copytree(tiny_files / "proxy", proxy)
    weights = proxy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    config = recipe(tiny_files, tmp_path / "runs", {"proxy": {"path": str(proxy)}})
    config = changed(config, {"align": {"alignment": "none"}, "export": {"proxy": "none"}})
    assert command("align", config, tmp_path) == 2
    assert f"{weights} is truncated" in said(capsys)
    weights.write_bytes(whole)
    assert command("align", config, tmp_path) == 0
    assert left(config) == {"corpus", "proxy"}


@pytest.mark.parametrize("stage, alpha", [("align", 1.0), ("distill", 0.0)])
def test_a_corpus_of_which_nothing_is_left_is_a_sentence(
    tiny_files, tmp_path, capsys, stage, alpha
):
    config = recipe(
        tiny_files, tmp_path / "runs", {"corpus": {"max_length": 3}, "distill": {"alpha": alpha}}
    )
    assert command(stage, config, tmp_path) == 2
    assert "No row of the corpus is left" in said(capsys)


def test_real_models_with_another_tokenizer_are_refused(assets, tmp_path, capsys):
    """stories260K has 512 ids; the corpus has the 49,152 of SmolLM2's tokenizer."""
    model = str(assets / "models" / "stories260K")
    config = make_config(
        {
            "preset": "paper",
            "name": "stories",
            "runs_dir": str(tmp_path / "runs"),
            "tokenizer": str(assets / "tokenizers" / "smollm2"),
            "corpus": {
                "sources": [
                    {"path": str(assets / "corpora" / "tinystories.jsonl"), "format": "text"}
                ],
                "template": "plain",
                "max_rows": 20,
            },
            "proxy": {"path": model},
            "student": {"init": {"path": model, "first_layers": 2}},
        }
    )
    assert command("align", config, tmp_path) == 2
    message = said(capsys)
    assert "must share one vocabulary" in message
    assert str(assets / "tokenizers" / "smollm2") in message and model in message
    assert left(config) == {"corpus"}
