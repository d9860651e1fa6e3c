"""Prepares one generated corpus alternately by the local path and by Beam's local runner.

    python benchmarks/corpus_beam.py --rows 24000

The command needs the environment of requirements-beam.txt. The rows are those of
``corpus_scale.py``, in eight files. Each run is a process of its own, and its start is part of the
time. The command compares the corpora by the digests in their manifests, and prints a table of
seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.corpus_scale import make_tokenizer, write_rows

FILES = 8
PATHS: dict[str, dict | None] = {
    "local": None,
    "Beam, 1 worker": {},
    "Beam, 2 processes": {
        "options": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    },
}


def config_of(work: Path, path: str) -> dict:
    """The config of one run."""
    model = {"path": str(work / "tokenizer")}
    return {
        "preset": "recommended",
        "name": path.replace(" ", "_").replace(",", ""),
        "runs_dir": str(work / "runs"),
        "tokenizer": str(work / "tokenizer"),
        "corpus": {
            "sources": [{"path": str(work / "rows")}],
            "template": "plain",
            "beam": PATHS[path],
            "shard_rows": 2000,
        },
        "proxy": model,
        "student": model,
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=24_000, help="rows of the corpus")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each path")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/corpus_beam"), help="folder for files"
    )
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    if not (work / "rows").exists():
        (work / "rows").mkdir(parents=True)
        make_tokenizer(work / "tokenizer")
        for number in range(FILES):
            write_rows(work / "rows" / f"{number}.jsonl", arguments.rows // FILES, seed=number)
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    cpu: dict[str, list[float]] = {path: [] for path in PATHS}
    contents = set()
    for _ in range(arguments.rounds):
        for path in PATHS:
            config = config_of(work, path)
            shutil.rmtree(work / "runs", ignore_errors=True)
            file = work / "config.yaml"
            file.write_text(json.dumps(config))
            command = [sys.executable, "-m", "proxykd_jax.prepare", "--config", str(file)]
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True)
            seconds[path].append(time.perf_counter() - start)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu[path].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            manifest = work / "runs" / config["name"] / "corpus" / "manifest.json"
            contents.add(json.loads(manifest.read_text())["content"])
    print(f"{arguments.rows} rows in {FILES} files; {len(contents)} different corpora")
    for path in PATHS:
        shown = " | ".join(
            f"{s:.1f} ({c:.0f})" for s, c in zip(seconds[path], cpu[path], strict=True)
        )
        print(f"| {path} | {shown} |")


if __name__ == "__main__":
    main()
