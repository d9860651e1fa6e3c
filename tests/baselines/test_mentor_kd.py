"""Mentor-KD: a mentor adds texts and its distribution on them; wrong answers are dropped."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.miniature import world as w
from proxykd_jax import distill
from proxykd_jax.config import Config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.data.soft_labels import open_soft_labels
from proxykd_jax.errors import UserError
from proxykd_jax.generation.fresh_split import AnsweredSplit
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.restore import load_aligned_proxy
from tests.baselines.runs import (
    ONE_STEP,
    answer_logps,
    check_stopped_run_equals_unbroken,
    first_step,
    mean_kl,
    mean_nll,
    method_recipe,
    tempered,
    untrained_student,
)
from tests.tiny_run import log_lines

MENTOR: dict[str, Any] = {"name": "mentor_kd", "num_rationales": 2}
ONE_STEP = {"distill": {**ONE_STEP["distill"], "batch_size": 400}}
WHOLE: dict[str, Any] = {"score": {"top_k": 46, "batch_size": 64, "rows_per_part": 128}}
TEACHERS = ("warmup", "align", "distill")
MENTORS = tuple(f"{split}_rationales_{draw:02d}" for split in TEACHERS for draw in (1, 2))


def truth(prompt: str) -> int:
    """Returns the correct final value, from the world's own table."""
    value, *functions, _ = prompt.split()
    result, table_FA = int(value), w.make_worlds(0, "fmt").truth_FA
    for name in functions:
        result = result if name == "." else int(table_FA[int(name[1:]), result])
    return result


@pytest.fixture(scope="module")
def files(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the tiny files with the correct value of each prompt added to its answer."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("proxy", "student", "test.jsonl", "fresh.jsonl"):
        (folder / name).symlink_to(tiny_files / name)
    lines = []
    for line in (tiny_files / "teacher.jsonl").read_text().splitlines():
        row = json.loads(line)
        lines.append(json.dumps({**row, "gold": truth(row["prompt"])}) + "\n")
    # One row has no gold.
    lines[0] = json.dumps({k: v for k, v in json.loads(lines[0]).items() if k != "gold"}) + "\n"
    (folder / "teacher.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = method_recipe(files, tmp_path_factory.mktemp("mentor"), MENTOR, ONE_STEP, WHOLE)
    distill.main(config)
    return config


def text_of(tokens: np.ndarray) -> list[str]:
    return [w.SYMBOLS[token] for token in tokens]


def is_right(row: TokenRow) -> bool:
    """Checks the tokens: the last value before the end token is the correct one."""
    answer = text_of(row.answer)
    values = [symbol for symbol in answer if symbol.isdigit()]
    right = answer[-1] == "</s>" and bool(values)
    return right and int(values[-1]) == truth(" ".join(text_of(row.prompt)))


def all_texts(config: Config) -> dict[str, list[TokenRow]]:
    """Returns the teacher's and the mentor's texts, right and wrong."""
    corpus = open_corpus(config.folder / "corpus")
    texts = {name: list(corpus.split(name)) for name in TEACHERS}
    for name in MENTORS:
        split = corpus.split(name.split("_")[0])
        answered = AnsweredSplit(split, SampleStore(config.folder / "samples" / name))
        texts[name] = answered.read(range(len(answered)))
    return texts


def learnt(config: Config) -> dict[str, list[TokenRow]]:
    """Returns the texts that have soft labels, found by the row ids in the store."""
    store, found = open_soft_labels(config.folder / "soft_labels"), {}
    for name, rows in all_texts(config).items():
        count = store.num_rows(name) if name in store.settings["splits"] else 0
        ids = [labels.row_id for labels in store.read(name, range(count))] if count else []
        by_id = {row.row_id: row for row in rows}
        found[name] = [by_id[row_id] for row_id in ids]
    return found


def union(texts: dict[str, list[TokenRow]]) -> list[TokenRow]:
    return [row for rows in texts.values() for row in rows]


def test_no_wrong_answer_reaches_the_student(finished: Config):
    """This holds for both sources; and every right answer does reach it."""
    everything, kept = all_texts(finished), learnt(finished)
    for names in (TEACHERS, MENTORS):
        texts = [row for name in names for row in everything[name]]
        right = [row for row in texts if is_right(row)]
        assert 3 < len(right) < len(texts)  # some are right and some are wrong
        known = {row.row_id for row in right}
        reached = [row.row_id for name in names for row in kept[name]]
        assert set(reached) <= known
        assert len(reached) >= len(right) - 3  # the prompt without a gold
    (line,) = [line for line in log_lines(finished, "distill") if "planned_steps" in line]
    counted = {key: n for key, n in line.items() if key.startswith("texts/")}
    assert sum(n for key, n in counted.items() if "correct" in key) == len(union(kept))
    assert sum(counted.values()) == len(union(everything))
    assert sum(n for key, n in counted.items() if "no_gold" in key) == 1
    assert line["rows"] == len(union(kept))


def test_each_text_has_the_mentors_distribution_on_that_text(finished: Config):
    mentor = load_aligned_proxy(finished, make_mesh(finished.mesh))
    store = open_soft_labels(finished.folder / "soft_labels")
    assert store.temperature == 2.0
    checked = 0
    for name, rows in learnt(finished).items():
        if not rows:
            continue
        logps = answer_logps(mentor, rows)
        for labels, whole_RV in zip(store.read(name, range(len(rows))), logps, strict=True):
            mentors_RV = tempered(whole_RV, 2.0)
            own = np.take_along_axis(mentors_RV, labels.ids.astype(np.int64), axis=-1)
            np.testing.assert_allclose(labels.logps, own, atol=1e-4)
            checked += 1
    assert checked == len(union(learnt(finished)))


@pytest.mark.parametrize("rescale", [False, True])
def test_its_loss_is_nll_and_kl_over_both_sources(files, tmp_path, finished, rescale):
    method = {**MENTOR, "rescale": rescale}
    config = method_recipe(files, tmp_path, method, ONE_STEP, WHOLE)
    shutil.copytree(finished.folder, config.folder)
    for name in ("student", "export"):
        shutil.rmtree(config.folder / name)
    line = first_step(config)
    rows = union(learnt(config))
    p = answer_logps(load_aligned_proxy(config, make_mesh(config.mesh)), rows)
    q = answer_logps(untrained_student(config), rows)
    kl = mean_kl(p, q, 2.0) * (4 if rescale else 1)
    assert line["loss"] == pytest.approx(0.7 * mean_nll(q, rows) + 0.3 * kl, rel=1e-3)


def test_with_lam_0_the_added_texts_still_change_the_loss(files, tmp_path, finished):
    config = method_recipe(files, tmp_path, {**MENTOR, "lam": 0.0}, ONE_STEP, WHOLE)
    shutil.copytree(finished.folder, config.folder)
    for name in ("student", "export"):
        shutil.rmtree(config.folder / name)
    line = first_step(config)
    texts, student = learnt(config), untrained_student(config)
    rows, teachers = union(texts), union({name: texts[name] for name in TEACHERS})
    assert line["loss"] == pytest.approx(mean_nll(answer_logps(student, rows), rows), rel=1e-4)
    alone = mean_nll(answer_logps(student, teachers), teachers)
    assert abs(line["loss"] / alone - 1) > 1e-3


def test_a_prompts_answers_differ_and_a_repeated_prompt_is_asked_once(finished: Config):
    first, second = (
        SampleStore(finished.folder / "samples" / f"align_rationales_{draw:02d}") for draw in (1, 2)
    )
    np.testing.assert_array_equal(first.rows, second.rows)
    pairs = zip(first.read(range(len(first))), second.read(range(len(second))), strict=True)
    same = [np.array_equal(a.tokens, b.tokens) for a, b in pairs]
    assert np.mean(same) < 0.5
    split = open_corpus(finished.folder / "corpus").split("align")
    prompts = [row.prompt.tobytes() for row in split.read(first.rows.tolist())]
    assert len(set(prompts)) == len(prompts)


def test_without_a_filter_every_text_is_learnt(files, tmp_path):
    method = {**MENTOR, "filter": "none", "num_rationales": 1}
    config = method_recipe(files, tmp_path, method, ONE_STEP, WHOLE)
    distill.main(config)
    store = open_soft_labels(config.folder / "soft_labels")
    corpus = open_corpus(config.folder / "corpus")
    assert store.num_rows("distill") == len(corpus.split("distill"))
    drawn = SampleStore(config.folder / "samples" / "distill_rationales_01")
    assert store.num_rows("distill_rationales_01") == int((drawn.drops == 0).sum())


@pytest.mark.slow  # the quick tests stop Proxy-KD, which resumes in the same loop
def test_a_stopped_run_equals_an_unbroken_one(files, tmp_path, monkeypatch):
    config = method_recipe(files, tmp_path / "whole", {**MENTOR, "num_rationales": 1})
    check_stopped_run_equals_unbroken(config, tmp_path / "stopped", monkeypatch, 4)


def test_a_corpus_without_golds_is_a_sentence(tiny_files, tmp_path):
    config = method_recipe(tiny_files, tmp_path, MENTOR)
    with pytest.raises(UserError, match=r"no row of corpus\.sources has a gold answer"):
        distill.main(config)
    assert not (config.folder / "samples").exists()


@pytest.mark.parametrize(
    "method, change, said",
    [
        (
            MENTOR,
            {"align": {"alignment": "none"}},
            "align.alignment: method.name mentor_kd requires",
        ),
        (MENTOR, {"score": {"temperature": 1.0}}, "mentor_kd requires 2.0"),
        ({**MENTOR, "num_rationales": 0}, {}, "method.num_rationales: should be greater than 0"),
        ({**MENTOR, "filter": "gold"}, {}, "method.filter: must be 'answer_match'"),
    ],
)
def test_mistakes_are_sentences(tiny_files, tmp_path, method, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        method_recipe(tiny_files, tmp_path, method, change)
