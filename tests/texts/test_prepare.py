"""prepare on generated corpora: no row is lost or leaks, and a killed run continues."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from proxykd_jax.artifacts import read_json, read_manifest, write_manifest
from proxykd_jax.config import load_config, make_config
from proxykd_jax.data.corpus import SPLITS, open_corpus, row_id_of
from proxykd_jax.errors import UserError
from proxykd_jax.prepare import main
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.row_limit import NO_ROOM, TOO_LONG, length_problem
from proxykd_jax.texts.selection import (
    BEYOND_MAX_ROWS,
    IN_BENCHMARK,
    IN_TEST,
    IN_VALIDATION,
    REPEATED,
)
from proxykd_jax.texts.split import split_name
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.tokenizer import load_tokenizer
from tests.forked import REPOSITORY, Forks

SENTENCE = "the cat sat on a mat and looked at every dog that ran past in warm rain"
WORDS = SENTENCE.split()


def sentence(rng, low=3, high=12):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def pairs(count, seed=0):
    rng = random.Random(seed)
    return [
        {"prompt": f"Question {seed}-{i}: {sentence(rng)}?", "response": sentence(rng, 2, 30)}
        for i in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_for(tmp_path, tokenizer, rows=None, *, name="run", preset="recommended", **corpus):
    if rows is not None:
        corpus.setdefault("sources", [{"path": write(tmp_path / "rows.jsonl", rows)}])
    corpus.setdefault("template", "plain")
    corpus.setdefault("max_length", 512)
    return make_config(
        {
            "preset": preset,
            "name": name,
            "runs_dir": str(tmp_path / "runs"),
            "tokenizer": str(tokenizer),
            "corpus": corpus,
            "proxy": {"path": "absent"},
            "student": {"path": "absent"},
        }
    )


def contents(corpus):
    """(split, tokens, prompt length) of every row."""
    return [
        (name, tuple(row.tokens.tolist()), row.prompt_length)
        for name in SPLITS
        for row in corpus.split(name)
    ]


def expected_rows(config, rows):
    renderer = Renderer(load_tokenizer(config), config.corpus.template, config.corpus.end_tokens)
    for row in rows:
        messages = (Message("user", row["prompt"]), Message("assistant", row["response"]))
        tokens, prompt_length = renderer.encode(TextRow(messages, None, "x"))
        yield tuple(tokens.tolist()), prompt_length


def drops_of(result, source="sources.0"):
    (entry,) = [e for label, e in result.counts["sources"].items() if label.startswith(source)]
    return {reason: dropped["count"] for reason, dropped in entry["drops"].items()}


def test_every_row_lands_in_its_split(tmp_path, llama_folder):
    rows = pairs(700)
    config = config_for(tmp_path, llama_folder, rows, shard_rows=100)
    result = main(config)
    corpus = open_corpus(result.folder)
    fraction = result.counts["validation_fraction"]
    assert fraction == pytest.approx(64 / 700)
    expected = [
        (
            split_name(row["prompt"], shares=config.corpus.shares, validation_fraction=fraction),
            *encoded,
        )
        for row, encoded in zip(rows, expected_rows(config, rows), strict=True)
    ]
    assert sorted(contents(corpus)) == sorted(expected)
    # Within a split rows keep the order of the file.
    align = [row for row in expected if row[0] == "align"]
    assert [row for row in contents(corpus) if row[0] == "align"] == align
    assert len(list(result.folder.glob("*align*-of-00003"))) == 3
    for name in ("warmup", "align", "distill", "validation"):
        counted = result.counts["splits"][name]
        assert counted["rows"] == len(corpus.split(name)) > 0
        assert counted["tokens"] == corpus.split(name).lengths.sum()
    assert len(corpus.split("test")) == len(corpus.split("fresh")) == 0
    assert corpus.end_token_ids == (2,) and corpus.tokenizer_path == str(llama_folder)


def test_order_of_the_file_does_not_matter(tmp_path, llama_folder):
    rows = pairs(300)
    first = main(config_for(tmp_path, llama_folder, rows, name="a"))
    random.Random(1).shuffle(rows)
    second = main(config_for(tmp_path, llama_folder, rows, name="b"))
    assert sorted(contents(open_corpus(first.folder))) == sorted(
        contents(open_corpus(second.folder))
    )


def test_funnel_adds_up(tmp_path, llama_folder, capsys):
    rows = pairs(200)
    rows += rows[:30]  # repeated rows
    rows += [{"prompt": f"long {i}", "response": "cat " * 300} for i in range(7)]
    rows += [{"prompt": "dog " * 300 + str(i), "response": "x"} for i in range(5)]
    rows += [{"prompt": f"empty {i}", "response": ""} for i in range(3)]
    result = main(config_for(tmp_path, llama_folder, rows, max_length=200, shard_rows=50))
    (source,) = result.counts["sources"].values()
    drops = drops_of(result)
    assert drops[REPEATED] == 30 and drops[TOO_LONG] == 7 and drops[NO_ROOM] == 5
    assert source["read"] == 245 and sum(drops.values()) == 45 and source["kept"] == 200
    kept = sum(split["rows"] for split in result.counts["splits"].values())
    assert kept == 200
    printed = capsys.readouterr().out
    assert "245 read, 200 kept" in printed and "7 left out: longer than max_length" in printed
    assert "45.0% expected" in printed
    assert max(open_corpus(result.folder).split("align").lengths) <= 200


def test_length_limits_are_inclusive():
    assert length_problem(100, 99, 100) is None
    assert length_problem(101, 99, 100) == TOO_LONG
    assert length_problem(101, 100, 100) == NO_ROOM
    assert length_problem(100, 100, 100) == NO_ROOM


def test_repeated_rows_stay_where_asked(tmp_path, llama_folder):
    rows = pairs(50)
    result = main(config_for(tmp_path, llama_folder, rows + rows, deduplicate=False))
    assert drops_of(result) == {}
    assert len(contents(open_corpus(result.folder))) == 100


def test_two_answers_to_one_prompt_are_two_rows_of_one_split(tmp_path, llama_folder):
    rows = [row | {"response": f"{row['response']} {i}"} for row in pairs(150) for i in range(2)]
    result = main(config_for(tmp_path, llama_folder, rows))
    splits = {}
    for name, tokens, prompt_length in contents(open_corpus(result.folder)):
        splits.setdefault(tokens[:prompt_length], []).append(name)
    assert len(splits) == 150
    assert all(len(names) == 2 and len(set(names)) == 1 for names in splits.values())


def test_held_out_prompts_are_nowhere_else(tmp_path, llama_folder):
    rows = pairs(400)
    test = [{"prompt": row["prompt"].upper(), "response": "test answer"} for row in rows[:25]]
    test += pairs(5, seed=9)
    fresh = [{"prompt": row["prompt"]} for row in rows] + [{"prompt": r["prompt"]} for r in test]
    fresh += [{"prompt": row["prompt"]} for row in pairs(40, seed=3)] * 2
    questions = pairs(6, seed=3)
    bench = write(tmp_path / "bench.jsonl", questions)
    config = config_for(
        tmp_path,
        llama_folder,
        rows,
        test=[{"path": write(tmp_path / "test.jsonl", test)}],
        fresh_prompts=[{"path": write(tmp_path / "fresh.jsonl", fresh)}],
        benchmarks=[bench],
    )
    result = main(config)
    corpus = open_corpus(result.folder)
    decode = load_tokenizer(llama_folder).decode
    prompts = {
        name: {decode(row.prompt).removeprefix("<s>").strip().lower() for row in corpus.split(name)}
        for name in SPLITS
    }
    assert len(prompts["test"]) == 30 and prompts["validation"]
    for held_out in ("test", "validation"):
        for other in SPLITS:
            assert other == held_out or not prompts[held_out] & prompts[other]
    assert drops_of(result)[IN_TEST] == 25
    drops = drops_of(result, "fresh_prompts.0")
    assert drops[IN_TEST] == 25 + 30
    assert drops[IN_VALIDATION] == len(corpus.split("validation"))
    assert drops[IN_BENCHMARK] >= 6
    # A training prompt may be a fresh prompt too; each prompt occurs once.
    assert prompts["fresh"] & prompts["align"]
    assert len(prompts["fresh"]) == len(corpus.split("fresh"))
    for row in corpus.split("fresh"):
        assert row.prompt_length == len(row.tokens)


def test_benchmark_questions_in_the_corpus(tmp_path, llama_folder):
    rows = pairs(100)
    bench = write(tmp_path / "bench.jsonl", rows[:4])
    keys = {"benchmarks": [bench], "name": "a"}
    with pytest.raises(UserError, match="4 rows hold questions"):
        main(config_for(tmp_path, llama_folder, rows, **keys))
    result = main(
        config_for(tmp_path, llama_folder, rows, **keys | {"name": "b"}, contamination="drop")
    )
    assert drops_of(result) == {IN_BENCHMARK: 4}


def test_max_rows_keeps_a_part_that_does_not_depend_on_order(tmp_path, llama_folder):
    rows = pairs(200)
    everything = set(contents(open_corpus(main(config_for(tmp_path, llama_folder, rows)).folder)))
    results = []
    for name in ("a", "b"):
        random.Random(name).shuffle(rows)
        result = main(config_for(tmp_path, llama_folder, rows, name=name, max_rows=60))
        assert drops_of(result) == {BEYOND_MAX_ROWS: 140}
        results.append(contents(open_corpus(result.folder)))
    assert sorted(results[0]) == sorted(results[1]) and len(results[0]) == 60
    assert {row[1:] for row in results[0]} <= {row[1:] for row in everything}


def test_max_rows_counts_rows_that_fit(tmp_path, llama_folder):
    long = {"prompt": "tell me", "response": "word " * 200}
    rows = [{**long, "prompt": f"tell me {n}"} for n in range(100)] + pairs(100)
    result = main(config_for(tmp_path, llama_folder, rows, max_rows=60, max_length=100))
    drops = drops_of(result)
    assert len(contents(open_corpus(result.folder))) == 60
    assert 20 < drops[TOO_LONG] < 100 and drops[TOO_LONG] + drops[BEYOND_MAX_ROWS] == 140


def test_many_sources_and_plain_texts(tmp_path, llama_folder):
    stories = [{"text": f"Story {i} began. {sentence(random.Random(i))}. End."} for i in range(40)]
    stories.append({"text": "One sentence."})
    config = config_for(
        tmp_path,
        llama_folder,
        sources=[
            {"path": write(tmp_path / "chat.jsonl", pairs(60))},
            {"path": write(tmp_path / "s1.jsonl", stories), "prompt_tokens": 4},
            {"path": write(tmp_path / "s2.jsonl", stories[20:]), "prompt_sentences": 1},
        ],
        deduplicate=False,
        preset="paper",
    )
    result = main(config)
    corpus = open_corpus(result.folder)
    kept = {label.split(" ")[0]: entry["kept"] for label, entry in result.counts["sources"].items()}
    assert kept == {"sources.0": 60, "sources.1": 41, "sources.2": 20}
    assert len(corpus.split("validation")) == 0  # the paper's preset has no validation rows
    lengths = np.concatenate([corpus.split(name).prompt_lengths for name in SPLITS])
    assert (lengths == 5).sum() >= 41  # BOS and four tokens


def stories(count, endings=3, seed=0):
    """Texts, of which several begin with the same sentence of nine or more words."""
    rng = random.Random(seed)
    begins = [f"Once {seed} there was {i} cat and {sentence(rng, 3, 5)}." for i in range(count)]
    return [{"text": f"{begin} {sentence(rng)}. End."} for begin in begins for _ in range(endings)]


@pytest.mark.parametrize("keys", [{}, {"prompt_tokens": 12}])
def test_stories_that_begin_alike_are_in_one_split(tmp_path, llama_folder, keys):
    rows = stories(80)
    found = {}
    for name in ("a", "b"):
        path = write(tmp_path / f"{name}.jsonl", rows)
        config = config_for(tmp_path, llama_folder, sources=[{"path": path, **keys}], name=name)
        found[name] = contents(open_corpus(main(config).folder))
        random.Random(1).shuffle(rows)
    assert sorted(found["a"]) == sorted(found["b"]) and len(found["a"]) == 240
    splits = {}
    for split, tokens, prompt_length in found["a"]:
        splits.setdefault(tokens[:prompt_length], []).append(split)
    assert all(len(set(names)) == 1 for names in splits.values())
    assert max(map(len, splits.values())) >= 3
    assert {names[0] for names in splits.values()} == {"warmup", "align", "distill", "validation"}


@pytest.mark.parametrize("keys", [{}, {"prompt_tokens": 12}])
def test_beginnings_of_held_out_stories_are_nowhere_else(tmp_path, llama_folder, keys):
    rows = stories(60)
    test = [{"text": row["text"].replace("End.", "Another end.")} for row in rows[:9]]
    fresh = [{"text": row["text"].split(".")[0] + ". Not told."} for row in rows]
    fresh += [{"text": f"{text} x"} for row in stories(5, 2, seed=7) for text in row.values()]
    # A prompt of one sentence contains this question, and a prompt of 12 tokens does not.
    question = stories(5, 2, seed=7)[0]["text"].split(".")[0] + "."
    config = config_for(
        tmp_path,
        llama_folder,
        sources=[{"path": write(tmp_path / "rows.jsonl", rows), **keys}],
        test=[{"path": write(tmp_path / "test.jsonl", test), **keys}],
        fresh_prompts=[{"path": write(tmp_path / "fresh.jsonl", fresh), **keys}],
        benchmarks=[write(tmp_path / "bench.jsonl", [{"prompt": question, "response": "x"}])],
    )
    result = main(config)
    corpus = open_corpus(result.folder)
    prompts = {name: {tuple(row.prompt.tolist()) for row in corpus.split(name)} for name in SPLITS}
    assert prompts["test"] and prompts["validation"] and prompts["fresh"]
    for held_out in ("test", "validation"):
        for other in SPLITS:
            assert other == held_out or not prompts[held_out] & prompts[other]
    assert drops_of(result)[IN_TEST] == 9
    drops = drops_of(result, "fresh_prompts.0")
    assert drops[IN_TEST] == 9 and drops[IN_VALIDATION] >= len(prompts["validation"])
    assert drops.get(IN_BENCHMARK, 0) == (0 if keys else 2)
    # Only the prompt of a fresh text is kept, so each occurs once.
    assert drops[REPEATED] > 0 and len(prompts["fresh"]) == len(corpus.split("fresh"))
    assert prompts["fresh"] & prompts["align"]


def test_no_template_for_conversations_is_said_before_work(tmp_path, llama_folder):
    with pytest.raises(UserError, match=r"rows.jsonl:1 is a conversation"):
        main(config_for(tmp_path, llama_folder, pairs(5), template="auto"))


def test_nothing_left_is_an_error_with_reasons(tmp_path, llama_folder):
    rows = pairs(3)
    bench = write(tmp_path / "bench.jsonl", rows)
    with pytest.raises(UserError, match=r"(?s)No row .*holds a benchmark question: 3"):
        main(config_for(tmp_path, llama_folder, rows, benchmarks=[bench], contamination="drop"))


def test_nothing_left_of_all_that_was_selected(tmp_path, llama_folder):
    rows = pairs(5)
    refuses = tmp_path / "refuses.jinja"
    refuses.write_text("{{ raise_exception('never') }}")
    with pytest.raises(
        UserError, match=r"(?s)No row .*chat template fails: never: 5 .*jsonl:[1-5]\)"
    ):
        main(config_for(tmp_path, llama_folder, rows, template=str(refuses)))
    with pytest.raises(UserError, match=r"(?s)No row .*leaves no room.*: 5"):
        main(config_for(tmp_path, llama_folder, rows, max_length=2))
    # Nothing of it stays, so the same run takes other settings.
    assert drops_of(main(config_for(tmp_path, llama_folder, rows))) == {}


def test_one_row_stops_no_corpus(tmp_path, llama_folder):
    rows = pairs(40)
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m['content'] }}|{% endfor %}"
    )
    odd = [rows[0] | {"system": "s"}, rows[1] | {"response": "\n\n(x)", "score": float("nan")}]
    result = main(config_for(tmp_path, llama_folder, [*rows, *odd], template=str(template)))
    assert drops_of(result) == {"the chat template fails: no system": 1}
    assert len(contents(open_corpus(result.folder))) == 41


def test_what_is_not_read_is_said(tmp_path, llama_folder, capsys):
    rows = pairs(30)
    rows[3]["remark"] = "never read"
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", pairs(5, seed=1))
    (folder / "readme.txt").write_text("text")
    result = main(config_for(tmp_path, llama_folder, sources=[{"path": str(folder)}]))
    (source,) = result.counts["sources"].values()
    note = {"count": 1, "first": f"{folder}/train.jsonl:4", "example": "never read"}
    assert source["notes"] == {"the key remark is not read": note}
    assert source["passed_over"] == {
        "readme.txt": "its ending is not read",
        "test.jsonl": "its name says test",
    }
    assert source["kept"] == 30
    printed = capsys.readouterr().out
    assert "1 row: the key remark is not read" in printed and "'never read'" in printed
    assert "2 files passed over: readme.txt (its ending is not read), test.jsonl" in printed


def test_a_corpus_that_was_read_otherwise_opens_but_is_not_taken(tmp_path, llama_folder):
    config = config_for(tmp_path, llama_folder, pairs(30))
    folder = main(config).folder
    record = read_manifest(folder)
    del record["inputs"]["reading_version"]
    write_manifest(folder, record)
    assert len(contents(open_corpus(folder))) == 30
    with pytest.raises(UserError, match=r"(?s)other settings.*reading_version: null then"):
        main(config)


def test_second_run_does_nothing_and_a_changed_one_says_so(tmp_path, llama_folder, bpe_folder):
    rows = pairs(80)
    config = config_for(tmp_path, llama_folder, rows)
    result = main(config)
    assert load_config(tmp_path / "runs" / "run" / "config.yaml") == config
    stamps = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
    assert main(config) == result
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")} == stamps
    # This key does not change the corpus:
    main(config_for(tmp_path, llama_folder, rows, validation_max_rows=5))
    changed = [
        (config_for(tmp_path, llama_folder, rows, max_length=256), "corpus.max_length"),
        (config_for(tmp_path, bpe_folder, rows), "tokenizer"),
        (config_for(tmp_path, llama_folder, rows, template="alpaca"), "template"),
        (config_for(tmp_path, llama_folder, rows, end_tokens=[1]), "end_tokens"),
    ]
    for other, key in changed:
        with pytest.raises(UserError, match=f"(?s)other settings.*{key}"):
            main(other)
    with pytest.raises(UserError, match=r"(?s)other settings.*rows\.jsonl"):
        main(config_for(tmp_path, llama_folder, pairs(81)))


# --- killed ---------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys
from proxykd_jax.config import load_config
real, left = os.replace, [int(sys.argv[2])]
def replace(source, target):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(source, target)
config = load_config(sys.argv[1])
import proxykd_jax.prepare
os.replace = replace
proxykd_jax.prepare.main(config)
"""


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_config(path, config):
    from proxykd_jax.config import dump_config

    path.write_text(dump_config(config))
    return str(path)


def test_killed_while_shards_are_committed(tmp_path, llama_folder):
    rows = pairs(300)
    whole = main(config_for(tmp_path, llama_folder, rows, name="whole", shard_rows=30))
    config = config_for(tmp_path, llama_folder, rows, name="killed", shard_rows=30)
    yaml = write_config(tmp_path / "c.yaml", config)
    folder = tmp_path / "runs" / "killed" / "corpus"
    # The kill comes between a shard's records and its index, or among the last renames.
    for replaces in (7, 25):
        run = subprocess.run([sys.executable, "-c", KILLED_AT, yaml, str(replaces)], check=False)
        assert run.returncode == -signal.SIGKILL
        assert read_json(folder / "manifest.json")["status"] == "running"
    assert main(config).counts == whole.counts
    assert snapshot(folder) == snapshot(whole.folder)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, llama_folder):
    rows = pairs(20_000)
    whole = main(config_for(tmp_path, llama_folder, rows, name="whole", shard_rows=500))
    config = config_for(tmp_path, llama_folder, rows, name="killed", shard_rows=500)
    yaml = write_config(tmp_path / "c.yaml", config)
    folder = tmp_path / "runs" / "killed" / "corpus"
    rng = random.Random(0)
    forks = Forks(os.environ)
    kills = 0
    while kills < 10:
        process = forks.start(
            "proxykd_jax.prepare", ("--config", yaml), cwd=REPOSITORY, output=tmp_path / "output"
        )
        before = len(list(folder.rglob("part_*")))
        while process.poll() is None and len(list(folder.rglob("part_*"))) < before + 2:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    forks.close()
    assert kills >= 5
    assert main(config).counts == whole.counts
    assert snapshot(folder) == snapshot(whole.folder)


def test_two_processes_at_once_make_one_corpus(tmp_path, llama_folder):
    rows = pairs(300)
    whole = main(config_for(tmp_path, llama_folder, rows, name="whole", shard_rows=30))
    config = config_for(tmp_path, llama_folder, rows, name="shared", shard_rows=30)
    yaml = write_config(tmp_path / "c.yaml", config)
    command = [sys.executable, "-m", "proxykd_jax.prepare", "--config", yaml]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("300 read, 300 kept" in text for text in printed) == 1
    assert snapshot(tmp_path / "runs" / "shared" / "corpus") == snapshot(whole.folder)


# --- the command, and real files ------------------------------------------------------------------


def test_command_line(tmp_path, llama_folder):
    yaml = write_config(tmp_path / "c.yaml", config_for(tmp_path, llama_folder, pairs(30)))
    command = [sys.executable, "-m", "proxykd_jax.prepare", "--config", yaml]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "30 read, 30 kept" in run.stdout
    run = subprocess.run(
        [*command, "--set", "tokenizer=/absent"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and run.stderr.startswith("error: /absent: there is no such folder")
    assert "Traceback" not in run.stderr


def test_real_corpora(tmp_path, assets):
    corpora = assets / "corpora"
    config = config_for(
        tmp_path,
        assets / "tokenizers" / "smollm2",
        sources=[
            {"path": str(corpora / "alpaca_eval" / "gpt4_0613.json")},
            {"path": str(corpora / "nectar_schema.jsonl")},
            {"path": str(corpora / "openorca_schema.jsonl")},
        ],
        template="auto",
        max_length=256,
    )
    result = main(config)
    corpus = open_corpus(result.folder)
    assert sum(entry["kept"] for entry in result.counts["sources"].values()) > 500
    for label, entry in result.counts["sources"].items():
        left = sum(dropped["count"] for dropped in entry["drops"].values())
        assert entry["read"] == entry["kept"] + left, label
    prompts = {name: {tuple(row.prompt.tolist()) for row in corpus.split(name)} for name in SPLITS}
    for name in SPLITS:
        for row in corpus.split(name):
            assert row.tokens[-1] == 2 and (row.answer == 2).sum() == 1
            assert row.row_id == row_id_of(row.tokens, row.prompt_length)
        for other in SPLITS:
            assert name == other or not prompts[name] & prompts[other]


def test_rows_with_several_answers_tools_and_thoughts(tmp_path, bpe_folder):
    from tests.texts.shapes import QWEN3

    template = tmp_path / "qwen3.jinja"
    template.write_text(QWEN3)
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]

    def record(number, arguments="{}", **first):
        call = {"id": "1", "function": {"name": "look_up", "arguments": arguments}}
        return {
            "tools": tools,
            "messages": [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": "The cat sat."} | first,
                {"role": "user", "content": "And the dog?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "It ran."},
                {"role": "assistant", "content": "The dog ran.", "reasoning_content": "It ran."},
            ],
        }

    rows = [*map(record, range(6)), record(6, "{"), record(7, reasoning="a cat"), record(8, loss=0)]
    path = write(tmp_path / "rows.jsonl", rows)
    config = config_for(
        tmp_path,
        bpe_folder,
        template=str(template),
        sources=[{"path": path, "turns": "all"}],
        validation_fraction=0,
        validation_rows=0,
    )
    counts = main(config).counts
    (source,) = counts["sources"].values()
    assert (source["read"], source["kept"]) == (9, 8)
    assert [reason for reason in source["drops"] if "arguments" in reason]
    (note,) = source["notes"]
    assert "leaves out its thought" in note and source["notes"][note]["count"] == 1
    corpus, decode = open_corpus(config.folder / "corpus"), load_tokenizer(bpe_folder).decode
    learnt = 0
    for name in SPLITS:
        for row in corpus.split(name):
            said = [decode(row.tokens[begin:end]) for begin, end in row.earlier.tolist()]
            call = '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call><|im_end|>'
            assert said in (["The cat sat.<|im_end|>", call], [call])
            thought = "<think>\nIt ran.\n</think>\n\nThe dog ran.<|im_end|>"
            assert decode(row.answer) == thought
            learnt += row.num_learnt
    assert learnt == sum(split["answer_tokens"] for split in counts["splits"].values())
