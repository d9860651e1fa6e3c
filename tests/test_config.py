"""The loader: strict, all mistakes in one message, nothing executed; presets; round trips."""

from __future__ import annotations

import copy
import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest

from proxykd_jax.config import Config, as_collect, as_config, dump_config, load_config, make_config
from proxykd_jax.config.keys import config_keys
from proxykd_jax.config.presets import PAPER, PRESETS, RECOMMENDED
from proxykd_jax.config.table_file import TableFile
from proxykd_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))

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
def write(tmp_path: Path):
    def write_config(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8", newline="")
        return path

    return write_config


def _minimal() -> dict[str, Any]:
    return {
        "preset": "paper",
        "name": "x",
        "corpus": {"sources": [{"path": "answers.jsonl"}]},
        "proxy": {"path": "big"},
        "student": {"path": "small"},
    }


def _message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_every_mistake_is_reported_at_once_with_a_suggestion(write):
    path = write("""\
preset: recomended
name: ../escape
name: again/..
corpus:
  sources:
    - path: answers.jsonl
      fromat: auto
proxy: {path: big, lora: {rnk: 8}}
student: {path: small}
align:
  num_rounds: 0
  learning_rate: 1e-3
  optimizer: {learning_rate: fast}
  preference: {loss: dop}
distill: {alpha: -1, epochs: 2.5}
""")
    lines = _message(path).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    problems = dict(line.removeprefix(f"{path}: ").split(": ", 1) for line in lines)
    assert "did you mean 'recommended'" in problems["preset"]
    assert problems["name"].startswith(("repeated on line 3", "must match"))
    assert any("name: repeated on line 3 (first on line 2); keep one" in line for line in lines)
    assert "did you mean 'format'" in problems["corpus.sources.0.fromat"]
    assert "did you mean 'rank'" in problems["proxy.lora.rnk"]
    assert "greater than 0 (got 0)" in problems["align.num_rounds"]
    assert "did you mean 'align.optimizer.learning_rate'" in problems["align.learning_rate"]
    assert 'valid number (got "fast")' in problems["align.optimizer.learning_rate"]
    assert "did you mean 'dpo'" in problems["align.preference.loss"]
    assert "greater than or equal to 0" in problems["distill.alpha"]
    assert "valid integer" in problems["distill.epochs"]
    # A list whose only entry is wrong does not count as empty, and a preset fills in omitted keys.
    assert set(problems) == {
        "preset",
        "name",
        "corpus.sources.0.fromat",
        "proxy.lora.rnk",
        "align.num_rounds",
        "align.learning_rate",
        "align.optimizer.learning_rate",
        "align.preference.loss",
        "distill.alpha",
        "distill.epochs",
    }


def test_no_preset_is_a_mistake_of_its_own(write):
    message = _message(write(MINIMAL.replace("preset: recommended\n", "")))
    assert message.count("\n") == 0
    assert "preset: required" in message


@pytest.mark.parametrize(
    "text, number",
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.5e-4", 2.5e-4), ("3", 3.0), ("1e+2", 100.0)],
)
def test_numbers_are_numbers(write, text, number):
    config = load_config(write(MINIMAL + f"align: {{optimizer: {{learning_rate: {text}}}}}\n"))
    assert config.align.optimizer.learning_rate == number


@pytest.mark.parametrize("text", ['"1e-5"', "true", ".nan", ".inf", "0", "-1e-5", "[1]", "null"])
def test_what_is_no_learning_rate(write, text):
    path = write(MINIMAL + f"align: {{optimizer: {{learning_rate: {text}}}}}\n")
    assert "align.optimizer.learning_rate: " in _message(path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("!!python/object/apply:os.system [touch pwned]", "python/object/apply"),
        ("!!python/name:os.system", "python/name"),
        ("!!binary aGVsbG8=", "binary"),
        ("!!set {a}", "set"),
        ("!!timestamp 2001-01-01", "timestamp"),
        ("[&x a, *x]", "aliases"),
        ("&x [*x]", "aliases"),
        ("{? [a] : 1}", "plain text"),
        ('"\\ud83d"', "surrogate"),
        ("\x00", "not allowed"),
        ("[" * 5000, "nested too deeply"),
        ("[1", "on line"),
        ("a\n---\nb: 1", "another document"),
    ],
)
def test_yaml_that_is_refused(write, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    message = _message(write(MINIMAL + f"tokenizer: {text}\n"))
    assert said in message
    assert str(tmp_path / "config.yaml") in message
    assert not (tmp_path / "pwned").exists()


def test_dates_stay_text(write):
    assert load_config(write(MINIMAL + "tokenizer: 2024-01-01\n")).tokenizer == "2024-01-01"


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "text\n", "3\n"])
def test_what_is_no_mapping(write, text):
    assert "required" in (message := _message(write(text))) or "mapping of keys" in message


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in _message(tmp_path / "absent.yaml")
    assert "directory" in _message(tmp_path)
    (tmp_path / "latin").write_bytes("name: é".encode("latin-1"))
    assert "not UTF-8" in _message(tmp_path / "latin")


@pytest.mark.parametrize("name", ["a", "run-1_b.c", "A" * 64, "..."])
def test_run_names(name):
    assert make_config({**_minimal(), "name": name}).name == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a b", "a\n", "A" * 65, "é", 3])
def test_names_that_are_no_folder_name(name):
    with pytest.raises(UserError, match="name"):
        make_config({**_minimal(), "name": name})


def test_set_changes_one_key(write):
    path = write(MINIMAL)
    config = load_config(
        path,
        [
            "align.num_rounds=2",
            "align.optimizer.learning_rate=1e-5",
            "align.optimizer.clip_norm=null",
            "corpus.sources.0.format=alpaca",
            "corpus.end_tokens=[1, '</s>']",
            "corpus.template=a=b.jinja",
        ],
    )
    assert config.align.num_rounds == 2
    assert config.align.optimizer.learning_rate == 1e-5
    assert config.align.optimizer.clip_norm is None
    assert config.corpus.sources[0].format == "alpaca"
    assert config.corpus.sources[0].path == "answers.jsonl"
    assert config.corpus.end_tokens == (1, "</s>")
    assert config.corpus.template == "a=b.jinja"
    assert config.align.epochs_per_round == load_config(path).align.epochs_per_round


@pytest.mark.parametrize(
    "override, said",
    [
        ("align.num_rounds", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("align.rounds=3", "did you mean 'num_rounds'"),
        ("align=3", "section of keys"),
        ("proxy.path.x=1", "path is a value"),
        ("corpus.sources.7.path=a", "7 is no index of a list of 1"),
        ("corpus.sources.x.path=a", "x is no index"),
        ("corpus.sources=a", "should be a list"),
        ("corpus.sources=[]", "needs at least 1 entry"),
        ("name=", "must match"),
        ("name=[", "--set name=["),
        ("seed=1e3", "valid integer"),
        ("align.preference.share_prompt=both", "share_prompt: must be 'auto', true or false"),
        ("seed=!!python/name:os.system", "python/name"),
    ],
)
def test_set_that_is_wrong(write, override, said):
    assert said in _message(write(MINIMAL), override)


# --- paths ----------------------------------------------------------------------------------------


PATHS = [key for key, kind, *_ in config_keys() if "path" in re.split(r"\W+", kind)]
TABLE_PATHS = [key for key, kind, *_ in config_keys(TableFile) if "path" in re.split(r"\W+", kind)]
# Text that is compared with a file's name.
NO_PATHS = re.compile(r"(corpus\.(sources|fresh_prompts|test)|collect\.prompts)\[\]\.teacher")
# What a section needs beside a path in it.
BESIDE = {
    "align.sampling.server": {"url": "http://127.0.0.1:8000", "api": "vllm"},
    "collect": {
        "prompts": [{"path": "p"}],
        "folder": "f",
        "url": "http://127.0.0.1:8000",
        "model": "m",
    },
    "evaluate.benchmarks": {"gsm8k": "gsm8k.jsonl"},
    "proxy.init": {"first_layers": 1},
    "student.init": {"first_layers": 1},
}


@pytest.mark.parametrize("root", [Config, TableFile])
def test_every_key_that_speaks_of_a_file_or_folder_is_a_path(root):
    keys = [row for row in config_keys(root) if {"text", "path"} & set(re.split(r"\W+", row[1]))]
    speak = {
        key
        for key, _, _, meaning in keys
        if re.search(r"\b(files?|folders?|paths?|recipe)\b|\.jsonl?\b", meaning)
    }
    paths = PATHS if root is Config else TABLE_PATHS
    assert {key for key in speak if not NO_PATHS.fullmatch(key)} - set(paths) == set()


def _with(key: str, text: str) -> dict[str, Any]:
    """The minimal config with one more path."""
    data = _minimal()
    *parents, last = key.split(".")
    node, place = data, ""
    for parent in parents:
        place = f"{place}.{parent}".lstrip(".")
        inner = {} if parent.endswith("[]") else dict(node.get(parent, {}))
        inner |= BESIDE.get(place, {})
        node[parent.removesuffix("[]")] = [inner] if parent.endswith("[]") else inner
        node = inner
    kind = next(kind for known, kind, *_ in config_keys() if known == key)
    node[last] = [text] if kind.startswith("list") else text
    if last == "answers":
        node["path"] = "questions.jsonl"
    if "init" in parents:
        del data[parents[0]]["path"]
    return data


def _at(node: Any, key: str) -> str:
    for part in key.split("."):
        node = getattr(node, part.removesuffix("[]"))
        node = node[0] if isinstance(node, tuple) else node
    return node


@pytest.mark.parametrize("key", PATHS)
def test_a_path_may_hold_variables_and_a_home(monkeypatch, key):
    monkeypatch.setenv("SOME_FOLDER", "/data")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("ABSENT_FOLDER", raising=False)
    for text, meant in {
        "$SOME_FOLDER/a": "/data/a",
        "x/${SOME_FOLDER}_b": "x//data_b",
        "~/a": "/home/somebody/a",
        "x~/a": "x~/a",
        "owner/name": "owner/name",
    }.items():
        config = make_config(_with(key, text))
        assert _at(config, key) == meant
        assert make_config(config.model_dump(mode="json")) == config
    with pytest.raises(UserError) as caught:
        make_config(_with(key, "${ABSENT_FOLDER}/a"), ["seed=-1"])
    lines = str(caught.value).split("\n")
    assert len(lines) == 2 and any("seed: " in line for line in lines)
    (line,) = (line for line in lines if "seed" not in line)
    place, said = line.removeprefix("config: ").split(": ", 1)
    assert re.sub(r"\.0\b", "", place) == key.replace("[]", "")
    assert said == (
        "the environment variable ABSENT_FOLDER is not set; set it, or write the path out "
        '(got "${ABSENT_FOLDER}/a")'
    )


def test_a_named_model_has_a_path_after_its_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    models = ["a.b=~/m", "~/m", "x/a=~/m", "student:best", "http://host:1/~a#m"]
    config = make_config(
        {**_minimal(), "evaluate": {"benchmarks": {"arc": "hub:a#b", "models": models}}}
    )
    found = ("a.b=/home/somebody/m", "/home/somebody/m", *models[2:])
    assert config.evaluate.benchmarks.models == found


def test_text_that_is_no_path_is_left_alone():
    for key, text in {"logging.wandb_project": "$X", "corpus.sources.0.subset": "~"}.items():
        dumped = make_config(_minimal(), [f"{key}='{text}'"]).model_dump(mode="json")
        for part in key.split("."):
            dumped = dumped[int(part) if part.isdigit() else part]
        assert dumped == text


def test_make_config_takes_paths_and_refuses_objects():
    data = _minimal()
    data["proxy"]["path"] = Path("big")
    assert make_config(data).proxy.path == "big"
    data["seed"] = object()
    with pytest.raises(UserError, match="plain data"):
        make_config(data)


def test_the_callers_dictionary_is_left_alone(monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "/data")
    data = {**_minimal(), "tokenizer": "$SOME_FOLDER/t"}
    before = repr(data)
    make_config(data, ["align.num_rounds=2"])
    assert repr(data) == before


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_what_is_dumped_is_read_back(tmp_path, preset):
    config = make_config(
        {**_minimal(), "preset": preset, "corpus": {"sources": [{"path": "ü.jsonl"}]}},
        ["corpus.end_tokens=[1, '</s>']", "align.optimizer.eps=1e-12", "mesh.data=rest"],
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    "section, said",
    [
        ({"proxy": {"path": "a", "init": {"path": "b", "first_layers": 2}}}, "exactly one of path"),
        ({"student": {}}, "exactly one of path"),
        ({"corpus": {"sources": [{"path": "a", "dataset": "b"}]}}, "exactly one of path, dataset"),
        (
            {"corpus": {"sources": [{"path": "a", "prompt_tokens": 3, "prompt_sentences": 1}]}},
            "not",
        ),
        (
            {"corpus": {"sources": [{"path": "a"}], "shares": {"warmup": 0.5}}},
            "must add up to 1",
        ),
        ({"align": {"preference": {"margin": 0.5}}}, "dpo would ignore 0.5"),
        (
            {"align": {"preference": {"loss": "simpo", "length_normalize": True}}},
            "simpo would ignore it",
        ),
        ({"mesh": {"data": "all"}}, "rest"),
        ({"mesh": {"fsdp": 0}}, "greater than 0"),
    ],
)
def test_keys_that_do_not_go_together(section, said):
    with pytest.raises(UserError, match=said):
        make_config({**_minimal(), **section})


def test_a_config_is_frozen_and_comparable():
    config = make_config(_minimal())
    with pytest.raises(Exception, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    assert config == make_config(_minimal())
    assert config != make_config(_minimal(), ["seed=1"])


# --- presets --------------------------------------------------------------------------------------


def _leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in node.items():
        inner = isinstance(value, dict)
        leaves.update(_leaves(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return leaves


def test_both_presets_fill_the_same_keys():
    assert set(_leaves(PAPER)) == set(_leaves(RECOMMENDED))


def _says(cell: str, value: Any) -> bool:
    """Whether a cell of the documentation's table holds a value."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value] in cell
    if isinstance(value, str):
        return value in cell
    return value in [float(number) for number in re.findall(r"\d[\d.]*(?:e-?\d+)?", cell)]


def test_the_documentation_lists_both_presets_with_a_reason():
    """Each key has its two values; each difference names a measurement, or says there is none."""
    text = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8")
    table = text.partition("## The presets")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    paper, recommended = _leaves(PAPER), _leaves(RECOMMENDED)
    for key in paper:
        found = [
            row
            for row in rows
            if any(fnmatch.fnmatchcase(key, name) for name in re.findall(r"`([^`]+)`", row[0]))
        ]
        assert len(found) == 1, f"{key} stands in {len(found)} rows of the table"
        _, first, second, why = found[0]
        assert _says(first, paper[key]), f"{key}: {paper[key]} is not in {first!r}"
        if paper[key] == recommended[key]:
            continue
        assert _says(second, recommended[key]), f"{key}: {recommended[key]} is not in {second!r}"
        named = any(place in why for place in ("log.md", "results.md", "ot measured here yet"))
        assert named, f"{key}: no measurement named"


def test_presets_fill_exactly_the_keys_without_a_default():
    """A preset has every key without a default; without any of its keys loading fails."""
    assert Config.model_validate(_on_paper()) == make_config(_minimal())
    for key in _leaves(PAPER):
        data = _on_paper()
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        del node[last]
        with pytest.raises(ValueError, match=rf"(?m)^{re.escape(key)}$"):
            Config.model_validate(data)


def _on_paper() -> dict[str, Any]:
    """The minimal config with the paper's preset written out."""
    data = copy.deepcopy({**PAPER, **_minimal()})
    data["corpus"] = {**PAPER["corpus"], **data["corpus"]}
    return data


def test_the_paper_preset_has_the_papers_values():
    config = make_config(_minimal())
    assert config.corpus.max_length == 1024
    assert (config.corpus.shares.warmup, config.corpus.shares.align) == (0.10, 0.45)
    assert config.align.num_rounds == 16
    assert config.align.nll_weight == config.align.preference_weight == 1
    assert config.align.preference.loss == "dpo"
    assert (config.align.sampling.temperature, config.align.sampling.top_p) == (1, 1)
    assert config.score.top_k == 10
    assert config.score.temperature == 1
    assert config.distill.alpha == 100
    assert config.distill.tail == "renormalize_proxy"
    assert config.distill.weights.loglik == "sum"
    assert not config.distill.weights.normalize
    for stage in (config.align, config.distill):
        optimizer = stage.optimizer
        assert (optimizer.learning_rate, optimizer.schedule) == (1e-5, "constant")
        assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.999, 0)
        assert optimizer.clip_norm is None and optimizer.warmup_steps == 0
        assert not stage.stop.enabled
    assert config.distill.epochs == config.align.epochs_per_round == 1
    assert config.corpus.validation_fraction == config.corpus.validation_rows == 0
    for model in (config.proxy, config.student):
        assert (model.trainable, model.dtype) == ("lora", "bfloat16")
        assert (model.lora.rank, model.lora.alpha, model.lora.dropout) == (16, 32, 0)


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path, monkeypatch):
    monkeypatch.setenv("PROXYKD_ASSETS", "/assets")
    config = load_config(path)
    assert config.name == path.stem


PUBLISHED_PARAMETERS = {  # billions
    "llama2_70b": 68.98,
    "llama2_13b": 13.02,
    "llama2_7b": 6.74,
    "llama1_7b": 6.74,
    "qwen2_5_32b": 32.76,
    "qwen2_5_7b": 7.62,
    "tinyllama_1b": 1.10,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED_PARAMETERS))
def test_published_shapes_have_the_published_number_of_parameters(name):
    import jax

    from proxykd_jax.models.hf_config import read_config
    from proxykd_jax.models.params import abstract_params

    params = abstract_params(read_config(REPOSITORY / "configs" / "models" / name))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total / 1e9 == pytest.approx(PUBLISHED_PARAMETERS[name], abs=0.005)


def test_every_recipe_of_the_paper_names_its_shapes():
    named = {
        model.config
        for path in RECIPES
        if "config: " in path.read_text()
        for model in (load_config(path).proxy, load_config(path).student)
    }
    assert named == {f"configs/models/{name}" for name in PUBLISHED_PARAMETERS}


def test_a_config_is_taken_in_every_form(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    config = load_config(path)
    for given in (path, str(path), config, config.model_dump(mode="json")):
        assert as_config(given) == config
    with pytest.raises(UserError, match="not as int"):
        as_config(3)
    with pytest.raises(UserError, match="collect: required"):
        as_collect(config)
    section = {"prompts": [{"path": tmp_path}], "folder": "f", "url": "http://h:1", "model": "m"}
    found = as_collect({"collect": section})
    assert as_collect(found) is found and found.model == "m"
