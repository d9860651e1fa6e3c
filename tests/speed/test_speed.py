"""The command line, the rows, and one case from end to end at a very small shape."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import __main__ as speed
from benchmarks.speed import rows as speed_rows
from benchmarks.speed.cases import Case, Comparison, Entry
from benchmarks.speed.floor import step_products
from benchmarks.speed.rows import Rows, corpus_rows, dense_rows, mixed_rows
from benchmarks.speed.run_case import Bench, run_case
from benchmarks.speed.shapes import SHAPES


def test_an_unknown_case_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["--out", str(tmp_path / "out"), "--only", "sft_dense_15m,nothing"]) == 2
    said = capsys.readouterr().err
    assert "there is no case nothing" in said and "floor_15m" in said
    assert not (tmp_path / "out").exists()


def test_a_file_as_the_folder_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert speed.main(["--out", str(tmp_path / "out"), "--only", "floor_15m"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = mixed_rows(5, (3, 9), (2, 7), 97)
    rows.save(tmp_path / "rows.npz")
    read = Rows.load(tmp_path / "rows.npz")
    for name in ("tokens", "rejected", "topk_ids", "topk_logps"):
        for one, other in zip(getattr(rows, name), getattr(read, name), strict=True):
            np.testing.assert_array_equal(one, other)
    for index in range(5):
        prompt = int(rows.prompt_lengths[index])
        np.testing.assert_array_equal(rows.rejected[index][:prompt], rows.tokens[index][:prompt])
        assert len(rows.topk_ids[index]) == len(rows.tokens[index]) - prompt
        assert all(len(set(ids)) == speed_rows.TOP_K for ids in rows.topk_ids[index].tolist())
        mass = np.exp(rows.topk_logps[index]).sum(-1) + np.exp(rows.tails(index))
        np.testing.assert_allclose(mass, 1.0, atol=1e-5)


def test_a_corpus_that_is_not_there_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROXYKD_ASSETS", str(tmp_path))
    found = corpus_rows("alpaca_eval", 4, 64, 32_000)
    assert isinstance(found, str) and "set PROXYKD_ASSETS" in found


def test_rows_of_real_corpora(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXYKD_ASSETS", str(assets))
    for corpus, vocab in (("alpaca_eval", 32_000), ("tinystories", 512)):
        rows = corpus_rows(corpus, 8, 512, vocab)
        assert isinstance(rows, Rows) and len(rows) == 8
        assert int(rows.lengths.max()) <= 512
        assert np.all(rows.lengths - rows.prompt_lengths > 1)


def test_products_of_a_step_are_three_times_the_forward_pass() -> None:
    shape, batch, length = SHAPES["15m"], 2, 8
    total = 0
    for equation, left, right, count in step_products(shape, batch, length):
        sizes = dict(zip(equation[: equation.index(",")], left, strict=True))
        inputs = equation.split("->")[0].split(",")[1]
        sizes |= dict(zip(inputs, right, strict=True))
        total += 2 * count * int(np.prod(list(sizes.values())))
    kernels = shape.layers * sum(a * b for a, b in shape.linear().values())
    attention = 2 * shape.layers * shape.dim * length
    forward = 2 * batch * length * (kernels + shape.dim * shape.vocab + attention)
    assert total == 3 * forward


def test_ours_against_the_floor(tmp_path: Path) -> None:
    task = {"shape": "tiny", "batch_size": 2}
    case = Case(
        name="tiny",
        entries=(
            Entry("step", "ours", {"work": "sft", **task}),
            Entry("products", "ours", {"work": "products", "length": 16, "steps": 2, **task}),
        ),
        comparisons=(Comparison("tiny", "step", "products", measure="cpu", bar=0.75),),
        rows={"kind": "dense", "count": 4, "length": 17, "prompt": 1},
        repetitions=3,
        steps=2,
    )
    bench = Bench(tmp_path, {"ours": sys.executable})
    peak = {"work": "peak", "shape": "tiny", "sizes": [64]}
    assert run_case(bench, Case("peak", (Entry("ours", "ours", peak),), ())) == []
    assert bench.peak_flops > 0
    (record,) = run_case(bench, case)
    assert record["reason"] == ""
    assert record["flop_utilisation"] > 0
    walls = [record["turns"][side]["wall"] for side in ("ours", "peer")]
    assert [len(wall) for wall in walls] == [3, 3]
    assert record["ours"] > 0 and record["peer"] > 0 and record["ratio"] > 0
    # A step has two rows of sixteen answer tokens.
    assert record["units_a_second"]["ours"] == pytest.approx(32 / np.median(walls[0]))


def test_dense_rows_are_dense() -> None:
    rows = dense_rows(3, 10, 4, 97)
    assert rows.answer_tokens == 18
    assert set(rows.lengths.tolist()) == set(rows.rejected_lengths.tolist()) == {10}
