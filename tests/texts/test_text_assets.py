"""Real files: each corpus and benchmark has its published counts and known traps.

The same tests on generated data are in the other files of this folder.
"""

import json
from collections import Counter

import pytest

from proxykd_jax.config.schema import SharesConfig, SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.contamination import ContaminationIndex
from proxykd_jax.texts.dedup import Deduplicator, PromptSet
from proxykd_jax.texts.readers import read_source, sought_in_corpus
from proxykd_jax.texts.records import Drops
from proxykd_jax.texts.split import split_name


def read(path, *, prompts_only=False, drops=None, **keys):
    source = SourceConfig(path=str(path), **keys)
    return list(read_source(source, prompts_only=prompts_only, drops=drops or Drops()))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("alpaca_eval/gpt4_0613.json", 488),
        ("alpaca_eval/vicuna-7b.json", 488),
        ("nectar_schema.jsonl", 488),
        ("openorca_schema.jsonl", 200),
        ("openorca_first_row.jsonl", 1),
        ("openorca_schema.1M-GPT4-Augmented.parquet", 200),
        ("orca_dpo_pairs_validation.jsonl", 200),
        ("gpteacher/codegen-instruct.json", 4535),
        ("gpteacher/toolformer-similarity-0.6-dataset.json", 2396),
        ("tinystories.jsonl", 1700),
    ],
)
def test_corpora_are_read_whole(assets, name, rows):
    drops = Drops()
    assert len(read(assets / "corpora" / name, drops=drops)) == rows
    assert not drops.total


def test_missing_answers_are_counted(assets):
    drops = Drops()
    assert len(read(assets / "corpora/alpaca_eval/text_davinci_003.json", drops=drops)) == 486
    assert drops.counts == {"empty answer": 2}


def test_nectar_takes_the_teachers_answers_whatever_their_rank(assets):
    path = assets / "corpora/nectar_schema.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [
        answer["answer"]
        for record in records
        for answer in record["answers"]
        if answer["model"].startswith("gpt-4")
    ]
    rows = read(path)
    assert [row.messages[-1].content for row in rows] == expected
    best = sum(
        answer["model"].startswith("gpt-4") and answer["rank"] == 1.0
        for record in records
        for answer in record["answers"]
    )
    assert best == 104 and len(expected) == 488
    same = [(r.messages, r.first_user_message) for r in read(
        assets / "corpora/nectar_schema.rlaif.parquet")]  # fmt: skip
    assert same == [(r.messages, r.first_user_message) for r in rows]


def test_openorca_parquet_equals_jsonl_and_needs_the_right_name(assets, tmp_path):
    rows = read(assets / "corpora/openorca_schema.jsonl")
    parquet = assets / "corpora/openorca_schema.1M-GPT4-Augmented.parquet"
    assert [r.messages for r in read(parquet)] == [r.messages for r in rows]
    copy = tmp_path / "3_5M-GPT3_5-Augmented.parquet"
    copy.write_bytes(parquet.read_bytes())
    with pytest.raises(UserError, match=r"answers of GPT-3\.5"):
        read(copy)
    (first,) = read(assets / "corpora/openorca_first_row.jsonl")
    assert [m.role for m in first.messages] == ["user", "assistant"]  # an empty system prompt


def test_the_same_prompts_in_two_corpora_share_their_splits(assets):
    """488 prompts occur in both files. None is in two splits, and no answer is lost."""
    nectar = read(assets / "corpora/nectar_schema.jsonl")
    alpaca = read(assets / "corpora/alpaca_eval/gpt4_0613.json")
    prompts = PromptSet(nectar)
    assert all(row in prompts for row in alpaca)
    splits = {}
    for row in nectar + alpaca:
        name = split_name(row.first_user_message, shares=SharesConfig(), validation_fraction=0.1)
        splits.setdefault(row.first_user_message, set()).add(name)
    assert all(len(names) == 1 for names in splits.values())
    assert set(Counter(min(names) for names in splits.values())) == {
        "warmup", "align", "distill", "validation"
    }  # fmt: skip
    seen = Deduplicator()
    kept = [row for row in nectar + alpaca if seen.is_new(row)]
    assert len(kept) == len({tuple(m.content for m in row.messages) for row in nectar + alpaca})


def test_fastchat_conversations_are_joined(assets):
    folder = assets / "corpora/fastchat"
    questions, answers = folder / "mt_bench_question.jsonl", folder / "mt_bench_gpt-4.jsonl"
    drops = Drops()
    rows = read(questions, answers=str(answers), drops=drops)
    assert len(rows) == 60 and drops.counts == {"no answer of the teacher": 50}
    assert [len(row.messages) for row in rows] == [2, 4] * 30
    assert len(read(questions, prompts_only=True)) == 80
    with pytest.raises(UserError, match="Name the file of answers"):
        read(questions)


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("gsm8k/train.jsonl", 7473),
        ("gsm8k/test.jsonl", 660),
        ("arc_challenge/ARC-Challenge-Test.jsonl", 586),
        ("arc_challenge/hf_layout_test.jsonl", 586),
        ("csqa/train_rand_split.jsonl", 9741),
        ("agieval/gaokao-mathcloze.jsonl", 118),
        ("agieval/math.jsonl", 1000),
        ("agieval/lsat-ar.jsonl", 230),
        ("bbh/word_sorting.json", 250),
        ("mmlu/dev", 285),
        ("mmlu/test/abstract_algebra_test.csv", 100),
        ("mmlu_header_variant/abstract_algebra_test.csv", 100),
    ],
)
def test_benchmarks_give_one_prompt_an_item(assets, path, count):
    drops = Drops()
    rows = read(assets / "eval" / path, prompts_only=True, drops=drops)
    assert len(rows) == count and not drops.total


def test_re_dumps_give_the_same_prompts(assets):
    for one, other in (
        ("arc_challenge/ARC-Challenge-Test.jsonl", "arc_challenge/hf_layout_test.jsonl"),
        ("mmlu/test/abstract_algebra_test.csv", "mmlu_header_variant/abstract_algebra_test.csv"),
    ):
        rows = [read(assets / "eval" / name, prompts_only=True) for name in (one, other)]
        assert [r.messages for r in rows[0]] == [r.messages for r in rows[1]]


@pytest.fixture(scope="module")
def benchmark_index(assets):
    names = ("gsm8k/test.jsonl", "arc_challenge", "agieval", "bbh", "mmlu/test")
    return ContaminationIndex.from_files([str(assets / "eval" / name) for name in names])


def test_ordinary_corpora_hold_no_benchmark_question(assets, benchmark_index):
    for name in ("alpaca_eval/gpt4_0613.json", "gpteacher", "openorca_schema.jsonl"):
        rows = read(assets / "corpora" / name, prompts_only=True)
        assert not [row for row in rows if row in benchmark_index]


def test_every_test_question_is_found_in_a_corpus(assets, benchmark_index):
    for name in (
        "gsm8k/test.jsonl",
        "arc_challenge/ARC-Challenge-Dev.jsonl",
        "arc_challenge/ARC-Challenge-Test.jsonl",
        "arc_challenge/hf_layout_test.jsonl",
        "bbh/date_understanding.json",
    ):
        rows = read(assets / "eval" / name, prompts_only=True)
        assert all(benchmark_index.match(row) for row in rows)
    path = str(assets / "eval/gsm8k/test.jsonl")
    questions = [sought.text for sought in sought_in_corpus(path)]
    long = [text for text in questions if len(text.split()) >= 13]
    assert len(long) > 600
    index = ContaminationIndex(questions)
    row = read(assets / "corpora/openorca_first_row.jsonl")[0]
    message = row.messages[0]
    for text in long:
        wrapped = type(message)("user", f"Solve this: {text}\nThink step by step.")
        assert index.match(type(row)((wrapped,), None, "f:1"))
