"""The stage: which models it measures, what it writes, and that it measures each once."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.miniature import make as maker
from benchmarks.miniature import pretrain
from proxykd_jax import evaluate
from proxykd_jax.config import Config, load_config
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation import measures


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "STEPS_A_CALL", 2)
        maker.make(out, steps_share=0.002, num_corpus=120, num_test=24, num_fresh=10)
    return out


@pytest.fixture
def config(files: Path, tmp_path: Path) -> Config:
    overrides = [f"runs_dir={tmp_path}", "evaluate.batch_size=16"]
    return load_config(files / "configs" / "proxy_kd.yaml", overrides)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows each call of ``measure`` was given."""
    calls: list[int] = []
    original = measures.measure

    def spy(*args, **options):
        calls.append(len(args[1]))
        return original(*args, **options)

    monkeypatch.setattr(measures, "measure", spy)
    yield calls


def test_two_models_are_measured_once(config: Config, counted: list[int]) -> None:
    models = {"proxy_raw": config.proxy, "student": config.student}
    result = evaluate.main(config, models)
    assert len(counted) == 4  # two models, validation and test
    again = evaluate.main(config, models)
    assert len(counted) == 4
    assert again.summary == result.summary
    assert result.summary == json.loads((result.folder / "summary.json").read_text())
    test = result.summary["models"]["student"]["test"]
    validation = result.summary["models"]["student"]["validation"]
    assert test["n"] == 24
    # The true distribution is known for test rows only. NLL - KL is the teacher's entropy.
    assert "kl" not in validation
    assert 0 < test["kl"]["token_mean"] < test["nll"]["token_mean"]
    evaluate.main(config.model_copy(update={"name": "other"}), models)
    assert len(counted) == 8


def test_other_settings_or_damage_measure_again(config: Config, counted: list[int]) -> None:
    models = {"student": config.student}
    folder = evaluate.main(config, models).folder
    fewer = config.evaluate.model_copy(update={"max_rows": 5})
    result = evaluate.main(config.model_copy(update={"evaluate": fewer}), models)
    assert result.summary["models"]["student"]["test"]["n"] == 5
    assert len(counted) == 4
    (folder / "student.safetensors").write_bytes(b"cut off")
    evaluate.main(config, models)
    assert len(counted) == 6


def test_differences_are_paired(config: Config) -> None:
    models = {"student": config.student, "student_before": config.student}
    differences = evaluate.main(config, models).summary["differences"]
    assert set(differences) == {"student - student_before"}
    for part in ("validation", "test"):
        assert differences["student - student_before"][part]["nll"] == {
            "token_mean": 0.0,
            "token_se": 0.0,
        }


def test_without_held_out_rows_it_says_so(config: Config) -> None:
    corpus = config.corpus.model_copy(update={"test": (), "validation_fraction": 0.0})
    with pytest.raises(UserError, match="neither validation nor test"):
        evaluate.main(config.model_copy(update={"corpus": corpus}), {"student": config.student})


def test_the_gap_between_nll_and_kl_is_the_teachers_alone(config: Config) -> None:
    """NLL - KL estimates the teacher's entropy, whatever the model."""
    models = {"proxy_raw": config.proxy, "student": config.student}
    found = evaluate.main(config, models).summary["models"]
    gaps = [
        found[m]["test"]["nll"]["token_mean"] - found[m]["test"]["kl"]["token_mean"] for m in models
    ]
    # Near-random models on 24 rows: the sampling noise of the gap is about 0.1.
    assert np.ptp(gaps) < 0.3
    assert all(0.5 < gap < 1.5 for gap in gaps)
