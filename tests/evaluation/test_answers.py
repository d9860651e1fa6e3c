"""The held-out answers of a finished run: who answers, and when an answer is made again."""

import json

from proxykd_jax.artifacts import stage_identity
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.evaluate import run_models
from proxykd_jax.evaluation.answers import HeldOutAnswers, read_answers
from tests.tiny_run import changed, copy_run

ASKED = ["proxy_aligned", "student_before", "student"]


def test_a_finished_run_has_answers_and_damaged_ones_are_made_again(finished_run, tmp_path):
    config = copy_run(finished_run, tmp_path / "runs")
    path = config.folder / "eval" / "answers.jsonl"
    corpus, lines = open_corpus(config.folder / "corpus"), read_answers(path)
    test = corpus.split("test")
    assert [line["row_id"] for line in lines] and {line["split"] for line in lines} == {"test"}
    assert sorted(line["row_id"] for line in lines) == sorted(test.row_ids[:])
    for line in lines:
        assert set(line["answers"]) == set(ASKED) and line["prompt"] and line["teacher"]["text"]
        for answer in line["answers"].values():
            assert answer["finished"] or answer["tokens"] > 0
    identities = {name: each.identity for name, each in run_models(config).items()}
    assert identities["student"]["stage"] == stage_identity(config.folder / "student")
    assert HeldOutAnswers(config, corpus).missing(identities) == []
    fewer = changed(config, {"evaluate": {"answers": 3}})
    assert HeldOutAnswers(fewer, corpus).missing(identities) == []
    trained_anew = {**identities, "student": {"stage": "another", "step": 1}}
    assert HeldOutAnswers(config, corpus).missing(trained_anew) == ["student"]
    lines[2]["answers"]["student_before"]["text"] += "!"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert HeldOutAnswers(config, corpus).missing(identities) == ["student_before"]
    path.write_text(path.read_text()[:-9])
    assert HeldOutAnswers(config, corpus).missing(identities) == ASKED
