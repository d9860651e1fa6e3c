"""prepare on Apache Beam's local runner writes the same files as the local path."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from proxykd_jax.artifacts import read_json
from proxykd_jax.data.corpus import SPLITS, open_corpus
from proxykd_jax.errors import UserError
from proxykd_jax.prepare import main
from proxykd_jax.texts.row_limit import TOO_LONG
from proxykd_jax.texts.selection import BEYOND_MAX_ROWS, IN_BENCHMARK, IN_TEST, IN_VALIDATION
from proxykd_jax.texts.template import RESERVED_CHARACTERS
from tests.texts.test_prepare import (
    KILLED_AT,
    config_for,
    pairs,
    sentence,
    snapshot,
    stories,
    write,
    write_config,
)

REASON = "Apache Beam is absent; it has an environment of its own (requirements-beam.txt)"
beam = pytest.importorskip("apache_beam", reason=REASON)

ONE_WORKER: dict = {}
PROCESSES = {"options": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]}


def both(tmp_path, tokenizer, *, beam=ONE_WORKER, **corpus):
    """The results of the local path and of Beam; their folders are the same, file by file."""
    local = main(config_for(tmp_path, tokenizer, name="local", **corpus))
    spread = main(config_for(tmp_path, tokenizer, name="spread", beam=beam, **corpus))
    same_files(spread.folder, local.folder)
    assert spread.counts == local.counts
    assert not list(spread.folder.parent.rglob("*.tmp"))
    return local, spread


def same_files(folder, expected):
    """Both runs are equal byte for byte; manifests hold no times."""
    found, wanted = snapshot(folder), snapshot(expected)
    assert list(found) == list(wanted)
    differing = [name for name in found if found[name] != wanted[name]]
    assert not differing


def drops(result, label):
    (entry,) = [e for name, e in result.counts["sources"].items() if name.startswith(label)]
    return {reason: dropped["count"] for reason, dropped in entry["drops"].items()}


def many_sources(tmp_path):
    """Many files, with rows for each reason to leave a row out."""
    rng = random.Random(5)
    chat = tmp_path / "chat"
    (chat / "deeper").mkdir(parents=True)
    everything = []
    for number in range(5):
        rows = pairs(60, seed=number)
        rows += rng.sample(everything, min(15, len(everything)))  # rows that other files have too
        rows += rng.sample(rows, 10)  # rows that this file has twice
        rows += [{"prompt": f"long {number}.{i}", "response": "cat " * 300} for i in range(3)]
        rows += [{"prompt": f"empty {number}.{i}", "response": ""} for i in range(2)]
        rows += [{"prompt": f"odd {number}", "response": "a \U00108001 b"}]
        rows += [{"prompt": f"cut {number}", "response": "a b", "finish_reason": "length"}]
        rows += [{"prompt": f"marked {number}", "response": "a b</s>", "remark": f"r{number}"}]
        rows += [{"prompt": f"said {number}", "response": "c", "history": [[f"h{number}", "b"]]}]
        rng.shuffle(rows)
        everything += rows
        write(chat / ("deeper" if number % 2 else ".") / f"{number}.jsonl", rows)
    (chat / "array.json").write_text(json.dumps(pairs(20, seed=11) + pairs(20, seed=0)))
    write(chat / "deeper" / "test.jsonl", pairs(5, seed=31))  # passed over
    (chat / "notes.txt").write_text("passed over")
    write(chat / "nothing.jsonl", [{"prompt": "no answer", "response": ""}])  # it gives no row
    twice = rng.sample(everything, 40) + pairs(30, seed=12)
    test = [{"prompt": row["prompt"].upper(), "response": "t"} for row in everything[:30]]
    fresh = [{"prompt": row["prompt"]} for row in everything[:200]]
    fresh += [{"prompt": row["prompt"]} for row in pairs(40, seed=21)] * 2
    return {
        "sources": [
            {"path": str(chat)},
            {"path": write(tmp_path / "twice.jsonl", twice)},
            {"path": write(tmp_path / "few.jsonl", pairs(80, seed=13)), "limit": 25},
            {"path": write(tmp_path / "stories.jsonl", stories(20)), "prompt_tokens": 12},
            {"path": write(tmp_path / "sentences.jsonl", stories(25)), "prompt_sentences": 1},
        ],
        "test": [
            {"path": write(tmp_path / "test_a.jsonl", test + test[:3])},
            {"path": write(tmp_path / "test_b.jsonl", test[:5] + pairs(5, seed=9))},
        ],
        "fresh_prompts": [
            {"path": write(tmp_path / "fresh_a.jsonl", fresh)},
            {"path": write(tmp_path / "fresh_b.jsonl", fresh[::-1] + stories(4, seed=3))},
        ],
        "benchmarks": [
            write(tmp_path / "bench.jsonl", pairs(6, seed=21) + rng.sample(everything, 4))
        ],
        "contamination": "drop",
        "max_length": 120,
        "shard_rows": 20,
    }


def test_every_file_is_the_local_paths(tmp_path, llama_folder):
    local, _ = both(tmp_path, llama_folder, **many_sources(tmp_path))
    chat, fresh = drops(local, "sources.0"), drops(local, "fresh_prompts.0")
    for reason in (IN_TEST, IN_BENCHMARK, TOO_LONG, RESERVED_CHARACTERS):
        assert chat[reason] > 0, reason
    assert chat["repeats an earlier row"] > 50 and fresh["repeats an earlier row"] > 40
    assert fresh[IN_VALIDATION] > 0 and fresh[IN_TEST] > 0 and fresh[IN_BENCHMARK] > 0
    assert drops(local, "test.1")["repeats an earlier row"] == 5
    corpus = open_corpus(local.folder)
    assert all(len(corpus.split(name)) for name in SPLITS)
    assert len(list(local.folder.glob("*-distill.*"))) > 5


@pytest.mark.parametrize("keys", [{"max_rows": 150}, {"max_rows": 10_000}, {"deduplicate": False}])
def test_other_settings(tmp_path, llama_folder, keys):
    local, _ = both(tmp_path, llama_folder, **many_sources(tmp_path) | keys)
    assert (drops(local, "sources.0").get(BEYOND_MAX_ROWS, 0) > 0) == (keys.get("max_rows") == 150)


def test_equal_rows_around_max_rows(tmp_path, llama_folder):
    rows = pairs(40) * 3
    both(tmp_path, llama_folder, rows=rows, deduplicate=False, max_rows=50, shard_rows=7)


def test_a_file_that_repeats_another(tmp_path, llama_folder):
    paths = [write(tmp_path / f"{n}.jsonl", pairs(50, seed=n % 3)) for n in range(4)]
    sources = [{"path": path} for path in paths]
    local, _ = both(tmp_path, llama_folder, sources=sources, shard_rows=10)
    assert drops(local, "sources.3") == {"repeats an earlier row": 50}


def test_few_buckets_and_many(tmp_path, llama_folder, monkeypatch):
    from proxykd_jax.texts.beam import make

    corpus = many_sources(tmp_path)
    local = main(config_for(tmp_path, llama_folder, name="local", **corpus))
    for buckets in (1, 997):
        monkeypatch.setattr(make, "_FEWEST_BUCKETS", buckets)
        config = config_for(tmp_path, llama_folder, name=f"b{buckets}", beam=ONE_WORKER, **corpus)
        same_files(main(config).folder, local.folder)


@pytest.mark.slow
def test_several_processes(tmp_path, llama_folder):
    both(tmp_path, llama_folder, beam=PROCESSES, **many_sources(tmp_path) | {"max_rows": 200})


# --- who made it is no part of it -----------------------------------------------------------------


def test_either_path_accepts_the_others_corpus(tmp_path, llama_folder):
    rows = pairs(60)
    local = config_for(tmp_path, llama_folder, rows, name="a")
    spread = config_for(tmp_path, llama_folder, rows, name="a", beam=ONE_WORKER)
    for first, second in ((local, spread), (spread, local)):
        result = main(first)
        stamps = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")}
        assert main(second) == result
        assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*")} == stamps
        for path in sorted(result.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        result.folder.rmdir()


def _row_ids(folder, shard):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    return [row["row_id"].decode() for row in builder.as_data_source(f"align[{shard}shard]")]


def test_tfds_opens_it_and_beam_reads_it(tmp_path, llama_folder):
    """Beam reads it by shard, because ``ReadFromTFDS`` reads no ArrayRecord (TFDS 4.9.10)."""
    import tensorflow_datasets as tfds

    result = main(config_for(tmp_path, llama_folder, pairs(90), shard_rows=10, beam=ONE_WORKER))
    folder = str(result.folder)
    align = tfds.builder_from_directory(folder).info.splits["align"]
    wanted = sorted(row.row_id for row in open_corpus(result.folder).split("align"))
    assert len(wanted) == align.num_examples > 20 and align.num_shards > 2
    found = tmp_path / "row_ids"
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = (
            pipeline
            | beam.Create(range(align.num_shards))
            | beam.FlatMap(lambda shard: _row_ids(folder, shard))
            | beam.io.WriteToText(str(found), shard_name_template="")
        )
    assert sorted(found.read_text().split()) == wanted


# --- going on -------------------------------------------------------------------------------------


def test_committed_shards_are_not_written_again(tmp_path, llama_folder, monkeypatch):
    from proxykd_jax.data.corpus_writer import ShardWriter

    corpus = many_sources(tmp_path)
    whole = main(config_for(tmp_path, llama_folder, name="whole", **corpus))
    config = config_for(tmp_path, llama_folder, name="killed", beam=ONE_WORKER, **corpus)
    real, committed = ShardWriter.commit, []

    def commit(shard):
        if len(committed) >= 8:
            raise OSError("no space is left")
        real(shard)
        committed.append((shard._split, shard._shard))

    monkeypatch.setattr(ShardWriter, "commit", commit)
    with pytest.raises(Exception, match="no space is left"):
        main(config)
    assert not list(config.folder.rglob("*.tmp"))
    before = list(committed)
    monkeypatch.setattr(ShardWriter, "commit", lambda shard: (real(shard), committed.append(shard)))
    main(config)
    assert len(before) >= 8
    assert len(committed) == len(list((whole.folder / "index").glob("*/part_*")))
    same_files(config.folder / "corpus", whole.folder)


@pytest.mark.slow
def test_killed_while_shards_are_committed(tmp_path, llama_folder):
    corpus = many_sources(tmp_path)
    whole = main(config_for(tmp_path, llama_folder, name="whole", **corpus))
    config = config_for(tmp_path, llama_folder, name="killed", beam=ONE_WORKER, **corpus)
    yaml = write_config(tmp_path / "c.yaml", config)
    folder = tmp_path / "runs" / "killed" / "corpus"
    for replaces in (3, 90, 80):  # before the shards are written, then while they are written
        run = subprocess.run([sys.executable, "-c", KILLED_AT, yaml, str(replaces)], check=False)
        assert run.returncode == -signal.SIGKILL
        assert read_json(folder / "manifest.json")["status"] == "running"
    assert list(folder.rglob("part_*"))
    # The local path continues what Beam has begun.
    local = config_for(tmp_path, llama_folder, name="killed", **corpus)
    assert main(local).counts == whole.counts
    same_files(folder, whole.folder)


@pytest.mark.slow
def test_a_stop_asked_for_ends_it(tmp_path, llama_folder):
    config = config_for(tmp_path, llama_folder, pairs(20_000), beam=ONE_WORKER, shard_rows=500)
    yaml = write_config(tmp_path / "c.yaml", config)
    command = [sys.executable, "-m", "proxykd_jax.prepare", "--config", yaml]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(config.folder.rglob("scan")):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "stopped as asked" in said
    assert main(config).counts["sources"]


# --- mistakes -------------------------------------------------------------------------------------


def test_threads_that_lose_rows_are_refused(tmp_path, llama_folder):
    options = ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]
    config = config_for(tmp_path, llama_folder, pairs(20), beam={"options": options})
    with pytest.raises(UserError, match="multi_processing"):
        main(config)


def said(tmp_path, tokenizer, **corpus):
    """The messages of the local path and of Beam for the same mistake."""
    sentences = []
    for name, extra in (("local", {}), ("spread", {"beam": ONE_WORKER})):
        with pytest.raises(UserError) as caught:
            main(config_for(tmp_path, tokenizer, name=name, **corpus, **extra))
        sentences.append(str(caught.value))
        folder = tmp_path / "runs" / name
        assert not list(folder.rglob("*.tmp"))
    assert sentences[0] == sentences[1]
    return sentences[0]


def test_a_damaged_file_is_named_as_before(tmp_path, llama_folder):
    for number in range(6):
        write(tmp_path / f"{number}.jsonl", pairs(30, seed=number))
    for number in (2, 4):
        with open(tmp_path / f"{number}.jsonl", "a") as file:
            file.write("{half\n")
    text = said(tmp_path, llama_folder, sources=[{"path": str(tmp_path / "*.jsonl")}])
    assert "2.jsonl:31 is not JSON" in text


def test_rows_that_a_template_refuses(tmp_path, llama_folder):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if 'forbidden' in m.content %}"
        "{{ raise_exception('no such word') }}{% endif %}{{ m.content }}"
        "{% if m.role == 'user' %}\n###\n{% endif %}{% endfor %}"
    )
    for number in range(4):
        rows = pairs(40, seed=number)
        rows[7 * number]["prompt"] += "forbidden" if number in (1, 3) else ""
        write(tmp_path / f"{number}.jsonl", rows)
    sources = [{"path": str(tmp_path / "*.jsonl")}]
    local, _ = both(tmp_path, llama_folder, sources=sources, template=str(template), shard_rows=10)
    assert drops(local, "sources.0") == {"the chat template fails: no such word": 2}


def test_conversations_without_a_template(tmp_path, llama_folder):
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", pairs(20, seed=number) if number else stories(20))
    keys = {"sources": [{"path": str(tmp_path / "*.jsonl")}], "template": "auto"}
    text = said(tmp_path, llama_folder, shard_rows=10, **keys)
    assert "is a conversation, and the tokenizer" in text
    # No shard that lacks a row counts; with a template the corpus is the local one.
    both(tmp_path / "again", llama_folder, **keys | {"template": "plain"})


def test_rows_that_the_runner_loses_make_no_shard(tmp_path, llama_folder, monkeypatch):
    from proxykd_jax.texts.beam import write as beam_write

    real = beam_write.encode_piece

    def losing(folder, number):
        return list(real(folder, number))[number:]  # the last piece loses its first block

    monkeypatch.setattr(beam_write, "encode_piece", losing)
    paths = [write(tmp_path / f"{n}.jsonl", pairs(50, seed=n)) for n in range(2)]
    keys = {"sources": [{"path": path} for path in paths], "shard_rows": 10}
    config = config_for(tmp_path, llama_folder, beam=ONE_WORKER, **keys)
    with pytest.raises(RuntimeError, match="that lack rows"):
        main(config)
    monkeypatch.setattr(beam_write, "encode_piece", real)
    local = main(config_for(tmp_path, llama_folder, name="local", **keys))
    same_files(main(config).folder, local.folder)


def test_benchmark_questions_are_refused_in_the_same_words(tmp_path, llama_folder):
    corpus = many_sources(tmp_path) | {"contamination": "refuse"}
    assert "hold questions" in said(tmp_path, llama_folder, **corpus)


def test_nothing_left_and_nothing_usable(tmp_path, llama_folder):
    rows = pairs(6)
    bench = write(tmp_path / "bench.jsonl", rows)
    text = said(tmp_path, llama_folder, rows=rows * 2, benchmarks=[bench], contamination="drop")
    assert "holds a benchmark question: 6" in text and "repeats an earlier row: 6" in text
    text = said(tmp_path, llama_folder, rows=rows, max_length=2)
    assert "leaves no room" in text
    empty = [{"prompt": sentence(random.Random(n)), "response": ""} for n in range(3)]
    sources = [{"path": write(tmp_path / "empty.jsonl", empty)}]
    assert "gives no row" in said(tmp_path, llama_folder, sources=sources)


def test_the_command_and_its_mistakes(tmp_path, llama_folder):
    yaml = write_config(tmp_path / "c.yaml", config_for(tmp_path, llama_folder, pairs(30)))
    command = [sys.executable, "-m", "proxykd_jax.prepare", "--config", yaml, "--set"]

    def run(setting):
        return subprocess.run([*command, setting], capture_output=True, text=True, check=False)

    done = run("corpus.beam.runner=NoSuchRunner")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "\nerror: corpus.beam: the runner NoSuchRunner cannot" in f"\n{done.stderr}"
    assert "pip install 'proxykd_jax[beam]'" in done.stderr
    done = run('corpus.beam.options=["--direct_num_workers=many"]')
    assert done.returncode == 2 and "Beam refuses --direct_num_workers=many" in done.stderr
    done = run("corpus.beam.runner=DirectRunner")
    assert done.returncode == 0 and "30 read, 30 kept" in done.stdout, done.stderr


# --- real files -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_corpora(tmp_path, assets):
    corpora = assets / "corpora"
    local, _ = both(
        tmp_path,
        assets / "tokenizers" / "smollm2",
        sources=[
            {"path": str(corpora / "alpaca_eval" / "gpt4_0613.json")},
            {"path": str(corpora / "nectar_schema.jsonl")},
            {"path": str(corpora / "openorca_schema.1M-GPT4-Augmented.parquet")},
        ],
        template="auto",
        max_length=256,
        shard_rows=30,
    )
    assert sum(entry["kept"] for entry in local.counts["sources"].values()) > 500


@pytest.mark.slow
def test_real_stories(tmp_path, assets):
    both(
        tmp_path,
        assets / "models" / "stories260K",
        sources=[
            {
                "path": str(assets / "corpora" / "tinystories.jsonl"),
                "format": "text",
                "prompt_sentences": 1,
            }
        ],
        end_tokens=[1],
        max_rows=1000,
        shard_rows=100,
    )
