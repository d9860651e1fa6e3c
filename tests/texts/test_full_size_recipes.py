"""The full-size recipes prepare the official files, with generated answers and other tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxykd_jax import prepare
from proxykd_jax.config import load_config
from proxykd_jax.data.corpus import open_corpus
from tests.conftest import REPOSITORY

# Recipe -> those whose corpus is the same but for the number of its rows.
RECIPES = {
    "llama2_70b_to_7b": (
        *("llama1_7b_student", "llama2_13b_to_7b", "llama2_70b_to_7b_one_gpu"),
        "llama2_7b_to_1b_one_gpu",
    ),
    "qwen2_5_32b_to_7b": (),
}
# Where the recipes expect a file -> where the folder of assets has it, or what stands for it.
FILES = {
    "OpenOrca/1M-GPT4-Augmented.parquet": "corpora/openorca_schema.1M-GPT4-Augmented.parquet",
    "Nectar/rlaif.parquet": "corpora/nectar_schema.rlaif.parquet",
    "gsm8k/train.jsonl": "eval/gsm8k/train.jsonl",
    "ai2_arc/ARC-Challenge-Train.jsonl": "eval/arc_challenge/ARC-Challenge-Dev.jsonl",
    "commonsense_qa/train_rand_split.jsonl": "eval/csqa/train_rand_split.jsonl",
    **{f"eval/{name}": f"eval/{name}" for name in ("gsm8k", "arc_challenge", "csqa")},
    **{f"eval/{name}": f"eval/{name}" for name in ("mmlu", "bbh", "agieval")},
}
ANSWERS = {
    "gsm8k_train": "gsm8k/train.jsonl",
    "arc_challenge_train": "ai2_arc/ARC-Challenge-Train.jsonl",
    "csqa_train": "commonsense_qa/train_rand_split.jsonl",
}


@pytest.fixture
def data(assets, tmp_path, monkeypatch) -> Path:
    """A folder with ``data/`` as the recipes name it, as the working directory."""
    for name, place in FILES.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(assets / place)
    (tmp_path / "data" / "gpt4").mkdir()
    for name, prompts in ANSWERS.items():
        with (tmp_path / "data" / "gpt4" / f"{name}.jsonl").open("w") as file:
            for line in (tmp_path / "data" / prompts).read_text().splitlines():
                row = json.loads(line)
                key = {"id": row["id"]} if "id" in row else {"prompt": row["question"]}
                answer = {**key, "response": f"The answer is {len(line) % 97}."}
                file.write(json.dumps(answer) + "\n")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_prepare_of_the_official_files_comes_to_its_end(name, data, assets, capsys) -> None:
    """The four rows of GSM8K's training set that its test set holds too are dropped and counted."""
    tokenizer = assets / "tokenizers" / ("smollm2" if name.startswith("qwen") else "llama2")
    paths = [f"{role}.path={tokenizer}" for role in ("proxy", "student")]
    config = load_config(f"configs/{name}.yaml", [f"runs_dir={data / 'runs'}", *paths])
    prepare.main(config)
    corpus = open_corpus(config.folder / "corpus")
    assert sum(len(corpus.split(split)) for split in ("warmup", "align", "distill")) > 15_000
    said = capsys.readouterr().out
    assert "4 left out: holds a benchmark question (data/gsm8k/train.jsonl:21)" in said


@pytest.mark.parametrize("name", RECIPES)
def test_other_recipes_have_the_same_corpus(name) -> None:
    def corpus(recipe: str) -> dict:
        return load_config(REPOSITORY / "configs" / f"{recipe}.yaml").corpus.model_dump()

    ours = corpus(name)
    for other in RECIPES[name]:
        assert corpus(other) | {"max_rows": ours["max_rows"]} == ours, other
