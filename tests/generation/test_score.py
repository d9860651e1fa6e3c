"""The score stage from a config: what it scores, answers, reports, refuses and resumes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from proxykd_jax import score
from proxykd_jax.artifacts import read_json, read_manifest, write_manifest
from proxykd_jax.config import make_config
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.data.parts import PartFolder
from proxykd_jax.data.soft_labels import open_soft_labels, weights_of
from proxykd_jax.errors import UserError
from proxykd_jax.generation.fresh_split import AnsweredSplit
from proxykd_jax.generation.samples import EMPTY, SampleStore
from proxykd_jax.models.hf_weights import save_model
from tests.generation.tiny import tiny_model
from tests.texts.conftest import save_bpe

WORDS = ["the", "cat", "sat", "on", "mat", "looked", "dog", "it", "was", "warm", "day", "once"]


def sentence(rng: np.random.Generator, most: int = 9) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(2, most))))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A scored run with an untrained proxy: (its config as a dict, its folder)."""
    folder = tmp_path_factory.mktemp("run")
    model = save_bpe(folder / "model", chat_template=None)
    config, params, _ = tiny_model(
        400, tie_embeddings=True, max_positions=128, eos_token_ids=(2,), bos_token_id=1
    )
    save_model(folder / "weights", config, params, dtype="float32")
    for path in (folder / "weights").iterdir():
        shutil.copy(path, model / path.name)
    rng = np.random.default_rng(0)
    rows = [{"prompt": sentence(rng) + f" {i}", "response": sentence(rng, 14)} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": sentence(rng) + f" fresh {i}"} for i in range(24)]
    (folder / "fresh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    record = {
        "preset": "recommended",
        "name": "run",
        "runs_dir": str(folder / "runs"),
        "corpus": {
            "sources": [{"path": str(folder / "rows.jsonl")}],
            "fresh_prompts": [{"path": str(folder / "fresh.jsonl")}],
            "template": "plain",
            "max_length": 64,
            "validation_fraction": 0.1,
            "validation_rows": 1,
        },
        "proxy": {"path": str(model), "dtype": "float32"},
        "student": {"path": str(model), "dtype": "float32"},
        "align": {"alignment": "none", "sampling": {"rows_per_part": 9, "batch_size": 8}},
        "score": {"top_k": 6, "rows_per_part": 11, "batch_size": 8},
        "export": {"proxy": "none"},
    }
    result = score.main(make_config(record))
    return record, folder / "runs" / "run", result


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_all_that_the_student_sees_is_scored(run):
    _, folder, result = run
    store = open_soft_labels(result.folder)
    corpus = open_corpus(folder / "corpus")
    assert store.settings["splits"] == ["warmup", "align", "distill", "fresh"]
    assert store.top_k == 6 and store.vocab_size == corpus.vocab_size
    for name in ("warmup", "align", "distill"):
        split = corpus.split(name)
        assert store.num_rows(name) == len(split) > 0
        for row, labels in zip(
            split.read(range(len(split))),
            store.read(name, range(len(split)), split.row_ids[:]),
            strict=True,
        ):
            assert labels.ids.shape == (len(row.answer), 6) and labels.finished
    store.check(tokenizer=corpus.tokenizer_digest, top_k=6, temperature=1.0)
    with pytest.raises(UserError, match="tokenizer"):
        store.check(tokenizer="another")


def test_fresh_prompts_are_answered_and_scored(run):
    _, folder, result = run
    corpus, store = open_corpus(folder / "corpus"), open_soft_labels(result.folder)
    samples = SampleStore(folder / "samples" / "fresh")
    prompts = corpus.split("fresh")
    assert len(samples) == len(prompts) == 24
    answered = AnsweredSplit(prompts, samples)
    assert len(answered) == store.num_rows("fresh") == 24 - int((samples.drops == EMPTY).sum())
    rows = answered.read(range(len(answered)))
    labels = store.read("fresh", range(len(rows)), [row.row_id for row in rows])
    for row, found, finished in zip(rows, labels, answered.finished, strict=True):
        assert len(row.tokens) <= corpus.max_length
        assert found.finished == finished == (int(row.tokens[-1]) in corpus.end_token_ids)
        assert finished or len(row.tokens) == corpus.max_length
        # The proxy drew these answers itself, so sampling and scoring give the same log-probs.
    sampled = {s.row_id: s.loglik for s in samples.read(range(24)) if s.drop == 0}
    np.testing.assert_allclose(
        store.seq_logliks("fresh"), list(sampled.values()), rtol=1e-4, atol=1e-3
    )


def test_figures_stand_in_the_manifest_and_the_metrics(run):
    _, folder, result = run
    store = open_soft_labels(result.folder)
    found = weights_of(
        store.seq_logliks("distill"), store.lengths("distill"), loglik="token_mean"
    )  # the recommended preset's
    assert result.loglik_mean == found.loglik_mean
    assert result.loglik_std == found.loglik_std
    assert result.weight_length_correlation == found.length_correlation
    mass = np.concatenate(
        [
            np.exp(labels.logps).sum(-1)
            for labels in store.read("distill", range(store.num_rows("distill")))
        ]
    )
    assert result.figures["distill"]["large_mass_share"] == pytest.approx(
        (mass > 0.95).mean(), abs=0.01
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["stage"] == "score"]
    assert line["distill/token_mean/loglik_mean"] == found.loglik_mean
    assert line["fresh/samples/rows"] == 24


def test_a_complete_store_is_not_made_again(run, monkeypatch):
    record, folder, result = run
    before = files(folder)
    monkeypatch.setattr("proxykd_jax.training.scoring.load_aligned_proxy", None)
    assert score.main(make_config(record)) == result
    assert files(folder) == before


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch):
    record, folder, _ = run
    runs = tmp_path / "runs"
    shutil.copytree(folder, runs / "run")
    for name in ("soft_labels", "samples/fresh"):
        shutil.rmtree(runs / "run" / name)
    lines = (runs / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["stage"] != "score"]
    (runs / "run" / "metrics.jsonl").write_text("".join(kept))
    config = make_config({**record, "runs_dir": str(runs)})
    commit, commits = PartFolder.commit, []

    def cut(self, index, arrays, metadata=None):
        # The process dies with a half-written file in the second part of each folder, and then
        # before it writes the metrics line.
        if len(commits) in (1, 5, 8):
            commits.append("cut")
            self.path(index).with_name(f".{self.path(index).name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        commits.append(self.path(index).name)
        return commit(self, index, arrays, metadata)

    monkeypatch.setattr(PartFolder, "commit", cut)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            score.main(config)
    score.main(config)
    assert commits.count("cut") == 3
    for name in ("soft_labels", "samples/fresh"):
        assert files(runs / "run" / name) == files(folder / name)
    assert (runs / "run" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_the_metrics_line_is_written_once(run, tmp_path):
    """After a kill between the line and the manifest, the line is replaced and not repeated."""
    record, folder, _ = run
    runs = tmp_path / "runs"
    shutil.copytree(folder, runs / "run")
    path = runs / "run" / "soft_labels" / "manifest.json"
    complete = read_json(path)
    keys = ("stage", "settings", "inputs", "code_version")
    path.write_text(json.dumps({"status": "running", **{key: complete[key] for key in keys}}))
    score.main(make_config({**record, "runs_dir": str(runs)}))
    assert read_json(path) == complete
    assert (runs / "run" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"score": {"top_k": 5, "rows_per_part": 11, "batch_size": 8}}, "top_k: 6 then, 5 now"),
        ({"score": {"top_k": 4000, "rows_per_part": 11}}, "score.top_k: 4000"),
        ({"distill": {"data": "distill"}}, "splits"),
    ],
)
def test_other_settings_are_refused(run, section, message):
    record, _, _ = run
    with pytest.raises(UserError, match=message):
        score.main(make_config({**record, **section}))


def test_another_proxy_is_refused(run, tmp_path):
    record, folder, _ = run
    runs = tmp_path / "runs"
    shutil.copytree(folder, runs / "run")
    proxy = runs / "run" / "proxy"
    write_manifest(proxy, {**read_manifest(proxy), "content": "another adapter"})
    with pytest.raises(UserError, match=r"proxy\.stage"):
        score.main(make_config({**record, "runs_dir": str(runs)}))


def test_real_weights(assets, tmp_path):
    """stories260K scores published stories: tokens are likely, and the top ten hold most mass."""
    record = {
        "preset": "paper",
        "name": "stories",
        "runs_dir": str(tmp_path),
        "corpus": {
            "sources": [
                {
                    "path": str(assets / "corpora" / "tinystories.jsonl"),
                    "format": "text",
                    "prompt_sentences": 1,
                }
            ],
            "template": "plain",
            "end_tokens": [1],
            "max_rows": 30,
            "max_length": 512,
        },
        "proxy": {"path": str(assets / "models" / "stories260K"), "dtype": "float32"},
        "student": {"path": str(assets / "models" / "stories260K"), "dtype": "float32"},
        "align": {"alignment": "none", "batch_size": 8},
        "score": {"batch_size": 8},
        "export": {"proxy": "none"},
    }
    result = score.main(make_config(record))
    figures = result.figures["distill"]
    assert list(result.figures) == ["distill"]
    assert -2.0 < figures["token_mean/loglik_mean"] < -1.0
    assert figures["large_mass_share"] > 0.4
    assert result.loglik_mean == figures["sum/loglik_mean"]
