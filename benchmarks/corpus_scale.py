"""Prepares and streams a generated corpus at two sizes: the rates, and whether memory grows.

    python benchmarks/corpus_scale.py --rows 1000000 --tokenizer FOLDER

Rows are prompts and answers of English prose (the documentation inside Python's library). Their
lengths resemble a teacher's: medians of 35 and 120 words, long tails. Each step runs in its own
process, whose peak memory is read when it ends. The command prints a JSON line for each step, and a
table.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Writes a JSONL corpus without repeated rows."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for row in range(count):
            prompt, answer = (
                _passage(words, rng, round(rng.lognormvariate(mu, sigma)))
                for mu, sigma in ((3.55, 0.8), (4.8, 0.7))
            )
            record = {"prompt": f"Question {row}: {prompt}?", "response": answer}
            file.write(json.dumps(record) + "\n")


def _passage(words: list[str], rng: random.Random, length: int) -> str:
    start = rng.randrange(len(words) - max(length, 3))
    return " ".join(words[start : start + max(length, 3)])


def make_tokenizer(folder: Path) -> Path:
    """Trains a byte-level BPE of 32,000 tokens on the same prose."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    return folder


def run_config(work: Path, tokenizer: str, rows: int) -> Any:
    """The config of one size, with the paper's lengths."""
    from proxykd_jax.config import make_config

    return make_config(
        {
            "preset": "recommended",
            "name": f"rows_{rows}",
            "runs_dir": str(work / "runs"),
            "tokenizer": tokenizer,
            "corpus": {
                "sources": [{"path": str(work / f"rows_{rows}.jsonl")}],
                "template": "plain",
                "max_length": 1024,
            },
            "proxy": {"path": tokenizer},
            "student": {"path": tokenizer},
        }
    )


def measure_prepare(work: Path, tokenizer: str, rows: int) -> dict[str, Any]:
    """Turns the text into a tokenised, split corpus."""
    from proxykd_jax.prepare import main as prepare

    result = prepare(run_config(work, tokenizer, rows))
    splits = result.counts["splits"].values()
    return {
        "rows": sum(split["rows"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits),
    }


def measure_stream(work: Path, tokenizer: str, rows: int, batching: str) -> dict[str, Any]:
    """Streams one epoch over D_w, D_p and D_s in batches of 32."""
    from proxykd_jax.data.corpus import open_corpus
    from proxykd_jax.data.order import default_buckets, plan_epoch
    from proxykd_jax.data.stream import BatchStream
    from proxykd_jax.training.batches import Joined, token_collate

    corpus = open_corpus(work / "runs" / f"rows_{rows}" / "corpus")
    joined = Joined({name: corpus.split(name) for name in ("warmup", "align", "distill")})
    plan = plan_epoch(
        joined.lengths - 1,
        seed=0,
        epoch=0,
        batch_size=32,
        batching=batching,  # type: ignore[arg-type]
        buckets=default_buckets(1024),
    )
    seen = tokens = positions = 0
    shapes = set()
    for batch in BatchStream(lambda epoch: plan, token_collate(joined), 0, len(plan)):
        seen += int(batch.example_mask_BS.sum())
        tokens += int((batch.segment_ids_BL > 0).sum())
        positions += batch.tokens_BL.size
        shapes.add(batch.tokens_BL.shape)
    if seen != len(joined):
        raise RuntimeError(f"{seen} rows were streamed of {len(joined)}.")
    return {"rows": seen, "tokens": tokens, "filled": tokens / positions, "shapes": len(shapes)}


def in_a_process(step: str, work: Path, tokenizer: str, rows: int) -> dict[str, Any]:
    """Runs one step in a fresh process and returns its figures."""
    command = [sys.executable, __file__, "--step", step, "--work", str(work)]
    command += ["--rows", str(rows), "--tokenizer", tokenizer]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_step(step: str, work: Path, tokenizer: str, rows: int) -> None:
    """Runs the step and prints a line of figures; the fresh process calls it."""
    wall, cpu = time.perf_counter(), time.process_time()
    if step == "prepare":
        figures = measure_prepare(work, tokenizer, rows)
    else:
        figures = measure_stream(work, tokenizer, rows, step.removeprefix("stream_"))
    figures |= {
        "step": step,
        "of": rows,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB,
    }
    print(json.dumps(figures))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the larger corpus")
    parser.add_argument("--tokenizer", help="its folder (default: a new BPE is trained)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/corpus_scale"), help="folder for files"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work: Path = arguments.work
    if arguments.step:
        run_step(arguments.step, work, arguments.tokenizer, arguments.rows)
        return
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = arguments.tokenizer or str(make_tokenizer(work / "tokenizer"))
    results = []
    for rows in (arguments.rows // 10, arguments.rows):
        text = work / f"rows_{rows}.jsonl"
        write_rows(text, rows)
        print(f"{rows:,} rows, {text.stat().st_size / 1e6:,.0f} MB of text", flush=True)
        for step in ("prepare", "stream_bucket", "stream_pack"):
            results.append(in_a_process(step, work, tokenizer, rows))
            print(json.dumps(results[-1]), flush=True)
        text.unlink()
        shutil.rmtree(work / "runs" / f"rows_{rows}")
    print(f"{'step':15}{'rows':>11}{'rows/s':>9}{'tokens/s':>11}{'CPU s':>8}{'peak MiB':>10}")
    for result in results:
        seconds = result["wall_seconds"]
        print(
            f"{result['step']:15}{result['of']:>11,}{result['rows'] / seconds:>9,.0f}"
            f"{result['tokens'] / seconds:>11,.0f}{result['cpu_seconds']:>8.0f}"
            f"{result['peak_mib']:>10,.0f}"
        )


if __name__ == "__main__":
    main()
