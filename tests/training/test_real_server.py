"""Rounds with a real ``transformers serve`` on loopback, an independent implementation.

It needs PyTorch, FastAPI, uvicorn and openai; without one of them the tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from proxykd_jax import align
from proxykd_jax.checking import dry_run
from proxykd_jax.config import Config
from proxykd_jax.generation.samples import DROP_REASONS, KEPT, NOT_REENCODABLE, SampleStore
from tests.tiny_run import changed, recipe

pytestmark = pytest.mark.slow
_NEEDED = ("torch", "fastapi", "uvicorn", "openai")
_START_S = 180.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Gives the address of a server that runs until the module's tests are over."""
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"transformers serve needs {', '.join(absent)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = Path(sys.executable).with_name("transformers")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(command, "serve", "--host", "127.0.0.1", "--port", str(port)),
                *("--device", "cpu", "--dtype", "float32"),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"},
        )
    try:
        until = time.monotonic() + _START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def by_server(config: Config, url: str, runs: Path) -> Config:
    server = {"url": url, "api": "transformers", "serves": "merged", "prompt_as": "text"}
    keys = {"server": {**server, "concurrency": 4, "timeout_s": 120.0, "retries": 1}}
    return changed(config, {"runs_dir": str(runs), "align": {"sampling": keys}})


def answers(config: Config) -> SampleStore:
    return SampleStore(config.folder / "samples" / "round_01")


def share_equal(ours: SampleStore, theirs: SampleStore, special: set[int]) -> float:
    """Compares answers that text can represent: transformers drops special tokens from the text. It
    also drops an end token at the last place of the budget and reports a truncated answer."""
    np.testing.assert_array_equal(ours.rows, theirs.rows)
    assert (theirs.drops == NOT_REENCODABLE).mean() < 0.1
    pairs = [
        (mine.tokens.tolist(), other.tokens.tolist())
        for mine, other in zip(
            ours.read(range(len(ours))), theirs.read(range(len(ours))), strict=True
        )
        if other.drop != NOT_REENCODABLE
        and not special & set(mine.tokens[: -1 if mine.finished and other.finished else None])
    ]
    assert len(pairs) > 0.8 * len(ours)
    return float(np.mean([mine == other for mine, other in pairs]))


def test_its_greedy_answers_are_ours(url, tiny_files, tmp_path, monkeypatch):
    """The model is random and learnt for a few steps: the served files hold the round's weights."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    greedy = {"align": {"num_rounds": 1, "sampling": {"temperature": 0}}}
    ours = recipe(tiny_files, tmp_path / "ours", greedy)
    theirs = by_server(ours, url, tmp_path / "theirs")
    align.main(ours)
    align.main(theirs)
    assert share_equal(answers(ours), answers(theirs), {44, 45}) > 0.98
    assert not (theirs.folder / "served").exists()


def test_it_samples_where_it_shall(url, tiny_files, tmp_path, monkeypatch):
    """By default transformers serve is greedy, whatever the temperature."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    one = {"align": {"num_rounds": 1, "sampling": {"temperature": 0}}}
    greedy = by_server(recipe(tiny_files, tmp_path / "greedy", one), url, tmp_path / "greedy")
    drawn = changed(greedy, {"runs_dir": str(tmp_path / "drawn")})
    drawn = changed(drawn, {"align": {"sampling": {"temperature": 1.0}}})
    align.main(greedy)
    align.main(drawn)
    assert share_equal(answers(greedy), answers(drawn), {45}) < 0.7


def test_rounds_of_a_real_model(url, assets, tmp_path, monkeypatch, capsys):
    """stories260K: its tokenizer marks words by a space, and its stories end with its BOS."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = str(assets / "models" / "stories260K")
    source = {"path": str(assets / "corpora" / "tinystories.jsonl"), "format": "text"}
    change = {
        "corpus": {
            "sources": [{**source, "prompt_sentences": 1}], "fresh_prompts": [], "test": [],
            "template": "plain", "end_tokens": [1], "max_length": 320, "max_rows": 120,
        },
        "proxy": {"path": folder}, "student": {"path": folder},
        "align": {
            "num_rounds": 1, "batching": "bucket", "warmup_max_steps": 2, "round_max_steps": 2,
            "optimizer": {"learning_rate": 1e-3},
            "sampling": {"temperature": 0, "max_new_tokens": 60, "rows_per_part": 64},
        },
    }  # fmt: skip
    ours = recipe(tmp_path, tmp_path / "ours", change)
    theirs = by_server(ours, url, tmp_path / "theirs")
    assert not [line for line in dry_run(theirs) if "not checked" in line]
    assert f"{url} answers (transformers, serves merged)" in capsys.readouterr().out
    align.main(ours)
    align.main(theirs)
    store = answers(theirs)
    assert len(store) > 40 and (store.drops == KEPT).mean() > 0.9, DROP_REASONS
    assert share_equal(answers(ours), store, {0, 1, 2}) > 0.9
    kept = store.drops == KEPT
    for sums in store.references():
        assert np.isfinite(sums).all() and (sums[kept] < 0).all()
